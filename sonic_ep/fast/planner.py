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
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.device_errors import DeviceErrors, Limits
from sonic_ep.fast.launch import capturing, host_ints
from sonic_ep.fast.plan import PlanShape, empty_plan, gathered_counts, placed_plan
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import MOST_SLOTS, RoutingPlan, check_slots, room_for_rows, row_ceiling

# In place of a count that has not been copied yet.
NOT_ARRIVED = -1
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


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingPlan:
    """A plan with room for the most rows. counted: a copy of all ranks' row counts to the host has started.

    scores_WCK: the scores of the group, fp32, if they came with the ids; unspecified for tokens that do not exist.
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
        # As kernels can take it: no rank has more rows than there are slots.
        self._bound = None if config.max_rows is None else min(config.max_rows, MOST_SLOTS)
        # The bound that the device checks; None if there is none, or the host checks it.
        self.max_rows = None if config.cpu_sync_on_runtime else self._bound

    def begin(
        self, topk_idx_TK: Tensor, *, num_experts: int, max_tokens: int, distinct: bool, scores_TK: Tensor | None = None
    ) -> PendingPlan:
        """Collective. Exchange ids, and scores (T, K) fp32 if given, and queue the plan. Raises as ``DeviceErrors``."""
        self.device_errors.begin()
        self._workspace.enter(Phase.EXCHANGE)
        sizes = {"world_size": self._group.world_size, "max_tokens": max_tokens, "top_k": topk_idx_TK.shape[1]}
        shape = PlanShape(rank=self._group.rank, num_experts=num_experts, **sizes)
        check_slots(self._group, **sizes)
        if max_tokens == 0:
            plan = empty_plan(shape, topk_idx_TK.device)
            none_WCK = None if scores_TK is None else scores_TK.new_empty(plan.expert_ids.shape)
            return PendingPlan(plan=plan, scores_WCK=none_WCK, counted=False)
        max_rows = MOST_SLOTS if self.max_rows is None else self.max_rows
        step = self._workspace.step.number
        self.device_errors.expect(Limits(num_experts=num_experts, max_rows=max_rows, step=step))
        codes = self.device_errors.codes
        counts = gathered_counts(topk_idx_TK, shape, self._workspace, codes, scores_TK)
        if self._config.cpu_sync_on_runtime:
            # Summed on the device, so that little is left for the host while the GPU waits for it.
            self._counts.start(counts.totals[:num_experts].view(shape.world_size, -1).sum(dim=1, dtype=torch.int32))
        rows = row_ceiling(experts_per_rank=shape.experts_per_rank, distinct=distinct, **sizes)
        room = {"row_capacity": rows if self._bound is None else min(rows, self._bound), "max_rows": max_rows}
        plan = placed_plan(counts, shape, num_tokens=topk_idx_TK.shape[0], device_errors=codes, **room)
        # A router's own ids are in range, and without a bound there is room for all rows.
        self.device_errors.queued(flags=not distinct or self.max_rows is not None)
        return PendingPlan(plan=plan, scores_WCK=counts.scores, counted=self._config.cpu_sync_on_runtime)

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
