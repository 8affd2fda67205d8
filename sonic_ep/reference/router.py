"""The router in plain torch: logits and scores in fp32, ties to the lower expert."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.autograd_utils import apply_function, once_differentiable, savable, unpack_saved
from sonic_ep.backend import Routing
from sonic_ep.config import RouterOptions
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.reference.dense import dense_scores


def route(x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions, collectives: BoundedCollectives) -> Routing:
    """Logits ``x . router_w`` (T, E) in fp32, the K largest of each token, and their scores."""
    logits_TE = apply_function(RouterLogits, x_TH, router_w_EH, options, collectives)
    topk_idx_TK = choose_experts(logits_TE, options.top_k)
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=dense_scores(logits_TE, topk_idx_TK, options))


class RouterLogits(torch.autograd.Function):
    """x (T, H) and router_w (E, H) to logits (T, E) fp32. The options say whether router_w's gradient is summed."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions, collectives: BoundedCollectives
    ) -> Tensor:
        """``x . router_w``."""
        ctx.reduced, ctx.collectives, ctx.call_lock = options.reduce_router_grad, collectives, collectives.call_lock
        ctx.step, ctx.x_dtype, ctx.weight_dtype = collectives.step, x_TH.dtype, router_w_EH.dtype
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(savable(x_TH) if needs_weight else None, router_w_EH if needs_x else None)
        return F.linear(x_TH.float(), router_w_EH.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of x and router_w in their dtypes, None where not required."""
        x_TH, router_w_EH = unpack_saved(ctx, ctx.collectives.group, ("x", "router_w"))
        x_grad = None if router_w_EH is None else (grad_TE @ router_w_EH.float()).to(ctx.x_dtype)
        if x_TH is None:
            return x_grad, None, None, None
        weight_grad = grad_TE.t() @ x_TH.float()
        if ctx.reduced:
            ctx.collectives.sync(Phase.ROUTER, weight_grad.device, step=ctx.step, backward=True)
            weight_grad = sum_over_ranks(weight_grad, ctx.collectives)
        return x_grad, weight_grad.to(ctx.weight_dtype), None, None


def choose_experts(logits_TE: Tensor, top_k: int) -> Tensor:
    """The K largest of each row, (T, K) int64: descending; equal logits by ascending expert; NaN above infinity.

    >>> import torch
    >>> choose_experts(torch.tensor([[0.5, 2.0, 0.5, 2.0]]), 3)
    tensor([[1, 3, 0]])
    """
    # GPUs sort by bits and would order NaN by sign.
    ordered_TE = logits_TE.detach().masked_fill(logits_TE.isnan(), float("nan"))
    return ordered_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def sum_over_ranks(local: Tensor, collectives: BoundedCollectives) -> Tensor:
    """The sum of ``local`` over ranks, in ascending order: the same bits on every rank."""
    total, *others = collectives.all_gather(local).unbind()
    for other in others:
        total = total + other
    return total
