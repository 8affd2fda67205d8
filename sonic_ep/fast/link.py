"""What the link between two GPUs carries: the ceilings that rates of dispatch and combine are held against.

Every rank moves one contiguous buffer from or to its next neighbour, all of them at once, so both directions of every
link are busy, as they are when a layer runs. Kernels read a peer's memory or write to it; the copy engine does both
without a kernel. Each way is tried with a few launches, and the best counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.cost import LinkCeilings
from sonic_ep.fast.device_functions import copy_row, peer_pointer
from sonic_ep.fast.launch import launch, multiprocessors
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.workspace import Workspace

SOURCE = "link_source"
TARGET = "link_target"
WORD = torch.int32
# Copies are split over so many streams, each of which the driver may give an engine of its own.
STREAMS = (1, 2, 4)

# Seconds that a collective transfer takes, all ranks having met before each round.
Stopwatch = Callable[[Callable[[], None]], float]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel moves a buffer: bytes and warps of a program's step, and programs of a multiprocessor.

    programs: None for one step each.
    """

    piece_bytes: int
    warps: int
    programs: int | None = None


LAUNCHES = (
    Launch(piece_bytes=8192, warps=4),
    Launch(piece_bytes=8192, warps=4, programs=4),
    Launch(piece_bytes=8192, warps=4, programs=8),
    Launch(piece_bytes=8192, warps=4, programs=16),
    Launch(piece_bytes=16384, warps=8),
    Launch(piece_bytes=16384, warps=8, programs=4),
    Launch(piece_bytes=16384, warps=8, programs=8),
    Launch(piece_bytes=32768, warps=8),
    Launch(piece_bytes=32768, warps=8, programs=4),
    Launch(piece_bytes=32768, warps=16, programs=4),
)
# What is moved is a multiple of this.
LARGEST_PIECE = max(how.piece_bytes for how in LAUNCHES)


@triton.jit
def read_peer_kernel(sources_ptr, target_ptr, peer, pieces, WORDS: tl.constexpr):
    """Copy the buffer of ``peer`` here. Any grid: of P programs, program p takes pieces p, p + P, p + 2P and so on.

    sources_ptr (W,) int64: addresses of every rank's buffer; target_ptr (pieces, WORDS).
    """
    source_ptr = peer_pointer(sources_ptr, peer, target_ptr)
    for number in range(tl.program_id(0), pieces, tl.num_programs(0)):
        copy_row(source_ptr + number * WORDS, target_ptr + number * WORDS, WORDS, WORDS)


@triton.jit
def write_peer_kernel(source_ptr, targets_ptr, peer, pieces, WORDS: tl.constexpr):
    """Copy this rank's buffer to that of ``peer``. Any grid, as above.

    source_ptr (pieces, WORDS); targets_ptr (W,) int64: addresses of every rank's buffer.
    """
    target_ptr = peer_pointer(targets_ptr, peer, source_ptr)
    for number in range(tl.program_id(0), pieces, tl.num_programs(0)):
        copy_row(source_ptr + number * WORDS, target_ptr + number * WORDS, WORDS, WORDS)


class Link:
    """Two shared buffers of ``nbytes`` on every rank, and the ways to move one to the other over the link.

    Construction is collective. nbytes: a multiple of the largest piece, fewer than 2**31 words of 4 bytes.
    """

    def __init__(self, workspace: Workspace, nbytes: int, launches: tuple[Launch, ...] = LAUNCHES) -> None:
        largest = max(how.piece_bytes for how in launches)
        if nbytes < largest or nbytes % largest or nbytes // WORD.itemsize > 2**31 - 1:
            raise ValueError(f"{workspace.group}: link: got {nbytes} bytes, expected a multiple of {largest}")
        group = workspace.group
        self.nbytes = nbytes
        self.launches = launches
        self._workspace = workspace
        self._next = (group.rank + 1) % group.world_size
        self._last = (group.rank - 1) % group.world_size
        self._source = workspace.reserve(SOURCE, nbytes)
        self._target = workspace.reserve(TARGET, nbytes)
        # Zeros would be faster than anything real.
        self._words(self._source, group.rank).random_()
        on_gpu = workspace.device.type == "cuda"
        self._streams = tuple(torch.cuda.Stream(workspace.device) for _ in range(max(STREAMS) if on_gpu else 0))
        workspace.barrier_after_write()

    def copy_in(self, streams: int) -> None:
        """Collective. The next rank's source to this rank's target, by copy engine."""
        self._copy(self._words(self._target, self._rank), self._words(self._source, self._next), streams)

    def copy_out(self, streams: int) -> None:
        """Collective. This rank's source to the next rank's target, by copy engine."""
        self._copy(self._words(self._target, self._next), self._words(self._source, self._rank), streams)

    def read(self, how: Launch) -> None:
        """Collective. The next rank's source to this rank's target, by a kernel that reads it."""
        target = self._words(self._target, self._rank)
        self._launch(read_peer_kernel, self._source.addresses, target, how=how)

    def write(self, how: Launch) -> None:
        """Collective. This rank's source to the next rank's target, by a kernel that writes it."""
        source = self._words(self._source, self._rank)
        self._launch(write_peer_kernel, source, self._target.addresses, how=how)

    def expect_next(self, what: str) -> None:
        """Collective. Raise ``AssertionError`` unless this rank's target holds the next rank's source."""
        self._expect(what, self._next)

    def expect_last(self, what: str) -> None:
        """Collective. Raise ``AssertionError`` unless this rank's target holds the source of the rank before."""
        self._expect(what, self._last)

    @property
    def _rank(self) -> int:
        return self._workspace.group.rank

    def _words(self, buffer: SharedBuffer, rank: int) -> Tensor:
        return buffer.rows(rank, (self.nbytes // WORD.itemsize,), WORD)

    def _launch(self, kernel: object, first: Tensor, second: Tensor, *, how: Launch) -> None:
        pieces = self.nbytes // how.piece_bytes
        device = self._workspace.device
        programs = pieces if how.programs is None else min(pieces, how.programs * multiprocessors(device))
        words = how.piece_bytes // WORD.itemsize
        arguments = (first, second, self._next, pieces)
        launch(kernel, (programs,), *arguments, device=device, WORDS=words, num_warps=how.warps)

    def _copy(self, target: Tensor, source: Tensor, streams: int) -> None:
        if not self._streams:
            target.copy_(source)
            return
        current = torch.cuda.current_stream(target.device)
        chosen = self._streams[:streams]
        for stream, to, of in zip(chosen, target.chunk(streams), source.chunk(streams), strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                to.copy_(of)
        for stream in chosen:
            current.wait_stream(stream)

    def _expect(self, what: str, sender: int) -> None:
        self._workspace.barrier_after_write()
        arrived = torch.equal(self._words(self._target, self._rank), self._words(self._source, sender))
        # The next transfer may not begin before everybody has looked.
        self._workspace.barrier_before_write()
        self._words(self._target, self._rank).zero_()
        self._workspace.barrier_before_write()
        if not arrived:
            raise AssertionError(f"{self._workspace.group}: link: {what}: what arrived is not what rank {sender} sent")


def link_ceilings(workspace: Workspace, nbytes: int, seconds: Stopwatch) -> LinkCeilings | None:
    """Collective. The ceilings for transfers of ``nbytes``, or None where there is no link: on one rank.

    seconds: what a transfer takes, the same answer on every rank; ``sonic_ep.testing.timing`` knows how.
    Raises ``AssertionError`` if a transfer did not bring what was sent.
    """
    if workspace.group.world_size == 1:
        return None
    link = Link(workspace, nbytes)

    def best(ways: list[Callable[[], None]], expect: Callable[[str], None], what: str) -> float:
        for way in ways:
            way()
            expect(what)
        return nbytes / min(seconds(way) for way in ways)

    return LinkCeilings(
        copy_engine_in=best([partial(link.copy_in, n) for n in STREAMS], link.expect_next, "copy engine in"),
        copy_engine_out=best([partial(link.copy_out, n) for n in STREAMS], link.expect_last, "copy engine out"),
        read=best([partial(link.read, how) for how in link.launches], link.expect_next, "kernel reads"),
        write=best([partial(link.write, how) for how in link.launches], link.expect_last, "kernel writes"),
    )
