"""The collectives of the reference backend: an all-gather and an all-to-all with uneven splits, any group, any dtype.

They move bytes and know nothing of autograd; their adjoints are written where they are used.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sonic_ep.group import EPGroup
from sonic_ep.meeting import Meeting, Step
from sonic_ep.turn import Turn
from sonic_ep.waits import Waits


class Collectives(Protocol):
    """What the primitives need of a group."""

    @property
    def group(self) -> EPGroup:
        """The group that communicates."""
        ...

    @property
    def step(self) -> Step:
        """The call that is being made."""
        ...

    @property
    def turn(self) -> Turn:
        """Whose call or backward it is."""
        ...

    def meet(self, meeting: Meeting, device: torch.device, own: int = 0) -> list[int]:
        """``own`` of every rank, once all are seen to be at ``meeting``; what follows belongs to it."""
        ...

    def all_gather(self, local: Tensor) -> Tensor:
        """``local`` of every rank, equal shapes, stacked: (W, *local.shape)."""
        ...

    def all_to_all_rows(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Rows (N, ...) cut by ``send_splits``, piece q to rank q; the pieces received, in rank order."""
        ...


class Meetings:
    """Where the ranks of a group are, whatever moves between them."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self.group = waits.group

    @property
    def step(self) -> Step:
        """The call that is being made."""
        return self._waits.meeting.step

    @property
    def turn(self) -> Turn:
        """Whose call or backward it is."""
        return self._waits.turn

    def meet(self, meeting: Meeting, device: torch.device, own: int = 0) -> list[int]:
        """``own`` of every rank, in rank order. Raises ``CollectiveMismatchError`` if one is elsewhere."""
        self._waits.meeting = meeting
        return self._waits.numbers(own, device)


class OneRank(Meetings):
    """The collectives of a group of one: nothing moves."""

    def all_gather(self, local: Tensor) -> Tensor:
        """``local`` alone, (1, *local.shape)."""
        return local.unsqueeze(0).clone()

    def all_to_all_rows(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """A copy of ``rows``."""
        assert send_splits == receive_splits == [rows.shape[0]]
        return rows.clone()


class ProcessGroupCollectives(Meetings):
    """The collectives of ``torch.distributed``: gloo on the CPU, NCCL on GPUs (gloo takes CUDA tensors as well)."""

    def all_gather(self, local: Tensor) -> Tensor:
        """``local`` of every rank, (W, *local.shape)."""
        return self._waits.all_gather(local)

    def all_to_all_rows(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Uneven splits, zeros among them; every rank takes part, whatever it has to send."""
        return self._waits.all_to_all_rows(rows, send_splits, receive_splits)


def collectives_of(waits: Waits) -> Collectives:
    """The collectives of a group."""
    return OneRank(waits) if waits.group.world_size == 1 else ProcessGroupCollectives(waits)


def sum_over_ranks(local: Tensor, collectives: Collectives) -> Tensor:
    """``local`` of all ranks, of one shape, summed in ascending order of rank, so the same bits on every rank."""
    by_rank = collectives.all_gather(local)
    total = by_rank[0].clone()
    for other in by_rank[1:]:
        total += other
    return total
