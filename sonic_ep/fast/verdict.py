"""What is found wrong on the device: ids out of range, too many rows for the room there is, a recompute gone astray."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from sonic_ep.fast.device import host_words
from sonic_ep.fast.unheard import told_at_the_end
from sonic_ep.group import EPGroup
from sonic_ep.plan import overflow_error, recompute_error

WORDS = 4
MOST_STEP = 2**31 - 1


class Record:
    """What kernels have written, and what it means.

    words (4,) int32: the rank with an id out of range, plus one; the rank with more rows than R, plus one, and its
    rows; the last step whose forward was run again with another routing. Zeros where all is well. Every rank sees the
    ids of all, so all ranks hold the same words.
    On a GPU they are pinned memory of the host that kernels write through the bus.
    """

    def __init__(self, group: EPGroup, device: torch.device) -> None:
        self.group = group
        self.words = host_words(WORDS, device)
        self.num_experts = 0
        self.max_rows = 0
        self.written: torch.cuda.Event | None = None

    def last_error(self) -> Exception | None:
        """The same once its kernels have run, if they do."""
        with suppress(RuntimeError):
            if self.written is not None and not torch.cuda.is_current_stream_capturing():
                self.written.synchronize()
        return self.error()

    def error(self) -> Exception | None:
        """``ValueError``, ``RowOverflowError`` or ``RecomputeError``, if there is one to tell."""
        bad_rank, full_rank, rows, rerouted = self.words.tolist()
        if bad_rank:
            return ValueError(
                f"{self.group}: topk_idx: got expert ids out of range on rank {bad_rank - 1}, "
                f"expected 0 to {self.num_experts - 1}, or -1 for a dropped slot"
            )
        if full_rank:
            return overflow_error(self.group, max_rows=self.max_rows, rank=full_rank - 1, rows=rows)
        return recompute_error(self.group, rerouted) if rerouted else None


class Verdict:
    """Kernels write its record, the host reads it later: at the next plan, or when it is asked to check.

    All ranks raise together. What nobody has asked for until the verdict is let go is printed then. host_reads: whether
    what a backward finds is raised there, as the host reads it at once.
    """

    def __init__(self, group: EPGroup, device: torch.device, *, host_reads: bool = False) -> None:
        self._group = group
        self.host_reads = host_reads
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._record = Record(group, device)
        told_at_the_end(self, self._record.last_error)
        # Gathers what backwards find, until the host has seen it.
        with torch.inference_mode(False):
            self._rerouted = torch.zeros(1, dtype=torch.int32, device=device)
        self._captured = False

    @property
    def record(self) -> Tensor:
        """The words that kernels write, (4,) int32 on the host; see ``Record``."""
        return self._record.words

    def expect(self, *, num_experts: int, max_rows: int) -> None:
        """A plan with these limits is about to be queued."""
        self._record.num_experts = num_experts
        self._record.max_rows = max_rows

    def queued(self) -> None:
        """All kernels of the plan have been queued on the current stream."""
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured = True
        elif self._on_gpu:
            self._record.written = torch.cuda.Event()
            self._record.written.record(torch.cuda.current_stream(self._device))

    def compare(self, expert_ids_WCK: Tensor, again_WCK: Tensor, step: int) -> Tensor:
        """Whether the ids of a forward and of its recompute differ, bool () on the device. If so it is told later.

        Raises ``RecomputeError`` at once where the host reads what it needs: other ids are other sizes there.
        """
        differs = (expert_ids_WCK != again_WCK).any()
        if self.host_reads and bool(differs):
            raise recompute_error(self._group, step)
        torch.maximum(self._rerouted, differs.int() * min(step, MOST_STEP), out=self._rerouted)
        self.record[3:].copy_(self._rerouted, non_blocking=True)
        self.queued()
        return differs

    def raise_if_bad(self) -> None:
        """Raise what was found last, once its kernels have run.

        Raises ``ValueError``, ``RowOverflowError`` or ``RecomputeError``.

        In graph capture, where nothing can be waited for, it does nothing; what is found later is raised later. Where a
        plan is in a graph, it waits for all that is queued: only so do all ranks see what the same replays have found.
        """
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            return
        if self._captured:
            torch.cuda.synchronize(self._device)
        elif self._record.written is not None:
            self._record.written.synchronize()
        found = self._record.error()
        if found is not None:
            self.record.zero_()
            self._rerouted.zero_()
            try:
                raise found
            finally:
                # Its traceback holds this frame, and would hold it for good through its own name.
                del found
