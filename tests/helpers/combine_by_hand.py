"""Sums of combine, one token at a time, with the order and the roundings of each mode written out."""

import torch
from torch import Tensor

from sonic_ep import CombineMode
from sonic_ep.testing import Inputs

HIDDEN = 8


def expert_rows(inputs: Inputs) -> Tensor:
    """A made-up output of every slot, (N, K, H): any rank can tell it from the slot's number."""
    tokens, top_k = inputs.topk_idx.shape
    generator = torch.Generator().manual_seed(99)
    rows = torch.randn(tokens, top_k, HIDDEN, generator=generator, dtype=torch.float64)
    return rows.to(inputs.case.dtype).to(inputs.x.device)


def one_by_one(terms: list[Tensor], dtype: torch.dtype) -> Tensor:
    """fp32 sum from the left, starting at zero, one rounding."""
    total = torch.zeros(HIDDEN, dtype=torch.float32, device=terms[0].device if terms else "cpu")
    for term in terms:
        total = total + term.float()
    return total.to(dtype)


def all_to_all_by_hand(rows: Tensor, scores: Tensor, owners: list[int]) -> Tensor:
    """round(sum over k)."""
    terms = [scores[k] * rows[k].float() for k, owner in enumerate(owners) if owner >= 0]
    return one_by_one(terms, rows.dtype)


def reduce_scatter_by_hand(rows: Tensor, scores: Tensor, owners: list[int]) -> Tensor:
    """round(sum over ranks of round(sum over k on the rank))."""
    partial = []
    for rank in sorted(set(owners) - {-1}):
        terms = [scores[k] * rows[k].float() for k, owner in enumerate(owners) if owner == rank]
        partial.append(one_by_one(terms, rows.dtype))
    return one_by_one(partial, rows.dtype)


BY_HAND = {
    CombineMode.ALL_TO_ALL: all_to_all_by_hand,
    CombineMode.REDUCE_SCATTER: reduce_scatter_by_hand,
    CombineMode.RANK_DEDUP: reduce_scatter_by_hand,
}


def canonical(inputs: Inputs, slots: Tensor, rank: int) -> Tensor:
    experts = range(*inputs.experts_of(rank).indices(inputs.case.num_experts))
    chosen = [(inputs.topk_idx == expert).nonzero() for expert in experts]
    where = torch.cat(chosen)
    return slots[where[:, 0], where[:, 1]]


def owners_of_slots(inputs: Inputs, experts_per_rank: int) -> Tensor:
    """Rank of each slot's expert, (N, K); -1 where the slot is dropped."""
    return (inputs.topk_idx // experts_per_rank).where(inputs.topk_idx >= 0, -1)
