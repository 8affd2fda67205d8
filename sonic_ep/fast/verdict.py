"""What plans find wrong on the device: ids out of range, and more rows than there is room for."""

from __future__ import annotations

import torch

from sonic_ep.fast.device import host_words
from sonic_ep.group import EPGroup
from sonic_ep.plan import overflow_error


class Verdict:
    """Kernels write it, the host reads it later: at the next plan, or when it is asked to check.

    record (3,) int32: the rank with an id out of range, plus one; the rank with more rows than R, plus one, and its
    rows. Zeros where all is well. Every rank sees the ids of all, so all ranks hold the same record and raise together.
    On a GPU it is pinned memory of the host that kernels write through the bus.
    """

    def __init__(self, group: EPGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._on_gpu = device.type == "cuda"
        self.record = host_words(3, device)
        self._written: torch.cuda.Event | None = None
        self._captured = False
        self._num_experts = 0
        self._max_rows = 0

    def expect(self, *, num_experts: int, max_rows: int) -> None:
        """A plan with these limits is about to be queued."""
        self._num_experts = num_experts
        self._max_rows = max_rows

    def queued(self) -> None:
        """All kernels of the plan have been queued on the current stream."""
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured = True
        elif self._on_gpu:
            self._written = torch.cuda.Event()
            self._written.record(torch.cuda.current_stream(self._device))

    def raise_if_bad(self) -> None:
        """Raise what the last plan found, once its kernels have run: ``ValueError`` or ``RowOverflowError``.

        In graph capture, where nothing can be waited for, it does nothing; what is found later is raised later. Where a
        plan is in a graph, it waits for all that is queued: only so do all ranks see what the same replays have found.
        """
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            return
        if self._captured:
            torch.cuda.synchronize(self._device)
        elif self._written is not None:
            self._written.synchronize()
        bad_rank, full_rank, rows = self.record.tolist()
        if bad_rank or full_rank:
            self.record.zero_()
        if bad_rank:
            raise ValueError(
                f"{self._group}: topk_idx: got expert ids out of range on rank {bad_rank - 1}, "
                f"expected 0 to {self._num_experts - 1}, or -1 for a dropped slot"
            )
        if full_rank:
            raise overflow_error(self._group, max_rows=self._max_rows, rank=full_rank - 1, rows=rows)
