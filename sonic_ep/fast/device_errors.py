"""Errors that kernels find and the host raises: a wait that failed, bad ids, too many rows, another recompute."""

import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.compat import stream_is_captured
from sonic_ep.distributed.collectives import BoundedCollectives, left
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.sync_tag import Phase, SyncTag, mismatch
from sonic_ep.errors import CollectiveMismatchError, PeerError, PeerLostError
from sonic_ep.fast.launch import capturing, host_ints, launch, triton_kernel
from sonic_ep.fast.sync import ELSEWHERE
from sonic_ep.plan import RoutingPlan, missing_rows_error, overflow_error, recompute_error

# Of a failed wait, int64: why (0: none failed; see ``sonic_ep.fast.sync``), peer + 1, this rank's tag, the peer's flag.
WAIT_CODES = 4
# Of a plan, int32: rank with an id out of range + 1; rank with too many rows + 1; its rows; last step rerouted; rows
# that a combine of this rank lacked, the most.
PLAN_CODES, MISSING = 5, 4
REROUTED: tl.constexpr = tl.constexpr(3)
# The codes of each kind of error, in the order in which they are raised.
ALL, KINDS = slice(None), (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5))
# From one plan's codes to the next's: kernels are compiled for pointers to multiples of 16 bytes.
CODES_STRIDE = 8
# Plans that the host may queue ahead of the device: the error of plan n is raised by plan n + PLANS_AHEAD. As many
# layers fill the queue of a GPU, so the host never waits for an error.
PLANS_AHEAD = 64
# Windows of plans among so many, with an event each.
WINDOWS = 8
MOST_STEP = 2**31 - 1
COMPARED_IDS = 1024


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
        # Reading a tensor would take microseconds, and every phase looks here.
        self._seen = self.codes.numpy().data
        self._find = partial(wait_error, self.codes, collectives)
        self._unraised = report_at_exit(self, self._find)

    def found(self) -> bool:
        """Whether a wait has failed. Does not wait for the GPU."""
        return self._seen[0] != 0

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


@dataclass(kw_only=True)
class Limits:
    """Bounds of a plan and the step that made it, for error messages."""

    num_experts: int = 0
    max_rows: int = 0
    step: int = 0


class PlanErrors:
    """Error codes (PLAN_CODES,) int32 of one plan, or of all that graphs and backwards have written by some plan.

    codes: pinned, or on a GPU, where reading them waits for its kernels. All but the last are the same on every rank,
    which reads all ids. used: whether any kernel may have written to them.
    """

    def __init__(self, group: EPGroup, codes: Tensor) -> None:
        self._group = group
        self.codes = codes
        self.limits = Limits()
        self.used = False
        # Reading a tensor would take microseconds, and every plan looks here.
        self._seen = None if codes.is_cuda else codes.numpy().data

    def error(self, kind: slice = ALL) -> Exception | None:
        """``ValueError``, ``RowOverflowError`` or ``RecomputeError``, if there is one of this kind: the first."""
        found = self.codes.tolist() if self._seen is None else self._seen
        if not any(found):
            return None
        of_kind = [0] * PLAN_CODES
        of_kind[kind] = found[kind]
        bad_rank, full_rank, rows, rerouted, missing = of_kind
        limits, more = self.limits, f" (in step {self.limits.step})"
        if bad_rank:
            expected = f"expected 0 to {limits.num_experts - 1}, or -1 for a dropped slot{more}"
            got = f"topk_idx: got expert ids out of range on rank {bad_rank - 1}"
            return ValueError(f"{self._group}: {got}, {expected}")
        if full_rank:
            return overflow_error(self._group, max_rows=limits.max_rows, rank=full_rank - 1, rows=rows, more=more)
        if rerouted:
            return recompute_error(self._group, rerouted)
        return missing_rows_error(self._group, missing=missing) if missing else None

    @property
    def kind(self) -> slice:
        """The codes of the first error."""
        found = self.codes.tolist()
        return next((kind for kind in KINDS if any(found[kind])), ALL)

    def clear(self, kind: slice = ALL) -> None:
        """None of this kind. Kernels that write to them have run."""
        self.codes[kind].zero_()


class Mark:
    """A place in the queue of the device, which it has passed once ``wait`` returns.

    first: the first plan of the window of plans that it ends. gathered: a copy of what graphs and backwards have
    written by then. With windows of 8, the mark that ends the plans 8 to 15 is looked at by plan 8 + ``PLANS_AHEAD``.
    """

    def __init__(self, gathered: PlanErrors, event: torch.cuda.Event | None) -> None:
        self.first = 0
        self.gathered = gathered
        self.event = event

    def wait(self) -> None:
        """Wait for what was queued before. Raises ``RuntimeError`` if one of those kernels failed."""
        if self.event is not None and not self.event.query():
            self.event.synchronize()


def first_error(records: Iterable[PlanErrors], gathered: PlanErrors) -> Exception | None:
    """The first error in ``records`` or in ``gathered``, or None. Waits for the device, except in graph capture."""
    device, in_capture = gathered.codes.device, False
    # A lost GPU raises, here and below. What its kernels have written on the host is read all the same.
    with suppress(RuntimeError):
        in_capture = capturing(device)
        if device.type == "cuda" and not in_capture:
            torch.cuda.synchronize(device)
    for record in records:
        if (found := record.error()) is not None:
            return found
    with suppress(RuntimeError):
        return gathered.error() if gathered.used and not in_capture else None
    return None


@triton_kernel
def compare_ids_kernel(ids_ptr, again_ptr, differs_ptr, codes_ptr, numbers, step, BLOCK: tl.constexpr):
    """Set differs_ptr () int8 to 1, and the REROUTED code to at least ``step``, if ids differ; else leave both.

    ids_ptr, again_ptr (numbers,) int32; codes_ptr (PLAN_CODES,) int32. Grid (ceil(numbers / BLOCK),).
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    differ = tl.load(ids_ptr + place, mask=inside, other=0) != tl.load(again_ptr + place, mask=inside, other=0)
    if tl.max(differ.to(tl.int32), axis=0) > 0:
        tl.store(differs_ptr, tl.full((), 1, tl.int8))
        tl.atomic_max(codes_ptr + REROUTED, step)


class DeviceErrors:
    """Raises the error of a plan ``PLANS_AHEAD`` plans later, or in ``raise_all``: in the same call on every rank.

    What graphs and backwards have flagged is raised by then at the latest. Errors that no call has raised are printed
    when this object is freed. host_reads: whether ``compare`` raises.
    """

    def __init__(self, group: EPGroup, device: torch.device, *, host_reads: bool = False) -> None:
        self._group = group
        self.host_reads = host_reads
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._ahead, self._window = PLANS_AHEAD, max(1, PLANS_AHEAD // WINDOWS)
        marks = self._ahead // self._window
        pinned = host_ints((self._ahead + marks) * CODES_STRIDE, device)
        places = range(0, len(pinned), CODES_STRIDE)
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            found = [PlanErrors(group, pinned[place : place + PLAN_CODES]) for place in places]
            # Written by graphs and backwards at any time. From then on each mark copies them, in stream order.
            self._gathered = PlanErrors(group, torch.zeros(PLAN_CODES, dtype=torch.int32, device=device))
        self._records = found[: self._ahead]
        self._unused = [Mark(copied, torch.cuda.Event() if self._on_gpu else None) for copied in found[self._ahead :]]
        # In the order of the queue: those that the device may not have passed; and those whose copies are to be read.
        self._marks: deque[Mark] = deque()
        self._passed: list[Mark] = []
        report_at_exit(self, partial(first_error, found, self._gathered))
        self._plans = 0
        # The first plan of the window, if any has an error that no mark comes after yet.
        self._unmarked: int | None = None
        self._current = self._records[0]

    @property
    def codes(self) -> Tensor:
        """Where the kernels of the plan being queued write errors, (PLAN_CODES,) int32."""
        return self._current.codes

    def begin(self) -> None:
        """Collective. Start a plan, after raising the error of the plan ``PLANS_AHEAD`` before; no-op in capture.

        Waits for the device only if it is behind by most of them.
        """
        if self._on_gpu and stream_is_captured():
            self._current = self._gathered
            return
        self._plans += 1
        self._current = self._records[self._plans % self._ahead]
        past = self._plans - self._ahead
        if self._unmarked is not None and self._unmarked <= past:
            # Almost no plan since has had any token.
            self._synchronize()
        while self._marks and self._marks[0].first <= past:
            self._marks[0].wait()
            self._passed.append(self._marks.popleft())
        self._raise(self._current)
        while self._passed:
            self._unused.append(self._passed.pop())
            self._raise(self._unused[-1].gathered)

    def expect(self, limits: Limits) -> None:
        """Set the bounds of the plan being queued."""
        self._current.limits = limits

    def queued(self, *, flags: bool) -> None:
        """All kernels of the plan have been queued on the current stream. flags: whether they may find an error."""
        if self._current is self._gathered:
            self._gathered.used |= flags
            return
        if self._unmarked is None and (flags or self._gathered.used):
            self._unmarked = self._plans // self._window * self._window
        # By the last plan of a window, so by the same on every rank, whatever one of them alone has flagged.
        if self._unmarked is not None and self._plans + 1 >= self._unmarked + self._window:
            self._mark(self._unmarked)

    def compare(self, expert_ids_WCK: Tensor, again_WCK: Tensor, step: int) -> Tensor:
        """Whether the ids of a forward and of its recompute differ, bool () on the device; ``RecomputeError`` if so."""
        differs = torch.zeros((), dtype=torch.int8, device=self._device)
        pointers, numbers = (expert_ids_WCK, again_WCK, differs, self._gathered.codes), expert_ids_WCK.numel()
        # What the host reads at once is not flagged for later.
        grid, sizes = (triton.cdiv(numbers, COMPARED_IDS),), (numbers, 0 if self.host_reads else min(step, MOST_STEP))
        launch(compare_ids_kernel, grid, *pointers, *sizes, device=self._device, BLOCK=COMPARED_IDS)
        self._gathered.used = True
        if self.host_reads and bool(differs):
            raise recompute_error(self._group, step)
        return differs.view(torch.bool)

    def flag_missing_rows(self, rows: int, plan: RoutingPlan) -> None:
        """Flag, on this rank, a combine of ``rows`` rows if the plan has more that are valid."""
        lacking = plan.group_ends[-1:].clamp(max=plan.row_capacity) - rows
        missing = self._gathered.codes[MISSING:]
        torch.maximum(missing, lacking, out=missing)
        self._gathered.used = True

    def raise_current(self) -> None:
        """Raise the error of the plan queued last. The host has waited for the kernels that flag it."""
        self._raise(self._current)

    def raise_all(self) -> None:
        """Collective. Wait for all that is queued, and raise the first error; later calls raise further ones."""
        self._synchronize()
        self._unused += [*self._marks, *self._passed]
        self._marks.clear()
        self._passed.clear()
        for place in range(1, self._ahead + 1):
            self._raise(self._records[(self._plans + place) % self._ahead])
        if self._gathered.used:
            self._raise(self._gathered)

    def _mark(self, first: int) -> None:
        mark = self._unused.pop()
        mark.first, self._unmarked = first, None
        if self._gathered.used:
            mark.gathered.limits = self._gathered.limits
            mark.gathered.codes.copy_(self._gathered.codes, non_blocking=True)
        if mark.event is not None:
            mark.event.record(torch.cuda.current_stream(self._device))
        self._marks.append(mark)

    def _synchronize(self) -> None:
        """Wait for all that is queued: then nothing needs a mark."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        self._unmarked = None

    def _raise(self, found: PlanErrors) -> None:
        """Raise the error, if there is one, and clear it: what has been gathered, with every copy of its kind.

        Errors of other kinds that were gathered are raised by later plans, or in ``raise_all``.
        """
        error = found.error()
        if error is None:
            return
        if found in self._records:
            found.clear()
        else:
            self._synchronize()
            # With what was found since the copy was made, which is cleared, too.
            kind = found.kind
            error = self._gathered.error(kind) or error
            for copied in (*(mark.gathered for mark in (*self._marks, *self._passed, *self._unused)), self._gathered):
                copied.clear(kind)
        try:
            raise error
        finally:
            # Its traceback holds this frame, which would hold it for good.
            del error
