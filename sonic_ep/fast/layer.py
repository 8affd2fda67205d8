"""The fast backend: plan, dispatch and combine over shared memory, and their adjoints.

Dispatch and combine are each other's adjoints, as in the reference: the gradient of dispatch is a combine without
scores in the configured combine mode, the gradient of combine dispatches d(out) in the configured dispatch mode.

Where gradients are on, both take part in backward on every rank of a group of several, whether or not this rank's own
tensors need a gradient: a backward that communicates has to run on all ranks or on none, and to ask the others which
tensors need one would cost a read on the host in every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from sonic_ep.backend import Experts, Routing
from sonic_ep.config import BackendUnavailableError, EPConfig, RouterOptions
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.fast.availability import LAYER_MISSING, interpreted
from sonic_ep.fast.collectives import gather_scores, reserve_values, send_home
from sonic_ep.fast.combine import FastCombine, combine_primitives
from sonic_ep.fast.device import movable
from sonic_ep.fast.dispatch import FastDispatch, dispatch_primitives
from sonic_ep.fast.plan import PlanShape, TileCounts, empty_plan, gathered_counts, placed_plan
from sonic_ep.fast.rows import spoil_if_overflowed, take_rows, weigh_rows
from sonic_ep.fast.verdict import Verdict
from sonic_ep.fast.workspace import Workspace
from sonic_ep.group import EPGroup
from sonic_ep.plan import MOST_SLOTS, RoutingPlan, check_slots, room_for_rows, row_ceiling


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """One plan with the primitives that move rows by it, as the autograd functions need them.

    max_rows: the caller's bound, past which only the device knows that a rank was routed more; None where there is no
        bound, or the host has held it already.
    """

    plan: RoutingPlan
    dispatch: FastDispatch
    combine: FastCombine
    workspace: Workspace
    max_rows: int | None

    def reserve(self, row_bytes: int) -> None:
        """Collective. Allocate what rows and backward need, so that backward never has to."""
        self.dispatch.reserve(self.plan, row_bytes)
        self.combine.reserve(self.plan, row_bytes)
        reserve_values(self.plan, self.workspace)

    def rows(self, x_TH: Tensor) -> Tensor:
        """Collective. x of the group's tokens in canonical row order, (R, H); unspecified past the valid rows."""
        self.workspace.enter()
        received = self.dispatch.receive(movable(x_TH), self.plan)
        source_R = self.dispatch.source_of_row(self.plan)
        rows_RH = received if source_R is None else take_rows(received, source_R, self.plan.group_ends)
        return self._spoiled(rows_RH)

    def sums(self, rows_RH: Tensor, scores_WCK: Tensor | None) -> Tensor:
        """Collective. The weighted sums of a token's rows, (T, H); every score is 1 if there are none."""
        self.workspace.enter()
        y_TH = self.combine.combine(rows_RH.contiguous(), scores_WCK, self.plan)
        return self._spoiled(y_TH)

    def home(self, value_of_row_R: Tensor) -> Tensor:
        """Collective. One fp32 value of each valid row to its slot's home, (T, K); zero for dropped slots."""
        return self._spoiled(send_home(value_of_row_R, self.plan, self.workspace))

    def _spoiled(self, rows_NH: Tensor) -> Tensor:
        """The rows, all NaN if a rank was routed more than the bound."""
        return rows_NH if self.max_rows is None else spoil_if_overflowed(rows_NH, self.plan, self.max_rows)


class Dispatch(torch.autograd.Function):
    """x (T, H) to rows (R, H). Backward: a combine without scores."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TH: Tensor, exchange: Exchange) -> Tensor:
        """Rows in canonical order."""
        ctx.exchange = exchange  # type: ignore[attr-defined]
        return exchange.rows(x_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        """Gradient of x: the sum of a token's row gradients, with the rounding points of the combine mode."""
        return ctx.exchange.sums(grad_RH, None), None


class Combine(torch.autograd.Function):
    """rows (R, H) and scores (T, K) fp32 to (T, H). Backward: d(out) is dispatched to the rows.

    d(row) = round(score * d(out)), d(score) = the sum over H of d(out) * row in fp32, both on the rank of the expert;
    the score's gradient then goes home, one float a slot.
    """

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, scores_TK: Tensor, exchange: Exchange) -> Tensor:
        """The weighted sums, (T, H)."""
        exchange.workspace.enter()
        scores_WCK = gather_scores(scores_TK, exchange.plan, exchange.workspace)
        ctx.exchange = exchange
        ctx.save_for_backward(scores_WCK, rows_RH)
        return exchange.sums(rows_RH, scores_WCK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of the rows (R, H) and of the scores (T, K)."""
        exchange: Exchange = ctx.exchange
        scores_WCK, rows_RH = ctx.saved_tensors
        out_grad_RH = exchange.rows(grad_TH)
        grad_RH, dots_R = weigh_rows(out_grad_RH, rows_RH, scores_WCK, exchange.plan)
        return grad_RH, exchange.home(dots_R), None


class FastBackend:
    """The backend protocol over shared memory. Holds a workspace for each device that a call has come with."""

    def __init__(self, group: EPGroup, config: EPConfig) -> None:
        self._group = group
        self._config = config
        self._kits: dict[torch.device, Kit] = {}

    def gather_number(self, number: int, device: torch.device) -> list[int]:
        """``number`` of every rank, in rank order. On the host: for what is agreed once, never in a steady state."""
        if self._group.world_size == 1:
            return [number]
        mine = torch.tensor([number], dtype=torch.int64, device=self._group.device_for(device))
        everybody = [torch.empty_like(mine) for _ in range(self._group.world_size)]
        dist.all_gather(everybody, mine, group=self._group.process_group)
        return [int(other) for other in everybody]

    def route(self, x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions) -> Routing:
        """Raises ``BackendUnavailableError``: this backend has no router yet."""
        raise BackendUnavailableError(f"{self._group}: backend 'fast': {LAYER_MISSING}")

    def check_expert_ids(self, topk_idx_TK: Tensor, num_experts: int) -> None:
        """The plan's kernels flag ids out of range on the device: to look at them here would be a read on the host."""

    def plan(self, topk_idx_TK: Tensor, *, num_experts: int, capacity: int, distinct: bool) -> RoutingPlan:
        """See ``sonic_ep.fast.plan``. Raises what the last plan has flagged, on every rank alike."""
        kit = self._kit(topk_idx_TK.device)
        kit.verdict.raise_if_bad()
        kit.workspace.enter()
        shape = PlanShape(
            rank=self._group.rank,
            world_size=self._group.world_size,
            capacity=capacity,
            top_k=topk_idx_TK.shape[1],
            num_experts=num_experts,
        )
        check_slots(self._group, world_size=shape.world_size, capacity=capacity, top_k=shape.top_k)
        if capacity == 0:
            return empty_plan(shape, topk_idx_TK)
        bound = MOST_SLOTS if self._bound is None else self._bound
        kit.verdict.expect(num_experts=num_experts, max_rows=bound)
        counts = gathered_counts(topk_idx_TK, shape, kit.workspace, kit.verdict.record)
        plan = placed_plan(
            counts,
            shape,
            num_tokens=topk_idx_TK.shape[0],
            row_capacity=self._room(counts, shape, kit.verdict, distinct=distinct),
            max_rows=bound,
            verdict=kit.verdict.record,
        )
        kit.verdict.queued()
        return plan

    def dispatch(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """Rows in canonical order, (R, H)."""
        exchange = self._exchange(plan, x_TH)
        rows_RH: Tensor = Dispatch.apply(self._joined(x_TH), exchange)
        return rows_RH

    def combine(self, rows_RH: Tensor, topk_scores_TK: Tensor, plan: RoutingPlan) -> Tensor:
        """The weighted sums of a token's rows, (T, H)."""
        exchange = self._exchange(plan, rows_RH)
        y_TH: Tensor = Combine.apply(self._joined(rows_RH), self._joined(topk_scores_TK.float()), exchange)
        return y_TH

    def layer(self, x_TH: Tensor, topk_scores_TK: Tensor, plan: RoutingPlan, experts: Experts) -> Tensor:
        """Raises ``BackendUnavailableError``: this backend has no experts yet."""
        raise BackendUnavailableError(f"{self._group}: backend 'fast': {LAYER_MISSING}")

    def check(self) -> None:
        """Wait for the devices, then raise what they have flagged."""
        for kit in self._kits.values():
            kit.workspace.synchronize()
            kit.workspace.raise_expired()
            kit.verdict.raise_if_bad()

    def close(self) -> None:
        """Give the shared memory back."""
        for kit in self._kits.values():
            kit.workspace.close()
        self._kits.clear()

    def _room(self, counts: TileCounts, shape: PlanShape, verdict: Verdict, *, distinct: bool) -> int:
        """R. Reads the rows of all ranks on the host if the config asks for it, and raises what is known by then."""
        rows_W = None
        if self._config.cpu_sync_on_runtime:
            rows_W = counts.totals[: shape.num_experts].view(shape.world_size, -1).sum(dim=1).tolist()
            verdict.raise_if_bad()
        ceiling = row_ceiling(
            world_size=shape.world_size,
            capacity=shape.capacity,
            top_k=shape.top_k,
            experts_per_rank=shape.experts_per_rank,
            distinct=distinct,
        )
        return room_for_rows(self._group, self._config, rank=shape.rank, ceiling=ceiling, rows_W=rows_W)

    @property
    def _bound(self) -> int | None:
        """``max_rows`` as kernels can take it: no rank has more rows than there are slots."""
        return None if self._config.max_rows is None else min(self._config.max_rows, MOST_SLOTS)

    def _kit(self, device: torch.device) -> Kit:
        """What this group holds on ``device``. Collective on the first call with it."""
        if device not in self._kits:
            if interpreted() == (device.type == "cuda"):
                where = "the CPU under Triton's interpreter" if interpreted() else "CUDA devices"
                raise ValueError(f"{self._group}: device: got {device}, expected one of {where} for backend 'fast'")
            self._kits[device] = Kit.make(self._group, device)
        return self._kits[device]

    def _joined(self, tensor: Tensor) -> Tensor:
        """The tensor, requiring a gradient if there may be a backward that other ranks take part in."""
        if self._group.world_size == 1 or not torch.is_grad_enabled() or tensor.requires_grad:
            return tensor
        own = tensor.clone() if tensor.is_inference() else tensor.detach()
        return own.requires_grad_()

    def _exchange(self, plan: RoutingPlan, rows: Tensor) -> Exchange:
        kit = self._kit(rows.device)
        load = Workload(world_size=plan.world_size, top_k=plan.top_k, num_experts=plan.num_experts)
        modes = choose_modes(self._config, load)
        exchange = Exchange(
            plan=plan,
            dispatch=kit.dispatch[modes.dispatch],
            combine=kit.combine[modes.combine],
            workspace=kit.workspace,
            max_rows=None if self._config.cpu_sync_on_runtime else self._bound,
        )
        exchange.reserve(rows.shape[1] * rows.element_size())
        return exchange


@dataclass(frozen=True, kw_only=True, eq=False)
class Kit:
    """What a backend holds on one device: the workspace, every primitive over it, and the plans' verdict."""

    workspace: Workspace
    dispatch: Any
    combine: Any
    verdict: Verdict

    @staticmethod
    def make(group: EPGroup, device: torch.device) -> Kit:
        """Collective: allocates shared memory."""
        workspace = Workspace(group, device)
        return Kit(
            workspace=workspace,
            dispatch=dispatch_primitives(workspace),
            combine=combine_primitives(workspace),
            verdict=Verdict(group, device),
        )
