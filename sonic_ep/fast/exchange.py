"""Dispatch and combine of one plan, and their gradients: each is the other's adjoint, as in the reference."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sonic_ep.autograd_utils import once_differentiable, savable, unpack_saved
from sonic_ep.distributed.sync_tag import Phase, Step
from sonic_ep.fast.collectives import FP32_BYTES, VALUES, gather_scores, return_to_origin
from sonic_ep.fast.combine.base import PushedCombine
from sonic_ep.fast.dispatch.base import PulledDispatch
from sonic_ep.fast.launch import aligned_contiguous
from sonic_ep.fast.permute import gather_rows, poison_if_overflowed, weigh_rows
from sonic_ep.fast.planner import Planner
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan, raise_if_malformed


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """One plan with the primitives that move rows by it, for a call (step) or its gradient (backward)."""

    plan: RoutingPlan
    dispatch: PulledDispatch
    combine: PushedCombine
    workspace: Workspace
    planner: Planner
    step: Step
    backward: bool = False

    def enter(self, phase: Phase) -> None:
        """Begin a phase of the step, see ``Workspace.enter``."""
        self.workspace.enter(phase, self.step, backward=self.backward)

    def reserve(self, row_bytes: int) -> None:
        """Collective. Allocate what rows and backward need, so that backward never has to."""
        self.dispatch.reserve(self.plan.max_tokens, row_bytes)
        self.combine.reserve(self.plan, row_bytes)
        self.workspace.reserve(VALUES, self.plan.max_tokens * self.plan.top_k * FP32_BYTES)

    @property
    def group_ends(self) -> Tensor:
        """``plan.group_ends`` (e,), clamped to R where the plan may have overflowed."""
        ends_e = self.plan.group_ends
        return ends_e if self.planner.max_rows is None else ends_e.clamp(max=self.plan.row_capacity)

    def rows(self, x_TH: Tensor) -> Tensor:
        """Collective. x of the group's tokens in canonical row order, (R, H); unspecified past the valid rows."""
        x_TH = aligned_contiguous(x_TH)
        received = self.dispatch.pull(x_TH, self.stage(x_TH), self.plan, self.plan.row_capacity)
        return self._poisoned(self.in_order(received))

    def stage(self, x_TH: Tensor) -> SharedBuffer:
        """Collective. The first half of a dispatch, which needs only the plan's C; x is ``aligned_contiguous``."""
        self.enter(Phase.DISPATCH)
        return self.dispatch.stage(x_TH, self.plan.max_tokens)

    def in_order(self, received: Tensor) -> Tensor:
        """What dispatch has received as rows in canonical order, (R, H); unspecified past the valid rows."""
        source_R = self.dispatch.source_of_row(self.plan)
        return received if source_R is None else gather_rows(received, source_R, self.plan.group_ends)

    def sums(self, rows_NH: Tensor, scores_WCK: Tensor | None) -> Tensor:
        """Collective. The weighted sums of a token's rows, (T, H); every score is 1 if there are none."""
        self.enter(Phase.COMBINE)
        y_TH = self.combine.combine(rows_NH.contiguous(), scores_WCK, self.plan)
        return self._poisoned(y_TH)

    def to_origin(self, value_of_row_R: Tensor) -> Tensor:
        """Collective. One fp32 value of each valid row back to its slot's token, (T, K); zero for dropped slots."""
        self.enter(Phase.EXCHANGE)
        return self._poisoned(return_to_origin(value_of_row_R, self.plan, self.workspace))

    def checked(self, grad_NH: Tensor, expert_ids_WCK: Tensor) -> Tensor:
        """The gradient (N, H); all NaN if these ids, saved in a recompute, differ from those of the forward's plan."""
        if expert_ids_WCK.data_ptr() == self.plan.expert_ids.data_ptr():
            return grad_NH
        differs = self.planner.device_errors.compare(self.plan.expert_ids, expert_ids_WCK, self.step.number)
        return grad_NH.masked_fill(differs, math.nan)

    def _poisoned(self, rows_NH: Tensor) -> Tensor:
        """The rows, all NaN if a rank was routed more than the bound."""
        max_rows = self.planner.max_rows
        return rows_NH if max_rows is None else poison_if_overflowed(rows_NH, self.plan, max_rows)


class Dispatch(torch.autograd.Function):
    """x (T, H) to rows (R, H). Backward: a combine without scores."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, exchange: Exchange) -> Tensor:
        """Rows in canonical order; those past the valid ones are unspecified."""
        ctx.exchange, ctx.call_lock = exchange, exchange.workspace.call_lock
        ctx.save_for_backward(savable(exchange.plan.expert_ids))
        return exchange.rows(x_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        """Gradient of x: the sum of a token's row gradients, with the rounding points of the combine mode."""
        exchange: Exchange = replace(ctx.exchange, backward=True)
        (expert_ids_WCK,) = unpack_saved(ctx, exchange.workspace.group, ("expert_ids of plan",))
        raise_if_malformed(exchange.workspace.group, exchange.plan)
        return exchange.checked(exchange.sums(grad_RH, None), expert_ids_WCK), None


class Combine(torch.autograd.Function):
    """rows (N, H), N at most R, and scores (T, K) fp32 to (T, H). Backward: d(out) is dispatched to the rows.

    There d(row) = round(score * d(out)), d(score) = the sum over H of d(out) * row in fp32, which returns to the token.
    """

    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, scores_TK: Tensor, exchange: Exchange) -> Tensor:
        """The weighted sums, (T, H)."""
        exchange.enter(Phase.EXCHANGE)
        scores_WCK = gather_scores(scores_TK, exchange.plan, exchange.workspace)
        ctx.exchange, ctx.call_lock = exchange, exchange.workspace.call_lock
        ctx.save_for_backward(scores_WCK, rows_NH, savable(exchange.plan.expert_ids))
        return exchange.sums(rows_NH, scores_WCK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of the rows (N, H) and of the scores (T, K)."""
        exchange: Exchange = replace(ctx.exchange, backward=True)
        names = ("scores", "rows", "expert_ids of plan")
        scores_WCK, rows_NH, expert_ids_WCK = unpack_saved(ctx, exchange.workspace.group, names)
        raise_if_malformed(exchange.workspace.group, exchange.plan)
        out_grad_RH = exchange.rows(exchange.checked(grad_TH, expert_ids_WCK))
        grad_NH, dots_R = weigh_rows(out_grad_RH, rows_NH, scores_WCK, exchange.plan)
        return grad_NH, exchange.to_origin(dots_R), None
