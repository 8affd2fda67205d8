# Parameters of Triton kernels carry no types.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Transfers over the link whose rates are the ceilings of dispatch and combine.

Every rank moves one contiguous buffer from or to its next neighbour, all at once, so both directions of every link are
busy, as they are when a layer runs. Each kind of transfer is tried in several configurations, and the fastest counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.cost import LinkCeilings
from sonic_ep.fast.device import copy_row, launch, multiprocessors, peer_pointer
from sonic_ep.fast.workspace import SharedBuffer, Workspace
from sonic_ep.profiler.bandwidth import Stopwatch

ELEMENT = torch.int32
# A copy is split over so many streams, each of which the driver may give an engine of its own.
STREAMS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """Bytes and warps of a kernel's step, and programs of a multiprocessor; None: one program for each step."""

    block_bytes: int
    warps: int
    programs: int | None = None


LAUNCHES = (
    *(CopyConfig(block_bytes=8192, warps=4, programs=programs) for programs in (None, 4, 8, 16)),
    *(CopyConfig(block_bytes=16384, warps=8, programs=programs) for programs in (None, 4, 8)),
    *(CopyConfig(block_bytes=32768, warps=8, programs=programs) for programs in (None, 4)),
    CopyConfig(block_bytes=32768, warps=16, programs=4),
)
# What is moved is a multiple of this.
LARGEST_BLOCK = max(config.block_bytes for config in LAUNCHES)


@triton.jit
def read_peer_kernel(sources_ptr, target_ptr, peer, blocks, BLOCK: tl.constexpr):
    """Copy the buffer of ``peer`` here. Any grid: of P programs, program p copies blocks p, p + P, p + 2P and so on.

    sources_ptr (W,) int64: addresses of every rank's buffer; target_ptr (blocks, BLOCK).
    """
    source_ptr = peer_pointer(sources_ptr, peer, target_ptr)
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        copy_row(source_ptr + number * BLOCK, target_ptr + number * BLOCK, BLOCK, BLOCK)


@triton.jit
def write_peer_kernel(source_ptr, targets_ptr, peer, blocks, BLOCK: tl.constexpr):
    """Copy this rank's buffer to that of ``peer``. Any grid, as above.

    source_ptr (blocks, BLOCK); targets_ptr (W,) int64: addresses of every rank's buffer.
    """
    target_ptr = peer_pointer(targets_ptr, peer, source_ptr)
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        copy_row(source_ptr + number * BLOCK, target_ptr + number * BLOCK, BLOCK, BLOCK)


class Link:
    """Two shared buffers of ``nbytes`` on every rank, and transfers from one to the other. All methods are collective.

    nbytes: a multiple of the largest block, fewer than 2**31 elements of 4 bytes.
    """

    def __init__(self, workspace: Workspace, nbytes: int, launches: tuple[CopyConfig, ...] = LAUNCHES) -> None:
        largest = max(config.block_bytes for config in launches)
        if nbytes < largest or nbytes % largest or nbytes // ELEMENT.itemsize > 2**31 - 1:
            raise ValueError(f"{workspace.group}: link: got {nbytes} bytes, expected a multiple of {largest}")
        group = workspace.group
        self.nbytes = nbytes
        self.launches = launches
        self._workspace = workspace
        self._rank = group.rank
        self._next, self._previous = ((group.rank + step) % group.world_size for step in (1, -1))
        self._source, self._target = (workspace.reserve(f"link_{name}", nbytes) for name in ("source", "target"))
        # Zeros would move faster than real data.
        self._elements(self._source, self._rank).random_()
        on_gpu = workspace.device.type == "cuda"
        self._streams = [torch.cuda.Stream(workspace.device) for _ in range(max(STREAMS) if on_gpu else 0)]
        workspace.publish()

    def copy_in(self, streams: int) -> None:
        """The next rank's source to this rank's target, by copy engine."""
        self._copy(self._elements(self._target, self._rank), self._elements(self._source, self._next), streams)

    def copy_out(self, streams: int) -> None:
        """This rank's source to the next rank's target, by copy engine."""
        self._copy(self._elements(self._target, self._next), self._elements(self._source, self._rank), streams)

    def read(self, config: CopyConfig) -> None:
        """The next rank's source to this rank's target, by a kernel that reads it."""
        self._launch(read_peer_kernel, self._source.addresses, self._elements(self._target, self._rank), config)

    def write(self, config: CopyConfig) -> None:
        """This rank's source to the next rank's target, by a kernel that writes it."""
        self._launch(write_peer_kernel, self._elements(self._source, self._rank), self._target.addresses, config)

    def expect_next(self, what: str) -> None:
        """Raise ``AssertionError`` unless this rank's target holds the next rank's source."""
        self._expect(what, self._next)

    def expect_last(self, what: str) -> None:
        """Raise ``AssertionError`` unless this rank's target holds the source of the rank before."""
        self._expect(what, self._previous)

    def _elements(self, buffer: SharedBuffer, rank: int) -> Tensor:
        return buffer.rows(rank, (self.nbytes // ELEMENT.itemsize,), ELEMENT)

    def _launch(self, kernel: Any, first: Tensor, second: Tensor, config: CopyConfig) -> None:
        device, blocks = self._workspace.device, self.nbytes // config.block_bytes
        programs = blocks if config.programs is None else min(blocks, config.programs * multiprocessors(device))
        constants = {"BLOCK": config.block_bytes // ELEMENT.itemsize, "num_warps": config.warps}
        launch(kernel, (programs,), first, second, self._next, blocks, device=device, **constants)

    def _copy(self, target: Tensor, source: Tensor, streams: int) -> None:
        if not self._streams:
            target.copy_(source)
            return
        current, chosen = torch.cuda.current_stream(target.device), self._streams[:streams]
        for stream, to, of in zip(chosen, target.chunk(streams), source.chunk(streams), strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                to.copy_(of)
        for stream in chosen:
            current.wait_stream(stream)

    def _expect(self, what: str, sender: int) -> None:
        self._workspace.publish()
        target = self._elements(self._target, self._rank)
        arrived = torch.equal(target, self._elements(self._source, sender))
        # No rank may begin the next transfer before all have compared and cleared.
        self._workspace.fence()
        target.zero_()
        self._workspace.fence()
        if not arrived:
            raise AssertionError(f"{self._workspace.group}: link: {what}: what arrived is not what rank {sender} sent")


def link_ceilings(workspace: Workspace, nbytes: int, seconds: Stopwatch) -> LinkCeilings | None:
    """Collective. The ceilings for transfers of ``nbytes``; None on one rank.

    seconds: the same answer on every rank. Raises ``AssertionError`` if a transfer did not bring what was sent.
    """
    if workspace.group.world_size == 1:
        return None
    link = Link(workspace, nbytes)

    def best(ways: list[Callable[[], None]], expect: Callable[[str], None], what: str) -> float:
        for way in ways:
            way()
            expect(what)
        return nbytes / min(map(seconds, ways))

    return LinkCeilings(
        copy_engine_in=best([partial(link.copy_in, n) for n in STREAMS], link.expect_next, "copy engine in"),
        copy_engine_out=best([partial(link.copy_out, n) for n in STREAMS], link.expect_last, "copy engine out"),
        read=best([partial(link.read, config) for config in link.launches], link.expect_next, "kernel reads"),
        write=best([partial(link.write, config) for config in link.launches], link.expect_last, "kernel writes"),
    )
