"""The layer as one autograd function: pull, experts, combine; and in backward its mirror.

    forward    x staged ─ pull ─ rows ─ w1 ─ h ─ act ─ A ─ w2 ─ y ─ combine ─ out
    backward   d(out) dispatched ─ w2 ─ dA ─ one pass over h and dA: dH, A' = score * A, <dA, A> ─ dw2 ─ w1 ─ combine ─
               dx; and dw1 last, so that gathering x again, if asked for, overlaps the rest

Saved for backward: what dispatch received, or x alone where it is gathered again; the pre-activation h (R, F), or two
(R, I) of split weights; the group's scores; the plan. Outputs of experts are never saved: <d(out), y> is computed as
<dA, A> + <d(out), b2>.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sonic_ep.activation import Activation, GateLayout
from sonic_ep.autograd_utils import in_halves, once_differentiable, unpack_saved
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.activation import activate, activate_backward
from sonic_ep.fast.copy_engine import CopyEngineGather, GatherInFlight
from sonic_ep.fast.dispatch.all_to_all import pull_to_rows
from sonic_ep.fast.exchange import Exchange
from sonic_ep.fast.experts import add_bias_dots, sum_groups
from sonic_ep.fast.gemm import GroupedGemm, weight_gradient
from sonic_ep.fast.planner import PendingPlan
from sonic_ep.fast.symmetric_memory import SharedBuffer

# Names of the saved tensors, in order, for errors; then those of the up-projections: hidden of each, w1 of each.
# "x": x if backward dispatches it again, else the rows received.
SAVED = ("x", "scores", "expert_ids of plan", "w2", "b2")
SAVED_OF_UPS = {1: ("hidden", "w1"), 2: ("hidden[0]", "hidden[1]", "w1[0]", "w1[1]")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of the layer, without the tensors that autograd tracks. staged, pending: x and plan, for forward only.

    shape: (..., H), of the result. exchange: in forward its plan may have more rows than arrive. gather: gathers
    x again in backward; None where the rows received are saved. training: a backward may come.
    """

    shape: torch.Size
    exchange: Exchange
    gemm: GroupedGemm
    activation: Activation
    layout: GateLayout
    gather: CopyEngineGather | None
    training: bool
    staged: SharedBuffer | None
    pending: PendingPlan | None


class MoEFunction(torch.autograd.Function):
    """x (T, H) and scores (T, K) fp32 to the weighted sums of the experts' outputs, (..., H). Collective both ways."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, scores: Tensor, w2: Tensor, b2: Tensor | None, call: Call, *ups: Any) -> Tensor:
        """Pull what is staged, apply the experts, combine. ``scores``: only for its gradient.

        ups: the weight of each up-projection, one, or gate and up; then the bias of each, or None.
        """
        assert call.staged is not None
        assert call.pending is not None
        exchange, received = _pulled(x_TH, call.exchange, call.staged, call.pending)
        scores_WCK = call.pending.scores_WCK
        w1, _ = in_halves(ups)
        hidden = _up_projections(exchange.in_order(received), ups, call.gemm, exchange.group_ends)
        if call.training:
            source = received if call.gather is None else x_TH
            ctx.call = replace(call, exchange=exchange, staged=None, pending=None)
            ctx.call_lock = exchange.workspace.call_lock
            kept = source if any(ctx.needs_input_grad[5 : 5 + len(w1)]) else None
            ids_WCK = exchange.plan.expert_ids
            ctx.save_for_backward(kept, scores_WCK, ids_WCK, w2, b2, *hidden, *w1)
            ctx.names = (*SAVED, *SAVED_OF_UPS[len(w1)])
            ctx.strides = {"w2": w2.stride()} | dict(zip(ctx.names[-len(w1) :], (w.stride() for w in w1), strict=True))
            del source, kept
        # Each is freed as soon as the next is there: they are the largest tensors of the layer.
        del received
        activated_RI = activate(hidden, call.activation, call.layout, exchange.plan)
        del hidden
        y_RH = call.gemm.rows(activated_RI, w2.transpose(1, 2), exchange.group_ends, b2)
        del activated_RI
        # Not a view: an in-place write by the caller replaces the node of a view, and FSDP's hooks with it.
        return exchange.sums(y_RH, scores_WCK).resize_(call.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (T, H), scores (T, K), w2, b2 and each w1 and b1; None for those that are not required."""
        needs_x, needs_scores, needs_w2, needs_b2, _, *needs_ups = ctx.needs_input_grad
        needs_w1, needs_b1 = in_halves(needs_ups)
        gemm, exchange = ctx.call.gemm, replace(ctx.call.exchange, backward=True)
        # First of all: under activation checkpointing this runs forward again, on every rank.
        saved = unpack_saved(ctx, exchange.workspace.group, ctx.names, ctx.strides)
        kept, scores_WCK, ids_WCK, w2, b2, *of_ups = saved
        hidden, w1 = in_halves(of_ups)
        del saved, of_ups
        out_grad_TH = out_grad.reshape(exchange.plan.num_tokens, out_grad.shape[-1])
        out_grad_RH = exchange.rows(exchange.checked(out_grad_TH, ids_WCK))
        in_flight = None
        if ctx.call.gather is not None and kept is not None:
            exchange.enter(Phase.DISPATCH)
            in_flight = ctx.call.gather.start(kept, exchange.plan.max_tokens, with_own=False)
        grad_RI = gemm.rows(out_grad_RH, w2, exchange.group_ends)
        form = (ctx.call.activation, ctx.call.layout)
        between = activate_backward(hidden, grad_RI, scores_WCK, *form, exchange.plan)
        if b2 is not None and needs_scores:
            add_bias_dots(out_grad_RH, b2, between.dots, exchange.plan)
        del grad_RI
        ends = exchange.group_ends
        w2_grad = weight_gradient(gemm, out_grad_RH, between.weighted, ends, w2) if needs_w2 else None
        b2_grad = sum_groups(out_grad_RH, scores_WCK, exchange.plan) if needs_b2 else None
        hidden_grads, dots_R = between.hidden, between.dots
        # Freed, to make room for the gradients of the rows.
        del out_grad_RH, between
        of_b1 = zip(hidden_grads, needs_b1, strict=True)
        b1_grads = [sum_groups(grad, None, exchange.plan) if needed else None for grad, needed in of_b1]
        scores_grad_TK = exchange.to_origin(dots_R) if needs_scores else None
        x_grad_TH = exchange.sums(_row_gradients(hidden_grads, w1, gemm, ends), None) if needs_x else None
        w1_grads: list[Tensor | None] = [None] * len(w1)
        if kept is not None:
            rows_RH = _rows_of_w1(kept, in_flight, exchange)
            of_w1 = zip(hidden_grads, w1, needs_w1, strict=True)
            w1_grads = [weight_gradient(gemm, grad, rows_RH, ends, w) if needed else None for grad, w, needed in of_w1]
        return x_grad_TH, scores_grad_TK, w2_grad, b2_grad, None, *w1_grads, *b1_grads


def _up_projections(rows_RH: Tensor, ups: Sequence[Any], gemm: GroupedGemm, group_ends_e: Tensor) -> tuple[Tensor, ...]:
    """The pre-activation (R, F) of each up-projection."""
    pairs = zip(*in_halves(ups), strict=True)
    return tuple(gemm.rows(rows_RH, w1.transpose(1, 2), group_ends_e, b1) for w1, b1 in pairs)


def _row_gradients(grads: Sequence[Tensor], w1: Sequence[Tensor], gemm: GroupedGemm, group_ends_e: Tensor) -> Tensor:
    """(R, H): the sum over the up-projections of their gradients (R, F) times their weights."""
    total_RH = gemm.rows(grads[0], w1[0], group_ends_e)
    for grad, weight in zip(grads[1:], w1[1:], strict=True):
        total_RH.add_(gemm.rows(grad, weight, group_ends_e))
    return total_RH


def _pulled(x_TH: Tensor, exchange: Exchange, staged: SharedBuffer, pending: PendingPlan) -> tuple[Exchange, Tensor]:
    """The exchange, its plan cut to R rows, and the rows received. A pull that needs no R precedes the read of R."""
    planner = exchange.planner
    if exchange.dispatch.sized_by_rows:
        rows = planner.rows(pending)
        received = exchange.dispatch.pull(x_TH, staged, exchange.plan, rows)
    else:
        received = exchange.dispatch.pull(x_TH, staged, exchange.plan, exchange.plan.row_capacity)
        rows = planner.rows(pending)
    return replace(exchange, plan=planner.sized(pending, rows)), received


def _rows_of_w1(kept: Tensor, in_flight: GatherInFlight | None, exchange: Exchange) -> Tensor:
    """The rows of the up-projection, (R, H), from those received, or from x where it is gathered again."""
    if in_flight is None:
        return exchange.in_order(kept)
    in_flight.wait()
    return pull_to_rows(kept, in_flight.addresses(), exchange.plan, exchange.plan.row_capacity)
