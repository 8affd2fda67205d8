"""Files in the host's memory that several processes map: private, unguessable, and gone as soon as all have them.

A process that is killed between making a file and unlinking it leaves it behind. Whoever makes one holds a lock on it
until it is unlinked, so the next process that shares memory can tell what nobody holds any more, and removes it.
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
# A file is made and then locked; one as young as this may be between the two.
YOUNG_SECONDS = 10.0


def folder() -> Path:
    """Where shared files are: memory, where there is such a folder."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


@contextmanager
def shared_file(nbytes: int) -> Iterator[Path]:
    """A new file of ``nbytes`` that only this user may open, unlinked at the end.

    Raises ``OSError`` if there is no memory for all of it: memory that is merely promised would end the process when
    it is used.
    """
    path = folder() / f"{PREFIX}{secrets.token_hex(TOKEN_BYTES)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.posix_fallocate(descriptor, 0, nbytes)
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def remove_abandoned() -> None:
    """Unlink this user's shared files whose makers are gone."""
    for path in folder().glob(f"{PREFIX}{'[0-9a-f]' * 2 * TOKEN_BYTES}"):
        try:
            if path.stat().st_uid == os.getuid() and time.time() - path.stat().st_mtime > YOUNG_SECONDS:
                _unlink_if_abandoned(path)
        except OSError:
            # Its maker was faster, or another process that looks after the same files.
            continue


def _unlink_if_abandoned(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


class HostSharedMemory:
    """Memory of one host, one file a rank, gone from the file system as soon as everybody has mapped it."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives
        remove_abandoned()

    def allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        """Each rank makes a file that only its user may open, and maps those of all."""
        rank = self._collectives.group.rank
        with ExitStack() as stack:
            offers = agreed(self._collectives, self._offer(nbytes, stack))
            paths = [str(offer.path) for offer in offers]
            by_rank = tuple(torch.from_file(p, shared=True, size=nbytes, dtype=torch.uint8) for p in paths)
            by_rank[rank].fill_(byte)
            self._collectives.objects("mapped and filled", Phase.MEMORY)
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
