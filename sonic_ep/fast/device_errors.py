"""Errors that kernels find and the host raises: a wait that failed, bad ids, too many rows, another recompute."""

import os
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sonic_ep.distributed.collectives import BoundedCollectives, left
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.sync_tag import Phase, SyncTag, mismatch
from sonic_ep.errors import CollectiveMismatchError, PeerError, PeerLostError
from sonic_ep.fast.launch import capturing, host_ints
from sonic_ep.fast.sync import ELSEWHERE
from sonic_ep.plan import RoutingPlan, missing_rows_error, overflow_error, recompute_error

# Of a failed wait, int64: why (0: none failed; see ``sonic_ep.fast.sync``), peer + 1, this rank's tag, the peer's flag.
WAIT_CODES = 4
# Of a plan, int32: rank with an id out of range + 1; rank with too many rows + 1; its rows; last step rerouted; rows
# that a combine of this rank lacked, the most.
PLAN_CODES, REROUTED, MISSING = 5, 3, 4
# Plans that the host may queue ahead of the device: the error of plan n is raised by plan n + PLANS_AHEAD.
PLANS_AHEAD = 8
MOST_STEP = 2**31 - 1


def report_at_exit(owner: Any, find: Callable[[], Exception | None]) -> weakref.finalize:
    """Print what ``find`` finds, if anything, once ``owner`` is freed. ``find`` must not hold it."""
    process = os.getpid()

    def report() -> None:
        # In a forked child it is the parent that reports.
        found = find() if process == os.getpid() else None
        if found is not None:
            print(f"sonic_ep: {type(found).__name__}: {found}", file=sys.stderr, flush=True)

    return weakref.finalize(owner, report)


def raise_found(found: Exception | None, cause: RuntimeError | None = None) -> None:
    """Raise ``found`` from ``cause``, if there is any."""
    if found is not None:
        try:
            raise found from cause
        finally:
            # Its traceback holds this frame, which would hold it for good.
            del found


class WaitErrors:
    """Failed waits of the kernels of one workspace. codes (WAIT_CODES,) int64: pinned, read while kernels run.

    On a GPU the kernel traps, too, and the program may see only PyTorch's error, which names no rank: so an error that
    was not raised is printed at the end.
    """

    def __init__(self, collectives: BoundedCollectives, device: torch.device) -> None:
        self.codes = host_ints(WAIT_CODES, device, torch.int64)
        self._find = partial(wait_error, self.codes, collectives)
        self._unraised = report_at_exit(self, self._find)

    def found(self) -> bool:
        """Whether a wait has failed. Does not wait for the GPU."""
        return bool(self.codes[0])

    def raise_if_any(self, cause: RuntimeError | None = None) -> None:
        """Raise the ``PeerError`` of a failed wait, from ``cause``. Does not wait for the GPU."""
        if self.found():
            self._unraised.detach()
            raise_found(self._find(), cause)


def wait_error(codes: Tensor, collectives: BoundedCollectives) -> PeerError | None:
    """The error that the codes of a failed wait stand for; None if none has failed."""
    why, peer, here, there = codes.tolist()
    if not why:
        return None
    group, peer, sync_tag, shown = collectives.group, peer - 1, SyncTag.decode(here), SyncTag.decode(there)
    if why == ELSEWHERE and shown.phase is not Phase.LEFT:
        return CollectiveMismatchError(f"{group}: {mismatch(sync_tag, peer, shown)}")
    reason = collectives.why_left(peer)
    if reason or why == ELSEWHERE:
        return PeerLostError(f"{group}: {left(peer, reason or 'see its own output for the error', sync_tag)}")
    return collectives.late([peer], sync_tag)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a plan and the step that made it, for error messages."""

    num_experts: int = 0
    max_rows: int = 0
    step: int = 0


class PlanErrors:
    """Error codes of one plan, (PLAN_CODES,) int32. All but the last are the same on every rank, which reads all ids.

    own: pinned, written by the plan's kernels. gathered: a copy of what graphs and backwards had written by then.
    """

    def __init__(self, group: EPGroup, device: torch.device) -> None:
        self._group = group
        self.own = host_ints(PLAN_CODES, device)
        self.gathered: Tensor | None = None
        self.limits = self.gathered_limits = Limits()
        self.written: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until every kernel that writes the codes has run. Raises ``RuntimeError`` if one failed."""
        if self.written is not None:
            self.written.synchronize()

    def error(self) -> Exception | None:
        """``ValueError``, ``RowOverflowError`` or ``RecomputeError``, if there is one."""
        found = self._error_of(self.own, self.limits)
        if found is None and self.gathered is not None:
            found = self._error_of(self.gathered, self.gathered_limits)
        return found

    def _error_of(self, codes: Tensor, limits: Limits) -> Exception | None:
        bad_rank, full_rank, rows, rerouted, missing = codes.tolist()
        more = f" (in step {limits.step})"
        if bad_rank:
            expected = f"expected 0 to {limits.num_experts - 1}, or -1 for a dropped slot{more}"
            got = f"topk_idx: got expert ids out of range on rank {bad_rank - 1}"
            return ValueError(f"{self._group}: {got}, {expected}")
        if full_rank:
            return overflow_error(self._group, max_rows=limits.max_rows, rank=full_rank - 1, rows=rows, more=more)
        if rerouted:
            return recompute_error(self._group, rerouted)
        return missing_rows_error(self._group, missing=missing) if missing else None


def first_error(records: Iterable[PlanErrors]) -> Exception | None:
    """The first error in ``records``, or None. Waits for their kernels, except in graph capture."""
    in_capture = False
    # A lost GPU raises, here and below. What its kernels have written on the host is read all the same.
    with suppress(RuntimeError):
        in_capture = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    for record in records:
        on_device = record.gathered is not None and record.gathered.is_cuda
        with suppress(RuntimeError):
            # In graph capture the host must not synchronize.
            if not in_capture:
                record.wait()
        with suppress(RuntimeError):
            if not (in_capture and on_device) and (found := record.error()) is not None:
                return found
    return None


class DeviceErrors:
    """Raises the error of a plan ``PLANS_AHEAD`` plans later, or in ``raise_all``: in the same call on every rank.

    Errors that no call has raised are printed when this object is freed. host_reads: whether ``compare`` raises.
    """

    def __init__(self, group: EPGroup, device: torch.device, *, host_reads: bool = False) -> None:
        self._group = group
        self.host_reads = host_reads
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._records = [PlanErrors(group, device) for _ in range(PLANS_AHEAD)]
        # Written by graphs and backwards at any time. From then on each plan copies them, in stream order.
        with torch.inference_mode(False):
            self._gathered = torch.zeros(PLAN_CODES, dtype=torch.int32, device=device)
        self._latest = PlanErrors(group, device)
        report_at_exit(self, partial(first_error, (*self._records, self._latest)))
        self._plans = 0

    @property
    def codes(self) -> Tensor:
        """Where the kernels of the plan being queued write errors, (PLAN_CODES,) int32."""
        return self._gathered if capturing(self._device) else self._current.own

    def begin(self) -> None:
        """Collective. Start a plan; wait for the plan ``PLANS_AHEAD`` before, and raise its error. No-op in capture."""
        if not capturing(self._device):
            self._plans += 1
            self._raise(self._current)
            self._current.written = None

    def expect(self, limits: Limits) -> None:
        """Set the bounds of the plan being queued."""
        if capturing(self._device):
            self._latest.gathered_limits = limits
        else:
            self._current.limits = limits

    def queued(self, *, flags: bool) -> None:
        """All kernels of the plan have been queued on the current stream. flags: whether they may find an error."""
        if capturing(self._device):
            if flags:
                self._latest.gathered = self._gathered
            return
        current = self._current
        if self._latest.gathered is not None:
            if current.gathered is None:
                current.gathered = host_ints(PLAN_CODES, self._device)
            current.gathered_limits = self._latest.gathered_limits
            current.gathered.copy_(self._gathered, non_blocking=True)
        if self._on_gpu and (flags or current.gathered is not None):
            current.written = torch.cuda.current_stream(self._device).record_event()

    def compare(self, expert_ids_WCK: Tensor, again_WCK: Tensor, step: int) -> Tensor:
        """Whether the ids of a forward and of its recompute differ, bool () on the device; ``RecomputeError`` if so."""
        differs = (expert_ids_WCK != again_WCK).any()
        if self.host_reads and bool(differs):
            raise recompute_error(self._group, step)
        rerouted = self._gathered[REROUTED:MISSING]
        torch.maximum(rerouted, differs.int() * min(step, MOST_STEP), out=rerouted)
        self._latest.gathered = self._gathered
        return differs

    def flag_missing_rows(self, rows: int, plan: RoutingPlan) -> None:
        """Flag, on this rank, a combine of ``rows`` rows if the plan has more that are valid."""
        lacking = plan.group_ends[-1:].clamp(max=plan.row_capacity) - rows
        missing = self._gathered[MISSING:]
        torch.maximum(missing, lacking, out=missing)
        self._latest.gathered = self._gathered

    def raise_current(self) -> None:
        """Wait for the plan queued last, and raise its error."""
        self._raise(self._current)

    def raise_all(self) -> None:
        """Collective. Wait for all that is queued, and raise the first error; later calls raise further ones."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        for place in range(1, PLANS_AHEAD + 1):
            self._raise(self._records[(self._plans + place) % PLANS_AHEAD])
        self._raise(self._latest)

    @property
    def _current(self) -> PlanErrors:
        return self._records[self._plans % PLANS_AHEAD]

    def _raise(self, record: PlanErrors) -> None:
        record.wait()
        raise_found(self._taken(record))

    def _taken(self, record: PlanErrors) -> Exception | None:
        """The error of ``record``, cleared from it, or from every copy of the gathered codes."""
        found = record.error()
        if found is not None and record.own.any():
            record.own.zero_()
        elif found is not None:
            if self._on_gpu:
                torch.cuda.synchronize(self._device)
            for copied in (*self._records, self._latest):
                if copied.gathered is not None:
                    copied.gathered.zero_()
        return found
