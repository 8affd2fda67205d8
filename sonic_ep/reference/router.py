"""The router in plain torch: logits and scores in fp32, ties to the lower expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from sonic_ep.backend import Routing
from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.reference.collectives import Collectives, SumGradient


def route(x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions, collectives: Collectives) -> Routing:
    """Logits (T, E) of this rank's tokens, the K largest of each, and their scores.

    ``logits = x . router_w`` in fp32. Choices descend by logit; equal logits go to the lower expert first.
    """
    weight_EH = router_w_EH.float()
    if options.reduce_router_grad:
        weight_EH = SumGradient.apply(weight_EH, collectives)
    logits_TE = F.linear(x_TH.float(), weight_EH)
    topk_idx_TK = choose_experts(logits_TE, options.top_k)
    scores_TK = _SCORES[options.score_order](logits_TE, topk_idx_TK)
    if options.norm_topk_probs:
        scores_TK = scores_TK / scores_TK.sum(dim=-1, keepdim=True)
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)


def choose_experts(logits_TE: Tensor, top_k: int) -> Tensor:
    """The K largest of each row, (T, K) int64: descending, equal logits in ascending order of expert.

    All NaN are equal, and above infinity.

    >>> import torch
    >>> choose_experts(torch.tensor([[0.5, 2.0, 0.5, 2.0]]), 3)
    tensor([[1, 3, 0]])
    """
    # On GPUs a sort goes by bits, and tells NaN of one sign from those of the other.
    ordered_TE = logits_TE.detach().masked_fill(logits_TE.isnan(), float("nan"))
    return ordered_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _topk_then_softmax(logits_TE: Tensor, topk_idx_TK: Tensor) -> Tensor:
    return F.softmax(logits_TE.gather(1, topk_idx_TK), dim=-1)


def _softmax_then_topk(logits_TE: Tensor, topk_idx_TK: Tensor) -> Tensor:
    return F.softmax(logits_TE, dim=-1).gather(1, topk_idx_TK)


_SCORES: Mapping[ScoreOrder, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        ScoreOrder.TOPK_THEN_SOFTMAX: _topk_then_softmax,
        ScoreOrder.SOFTMAX_THEN_TOPK: _softmax_then_topk,
    }
)
