"""The collectives of the reference backend: an all-gather and an all-to-all with uneven splits, any group, any dtype.

They move bytes and know nothing of autograd; their adjoints are written where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep.group import EPGroup


def _all_gather_tensor() -> Callable[..., object]:
    # PyTorch 2.13 gave all_gather_into_tensor a new name and deprecated the old one.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather: Callable[..., object] = getattr(dist, name)
    return gather


class Collectives(Protocol):
    """What the primitives need of a group."""

    @property
    def group(self) -> EPGroup:
        """The group that communicates."""
        ...

    def all_gather(self, local: Tensor) -> Tensor:
        """``local`` of every rank, equal shapes, stacked: (W, *local.shape)."""
        ...

    def all_to_all_rows(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Rows (N, ...) cut by ``send_splits``, piece q to rank q; the pieces received, in rank order."""
        ...


class OneRank:
    """The collectives of a group of one: nothing moves."""

    def __init__(self, group: EPGroup) -> None:
        self.group = group

    def all_gather(self, local: Tensor) -> Tensor:
        """``local`` alone, (1, *local.shape)."""
        return local.unsqueeze(0).clone()

    def all_to_all_rows(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """A copy of ``rows``."""
        assert send_splits == receive_splits == [rows.shape[0]]
        return rows.clone()


class ProcessGroupCollectives:
    """The collectives of ``torch.distributed``: gloo on the CPU, NCCL on GPUs (gloo takes CUDA tensors as well)."""

    def __init__(self, group: EPGroup) -> None:
        self.group = group
        self._all_gather_tensor = _all_gather_tensor()

    def all_gather(self, local: Tensor) -> Tensor:
        """``local`` of every rank, (W, *local.shape)."""
        gathered = local.new_empty((self.group.world_size, *local.shape))
        # The shape is the same on all ranks, so all of them skip an empty exchange together.
        if gathered.numel() > 0:
            flat = gathered.view(-1)
            self._all_gather_tensor(flat, local.contiguous().view(-1), group=self.group.process_group)
        return gathered

    def all_to_all_rows(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Uneven splits, zeros among them; every rank takes part, whatever it has to send."""
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), receive_splits, send_splits, group=self.group.process_group)
        return received


def collectives_of(group: EPGroup) -> Collectives:
    """The collectives of ``group``."""
    return OneRank(group) if group.world_size == 1 else ProcessGroupCollectives(group)


class SumGradient(torch.autograd.Function):
    """Identity in forward; in backward the sum over the group, added in rank order, so the same bits on every rank."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, collectives: Collectives) -> Tensor:
        """``weight``, unchanged."""
        ctx.collectives = collectives  # type: ignore[attr-defined]
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        """The gradients of all ranks, summed in rank order."""
        by_rank = ctx.collectives.all_gather(grad)  # type: ignore[attr-defined]
        total = by_rank[0].clone()
        for other in by_rank[1:]:
            total += other
        return total, None
