"""Dispatch and combine of one plan, and their gradients: each is the other's adjoint, as in the reference."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sonic_ep.autograd_utils import once_differentiable, savable, unpack_saved
from sonic_ep.distributed.sync_tag import Phase, number_of
from sonic_ep.fast.collectives import collect_values, reserve_values
from sonic_ep.fast.combine.base import PushedCombine
from sonic_ep.fast.copy_engine import CopyEngineGather, GatherInFlight
from sonic_ep.fast.dispatch.base import PulledDispatch
from sonic_ep.fast.permute import gather_rows, poison_if_overflowed, weigh_rows
from sonic_ep.fast.planner import Planner
from sonic_ep.fast.staging import stage_rows
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan, raise_if_malformed
from sonic_ep.profiler_names import BACKWARD, COMBINE, DISPATCH, named


@dataclass(kw_only=True, eq=False)
class Exchange:
    """One plan and what moves rows by it. tag: of the call. backward: for its gradient."""

    plan: RoutingPlan
    dispatch: PulledDispatch
    combine: PushedCombine
    workspace: Workspace
    planner: Planner
    tag: int
    backward: bool = False

    def enter(self, phase: Phase) -> None:
        """Begin a phase of the call, see ``Workspace.enter``."""
        self.workspace.enter(phase, self.tag, backward=self.backward)

    @property
    def group_ends(self) -> Tensor:
        """``plan.group_ends`` (e,), clamped to R where the plan may have overflowed."""
        ends_e = self.plan.group_ends
        return ends_e if self.planner.max_rows is None else ends_e.clamp(max=self.plan.row_capacity)

    def of_backward(self) -> "Exchange":
        """This one, from now on for the gradient of its step: its forward is over."""
        self.backward = True
        return self

    def rows(self, x_TH: Tensor, again: "AgainInBackward | None" = None) -> tuple[Tensor, GatherInFlight | None]:
        """Collective. x of the group's tokens in canonical row order, (R, H); unspecified past the valid rows.

        again: tokens to gather by copy engine besides, behind the same barrier.
        """
        x_TH, plan = x_TH.contiguous(), self.plan
        self.enter(Phase.DISPATCH)
        self.combine.expect(plan.max_tokens, plan.top_k, x_TH.shape[1] * x_TH.element_size())
        again_staged = None if again is None else again.stage(plan.max_tokens, self.workspace)
        staged = self.dispatch.stage(x_TH, plan.max_tokens)
        rows_RH = self._poisoned(self.in_order(self.dispatch.pull(x_TH, staged, plan, plan.row_capacity)))
        # After what dispatch received was freed, to make room for it.
        in_flight = None
        if again is not None and again_staged is not None:
            in_flight = again.gather.bring(again.x_TH, again_staged, plan.max_tokens, with_own=False)
        return rows_RH, in_flight

    def in_order(self, received: Tensor) -> Tensor:
        """What dispatch has received as rows in canonical order, (R, H); unspecified past the valid rows."""
        source_R = self.dispatch.source_of_row(self.plan)
        return received if source_R is None else gather_rows(received, source_R, self.plan.group_ends)

    def sums(
        self, rows_NH: Tensor, scores_WCK: Tensor | None, *, values_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Collective. The weighted sums of a token's rows, (T, H): ``PushedCombine.sums``. Without scores each is 1.

        values_R: fp32, of rows, pushed: returned besides, by slots of this rank, (T, K), 0 for dropped ones.
        """
        self.enter(Phase.COMBINE)
        y_TH, values_TK = self.combine.sums(rows_NH.contiguous(), scores_WCK, self.plan, values_R=values_R)
        return self._poisoned(y_TH), None if values_TK is None else self._poisoned(values_TK)

    def weighted_sums(self, rows_NH: Tensor, scores_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Collective. The sums of a token's rows weighted by scores, (T, H), and the group's scores, (W, C, K)."""
        self.enter(Phase.COMBINE)
        y_TH, scores_WCK = self.combine.weighted(rows_NH, scores_TK, self.plan)
        return self._poisoned(y_TH), scores_WCK

    def values(self, values_R: Tensor) -> Tensor:
        """Collective. ``values_R`` as of ``sums``, where nothing is combined."""
        self.enter(Phase.EXCHANGE)
        return self._poisoned(collect_values(values_R, self.plan, self.workspace))

    @property
    def origins(self) -> Tensor:
        """Where ``push_value`` pushes, (W,) int64."""
        return reserve_values(self.workspace, self.plan.max_tokens, self.plan.top_k).addresses

    def checked(self, grad_NH: Tensor, expert_ids_WCK: Tensor) -> Tensor:
        """The gradient (N, H); all NaN if these ids, saved in a recompute, differ from those of the forward's plan."""
        if expert_ids_WCK.data_ptr() == self.plan.expert_ids.data_ptr():
            return grad_NH
        differs = self.planner.device_errors.compare(self.plan.expert_ids, expert_ids_WCK, number_of(self.tag))
        return grad_NH.masked_fill(differs, math.nan)

    def _poisoned(self, rows_NH: Tensor) -> Tensor:
        """The rows, all NaN if a rank was routed more than the bound."""
        max_rows = self.planner.max_rows
        return rows_NH if max_rows is None else poison_if_overflowed(rows_NH, self.plan, max_rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class AgainInBackward:
    """x (T, H), contiguous, which a copy engine gathers again."""

    gather: CopyEngineGather
    x_TH: Tensor

    def stage(self, max_tokens: int, workspace: Workspace) -> Staging:
        """Collective. Copy x to shared memory; needs a barrier after it."""
        staged = self.gather.reserve(max_tokens, self.x_TH.shape[1] * self.x_TH.element_size())
        if workspace.group.world_size > 1:
            self.gather.before_staging()
            stage_rows(self.x_TH, staged, workspace)
        return staged


class Dispatch(torch.autograd.Function):
    """x (T, H) to rows (R, H). Backward: a combine without scores."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, exchange: Exchange) -> Tensor:
        """Rows in canonical order; those past the valid ones are unspecified."""
        ctx.exchange, ctx.call_lock = exchange, exchange.workspace.call_lock
        ctx.save_for_backward(savable(exchange.plan.expert_ids))
        return exchange.rows(x_TH)[0]

    @staticmethod
    @named(DISPATCH + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        """Gradient of x: the sum of a token's row gradients, with the rounding points of the combine mode."""
        exchange: Exchange = ctx.exchange.of_backward()
        (expert_ids_WCK,) = unpack_saved(ctx, exchange.workspace.group, ("expert_ids of plan",))
        raise_if_malformed(exchange.workspace.group, exchange.plan)
        exchange.enter(Phase.COMBINE)
        exchange.workspace.barrier_before_write()
        x_grad_TH, _ = exchange.sums(grad_RH, None)
        return exchange.checked(x_grad_TH, expert_ids_WCK), None


class Combine(torch.autograd.Function):
    """rows (N, H), N at most R, and scores (T, K) fp32 to (T, H). Backward: d(out) is dispatched to the rows.

    There d(row) = round(score * d(out)), d(score) = the sum over H of d(out) * row in fp32, which returns to the token.
    """

    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, scores_TK: Tensor, exchange: Exchange) -> Tensor:
        """The weighted sums, (T, H)."""
        y_TH, scores_WCK = exchange.weighted_sums(rows_NH, scores_TK)
        ctx.exchange, ctx.call_lock = exchange, exchange.workspace.call_lock
        ctx.save_for_backward(scores_WCK, rows_NH, savable(exchange.plan.expert_ids))
        return y_TH

    @staticmethod
    @named(COMBINE + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of the rows (N, H) and of the scores (T, K)."""
        exchange: Exchange = ctx.exchange.of_backward()
        names = ("scores", "rows", "expert_ids of plan")
        scores_WCK, rows_NH, expert_ids_WCK = unpack_saved(ctx, exchange.workspace.group, names)
        raise_if_malformed(exchange.workspace.group, exchange.plan)
        out_grad_RH, _ = exchange.rows(exchange.checked(grad_TH, expert_ids_WCK))
        grad_NH, dots_R = weigh_rows(out_grad_RH, rows_NH, scores_WCK, exchange.plan, exchange.origins)
        return grad_NH, exchange.values(dots_R), None
