"""Plans as the backend makes them: queued at once, and cut to their exact size where the config asks for that.

The exact size is a read on the host. It is started as soon as the rows are counted, and awaited when the caller has
queued all that can do without: so the GPU has work while the host learns the size.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sonic_ep.config import EPConfig
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.device_errors import DeviceErrors, Limits
from sonic_ep.fast.launch import host_ints
from sonic_ep.fast.plan import PlanShape, TileCounts, empty_plan, gathered_counts, placed_plan
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import MOST_SLOTS, RoutingPlan, check_slots, room_for_rows, row_ceiling

# No count.
NOT_ARRIVED = -1
# Looks at the memory of the host between two questions to the driver.
LOOKS_AT_A_TIME = 10_000


class HostCopy:
    """Counts of the device on their way to the host. ``start``, queue other work, ``wait``.

    The host looks at the memory that they arrive in. To wait in the driver would end some 200 us late, with the GPU
    idle by then; to look costs a core for as long as the host is ahead, but lets other threads of this process run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = host_ints(0, device)
        self._words: Any = ()
        self._queued: torch.cuda.Event | None = None

    def start(self, counts: Tensor) -> None:
        """Queue the copy of int32 ``counts``, none below zero, on the current stream.

        Raises ``RuntimeError`` in graph capture.
        """
        on_gpu = self._device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "cpu_sync_on_runtime: got a call in graph capture, where the host cannot read; expected it off there"
            )
        if self._queued is not None:
            # A call that failed may have left a copy under way. Nothing to wait for otherwise.
            self._queued.synchronize()
        if self._host.shape != counts.shape:
            self._host = host_ints(counts.numel(), self._device)
            self._words = (ctypes.c_int32 * counts.numel()).from_address(self._host.data_ptr())
        self._host.fill_(NOT_ARRIVED)
        self._host.copy_(counts, non_blocking=True)
        if on_gpu:
            self._queued = torch.cuda.Event()
            self._queued.record(torch.cuda.current_stream(self._device))

    def wait(self) -> list[int]:
        """The counts, once they have arrived; what has been queued since goes on."""
        looks = 0
        while NOT_ARRIVED in self._words:
            looks += 1
            time.sleep(0)
            if self._queued is not None and looks % LOOKS_AT_A_TIME == 0:
                # Where the GPU has failed nothing will arrive, and this raises what it failed of.
                self._queued.query()
        return list(self._words)


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingPlan:
    """A plan that has room for every row that may come; ``Planner.rows`` and ``Planner.sized`` give it its final R.

    scores_WCK: the scores of the group, fp32, if they came with the ids; unspecified for tokens that do not exist.
    counted: whether the rows of all ranks are on their way to the host.
    """

    plan: RoutingPlan
    scores_WCK: Tensor | None
    counted: bool


class Planner:
    """Makes the plans of one group on one device."""

    def __init__(self, group: EPGroup, config: EPConfig, workspace: Workspace) -> None:
        self._group = group
        self._config = config
        self._workspace = workspace
        self.device_errors = DeviceErrors(group, workspace.device, host_reads=config.cpu_sync_on_runtime)
        self._counts = HostCopy(workspace.device)

    @property
    def max_rows(self) -> int | None:
        """The bound that only the device can hold; None where there is none, or the host holds it."""
        return None if self._config.cpu_sync_on_runtime else self._bound

    def begin(
        self,
        topk_idx_TK: Tensor,
        *,
        num_experts: int,
        max_tokens: int,
        distinct: bool,
        scores_TK: Tensor | None = None,
    ) -> PendingPlan:
        """Collective. Exchange ids, and scores (T, K) fp32 if there are any, and queue the plan.

        Raises the error of the plan ``PLANS_AHEAD`` before, on every rank alike; see ``DeviceErrors``.
        """
        self.device_errors.begin()
        self._workspace.enter(Phase.EXCHANGE)
        shape = PlanShape(
            rank=self._group.rank,
            world_size=self._group.world_size,
            max_tokens=max_tokens,
            top_k=topk_idx_TK.shape[1],
            num_experts=num_experts,
        )
        check_slots(self._group, world_size=shape.world_size, max_tokens=max_tokens, top_k=shape.top_k)
        if max_tokens == 0:
            plan = empty_plan(shape, topk_idx_TK.device)
            scores_WCK = None if scores_TK is None else scores_TK.new_empty(plan.expert_ids.shape)
            return PendingPlan(plan=plan, scores_WCK=scores_WCK, counted=False)
        step = self._workspace.step.number
        self.device_errors.expect(Limits(num_experts=num_experts, max_rows=self._held_by_device, step=step))
        counts = gathered_counts(topk_idx_TK, shape, self._workspace, self.device_errors.words, scores_TK)
        if self._config.cpu_sync_on_runtime:
            # Summed here, so that little is left for the host to do while the GPU waits for it.
            self._counts.start(counts.totals[:num_experts].view(shape.world_size, -1).sum(dim=1, dtype=torch.int32))
        plan = self._placed(counts, shape, num_tokens=topk_idx_TK.shape[0], distinct=distinct)
        # A router's own ids are in range, and where no bound is set there is room for all rows.
        self.device_errors.queued(flags=not distinct or self.max_rows is not None)
        return PendingPlan(plan=plan, scores_WCK=counts.scores, counted=self._config.cpu_sync_on_runtime)

    def rows(self, pending: PendingPlan) -> int:
        """The final R; with ``cpu_sync_on_runtime`` the one read on the host. Raises ``RowOverflowError`` there."""
        plan = pending.plan
        if not pending.counted:
            return plan.row_capacity
        rows_W = self._counts.wait()
        return room_for_rows(self._group, self._config, rank=plan.rank, ceiling=plan.row_capacity, rows_W=rows_W)

    def sized(self, pending: PendingPlan, rows: int) -> RoutingPlan:
        """The plan with its final R = ``rows``. Raises what the host has learned with it: ids out of range."""
        if not pending.counted:
            return pending.plan
        self.device_errors.raise_current()
        # A copy, so that the rest of the ceiling is not kept.
        return replace(pending.plan, slot_of_row=pending.plan.slot_of_row[:rows].clone())

    def _placed(self, counts: TileCounts, shape: PlanShape, *, num_tokens: int, distinct: bool) -> RoutingPlan:
        ceiling = row_ceiling(
            world_size=shape.world_size,
            max_tokens=shape.max_tokens,
            top_k=shape.top_k,
            experts_per_rank=shape.experts_per_rank,
            distinct=distinct,
        )
        return placed_plan(
            counts,
            shape,
            num_tokens=num_tokens,
            row_capacity=ceiling if self._bound is None else min(ceiling, self._bound),
            max_rows=self._held_by_device,
            device_errors=self.device_errors.words,
        )

    @property
    def _bound(self) -> int | None:
        """``max_rows`` as kernels can take it: no rank has more rows than there are slots."""
        return None if self._config.max_rows is None else min(self._config.max_rows, MOST_SLOTS)

    @property
    def _held_by_device(self) -> int:
        return MOST_SLOTS if self.max_rows is None else self.max_rows
