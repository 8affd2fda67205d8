"""Plans as the backend makes them: queued at once, then cut to their exact size with ``cpu_sync_on_runtime``.

The host reads that size after the caller has queued all work that does not need it, so that the GPU stays busy.
"""

import ctypes
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sonic_ep.config import EPConfig
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.sync_tag import Phase, number_of
from sonic_ep.fast.collectives import FP32_BYTES, SCORES
from sonic_ep.fast.device_errors import DeviceErrors, Limits
from sonic_ep.fast.launch import capturing, host_ints
from sonic_ep.fast.plan import PlanShape, empty_plan, gathered_counts, placed_plan
from sonic_ep.fast.staging import StagedCall
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import INDEX_BYTES, MOST_SLOTS, RoutingPlan, check_slots, room_for_rows, row_ceiling
from sonic_ep.profiler_names import PLAN, named

# In place of a count that has not been copied yet.
NOT_ARRIVED = -1
# Name of a shared buffer.
IDS = "ids"
# Reads of host memory between two queries of the driver.
READS_PER_QUERY = 10_000


class HostCopy:
    """A copy of device counts to the host. ``start``, queue other work, ``wait``.

    The host polls the copy, since a wait in the driver would end some 200 us late. Other threads may run meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = host_ints(0, device)
        self._ints: Any = ()
        self._queued: torch.cuda.Event | None = None

    def start(self, counts: Tensor) -> None:
        """Queue the copy of int32 ``counts``, none below zero, on the current stream. Raises in graph capture."""
        if capturing(self._device):
            raise RuntimeError(
                "cpu_sync_on_runtime: got a call in graph capture, where the host cannot read; expected it to be False"
            )
        if self._queued is not None:
            # Only a call that failed can have left a copy in flight.
            self._queued.synchronize()
        if self._host.shape != counts.shape:
            self._host = host_ints(counts.numel(), self._device)
            self._ints = (ctypes.c_int32 * counts.numel()).from_address(self._host.data_ptr())
        self._host.fill_(NOT_ARRIVED)
        self._host.copy_(counts, non_blocking=True)
        if self._device.type == "cuda":
            self._queued = torch.cuda.current_stream(self._device).record_event()

    def wait(self) -> list[int]:
        """The counts, once all are copied. Does not wait for what has been queued since."""
        reads = 0
        while NOT_ARRIVED in self._ints:
            reads += 1
            time.sleep(0)
            if self._queued is not None and reads % READS_PER_QUERY == 0:
                # Raises the error of a GPU that has failed and will never copy.
                self._queued.query()
        return list(self._ints)


@dataclass(kw_only=True, eq=False)
class PendingPlan:
    """A plan with room for the most rows. counted: a copy of all ranks' row counts to the host has started.

    counts (E,): for the caller, whom backward survives. scores_WCK: the scores of the group, fp32, if they came with
    the ids; unspecified for tokens that do not exist.
    """

    plan: RoutingPlan
    counts: Tensor
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
        # As kernels can take it: no rank has more rows than there are slots.
        self._bound = None if config.max_rows is None else min(config.max_rows, MOST_SLOTS)
        # The bound that the device checks; None if there is none, or the host checks it.
        self.max_rows = None if config.cpu_sync_on_runtime else self._bound

    def begin(self) -> None:
        """Collective. Begin a plan. Raises as ``DeviceErrors``."""
        self.device_errors.begin()
        self._workspace.enter(Phase.EXCHANGE)

    def reserve(self, max_tokens: int, top_k: int, *, scored: bool, rows: Staging | None = None) -> StagedCall:
        """Collective. Shared memory for ids, and scores if they go with them. rows: where the call stages tokens."""
        check_slots(self._group, world_size=self._group.world_size, max_tokens=max_tokens, top_k=top_k)
        room = max_tokens * top_k
        scores = self._workspace.staging(SCORES, room * FP32_BYTES) if scored else None
        ids = self._workspace.staging(IDS, room * INDEX_BYTES)
        return StagedCall(ids=ids, scores=scores, rows=ids if rows is None else rows)

    @named(PLAN)
    def plan(self, staged: StagedCall, shape: PlanShape, *, num_tokens: int, distinct: bool) -> PendingPlan:
        """Collective. The barrier behind the staging, then the kernels of the plan."""
        if shape.max_tokens == 0:
            return self._empty(staged, shape)
        max_rows = MOST_SLOTS if self.max_rows is None else self.max_rows
        errors = self.device_errors
        errors.expect(Limits(num_experts=shape.num_experts, max_rows=max_rows, step=number_of(self._workspace.tag)))
        self._workspace.barrier_after_write()
        found = gathered_counts(staged, shape, self._workspace, errors.codes)
        if self._config.cpu_sync_on_runtime:
            # Summed on the device, so that little is left for the host while the GPU waits for it.
            tiles_E = found.counts[-1:] if found.scanned else found.counts[:-1]
            slots_TWe = tiles_E[:, : shape.num_experts].unflatten(1, (shape.world_size, -1))
            self._counts.start(slots_TWe.sum(dim=(0, 2), dtype=torch.int32))
        ceiling = self._most_rows(shape, distinct)
        room = {"num_tokens": num_tokens, "row_capacity": ceiling, "max_rows": max_rows}
        # Only where there is a bound does backward read the counts, which the caller of a layer gets.
        copied = self.max_rows is not None
        plan, counts = placed_plan(found, shape, device_errors=errors.codes, copied=copied, **room)
        # A router's own ids are in range, and without a bound there is room for all rows.
        errors.queued(flags=not distinct or self.max_rows is not None)
        counted = self._config.cpu_sync_on_runtime
        return PendingPlan(plan=plan, counts=counts, scores_WCK=found.scores, counted=counted)

    def rows(self, pending: PendingPlan) -> int:
        """The final R; with ``cpu_sync_on_runtime`` a read on the host, which raises ``RowOverflowError``."""
        plan = pending.plan
        if not pending.counted:
            return plan.row_capacity
        rows_W = self._counts.wait()
        return room_for_rows(self._group, self._config, rank=plan.rank, ceiling=plan.row_capacity, rows_W=rows_W)

    def sized(self, pending: PendingPlan, rows: int) -> RoutingPlan:
        """The plan with its final R = ``rows``. If the host has read R, raises ``ValueError`` for ids out of range."""
        if not pending.counted:
            return pending.plan
        self.device_errors.raise_current()
        # A copy, so that memory for the most rows is freed.
        return replace(pending.plan, slot_of_row=pending.plan.slot_of_row[:rows].clone())

    def _most_rows(self, shape: PlanShape, distinct: bool) -> int:
        sizes = {"world_size": shape.world_size, "max_tokens": shape.max_tokens, "top_k": shape.top_k}
        rows = row_ceiling(experts_per_rank=shape.experts_per_rank, distinct=distinct, **sizes)
        return rows if self._bound is None else min(rows, self._bound)

    def _empty(self, staged: StagedCall, shape: PlanShape) -> PendingPlan:
        """No rank has a token."""
        plan = empty_plan(shape, self._workspace.device)
        scores_WCK = None if staged.scores is None else plan.expert_ids.new_empty(plan.expert_ids.shape).float()
        return PendingPlan(plan=plan, counts=plan.counts.clone(), scores_WCK=scores_WCK, counted=False)
