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

from sonic_ep.autograd_utils import in_halves, once_differentiable, unpack_saved
from sonic_ep.fast.activation import ActivationForm
from sonic_ep.fast.copy_engine import CopyEngineGather, GatherInFlight
from sonic_ep.fast.dispatch.all_to_all import pull_to_rows
from sonic_ep.fast.exchange import AgainInBackward, Exchange
from sonic_ep.fast.experts import add_bias_dots, sum_groups
from sonic_ep.fast.gemm import GroupedGemm, weight_gradient
from sonic_ep.fast.planner import PendingPlan
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.profiler_names import BACKWARD, COMBINE, DISPATCH, EXPERTS, named, named_block

# Names of the saved tensors, in order, for errors; then those of the up-projections: hidden of each, w1 of each.
# "x": x if backward dispatches it again, else the rows received.
SAVED = ("x", "scores", "expert_ids of plan", "w2", "b2")
NAMES_OF_UPS = {1: (*SAVED, "hidden", "w1"), 2: (*SAVED, "hidden[0]", "hidden[1]", "w1[0]", "w1[1]")}


@dataclass(kw_only=True, eq=False)
class Call:
    """One call of the layer, without the tensors that autograd tracks. pending, staged: for forward only.

    shape: (..., H), of the result. exchange: in forward its plan may have more rows than arrive. gather: gathers
    x again in backward; None where the rows received are saved. training: a backward may come.
    """

    shape: torch.Size
    exchange: Exchange
    gemm: GroupedGemm
    form: ActivationForm
    gather: CopyEngineGather | None
    training: bool
    staged: Staging
    pending: PendingPlan


@dataclass(kw_only=True, eq=False)
class Kept:
    """What backward needs of a forward. exchange: by its plan, cut to R. received: by dispatch, if w1 needs it."""

    exchange: Exchange
    received: Tensor | None
    hidden: tuple[Tensor, ...]


def run_forward(
    x_TH: Tensor, w2: Tensor, b2: Tensor | None, call: Call, ups: Sequence[Any]
) -> tuple[Tensor, Kept | None]:
    """Pull what is staged, apply the experts, combine: (..., H), and if ``training`` what backward needs. Collective.

    ups: the weight of each up-projection, one, or gate and up; then the bias of each, or None.
    """
    exchange, received = _pulled(x_TH, call)
    plan, ends_e, kept = exchange.plan, exchange.group_ends, None
    with named_block(EXPERTS):
        hidden = _up_projections(exchange.in_order(received), ups, call.gemm, ends_e)
        if call.training:
            again = call.gather is None and any(w1.requires_grad for w1 in in_halves(ups)[0])
            kept = Kept(exchange=exchange, received=received if again else None, hidden=hidden)
        # Each is freed as soon as the next is there: they are the largest tensors of the layer.
        del received
        activated_RI = call.form.activate(hidden, plan)
        del hidden
        y_RH = call.gemm.rows(activated_RI, w2.transpose(1, 2), ends_e, b2)
        del activated_RI
    out_TH = _combined(y_RH, call.pending.scores_WCK, exchange)
    # Not a view: an in-place write by the caller replaces the node of a view, and FSDP's hooks with it.
    return out_TH.resize_(call.shape), kept


class MoEFunction(torch.autograd.Function):
    """x (T, H) and scores (T, K) fp32 to the weighted sums of the experts' outputs, (..., H). Collective both ways."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, scores: Tensor, w2: Tensor, b2: Tensor | None, call: Call, *ups: Any) -> Tensor:
        """``run_forward``. ``scores``: only for its gradient."""
        out, kept = run_forward(x_TH, w2, b2, call, ups)
        if kept is not None:
            w1, _ = in_halves(ups)
            exchange = kept.exchange
            ctx.gemm, ctx.gather, ctx.form = call.gemm, call.gather, call.form
            ctx.exchange, ctx.call_lock = exchange, exchange.workspace.call_lock
            source = kept.received if call.gather is None else x_TH
            rows = source if any(ctx.needs_input_grad[5 : 5 + len(w1)]) else None
            ids_WCK, scores_WCK = exchange.plan.expert_ids, call.pending.scores_WCK
            ctx.save_for_backward(rows, scores_WCK, ids_WCK, w2, b2, *kept.hidden, *w1)
            ctx.names = NAMES_OF_UPS[len(w1)]
            ctx.strides = {"w2": w2.stride()} | dict(zip(ctx.names[-len(w1) :], (w.stride() for w in w1), strict=True))
        return out

    @staticmethod
    @named(EXPERTS + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (T, H), scores (T, K), w2, b2 and each w1 and b1; None for those that are not required."""
        needs_x, needs_scores, needs_w2, needs_b2, _, *needs_ups = ctx.needs_input_grad
        needs_w1, needs_b1 = in_halves(needs_ups)
        gemm, exchange = ctx.gemm, ctx.exchange.of_backward()
        plan, ends = exchange.plan, exchange.group_ends
        # First of all: under activation checkpointing this runs forward again, on every rank.
        saved = unpack_saved(ctx, exchange.workspace.group, ctx.names, ctx.strides)
        kept, scores_WCK, ids_WCK, w2, b2, *of_ups = saved
        hidden, w1 = in_halves(of_ups)
        del saved, of_ups
        again = None if ctx.gather is None or kept is None else AgainInBackward(gather=ctx.gather, x_TH=kept)
        out_grad_TH = exchange.checked(out_grad.reshape(plan.num_tokens, out_grad.shape[-1]), ids_WCK)
        out_grad_RH, in_flight = _dispatched_gradient(out_grad_TH, exchange, again)
        grad_RI = gemm.rows(out_grad_RH, w2, ends)
        # The kernel that computes the scores' gradients last also pushes them to their tokens' ranks.
        origins = exchange.origins if needs_scores else None
        after_bias = b2 is not None and needs_scores
        between = ctx.form.gradient(hidden, grad_RI, scores_WCK, plan, None if after_bias else origins)
        if b2 is not None and origins is not None:
            add_bias_dots(out_grad_RH, b2, between.dots, plan, origins)
        del grad_RI
        w2_grad = weight_gradient(gemm, out_grad_RH, between.weighted, ends, w2) if needs_w2 else None
        b2_grad = sum_groups(out_grad_RH, scores_WCK, plan) if needs_b2 else None
        hidden_grads, dots_R = between.hidden, between.dots if needs_scores else None
        # Freed, to make room for the gradients of the rows.
        del out_grad_RH, between
        of_b1 = zip(hidden_grads, needs_b1, strict=True)
        b1_grads = [sum_groups(grad, None, plan) if needed else None for grad, needed in of_b1]
        x_grad_TH = scores_grad_TK = None
        if needs_x:
            x_grad_TH, scores_grad_TK = _returned_gradients(
                _row_gradients(hidden_grads, w1, gemm, ends), dots_R, exchange
            )
        elif dots_R is not None:
            scores_grad_TK = exchange.values(dots_R)
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


@named(COMBINE)
def _combined(y_RH: Tensor, scores_WCK: Tensor | None, exchange: Exchange) -> Tensor:
    return exchange.sums(y_RH, scores_WCK)[0]


@named(COMBINE + BACKWARD)
def _dispatched_gradient(
    out_grad_TH: Tensor, exchange: Exchange, again: AgainInBackward | None
) -> tuple[Tensor, GatherInFlight | None]:
    return exchange.rows(out_grad_TH, again)


@named(DISPATCH + BACKWARD)
def _returned_gradients(grad_RH: Tensor, dots_R: Tensor | None, exchange: Exchange) -> tuple[Tensor, Tensor | None]:
    return exchange.sums(grad_RH, None, values_R=dots_R)


@named(DISPATCH)
def _pulled(x_TH: Tensor, call: Call) -> tuple[Exchange, Tensor]:
    """The exchange, its plan cut to R rows, and the rows received. A pull that needs no R precedes the read of R."""
    exchange, staged, pending = call.exchange, call.staged, call.pending
    dispatch, planner, plan = exchange.dispatch, exchange.planner, exchange.plan
    if not pending.counted:
        return exchange, dispatch.pull(x_TH, staged, plan, plan.row_capacity)
    if dispatch.sized_by_rows:
        rows = planner.rows(pending)
        received = dispatch.pull(x_TH, staged, plan, rows)
    else:
        received = dispatch.pull(x_TH, staged, plan, plan.row_capacity)
        rows = planner.rows(pending)
    return replace(exchange, plan=planner.sized(pending, rows)), received


def _rows_of_w1(kept: Tensor, in_flight: GatherInFlight | None, exchange: Exchange) -> Tensor:
    """The rows of the up-projection, (R, H), from those received, or from x where it is gathered again."""
    if in_flight is None:
        return exchange.in_order(kept)
    in_flight.wait()
    workspace, plan = exchange.workspace, exchange.plan
    return pull_to_rows(kept, in_flight.addresses(), workspace.epoch, plan, plan.row_capacity)
