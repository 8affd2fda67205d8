"""The router in plain torch: logits and scores in fp32, ties to the lower expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.autograd_utils import apply_function, once_differentiable, savable, unpack_saved
from sonic_ep.backend import Routing
from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase, SyncTag


def route(x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions, collectives: BoundedCollectives) -> Routing:
    """Logits (T, E) of this rank's tokens, the K largest of each, and their scores.

    ``logits = x . router_w`` in fp32. Choices descend by logit; equal logits go to the lower expert first.
    """
    logits_TE = apply_function(RouterLogits, x_TH, router_w_EH, options, collectives)
    topk_idx_TK = choose_experts(logits_TE, options.top_k)
    scores_TK = _SCORES[options.score_order](logits_TE, topk_idx_TK)
    if options.norm_topk_probs:
        scores_TK = scores_TK / scores_TK.sum(dim=-1, keepdim=True)
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)


class RouterLogits(torch.autograd.Function):
    """x (T, H) and router_w (E, H) to logits (T, E) fp32.

    Backward: gradients in the dtypes of x and router_w; that of router_w is summed over the group if the options ask
    for it.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions, collectives: BoundedCollectives
    ) -> Tensor:
        """``x . router_w``."""
        ctx.reduced, ctx.collectives, ctx.call_lock = options.reduce_router_grad, collectives, collectives.call_lock
        ctx.sync_tag = SyncTag(step=collectives.step, phase=Phase.ROUTER, backward=True)
        ctx.x_dtype, ctx.weight_dtype = x_TH.dtype, router_w_EH.dtype
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(savable(x_TH) if needs_weight else None, router_w_EH if needs_x else None)
        return F.linear(x_TH.float(), router_w_EH.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of x and of the weight, each if it is required."""
        x_TH, router_w_EH = unpack_saved(ctx, ctx.collectives.group, ("x", "router_w"))
        x_grad = None if router_w_EH is None else (grad_TE @ router_w_EH.float()).to(ctx.x_dtype)
        if x_TH is None:
            return x_grad, None, None, None
        weight_grad = grad_TE.t() @ x_TH.float()
        if ctx.reduced:
            ctx.collectives.sync(ctx.sync_tag, weight_grad.device)
            weight_grad = sum_over_ranks(weight_grad, ctx.collectives)
        return x_grad, weight_grad.to(ctx.weight_dtype), None, None


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


def sum_over_ranks(local: Tensor, collectives: BoundedCollectives) -> Tensor:
    """``local`` of all ranks, of one shape, summed in ascending order of rank, so the same bits on every rank."""
    by_rank = collectives.all_gather(local)
    total = by_rank[0].clone()
    for other in by_rank[1:]:
        total += other
    return total
