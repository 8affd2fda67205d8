"""Transfers over the link whose rates are the ceilings of dispatch and combine.

Every rank moves one contiguous buffer from or to its next neighbour at once, so that both directions of every link are
busy. Each kind of transfer is tried in several configurations, and the fastest counts.
"""
# Parameters of Triton kernels carry no types.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from sonic_ep.cost import LinkBandwidth
from sonic_ep.fast.device_functions import copy_row, peer_pointer
from sonic_ep.fast.launch import launch, multiprocessors, triton_kernel
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.workspace import Workspace
from sonic_ep.profiler.bandwidth import Stopwatch
from sonic_ep.profiler.verification import expect

ELEMENT = torch.int32


class KernelCopy(NamedTuple):
    """Bytes and warps of a kernel's step, and programs of a multiprocessor; None: one program for each step."""

    block_bytes: int
    warps: int
    programs: int | None


# An int: copy engines, over so many streams, to each of which the driver may give an engine; else a kernel.
Way = int | KernelCopy
ENGINE_COPIES = (1, 2, 4)
KERNEL_COPIES = (
    *(KernelCopy(8192, 4, programs) for programs in (None, 4, 8, 16)),
    *(KernelCopy(16384, 8, programs) for programs in (None, 4, 8)),
    *(KernelCopy(32768, 8, programs) for programs in (None, 4)),
    KernelCopy(32768, 16, 4),
)
# What is moved is a multiple of this.
LARGEST_BLOCK = max(config.block_bytes for config in KERNEL_COPIES)


@triton_kernel
def copy_peer_kernel(sources_ptr, targets_ptr, like_ptr, source_rank, target_rank, blocks, BLOCK: tl.constexpr):
    """Copy the source of one rank to the target of another. Of P programs, program p copies blocks p, p + P and so on.

    sources_ptr, targets_ptr (W,) int64: addresses of every rank's buffer (blocks, BLOCK), of the type of ``like_ptr``.
    """
    source_ptr = peer_pointer(sources_ptr, source_rank, like_ptr)
    target_ptr = peer_pointer(targets_ptr, target_rank, like_ptr)
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        copy_row(source_ptr + number * BLOCK, target_ptr + number * BLOCK, BLOCK, BLOCK)


class Link:
    """Two shared buffers of ``nbytes`` on every rank, and transfers between them. All methods are collective."""

    def __init__(self, workspace: Workspace, nbytes: int) -> None:
        if nbytes < LARGEST_BLOCK or nbytes % LARGEST_BLOCK or nbytes // ELEMENT.itemsize > 2**31 - 1:
            raise ValueError(f"{workspace.group}: link: got {nbytes} bytes, expected a multiple of {LARGEST_BLOCK}")
        self.nbytes = nbytes
        self._workspace, self._group = workspace, workspace.group
        self._source, self._target = (workspace.reserve(f"link_{name}", nbytes) for name in ("source", "target"))
        # Zeros would move faster than real data.
        self._elements(self._source, self._group.rank).random_()
        streams = max(ENGINE_COPIES) if workspace.device.type == "cuda" else 0
        self._streams = [torch.cuda.Stream(workspace.device) for _ in range(streams)]
        workspace.barrier_after_write()

    def move(self, source: int, target: int, way: Way) -> None:
        """The source of rank ``source`` to the target of rank ``target``, one of which is this rank."""
        source_N, target_N = self._elements(self._source, source), self._elements(self._target, target)
        if isinstance(way, int):
            self._copy(source_N, target_N, streams=way)
            return
        device, blocks = self._workspace.device, self.nbytes // way.block_bytes
        programs = blocks if way.programs is None else min(blocks, way.programs * multiprocessors(device))
        addresses = (self._source.addresses, self._target.addresses)
        constants = {"BLOCK": way.block_bytes // ELEMENT.itemsize, "num_warps": way.warps}
        launch(copy_peer_kernel, (programs,), *addresses, source_N, source, target, blocks, device=device, **constants)

    def check(self, sender: int, what: str) -> None:
        """Clear this rank's target. Raises ``AssertionError`` unless it held the source of rank ``sender``."""
        self._workspace.barrier_after_write()
        target_N = self._elements(self._target, self._group.rank)
        arrived = torch.equal(target_N, self._elements(self._source, sender))
        # No rank may begin the next transfer before all have compared and cleared.
        self._workspace.barrier_before_write()
        target_N.zero_()
        self._workspace.barrier_before_write()
        expect(arrived, f"{self._group}: link: {what}: what arrived is not what rank {sender} sent")

    def _elements(self, buffer: SharedBuffer, rank: int) -> Tensor:
        return buffer.rows(rank, (self.nbytes // ELEMENT.itemsize,), ELEMENT)

    def _copy(self, source_N: Tensor, target_N: Tensor, streams: int) -> None:
        if not self._streams:
            target_N.copy_(source_N)
            return
        current, chosen = torch.cuda.current_stream(target_N.device), self._streams[:streams]
        for stream, source, target in zip(chosen, source_N.chunk(streams), target_N.chunk(streams), strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                target.copy_(source)
        for stream in chosen:
            current.wait_stream(stream)


def link_bandwidth(workspace: Workspace, nbytes: int, seconds: Stopwatch) -> LinkBandwidth:
    """Collective. The rates of transfers of ``nbytes`` between ranks, of which there are several.

    seconds: the same answer on every rank. Raises ``AssertionError`` if a transfer did not bring what was sent.
    """
    own, ranks = workspace.group.rank, workspace.group.world_size
    link = Link(workspace, nbytes)
    following, previous = (own + 1) % ranks, (own - 1) % ranks

    def best(what: str, source: int, target: int, ways: Sequence[Way]) -> float:
        for way in ways:
            link.move(source, target, way)
            link.check(source if target == own else previous, what)
        return nbytes / min(seconds(partial(link.move, source, target, way)) for way in ways)

    return LinkBandwidth(
        copy_engine_in=best("copy engine in", following, own, ENGINE_COPIES),
        copy_engine_out=best("copy engine out", own, following, ENGINE_COPIES),
        read=best("kernel reads", following, own, KERNEL_COPIES),
        write=best("kernel writes", own, following, KERNEL_COPIES),
    )
