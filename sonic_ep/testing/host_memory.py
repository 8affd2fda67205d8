"""Files in host memory that several processes map: private, with unguessable names, unlinked once all have mapped them.

The maker locks its file until then. If it is killed before, the next process that shares memory removes the file.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.symmetric_memory import Offer, SharedBuffer, agreed

PREFIX = "sonic_ep_"
TOKEN_BYTES = 16
# A file younger than this may not be locked yet.
YOUNG_SECONDS = 10.0


def folder() -> Path:
    """Where shared files are: in memory, where there is such a folder."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


@contextmanager
def shared_file(nbytes: int) -> Iterator[Path]:
    """A new file that only this user may open, unlinked at the end. Raises ``OSError`` if memory is short."""
    path = folder() / f"{PREFIX}{secrets.token_hex(TOKEN_BYTES)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # All of it now: a sparse file would end the process at the first write that finds no memory.
        os.posix_fallocate(descriptor, 0, nbytes)
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def remove_abandoned() -> None:
    """Unlink this user's shared files whose makers are gone."""
    for path in folder().glob(f"{PREFIX}{'[0-9a-f]' * 2 * TOKEN_BYTES}"):
        try:
            if path.stat().st_uid != os.getuid() or time.time() - path.stat().st_mtime <= YOUNG_SECONDS:
                continue
            with open(os.open(path, os.O_RDWR | os.O_NOFOLLOW)) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            # It is locked, or another process was faster.
            continue


class HostSharedMemory:
    """Memory of one host, one file for each rank."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives
        remove_abandoned()

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Collective. Each rank makes a file and maps all of them."""
        rank = self._collectives.group.rank
        with ExitStack() as stack:
            try:
                offer = Offer(nbytes=nbytes, path=str(stack.enter_context(shared_file(nbytes))))
            except OSError as error:
                offer = Offer(nbytes=nbytes, error=str(error))
            offers = agreed(self._collectives, offer)
            paths = [str(offer.path) for offer in offers]
            by_rank = tuple(torch.from_file(p, shared=True, size=nbytes, dtype=torch.uint8) for p in paths)
            by_rank[rank].fill_(byte)
            self._collectives.objects("mapped and filled", Phase.MEMORY)
        addresses = torch.tensor([tensor.data_ptr() for tensor in by_rank], dtype=torch.int64, device="cpu")
        return SharedBuffer(rank=rank, by_rank=by_rank, addresses=addresses)
