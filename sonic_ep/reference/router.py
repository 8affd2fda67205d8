"""The router in plain torch: logits and scores in fp32, ties to the lower expert."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.autograd_utils import apply_function, once_differentiable, savable, summed_together, unpack_saved
from sonic_ep.backend import RouterWeights, Routing
from sonic_ep.config import RouterOptions
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.profiler_names import BACKWARD, ROUTE, named
from sonic_ep.reference.dense import dense_base, dense_scores


def route(x_TH: Tensor, weights: RouterWeights, options: RouterOptions, collectives: BoundedCollectives) -> Routing:
    """Logits ``x . weight + bias`` (T, E) in fp32, the experts of each token and their scores: see ``RouterConfig``."""
    logits_TE = apply_function(RouterLogits, x_TH, weights.weight, weights.bias, options, collectives)
    topk_idx_TK = route_logits(logits_TE, weights.correction, options)
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=dense_scores(logits_TE, topk_idx_TK, options))


class RouterLogits(torch.autograd.Function):
    """x (T, H), router_w (E, H) and router_b (E,) or None to logits (T, E) fp32.

    The options say whether the gradients of router_w and router_b are summed over the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        router_w_EH: Tensor,
        router_b_E: Tensor | None,
        options: RouterOptions,
        collectives: BoundedCollectives,
    ) -> Tensor:
        """``x . router_w``, rounded to fp32, plus router_b."""
        ctx.reduced, ctx.collectives, ctx.call_lock = options.reduce_router_grad, collectives, collectives.call_lock
        ctx.step, ctx.x_dtype, ctx.weight_dtype = collectives.step, x_TH.dtype, router_w_EH.dtype
        ctx.bias_dtype = None if router_b_E is None else router_b_E.dtype
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(savable(x_TH) if needs_weight else None, router_w_EH if needs_x else None)
        logits_TE = F.linear(x_TH.float(), router_w_EH.float())
        return logits_TE if router_b_E is None else logits_TE + router_b_E.float()

    @staticmethod
    @named(ROUTE + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, router_w and router_b in their dtypes, None where not required."""
        x_TH, router_w_EH = unpack_saved(ctx, ctx.collectives.group, ("x", "router_w"))
        x_grad = None if router_w_EH is None else (grad_TE @ router_w_EH.float()).to(ctx.x_dtype)
        weight_grad = None if x_TH is None else grad_TE.t() @ x_TH.float()
        bias_grad = grad_TE.sum(dim=0) if ctx.needs_input_grad[2] else None
        if ctx.reduced and any(ctx.needs_input_grad[1:3]):
            ctx.collectives.sync(Phase.ROUTER, grad_TE.device, step=ctx.step, backward=True)
            add = partial(sum_over_ranks, collectives=ctx.collectives)
            weight_grad, bias_grad = summed_together((weight_grad, bias_grad), add)
        weight_grad = None if weight_grad is None else weight_grad.to(ctx.weight_dtype)
        return x_grad, weight_grad, None if bias_grad is None else bias_grad.to(ctx.bias_dtype), None, None


def route_logits(logits_TE: Tensor, correction_E: Tensor | None, options: RouterOptions) -> Tensor:
    """The experts of each token by the rules of ``RouterConfig``, (T, K) int64, best first."""
    if correction_E is None and not options.limits_groups:
        return choose_experts(logits_TE, options.top_k)
    base_TE = dense_base(logits_TE.detach(), options)
    value_TE = base_TE if correction_E is None else base_TE + correction_E
    if not options.limits_groups:
        return choose_experts(value_TE, options.top_k)
    left_TN = _experts_of_best_groups(value_TE, options)
    return left_TN.gather(1, choose_experts(value_TE.gather(1, left_TN), options.top_k))


def _experts_of_best_groups(value_TE: Tensor, options: RouterOptions) -> Tensor:
    """The experts of each token's best groups, ascending, (T, E * top_groups / num_groups) int64."""
    num_tokens, num_experts = value_TE.shape
    size = num_experts // options.num_groups
    value_TGS = value_TE.view(num_tokens, options.num_groups, size)
    first, *others = value_TGS.gather(2, choose_experts(value_TGS, options.group_top)).unbind(dim=2)
    # One by one, so that ties are the same in both backends.
    of_group_TG = sum(others, start=first)
    group_TP = choose_experts(of_group_TG, options.top_groups).sort(dim=1).values
    return (group_TP.unsqueeze(2) * size + torch.arange(size, device=group_TP.device)).flatten(1)


def choose_experts(values_TE: Tensor, top_k: int) -> Tensor:
    """The K largest of the last dimension, (..., K) int64: descending; equal ones ascending; NaN above infinity.

    >>> import torch
    >>> choose_experts(torch.tensor([[0.5, 2.0, 0.5, 2.0]]), 3)
    tensor([[1, 3, 0]])
    """
    # GPUs sort by bits and would order NaN by sign.
    ordered_TE = values_TE.detach().masked_fill(values_TE.isnan(), float("nan"))
    return ordered_TE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def sum_over_ranks(local: Tensor, collectives: BoundedCollectives) -> Tensor:
    """The sum of ``local`` over ranks, in ascending order: the same bits on every rank."""
    total, *others = collectives.all_gather(local).unbind()
    for other in others:
        total = total + other
    return total
