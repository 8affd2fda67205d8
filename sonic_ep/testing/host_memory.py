"""Files in host memory that several processes map: without a name, and gone with the last process that maps them."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.symmetric_memory import Offer, SharedBuffer, agreed


def folder() -> Path:
    """Where shared files are: in memory, where there is such a folder."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


class HostSharedMemory:
    """Memory of one host, one file for each rank."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Collective. Each rank makes a file and maps all of them."""
        rank = self._collectives.group.rank
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(tempfile.TemporaryFile(dir=folder())).fileno()
                # All of it now: a sparse file would end the process at the first write that finds no memory.
                os.posix_fallocate(descriptor, 0, nbytes)
                offer = Offer(nbytes=nbytes, path=f"/proc/{os.getpid()}/fd/{descriptor}")
            except OSError as error:
                offer = Offer(nbytes=nbytes, error=str(error))
            offers = agreed(self._collectives, offer)
            paths = [str(offer.path) for offer in offers]
            by_rank = tuple(torch.from_file(p, shared=True, size=nbytes, dtype=torch.uint8) for p in paths)
            by_rank[rank].fill_(byte)
            self._collectives.objects("mapped and filled", Phase.MEMORY)
        addresses = torch.tensor([tensor.data_ptr() for tensor in by_rank], dtype=torch.int64, device="cpu")
        return SharedBuffer(rank=rank, by_rank=by_rank, addresses=addresses)
