"""Several ranks from one command line: ``torch.distributed.run`` starts them, and each joins the group."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sonic_ep.cli.exit_codes import FAIL, PASS
from sonic_ep.distributed.group import device_of_rank

ENDED_BY_SIGNAL = 128
# Other launchers set RANK as well, but not all of these.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among the ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device

    def say(self, line: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(line, flush=True)

    def show_progress(self, line: str) -> None:
        """Print on rank 0, if that has a terminal, a line that the next one replaces."""
        if self.rank == 0 and sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="", flush=True)

    def say_without_terminal(self, line: str) -> None:
        """Print on rank 0 where ``show_progress`` prints nothing."""
        if not sys.stdout.isatty():
            self.say(line)


def launched_by_torchrun() -> bool:
    """Whether this process is a rank already."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def ranks_of(nproc: int | None) -> int:
    """How many ranks a command runs on: those of torchrun, or ``nproc``, or one.

    Raises ``ValueError`` if torchrun has started another number than ``nproc``.
    """
    if not launched_by_torchrun():
        return nproc or 1
    started = int(os.environ["WORLD_SIZE"])
    if nproc not in (None, started):
        raise ValueError(f"--nproc: got {nproc}, expected none: torchrun has started {started} ranks")
    return started


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run a script or module on ``nproc`` ranks of this machine; ``arguments`` are torchrun's.

    Returns the exit code of the rank that failed first. ``KeyboardInterrupt`` after Ctrl-C, when the ranks have ended.
    """
    # Imported here: the launcher is heavy, and one rank does without it.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # Ranks that share the processor's cores must not each take all of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    try:
        torchrun(["--standalone", f"--nproc-per-node={nproc}", *arguments])
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return ENDED_BY_SIGNAL + int(stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        # A rank that a signal ended has not said why.
        print(f"sonic-ep: rank {rank} was ended by {failure.signal_name()}", file=sys.stderr)
        return FAIL
    return PASS


@contextmanager
def joined_group() -> Iterator[Place]:
    """The world that torchrun made, joined while the context lasts; without torchrun, one rank and no group.

    NCCL if every rank of this machine has a GPU of its own, else gloo.
    """
    device = device_of_rank(int(os.environ["LOCAL_RANK"]) if launched_by_torchrun() else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not launched_by_torchrun():
        yield Place(rank=0, world_size=1, device=device)
        return
    # A rank inside a collective would not notice an exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    own_device = device.type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    dist.init_process_group("nccl" if own_device else "gloo")
    try:
        yield Place(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    except BaseException:
        # NCCL would wait here for ranks that have not failed; gloo aborts a process that keeps its group.
        if not own_device:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
