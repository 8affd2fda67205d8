"""Random numbers that are the same on any device, and routers of plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep import RouterConfig
from sonic_ep.testing import Rank


def randn(rank: Rank, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(rank.device)


class PlainRouting(NamedTuple):
    logits: Tensor
    topk_idx: Tensor
    topk_scores: Tensor


def base_of(logits: Tensor, config: RouterConfig) -> Tensor:
    if config.score_function == "sigmoid":
        return torch.sigmoid(logits)
    return torch.softmax(logits, dim=-1) if config.score_order == "softmax_then_topk" else logits


def plain_router(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, config: RouterConfig, top_k: int
) -> PlainRouting:
    """As a model would write it: ``topk``, ``gather`` and autograd, in the dtype of x."""
    logits = F.linear(x, weight, bias)
    base = base_of(logits, config)
    value = base.detach() if correction is None else base.detach() + correction
    if config.top_groups < config.num_groups:
        by_group = value.unflatten(1, (config.num_groups, -1))
        of_group = by_group.topk(config.group_top, dim=-1).values.sum(dim=-1)
        left = torch.zeros_like(of_group, dtype=torch.bool)
        left = left.scatter(1, of_group.topk(config.top_groups, dim=-1).indices, value=True)
        value = by_group.masked_fill(~left.unsqueeze(-1), -torch.inf).flatten(1)
    idx = value.topk(top_k, dim=-1).indices
    scores = base.gather(1, idx)
    if config.score_function == "softmax" and config.score_order == "topk_then_softmax":
        scores = torch.softmax(scores, dim=-1)
    if config.norm_topk_probs:
        scores = scores / (scores.sum(dim=-1, keepdim=True) + (1e-20 if config.score_function == "sigmoid" else 0))
    return PlainRouting(logits, idx, scores * config.scale)


def chosen_by_hand(values: Tensor, config: RouterConfig, top_k: int) -> list[int]:
    """The experts of one token, by sorting: values (E,) fp32. NaN first, then descending, equal ones ascending."""

    def order(numbers: Tensor) -> list[int]:
        held = numbers.tolist()
        return sorted(range(len(held)), key=lambda i: (held[i] == held[i], -held[i] if held[i] == held[i] else 0, i))

    size = len(values) // config.num_groups
    totals = []
    for of_group in values.split(size):
        largest = of_group[order(of_group)][: config.group_top]
        total = largest[0]
        for value in largest[1:]:
            total = total + value
        totals.append(total)
    groups = order(torch.stack(totals))[: config.top_groups]
    return [expert for expert in order(values) if expert // size in groups][:top_k]
