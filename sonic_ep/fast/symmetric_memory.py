"""Memory that ranks share: CUDA symmetric memory between GPUs, or a plain buffer for one rank."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from sonic_ep.compat import rendezvous_number
from sonic_ep.distributed.collectives import BoundedCollectives, differing
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.errors import BackendUnavailableError, SharedMemoryError

ALIGNMENT_BYTES = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedBuffer:
    """One buffer of equal size on every rank.

    by_rank: each rank's bytes as this process maps them, W tensors (bytes,) uint8. addresses (W,) int64, on the device:
    where they start. keep: what has to live as long as the buffer.
    """

    rank: int
    by_rank: tuple[Tensor, ...]
    addresses: Tensor
    keep: tuple[Any, ...] = ()

    @property
    def local(self) -> Tensor:
        """This rank's own bytes."""
        return self.by_rank[self.rank]

    @cached_property
    def nbytes(self) -> int:
        """Bytes on each rank."""
        return self.local.numel()

    def rows(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The start of ``rank``'s bytes as a tensor of ``shape`` and ``dtype``."""
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.by_rank[rank][:count].view(dtype).view(shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Staging:
    """A shared buffer in two halves, which steps use in turn: see ``sonic_ep.fast.sync.staged_at``.

    addresses (2 * W,) int64, on the device: where each rank's first half starts, then where each second half does. Of
    one rank, which has no peer to wait for, both halves are the same.
    """

    buffer: SharedBuffer
    half_bytes: int
    addresses: Tensor

    @staticmethod
    def of(buffer: SharedBuffer, half_bytes: int) -> "Staging":
        """Two halves of ``half_bytes`` if ``buffer`` has as much, else one that serves as both."""
        jump = half_bytes if buffer.nbytes >= 2 * half_bytes else 0
        addresses = torch.cat((buffer.addresses, buffer.addresses + jump))
        return Staging(buffer=buffer, half_bytes=half_bytes, addresses=addresses)


class Transport(Protocol):
    """How ranks map each other's memory."""

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Collective. ``nbytes`` on every rank, all of them ``byte`` on all ranks before it returns on any."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a rank brings to an allocation. path: of its file, if it has one. error: why it has no memory."""

    nbytes: int
    path: str | None = None
    error: str | None = None


def agreed(collectives: BoundedCollectives, own: Offer) -> list[Offer]:
    """Collective. Every rank's offer. Raises ``SharedMemoryError`` on all if one has no memory, or sizes differ."""
    offers = collectives.objects(own, Phase.MEMORY)
    short = [f"rank {rank}: {offer.error}" for rank, offer in enumerate(offers) if offer.error is not None]
    if short:
        raise SharedMemoryError(f"{collectives.group}: shared memory: got no {own.nbytes} bytes on {'; '.join(short)}")
    if sizes := differing([offer.nbytes for offer in offers]):
        raise SharedMemoryError(f"{collectives.group}: shared memory: bytes differ: {sizes}")
    return offers


# Set by ``sonic_ep.testing``, for kernels under Triton's interpreter. On GPUs nothing reads it.
host_transport: Callable[[BoundedCollectives], Transport] | None = None


class OneRank:
    """The transport of a group of one: plain memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """A plain buffer."""
        local = torch.full((nbytes,), byte, dtype=torch.uint8, device=self._device)
        addresses = torch.tensor([local.data_ptr()], dtype=torch.int64, device=self._device)
        return SharedBuffer(rank=0, by_rank=(local,), addresses=addresses)


def keep_in_step(collectives: BoundedCollectives, next_number: Callable[[], int]) -> None:
    """Collective. Take numbers until all ranks have reached the same; ``RuntimeError`` if they cannot.

    next_number: a counter of this process. Ranks that first take 4, 8 and 6 go on to 8, each by its own numbers.
    """
    taken = next_number()
    numbers = collectives.objects(taken, Phase.MEMORY)
    if not differing(numbers):
        return
    while taken < max(numbers):
        taken = next_number()
    if reached := differing(collectives.objects(taken, Phase.MEMORY)):
        raise RuntimeError(f"{collectives.group}: symmetric memory: numbers of rendezvous differ: {reached}")


class CudaSymmetricMemory:
    """Memory of the GPUs of one NVLink domain, mapped into each process by PyTorch's symmetric memory."""

    def __init__(self, collectives: BoundedCollectives, device: torch.device) -> None:
        self._collectives, self._device = collectives, device

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Every rank fills its own bytes before the exchange of offers, so after it all are filled."""
        error = None
        try:
            local = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=self._device)
            local.fill_(byte)
            torch.cuda.synchronize(self._device)
        except RuntimeError as failed:
            error = str(failed).splitlines()[0]
        agreed(self._collectives, Offer(nbytes=nbytes, error=error))
        group = self._collectives.group
        process_group = group.process_group
        assert process_group is not None
        # Else ranks that shared memory in different groups before would wait for each other forever.
        keep_in_step(self._collectives, lambda: rendezvous_number(self._rendezvous_alone))
        handle = symmetric_memory.rendezvous(local, group=process_group)
        return SharedBuffer(
            rank=group.rank,
            by_rank=tuple(handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.world_size)),
            addresses=torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=self._device),
            keep=(handle, local),
        )

    def _rendezvous_alone(self, group: Any) -> None:
        memory = symmetric_memory.empty(ALIGNMENT_BYTES, dtype=torch.uint8, device=self._device)
        symmetric_memory.rendezvous(memory, group)


def transport_of(collectives: BoundedCollectives, device: torch.device) -> Transport:
    """How the ranks of a group share memory of ``device``."""
    if collectives.group.world_size == 1:
        return OneRank(device)
    if device.type == "cuda":
        return CudaSymmetricMemory(collectives, device)
    if host_transport is None:
        raise BackendUnavailableError(
            f"{collectives.group}: kernels under Triton's interpreter share memory of the host, which is for tests: "
            "import sonic_ep.testing first"
        )
    return host_transport(collectives)
