"""The router: one GEMM and one kernel forward, at most five kernels and two GEMMs backward, nothing read on the host.

Logits and scores are those of the reference to fp32 rounding. Instead of a slow fp32 GEMM in backward, the logits'
gradient is cut into three bf16 parts, whose 3 x 8 bits hold the 24 of an fp32 number, and tensor cores sum their exact
products in fp32.
"""

from typing import Any

import torch
from torch import Tensor

from sonic_ep import compat
from sonic_ep.autograd_utils import apply_function, once_differentiable, savable, unpack_saved
from sonic_ep.backend import RouterWeights, Routing
from sonic_ep.config import RouterOptions
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.all_reduce import Summand, reserve_sum, sum_over_ranks, sum_parts
from sonic_ep.fast.bf16_parts import bf16_parts
from sonic_ep.fast.choice import StagedChoice, choose_experts
from sonic_ep.fast.choice_gradient import logits_gradient
from sonic_ep.fast.workspace import Workspace
from sonic_ep.profiler_names import BACKWARD, ROUTE, named

HALF_PRECISIONS = (torch.bfloat16, torch.float16)


def route(
    x_TH: Tensor, weights: RouterWeights, options: RouterOptions, workspace: Workspace, into: StagedChoice | None = None
) -> Routing:
    """Logits ``x . weight + bias`` (T, E) fp32, the experts of each token and their scores: see ``RouterConfig``.

    Collective in backward, which sums the gradients of weight and bias, and where memory for that sum has to grow.
    """
    weight, bias = weights.weight, weights.bias
    if options.reduce_router_grad:
        trained = weight.numel() if weight.requires_grad else 0
        trained += bias.numel() if bias is not None and bias.requires_grad else 0
        if trained > 0:
            # Also where gradients are off: under reentrant checkpointing a backward follows all the same.
            reserve_sum(workspace, trained)
    if not torch.is_grad_enabled():
        return choose_experts(_logits(x_TH, weight, bias), options, weights.correction, workspace, into)
    logits_TE = apply_function(RouterLogits, savable(x_TH), weight, bias, options, workspace)
    given = (logits_TE, weights.correction, options, workspace, into)
    topk_idx_TK, scores_TK = compat.applied(Choose, *given)
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)


def _logits(x_TH: Tensor, router_w_EH: Tensor, router_b_E: Tensor | None) -> Tensor:
    """``x . router_w``, rounded to fp32, plus router_b."""
    if torch.is_autocast_enabled(x_TH.device.type):
        with torch.autocast(x_TH.device.type, enabled=False):
            return _logits(x_TH, router_w_EH, router_b_E)
    logits_TE = product(x_TH, router_w_EH.t(), torch.float32)
    return logits_TE if router_b_E is None else logits_TE.add_(router_b_E)


class RouterLogits(torch.autograd.Function):
    """x (T, H), router_w (E, H) and router_b (E,) or None to logits (T, E) fp32.

    The options say whether the gradients of router_w and router_b are summed over the group. Separate from ``Choose``
    because a split backward, up to PyTorch 2.12, mixes up the gradients of a function with a weight and several
    results.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        router_w_EH: Tensor,
        router_b_E: Tensor | None,
        options: RouterOptions,
        workspace: Workspace,
    ) -> Tensor:
        """See ``_logits``."""
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.reduced, ctx.workspace = options.reduce_router_grad, workspace
        ctx.tag, ctx.call_lock = workspace.tag, workspace.call_lock
        ctx.x_dtype, ctx.weight_dtype = x_TH.dtype, router_w_EH.dtype
        ctx.bias_dtype = None if router_b_E is None else router_b_E.dtype
        ctx.save_for_backward(x_TH if needs_weight else None, router_w_EH if needs_x else None)
        return _logits(x_TH, router_w_EH, router_b_E)

    @staticmethod
    @named(ROUTE + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the weight and of the bias, each if it is required."""
        x_TH, router_w_EH = unpack_saved(ctx, ctx.workspace.group, ("x", "router_w"))
        left_TE, right_EH = grad_TE, router_w_EH
        if ctx.x_dtype == ctx.weight_dtype == torch.bfloat16 and any(ctx.needs_input_grad[:2]):
            left_TE, right_EH = bf16_parts(grad_TE.contiguous(), router_w_EH)
        # One product over all P * E numbers.
        x_grad = None if right_EH is None else product(left_TE, right_EH, ctx.x_dtype)
        summands = []
        if x_TH is not None:
            by_part, shape = product(left_TE.t(), x_TH, torch.float32), torch.Size((grad_TE.shape[1], x_TH.shape[1]))
            summands.append(Summand(parts=by_part, shape=shape, dtype=ctx.weight_dtype))
        if ctx.needs_input_grad[2]:
            summands.append(Summand(parts=grad_TE.sum(dim=0), shape=grad_TE.shape[1:], dtype=ctx.bias_dtype))
        if ctx.reduced and summands:
            ctx.workspace.enter(Phase.ROUTER, ctx.tag, backward=True)
            sums = iter(sum_over_ranks(summands, ctx.workspace))
        else:
            sums = iter([sum_parts(summand) for summand in summands])
        weight_grad, bias_grad = (next(sums) if needed else None for needed in ctx.needs_input_grad[1:3])
        return x_grad, weight_grad, bias_grad, None, None


class Choose(torch.autograd.Function):
    """Logits (T, E) fp32 to choices (T, K) int64 and their scores (T, K) fp32. Not collective."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        correction_E: Tensor | None,
        options: RouterOptions,
        workspace: Workspace,
        into: StagedChoice | None,
    ) -> tuple[Tensor, Tensor]:
        """Choices, scores."""
        chosen = choose_experts(logits_TE, options, correction_E, workspace, into)
        ctx.mark_non_differentiable(chosen.topk_idx)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.group, ctx.call_lock = options, workspace.group, workspace.call_lock
        ctx.corrected = correction_E is not None
        ctx.save_for_backward(logits_TE, chosen.topk_idx, chosen.topk_scores)
        return chosen.topk_idx, chosen.topk_scores

    @staticmethod
    @named(ROUTE + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, _: None, scores_grad_TK: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient of the logits, (T, E)."""
        logits_TE, topk_idx_TK, scores_TK = unpack_saved(ctx, ctx.group, ("router_logits", "topk_idx", "scores"))
        routing = Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)
        return logits_gradient(routing, scores_grad_TK, ctx.options, corrected=ctx.corrected), None, None, None, None


def product(left_MK: Tensor, right_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """``left . right``, (M, N), summed in fp32, in ``dtype``: fp32 or that of a factor."""
    if left_MK.numel() == 0:
        return left_MK.new_zeros((left_MK.shape[0], right_KN.shape[1]), dtype=dtype)
    alike = left_MK.dtype == right_KN.dtype and left_MK.dtype in HALF_PRECISIONS
    # On the CPU PyTorch has no product of half precision with an fp32 result.
    if left_MK.device.type != "cuda" or not alike:
        return torch.mm(left_MK.float(), right_KN.float()).to(dtype)
    if dtype == left_MK.dtype:
        return torch.mm(left_MK, right_KN)
    return torch.mm(left_MK, right_KN, out_dtype=dtype)
