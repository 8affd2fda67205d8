"""Combine of one token at a time, with the order and the roundings of each mode written out."""

import torch
from torch import Tensor

from sonic_ep import CombineMode
from sonic_ep.plan import RoutingPlan
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


def combined_by_hand(mode: CombineMode, rows: Tensor, scores: Tensor, owners: list[int]) -> Tensor:
    """all_to_all: round(sum over k). Otherwise round(sum over ranks of round(sum over k on the rank))."""
    terms = [score * row.float() for score, row in zip(scores, rows, strict=True)]
    if mode is CombineMode.ALL_TO_ALL:
        return one_by_one([term for term, owner in zip(terms, owners, strict=True) if owner >= 0], rows.dtype)
    by_rank = [[t for t, owner in zip(terms, owners, strict=True) if owner == r] for r in sorted(set(owners) - {-1})]
    return one_by_one([one_by_one(own, rows.dtype) for own in by_rank], rows.dtype)


def canonical(inputs: Inputs, slots: Tensor, rank: int) -> Tensor:
    """The rank's entries of ``slots`` (N, K, ...) in the order of its rows."""
    experts = range(*inputs.experts_of(rank).indices(inputs.case.num_experts))
    where = torch.cat([(inputs.topk_idx == expert).nonzero() for expert in experts])
    return slots[where[:, 0], where[:, 1]]


def row_buffer(plan: RoutingPlan, inputs: Inputs, slots: Tensor) -> Tensor:
    """(R, H): the valid rows of ``slots`` (N, K, H), NaN behind them."""
    rows = slots.new_full((plan.row_capacity, HIDDEN), float("nan"))
    rows[: plan.rows()] = canonical(inputs, slots, plan.rank)
    return rows


def owners_of_slots(inputs: Inputs, experts_per_rank: int) -> Tensor:
    """Rank of each slot's expert, (N, K); -1 where the slot is dropped."""
    return (inputs.topk_idx // experts_per_rank).where(inputs.topk_idx >= 0, -1)
