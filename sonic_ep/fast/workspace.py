"""The only owner of memory that ranks share, and of the meetings that keep its reuse in order.

Three transports stand behind one object: CUDA symmetric memory between GPUs, host shared memory for kernels under
Triton's interpreter, a plain buffer for one rank. Kernels see a table of addresses and do not know which.

Orders that hold:

- ``fence`` before a shared buffer is written: every rank has finished reading what it held before.
- ``publish`` after it is written and before a peer reads it: every rank has finished writing.
- Allocation happens in calls that all ranks make, never in backward and never in graph capture.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from sonic_ep.config import ClosedError, SharedMemoryError
from sonic_ep.fast.device import barrier_kernel, launch, leave_kernel
from sonic_ep.fast.expiry import Expiry
from sonic_ep.fast.shared_files import remove_abandoned, shared_file
from sonic_ep.group import EPGroup
from sonic_ep.meeting import Meeting, Phase, Step, published
from sonic_ep.turn import Turn
from sonic_ep.waits import Waits

POISON_BYTE = 0xFF
ALIGNMENT_BYTES = 512
# A flag at which ranks meet, or of something that arrives: it is up to the tag of their meeting.
TAG_BYTES = 8
NANOSECONDS_PER_SECOND = 1_000_000_000
MEETING = "meeting"
# Seconds for peers to lower this rank's last flag, and for its GPU to run ``leave_kernel``.
LEAVE_SECONDS = 2.0
LONE_GROUP: Any = "sonic_ep_lone_rank"
RENDEZVOUS_KEY = "CUDASymmetricMemory/{}/0"
MOST_RENDEZVOUS = 100_000


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedBuffer:
    """One buffer of equal size on every rank.

    by_rank: each rank's bytes as this process sees them, W tensors (bytes,) uint8. addresses (W,) int64, on the device:
    where they start. keep: whatever has to live as long as the buffer.
    """

    rank: int
    by_rank: tuple[Tensor, ...]
    addresses: Tensor
    keep: tuple[Any, ...] = ()

    @property
    def local(self) -> Tensor:
        """This rank's own bytes."""
        return self.by_rank[self.rank]

    @property
    def nbytes(self) -> int:
        """Bytes on each rank."""
        return self.local.numel()

    def rows(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The start of ``rank``'s bytes as a tensor of ``shape`` and ``dtype``."""
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.by_rank[rank][:count].view(dtype).view(shape)


class Transport(Protocol):
    """How ranks come to see each other's memory."""

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Collective. ``nbytes`` on every rank, each byte ``byte`` on all of them before anyone returns."""
        ...


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a rank brings to an allocation. path: of its file, if it has one. error: why it has nothing."""

    nbytes: int
    path: str | None = None
    error: str | None = None


def agreed(waits: Waits, own: Offer) -> list[Offer]:
    """Collective. What every rank offers. Raises ``SharedMemoryError`` on all if one has nothing, or sizes differ."""
    offers = waits.objects(own, Phase.MEMORY)
    short = [f"rank {rank}: {offer.error}" for rank, offer in enumerate(offers) if offer.error is not None]
    if short:
        raise SharedMemoryError(f"{waits.group}: shared memory: got no {own.nbytes} bytes on {'; '.join(short)}")
    sizes = [offer.nbytes for offer in offers]
    if len(set(sizes)) > 1:
        raise SharedMemoryError(f"{waits.group}: shared memory: got {sizes} bytes by rank, expected the same on all")
    return offers


class OneRank:
    """A group of one shares with nobody."""

    def __init__(self, waits: Waits, device: torch.device) -> None:
        self._waits, self._device = waits, device

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """A plain buffer."""
        local = torch.full((nbytes,), byte, dtype=torch.uint8, device=self._device)
        addresses = torch.tensor([local.data_ptr()], dtype=torch.int64, device=self._device)
        return SharedBuffer(rank=self._waits.group.rank, by_rank=(local,), addresses=addresses)


def keep_in_step(waits: Waits, next_number: Callable[[], int]) -> None:
    """Collective. Take numbers until the last one that each rank has taken is the same on all.

    next_number: a counter of this process, which steps as far on every rank. Where ranks take 4 8 6 first, and go two
    at a time, the first takes 6 and 8 too and the third 8. Raises ``RuntimeError`` where they cannot meet.
    """
    taken = next_number()
    numbers = waits.objects(taken, Phase.MEMORY)
    if len(set(numbers)) == 1:
        return
    while taken < max(numbers):
        taken = next_number()
    reached = waits.objects(taken, Phase.MEMORY)
    if len(set(reached)) > 1:
        raise RuntimeError(
            f"{waits.group}: symmetric memory: ranks that had made {numbers} rendezvous came to {reached}, "
            "expected the same"
        )


class CudaSymmetricMemory:
    """Memory of the GPUs of one NVLink domain, mapped into each process by PyTorch's symmetric memory."""

    def __init__(self, waits: Waits, device: torch.device) -> None:
        self._waits, self._device = waits, device

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Every rank fills its own bytes before it meets the others, so all are filled when they have met."""
        local, error = self._filled(nbytes, byte)
        agreed(self._waits, Offer(nbytes=nbytes, error=error))
        assert local is not None
        group = self._waits.group
        process_group = group.process_group
        assert process_group is not None
        # PyTorch up to 2.13 numbers the rendezvous of a process, not those of a group, and looks for peers under the
        # number: ranks that shared memory in different groups before would wait for each other without end
        # (github.com/pytorch/pytorch/issues/196082).
        keep_in_step(self._waits, self._lone_rendezvous)
        handle = symmetric_memory.rendezvous(local, group=process_group)
        return SharedBuffer(
            rank=group.rank,
            by_rank=tuple(handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.world_size)),
            addresses=torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=self._device),
            keep=(handle, local),
        )

    def _filled(self, nbytes: int, byte: int) -> tuple[Tensor | None, str | None]:
        """This rank's bytes, or why there are none."""
        try:
            local = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=self._device)
            local.fill_(byte)
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            return None, str(error).splitlines()[0]
        return local, None

    def _lone_rendezvous(self) -> int:
        """The number of a rendezvous with nobody; -1 where PyTorch keeps it under a name that is not known here."""
        store = dist.HashStore()  # type: ignore[attr-defined]
        alone = dist.ProcessGroup(store, 0, 1)
        _register_process_group(LONE_GROUP, alone)
        try:
            memory = symmetric_memory.empty(ALIGNMENT_BYTES, dtype=torch.uint8, device=self._device)
            symmetric_memory.rendezvous(memory, LONE_GROUP)
        finally:
            _unregister_process_group(LONE_GROUP)
        numbers = (number for number in range(MOST_RENDEZVOUS) if store.check([RENDEZVOUS_KEY.format(number)]))
        return next(numbers, -1)


class HostSharedMemory:
    """Memory of one host, one file a rank, gone from the file system as soon as everybody has mapped it."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        remove_abandoned()

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Each rank makes a file that only its user may open, and maps those of all."""
        rank = self._waits.group.rank
        with ExitStack() as stack:
            offers = agreed(self._waits, self._offer(nbytes, stack))
            paths = [str(offer.path) for offer in offers]
            by_rank = tuple(torch.from_file(p, shared=True, size=nbytes, dtype=torch.uint8) for p in paths)
            by_rank[rank].fill_(byte)
            self._waits.objects("mapped and filled", Phase.MEMORY)
        addresses = torch.tensor([tensor.data_ptr() for tensor in by_rank], dtype=torch.int64, device="cpu")
        return SharedBuffer(rank=rank, by_rank=by_rank, addresses=addresses)

    @staticmethod
    def _offer(nbytes: int, stack: ExitStack) -> Offer:
        """A file that lasts as long as ``stack``, or why there is none."""
        try:
            path = stack.enter_context(shared_file(nbytes))
        except OSError as error:
            return Offer(nbytes=nbytes, error=str(error))
        return Offer(nbytes=nbytes, path=str(path))


def transport_of(waits: Waits, device: torch.device) -> Transport:
    """How the ranks of a group share memory of ``device``."""
    if waits.group.world_size == 1:
        return OneRank(waits, device)
    return CudaSymmetricMemory(waits, device) if device.type == "cuda" else HostSharedMemory(waits)


class Workspace:
    """The shared buffers of one group on one device, by name. Construction is collective, and so is growth.

    waits: bounds the waits of kernels as well as those of the host, and knows where this rank is.
    """

    def __init__(
        self,
        group: EPGroup,
        device: torch.device,
        transport: Transport | None = None,
        waits: Waits | None = None,
    ) -> None:
        self.group = group
        self.device = device
        self._waits = waits or Waits(group)
        self.expiry = Expiry(self._waits, device)
        self._closed = False
        self._strayed: set[Step] = set()
        self._transport = transport or transport_of(self._waits, device)
        self._buffers: dict[str, SharedBuffer] = {}
        self._replaced: list[SharedBuffer] = []
        self._captured = False
        self._last_stream: torch.cuda.Stream | None = None
        weakref.finalize(self, keep_if_lost, self.expiry, self._buffers, self._replaced)
        self.reserve(MEETING, group.world_size * TAG_BYTES, 0)

    @property
    def turn(self) -> Turn:
        """Whose call or backward it is."""
        return self._waits.turn

    @property
    def step(self) -> Step:
        """The call that is being made."""
        return self._waits.meeting.step

    def enter(self, phase: Phase = Phase.MEETING, step: Step | None = None, *, backward: bool = False) -> None:
        """Begin a phase of ``step``, or of the call being made: after what the last one queued, on any stream.

        Raises ``PeerError`` if a kernel of this rank has waited in vain since, ``ClosedError`` after ``close``,
        ``RuntimeError`` for a backward that an error has ended before: what was sent in it may still be there.
        """
        self._open()
        if backward and step is not None and step in self._strayed:
            raise RuntimeError(
                f"{self.group}: step {step.number}: got a backward again that an error has ended before, expected its "
                "forward again first"
            )
        self.expiry.raise_if_any()
        self._waits.meeting = Meeting(step=step or self.step, phase=phase, backward=backward)
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        capturing = torch.cuda.is_current_stream_capturing()
        self._captured |= capturing
        if self._last_stream is not None and self._last_stream != stream and not capturing:
            stream.wait_stream(self._last_stream)
        if not capturing:
            self._last_stream = stream

    def stray(self) -> None:
        """A call or a backward has ended in an error on this rank."""
        meeting = self._waits.meeting
        if meeting.backward and self.group.world_size > 1:
            self._strayed.add(meeting.step)

    def leave(self) -> None:
        """Set this rank's flag on every peer to a tag of ``Phase.LEFT``: kernels that wait for it stop at once.

        Queued on the current stream; the host waits for it, ``LEAVE_SECONDS`` at most. Nothing on one rank.
        """
        if self._closed or self.group.world_size == 1:
            return
        tag = Meeting(step=self.step, phase=Phase.LEFT).tag
        limit = int(LEAVE_SECONDS * NANOSECONDS_PER_SECOND)
        sizes = (self.group.world_size, self.group.rank, tag, limit)
        launch(leave_kernel, sizes[:1], self._buffers[MEETING].addresses, *sizes, device=self.device, num_warps=1)
        if self.device.type == "cuda":
            shown = torch.cuda.Event()
            shown.record(torch.cuda.current_stream(self.device))
            deadline = time.monotonic() + LEAVE_SECONDS
            while not shown.query() and time.monotonic() < deadline:
                time.sleep(LEAVE_SECONDS / 1000)

    def reserve(self, name: str, nbytes: int, byte: int = POISON_BYTE) -> SharedBuffer:
        """The buffer ``name`` of at least ``nbytes``. Collective if it has to grow; fresh bytes are all ``byte``.

        All ranks ask for the same sizes in the same order. Raises ``RuntimeError`` if it had to grow in graph capture,
        ``ClosedError`` after ``close``.
        """
        self._open()
        held = self._buffers.get(name)
        if held is not None and held.nbytes >= nbytes:
            return held
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.group}: shared buffer {name!r}: got {0 if held is None else held.nbytes} bytes, expected "
                f"{nbytes} before graph capture: run the call once at this shape before it is captured"
            )
        if held is not None:
            self._retire(held)
        self._buffers[name] = self._allocate(nbytes, byte)
        return self._buffers[name]

    def fence(self) -> None:
        """Meet: every rank has finished reading the shared buffers."""
        self._meet(self._waits.meeting.tag)

    def publish(self) -> None:
        """Meet: every rank has finished writing the shared buffers."""
        self._meet(published(self._waits.meeting.tag))

    def run_waiting(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel that waits for peers; its last parameters are expiry, rank, tag and limit."""
        self._run(kernel, grid, *arguments, tag=self._waits.meeting.tag, **constants)

    def synchronize(self) -> None:
        """Wait for this rank's kernels."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Let go of all buffers, once this rank's kernels are done with them. Nothing can be shared any more."""
        self._closed = True
        self.synchronize()
        self._buffers.clear()
        self._replaced.clear()

    def _meet(self, tag: int) -> None:
        if self.group.world_size > 1:
            world_size = self.group.world_size
            # On the CPU kernels are interpreted, one program after the other.
            grid = (world_size,) if self.device.type == "cuda" else (2 * world_size,)
            self._run(barrier_kernel, grid, self._buffers[MEETING].addresses, world_size, tag=tag, num_warps=1)

    def _run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, tag: int, **constants: Any) -> None:
        limit = int(self._waits.timeout * NANOSECONDS_PER_SECOND)
        waits = (self.expiry.words, self.group.rank, tag, limit)
        # Interpreted, it is this thread that waits; a kernel has no trap then, and is done by now.
        with self.turn.waits() if self.device.type == "cpu" else nullcontext():
            launch(
                kernel, grid, *arguments, *waits, device=self.device, debug=True, sanitize_overflow=False, **constants
            )
        if self.device.type == "cpu":
            self.expiry.raise_if_any()

    def _retire(self, buffer: SharedBuffer) -> None:
        """Keep a buffer that a captured graph may still use; else let it go once no rank uses it any more.

        What uses it may be on any stream of this rank. The other ranks are met by the host, in the allocation that
        follows: a fence could come between meetings of another stream.
        """
        if self._captured:
            self._replaced.append(buffer)
        else:
            self.synchronize()

    def _allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        return self._transport.allocate(ALIGNMENT_BYTES * _blocks(nbytes), byte)

    def _open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.group}: shared memory: got a call after close(), expected none")


def keep_if_lost(expiry: Expiry, *buffers: object) -> None:
    """Never let ``buffers`` go if a kernel has trapped: PyTorch ends the process where it frees shared memory then.

    That would be before the process could say what has happened.
    """
    if expiry.found():
        for kept in buffers:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _blocks(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT_BYTES))
