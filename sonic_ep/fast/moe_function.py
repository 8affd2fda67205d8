"""The layer as one autograd function: pull, experts, combine; and in backward its mirror.

    forward    x staged ─ pull ─ rows ─ w1 ─ h ─ act ─ A ─ w2 ─ y ─ combine ─ out
    backward   d(out) dispatched ─ w2 ─ dA ─ one pass over h and dA: dH, A' = score * A, <dA, A> ─ dw2 ─ w1 ─ combine ─
               dx; and dw1 last, so that gathering x again, if asked for, overlaps the rest

Saved for backward: what dispatch received, or x alone where it is gathered again; the pre-activation h (R, F); the
group's scores; the plan. Outputs of experts are never saved: <d(out), y> is computed as <dA, A> + <d(out), b2>.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sonic_ep.activation import Activation, GateLayout
from sonic_ep.autograd_utils import once_differentiable, unpack_saved
from sonic_ep.backend import Experts
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.copy_engine import CopyEngineGather, GatherInFlight
from sonic_ep.fast.dispatch.all_to_all import pull_to_rows
from sonic_ep.fast.exchange import Exchange
from sonic_ep.fast.experts import activate, activate_backward, add_bias_dots, sum_groups
from sonic_ep.fast.gemm import GroupedGemm
from sonic_ep.fast.planner import PendingPlan
from sonic_ep.fast.symmetric_memory import SharedBuffer

# Names of the saved tensors, in order, for errors. "x": x if backward dispatches it again, else the rows received.
# None: b1, which no gradient reads.
SAVED = ("x", "hidden", "scores", "expert_ids of plan", "w1", "w2", None, "b2")


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

    def experts(self, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> Experts:
        """These weights with the activation of the call."""
        return Experts(w1=w1, w2=w2, b1=b1, b2=b2, activation=self.activation, layout=self.layout)


class MoEFunction(torch.autograd.Function):
    """x (T, H) and scores (T, K) fp32 to the weighted sums of the experts' outputs, (..., H). Collective both ways."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, scores: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, call: Call
    ) -> Tensor:
        """Pull what is staged, apply the experts, combine. ``scores``: only for its gradient."""
        assert call.staged is not None
        assert call.pending is not None
        exchange, received = _pulled(x_TH, call.exchange, call.staged, call.pending)
        scores_WCK = call.pending.scores_WCK
        hidden_RF = call.gemm.rows(exchange.in_order(received), w1.transpose(1, 2), exchange.group_ends, b1)
        if call.training:
            source = received if call.gather is None else x_TH
            ctx.call = replace(call, exchange=exchange, staged=None, pending=None)
            ctx.call_lock = exchange.workspace.call_lock
            kept = source if ctx.needs_input_grad[2] else None
            ids_WCK = exchange.plan.expert_ids
            ctx.save_for_backward(kept, hidden_RF, scores_WCK, ids_WCK, w1, w2, b1, b2)
            del source, kept
        # Each is freed as soon as the next is there: they are the largest tensors of the layer.
        del received
        activated_RI = activate(hidden_RF, call.experts(w1, w2, b1, b2), exchange.plan)
        del hidden_RF
        y_RH = call.gemm.rows(activated_RI, w2.transpose(1, 2), exchange.group_ends, b2)
        del activated_RI
        # Not a view: an in-place write by the caller replaces the node of a view, and FSDP's hooks with it.
        return exchange.sums(y_RH, scores_WCK).resize_(call.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (T, H), scores (T, K), w1, w2, b1 and b2; None for those that are not required."""
        needs_x, needs_scores, _, needs_w2, needs_b1, needs_b2, _ = ctx.needs_input_grad
        gemm, exchange = ctx.call.gemm, replace(ctx.call.exchange, backward=True)
        # First of all: under activation checkpointing this runs forward again, on every rank.
        kept, hidden_RF, scores_WCK, ids_WCK, w1, w2, b1, b2 = unpack_saved(ctx, exchange.workspace.group, SAVED)
        out_grad_TH = out_grad.reshape(exchange.plan.num_tokens, out_grad.shape[-1])
        out_grad_RH = exchange.rows(exchange.checked(out_grad_TH, ids_WCK))
        in_flight = None
        if ctx.call.gather is not None and kept is not None:
            exchange.enter(Phase.DISPATCH)
            in_flight = ctx.call.gather.start(kept, exchange.plan.max_tokens, with_own=False)
        grad_RI = gemm.rows(out_grad_RH, w2, exchange.group_ends)
        between = activate_backward(hidden_RF, grad_RI, scores_WCK, ctx.call.experts(w1, w2, b1, b2), exchange.plan)
        if b2 is not None and needs_scores:
            add_bias_dots(out_grad_RH, b2, between.dots, exchange.plan)
        del grad_RI
        w2_grad = gemm.weights(out_grad_RH, between.weighted, exchange.group_ends) if needs_w2 else None
        b2_grad = sum_groups(out_grad_RH, scores_WCK, exchange.plan) if needs_b2 else None
        hidden_grad_RF, dots_R = between.hidden, between.dots
        # Freed, to make room for the gradients of the rows.
        del out_grad_RH, between
        b1_grad = sum_groups(hidden_grad_RF, None, exchange.plan) if needs_b1 else None
        scores_grad_TK = exchange.to_origin(dots_R) if needs_scores else None
        x_grad_TH = exchange.sums(gemm.rows(hidden_grad_RF, w1, exchange.group_ends), None) if needs_x else None
        w1_grad = None
        if kept is not None:
            rows_RH = _rows_of_w1(kept, in_flight, exchange)
            w1_grad = gemm.weights(hidden_grad_RF, rows_RH, exchange.group_ends)
        return x_grad_TH, scores_grad_TK, w1_grad, w2_grad, b1_grad, b2_grad, None


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
