"""What is found wrong on the device: ids out of range, too many rows for the room there is, a recompute gone astray.

The host is not to wait for a plan before it queues the next. So every plan has a record of its own, in a ring of
``PLANS_AHEAD``, and the host reads a record when its place in the ring is used again.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sonic_ep.fast.device import host_words
from sonic_ep.fast.unheard import told_at_the_end
from sonic_ep.group import EPGroup
from sonic_ep.plan import overflow_error, recompute_error

# What may be flagged: the rank with an id out of range, plus one; the rank with more rows than R, plus one, and its
# rows; the last step whose forward was run again with another routing. Zeros where all is well.
WORDS = 4
# How many plans the host may be ahead of the device. What a plan has flagged is raised by the one so many later.
PLANS_AHEAD = 8
MOST_STEP = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan has to keep to, for messages."""

    num_experts: int = 0
    max_rows: int = 0


class Record:
    """Words, (WORDS,) int32, that say what was flagged up to one point of the stream, and what they mean.

    own: written by the kernels of one plan; on a GPU pinned memory of the host, to which they write through the bus.
    gathered: what graphs and backwards had flagged by then; None if that is of no concern. Every rank sees the ids of
    all, so all ranks hold the same words.
    """

    def __init__(self, group: EPGroup, device: torch.device) -> None:
        self._group = group
        self.own = host_words(WORDS, device)
        self.gathered: Tensor | None = None
        self.limits = self.gathered_limits = Limits()
        self.written: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until all that writes it has run. Raises ``RuntimeError`` if it fails."""
        if self.written is not None:
            self.written.synchronize()

    def error(self) -> Exception | None:
        """``ValueError``, ``RowOverflowError`` or ``RecomputeError``, if there is one to tell."""
        found = self._meaning(self.own, self.limits)
        if found is None and self.gathered is not None:
            found = self._meaning(self.gathered, self.gathered_limits)
        return found

    def _meaning(self, words: Tensor, limits: Limits) -> Exception | None:
        bad_rank, full_rank, rows, rerouted = words.tolist()
        if bad_rank:
            return ValueError(
                f"{self._group}: topk_idx: got expert ids out of range on rank {bad_rank - 1}, "
                f"expected 0 to {limits.num_experts - 1}, or -1 for a dropped slot"
            )
        if full_rank:
            return overflow_error(self._group, max_rows=limits.max_rows, rank=full_rank - 1, rows=rows)
        return recompute_error(self._group, rerouted) if rerouted else None


def first_error(records: Iterable[Record]) -> Exception | None:
    """The error of the first of ``records`` that has one, once their kernels have run, if they do."""
    for record in records:
        in_capture = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        found = None
        # A GPU that is lost tells nothing, and in graph capture the host must not ask it.
        with suppress(RuntimeError):
            if not in_capture:
                record.wait()
            if not (in_capture and record.gathered is not None and record.gathered.is_cuda):
                found = record.error()
        if found is not None:
            return found
    return None


class Verdict:
    """Kernels write records, and the host reads each ``PLANS_AHEAD`` plans later, or when it is asked to check.

    All ranks raise in the same call: a record is read when all that writes it has run, and not before its turn. What no
    call has raised when the verdict is gone is printed. host_reads: whether what a backward finds is raised there, as
    the host reads it at once.
    """

    def __init__(self, group: EPGroup, device: torch.device, *, host_reads: bool = False) -> None:
        self._group = group
        self.host_reads = host_reads
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._records = [Record(group, device) for _ in range(PLANS_AHEAD)]
        # Graphs and backwards flag in the device's own memory, whenever they run. Once they may have, plans take a copy
        # of it in the order of the stream, which is the same on all ranks. What no later plan comes to is read there.
        with torch.inference_mode(False):
            self._gathered = torch.zeros(WORDS, dtype=torch.int32, device=device)
        self._latest = Record(group, device)
        told_at_the_end(self, partial(first_error, (*self._records, self._latest)))
        self._plans = 0

    @property
    def words(self) -> Tensor:
        """What the kernels of the plan being queued write, (WORDS,) int32."""
        return self._gathered if self._capturing() else self._current.own

    def begin(self) -> None:
        """Collective. A plan is about to be queued: raise what the one ``PLANS_AHEAD`` before it has flagged.

        The host waits for that one's kernels alone. In graph capture, where nothing can be waited for, it does nothing.
        """
        if not self._capturing():
            self._plans += 1
            self._raise(self._current)
            self._current.written = None

    def expect(self, limits: Limits) -> None:
        """The plan being queued has to keep to ``limits``."""
        if self._capturing():
            self._latest.gathered_limits = limits
        else:
            self._current.limits = limits

    def queued(self, *, flags: bool) -> None:
        """All kernels of the plan have been queued on the current stream. flags: whether they may find a fault."""
        if self._capturing():
            if flags:
                self._latest.gathered = self._gathered
            return
        current = self._current
        if self._latest.gathered is not None:
            if current.gathered is None:
                current.gathered = host_words(WORDS, self._device)
            current.gathered_limits = self._latest.gathered_limits
            current.gathered.copy_(self._gathered, non_blocking=True)
        if self._on_gpu and (flags or current.gathered is not None):
            current.written = torch.cuda.Event()
            current.written.record(torch.cuda.current_stream(self._device))

    def compare(self, expert_ids_WCK: Tensor, again_WCK: Tensor, step: int) -> Tensor:
        """Whether the ids of a forward and of its recompute differ, bool () on the device. If so it is told later.

        Raises ``RecomputeError`` at once where the host reads what it needs: other ids are other sizes there.
        """
        differs = (expert_ids_WCK != again_WCK).any()
        if self.host_reads and bool(differs):
            raise recompute_error(self._group, step)
        rerouted = self._gathered[WORDS - 1 :]
        torch.maximum(rerouted, differs.int() * min(step, MOST_STEP), out=rerouted)
        self._latest.gathered = self._gathered
        return differs

    def raise_current(self) -> None:
        """Wait for the plan queued last, and raise what it has flagged, on every rank alike."""
        self._raise(self._current)

    def raise_all(self) -> None:
        """Collective. Wait for all that is queued, and raise what was flagged first, as ``Record.error`` says.

        What else was flagged stays for the next call.
        """
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        for place in range(1, PLANS_AHEAD + 1):
            self._raise(self._records[(self._plans + place) % PLANS_AHEAD])
        self._raise(self._latest)

    @property
    def _current(self) -> Record:
        return self._records[self._plans % PLANS_AHEAD]

    def _capturing(self) -> bool:
        return self._on_gpu and torch.cuda.is_current_stream_capturing()

    def _raise(self, record: Record) -> None:
        record.wait()
        found = record.error()
        if found is not None:
            self._forget(record)
            try:
                raise found
            finally:
                # Its traceback holds this frame, and would hold it for good through its own name.
                del found

    def _forget(self, record: Record) -> None:
        """What ``record`` tells is told: its own words, or all copies of what was gathered."""
        if record.own.any():
            record.own.zero_()
            return
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        for copied in (*self._records, self._latest):
            if copied.gathered is not None:
                copied.gathered.zero_()
