"""The only owner of memory that ranks share, and of the meetings that keep its reuse in order.

Three transports stand behind one object: CUDA symmetric memory between GPUs, host shared memory for kernels under
Triton's interpreter, a plain buffer for one rank. Kernels see a table of addresses and do not know which.

Orders that hold:

- ``fence`` before a shared buffer is written: every rank has finished reading what it held before.
- ``publish`` after it is written and before a peer reads it: every rank has finished writing.
- Allocation happens in calls that all ranks make, never in backward and never in graph capture.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from sonic_ep.config import ClosedError, PeerTimeoutError
from sonic_ep.fast.device import barrier_kernel, launch
from sonic_ep.group import EPGroup

POISON_BYTE = 0xFF
ALIGNMENT_BYTES = 512
FLAG_BYTES = 4
TIMEOUT_SECONDS = 60
# How often a program looks at a flag in a second: a compare-and-swap at the scope of the system takes about a
# microsecond on an H200, and the interpreter rests after each look.
POLLS_PER_SECOND = {"cuda": 1_000_000, "cpu": 800}
LONE_GROUP: Any = "sonic_ep_lone_rank"
RENDEZVOUS_KEY = "CUDASymmetricMemory/{}/0"
MOST_RENDEZVOUS = 100_000


class Phase(IntEnum):
    """What a rank was waiting for when its time was up."""

    FENCE = 1
    PUBLISH = 2
    COMBINE = 3


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


class OneRank:
    """A group of one shares with nobody."""

    def __init__(self, group: EPGroup, device: torch.device) -> None:
        self._group, self._device = group, device

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """A plain buffer."""
        local = torch.full((nbytes,), byte, dtype=torch.uint8, device=self._device)
        addresses = torch.tensor([local.data_ptr()], dtype=torch.int64, device=self._device)
        return SharedBuffer(rank=self._group.rank, by_rank=(local,), addresses=addresses)


def keep_in_step(group: EPGroup, next_number: Callable[[], int]) -> None:
    """Collective. Take numbers until the last one that each rank has taken is the same on all.

    next_number: a counter of this process, which steps as far on every rank. Where ranks take 4 8 6 first, and go two
    at a time, the first takes 6 and 8 too and the third 8. Raises ``RuntimeError`` where they cannot meet.
    """
    taken = next_number()
    numbers = gathered_objects(group, taken)
    if len(set(numbers)) == 1:
        return
    while taken < max(numbers):
        taken = next_number()
    reached = gathered_objects(group, taken)
    if len(set(reached)) > 1:
        raise RuntimeError(
            f"{group}: symmetric memory: ranks that had made {numbers} rendezvous came to {reached}, expected the same"
        )


class CudaSymmetricMemory:
    """Memory of the GPUs of one NVLink domain, mapped into each process by PyTorch's symmetric memory."""

    def __init__(self, group: EPGroup, device: torch.device) -> None:
        self._group, self._device = group, device

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Every rank fills its own bytes before it meets the others, so all are filled when they have met."""
        local = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=self._device)
        local.fill_(byte)
        torch.cuda.synchronize(self._device)
        process_group = self._group.process_group
        assert process_group is not None
        # PyTorch up to 2.13 numbers the rendezvous of a process, not those of a group, and looks for peers under the
        # number: ranks that shared memory in different groups before would wait for each other without end
        # (github.com/pytorch/pytorch/issues/196082).
        keep_in_step(self._group, self._lone_rendezvous)
        handle = symmetric_memory.rendezvous(local, group=process_group)
        ranks = range(self._group.world_size)
        return SharedBuffer(
            rank=self._group.rank,
            by_rank=tuple(handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in ranks),
            addresses=torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=self._device),
            keep=(handle, local),
        )

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

    def __init__(self, group: EPGroup) -> None:
        self._group = group

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Each rank makes a file that only its user may open, and maps those of all."""
        path = _new_shared_file(nbytes)
        try:
            offers = gathered_objects(self._group, (str(path), nbytes))
            if any(size != nbytes for _, size in offers):
                sizes = [size for _, size in offers]
                raise RuntimeError(f"{self._group}: shared memory: got {sizes} bytes by rank, expected the same on all")
            paths = [path_of_rank for path_of_rank, _ in offers]
            by_rank = tuple(torch.from_file(p, shared=True, size=nbytes, dtype=torch.uint8) for p in paths)
            by_rank[self._group.rank].fill_(byte)
            gathered_objects(self._group, "mapped and filled")
        finally:
            path.unlink()
        addresses = torch.tensor([tensor.data_ptr() for tensor in by_rank], dtype=torch.int64, device="cpu")
        return SharedBuffer(rank=self._group.rank, by_rank=by_rank, addresses=addresses)


def gathered_objects(group: EPGroup, own: Any) -> list[Any]:
    """Collective. ``own`` of every rank, in rank order."""
    objects = [None] * group.world_size
    dist.all_gather_object(objects, own, group=group.process_group)
    return objects


def _new_shared_file(nbytes: int) -> Path:
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
    path = folder / f"sonic_ep_{secrets.token_hex(16)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.ftruncate(descriptor, nbytes)
    finally:
        os.close(descriptor)
    return path


def transport_of(group: EPGroup, device: torch.device) -> Transport:
    """How the ranks of ``group`` share memory of ``device``."""
    if group.world_size == 1:
        return OneRank(group, device)
    return CudaSymmetricMemory(group, device) if device.type == "cuda" else HostSharedMemory(group)


class Workspace:
    """The shared buffers of one group on one device, by name. Construction is collective, and so is growth."""

    def __init__(self, group: EPGroup, device: torch.device, transport: Transport | None = None) -> None:
        self.group = group
        self.device = device
        self.poll_limit = TIMEOUT_SECONDS * POLLS_PER_SECOND[device.type]
        # The host reads it while kernels run, so on a GPU it is pinned memory that kernels write through the bus.
        self.expiry = host_words(3, device)
        self.step = 0
        self._closed = False
        self._transport = transport or transport_of(group, device)
        self._buffers: dict[str, SharedBuffer] = {}
        self._replaced: list[SharedBuffer] = []
        self._captured = False
        self._last_stream: torch.cuda.Stream | None = None
        self._meeting = self._allocate(group.world_size * FLAG_BYTES, 0)

    def enter(self) -> None:
        """Begin a collective step: after what the last one queued, also where that was on another stream.

        Raises ``PeerTimeoutError`` if a rank has waited in vain since, ``ClosedError`` after ``close``.
        """
        self._open()
        self.raise_expired()
        self.step += 1
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        capturing = torch.cuda.is_current_stream_capturing()
        self._captured |= capturing
        if self._last_stream is not None and self._last_stream != stream and not capturing:
            stream.wait_stream(self._last_stream)
        if not capturing:
            self._last_stream = stream

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
        self._meet(Phase.FENCE)

    def publish(self) -> None:
        """Meet: every rank has finished writing the shared buffers."""
        self._meet(Phase.PUBLISH)

    def run_waiting(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, phase: Phase, **constants: Any) -> None:
        """Launch a kernel that waits for peers; its last parameters are expiry, rank, step, limit and PHASE."""
        waits = (self.expiry, self.group.rank, self.step, self.poll_limit)
        traps = {"debug": True, "sanitize_overflow": False}
        launch(kernel, grid, *arguments, *waits, device=self.device, PHASE=int(phase), **traps, **constants)
        # Interpreted, a kernel has no trap, and it is done by now.
        if self.device.type == "cpu":
            self.raise_expired()

    def raise_expired(self) -> None:
        """Raise ``PeerTimeoutError`` if a kernel of this rank has waited in vain. No wait for the GPU."""
        phase, peer, step = self.expiry.tolist()
        if phase:
            raise PeerTimeoutError(
                f"{self.group}: waited about {TIMEOUT_SECONDS} s for rank {peer - 1} in phase "
                f"{Phase(phase).name.lower()} of step {step}; did it fail, or make another call?"
            )

    def synchronize(self) -> None:
        """Wait for this rank's kernels."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Let go of all buffers, once this rank's kernels are done with them. Nothing can be shared any more."""
        self.synchronize()
        self._closed = True
        self._buffers.clear()
        self._replaced.clear()

    def _meet(self, phase: Phase) -> None:
        if self.group.world_size > 1:
            self.run_waiting(
                barrier_kernel, (self.group.world_size,), self._meeting.addresses, phase=phase, num_warps=1
            )

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


def host_words(count: int, device: torch.device) -> Tensor:
    """Zeros, int32, on the host, for kernels on ``device`` to write and the host to read: pinned for a GPU."""
    # What is made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")


def _blocks(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT_BYTES))
