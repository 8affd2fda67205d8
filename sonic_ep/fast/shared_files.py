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
from contextlib import contextmanager
from pathlib import Path

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
