"""A pool of live ranks: worker processes that stay for a whole test run and call the functions they are sent.

One pool serves groups of any size. An error on one rank comes back with its rank and traceback at once; the ranks that
would wait for it are stopped, and fresh ones take the next call.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from sonic_ep import compat
from sonic_ep.distributed.group import device_of_rank
from sonic_ep.testing.interpreted import install_interpreter

# Environment of the ranks: on the CPU Triton's interpreter runs kernels, on GPUs ranks may share one.
SETTINGS = {"cpu": {"TRITON_INTERPRET": "1"}, "cuda": {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}}

# Ranks are forked from a server that has imported PyTorch and what its first backward imports: that saves two seconds.
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
IMPORTED_ONCE = ["torch", "torch.fx.experimental.symbolic_shapes"]

# After the first error, how long others may take to report theirs before they are stopped.
GRACE_SECONDS = 1.0


def starting_context() -> Any:
    """The context of ``multiprocessing`` that starts ranks."""
    context = multiprocessing.get_context(START_METHOD)
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


class RankError(RuntimeError):
    """A function failed on a rank. ``rank`` is the first that failed; the message has all tracebacks."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Rank, size of the world and device of the process that a function runs in."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call. store: the file of the process group's store; None for no process group."""

    function: Callable[..., Any]
    world_size: int
    arguments: tuple[Any, ...] = ()
    store: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The value that a job returned, or the traceback of its error."""

    value: Any = None
    failure: str | None = None
    died: bool = False


class RankPool(AbstractContextManager["RankPool"]):
    """Runs functions on W ranks at once.

    device_type: "cpu" (gloo; Triton kernels are interpreted) or "cuda" (NCCL where each rank has its own device, else
    gloo). timeout: seconds that a call may take. The pool is a context manager.
    """

    def __init__(self, device_type: str = "cpu", timeout: float = 600.0) -> None:
        self._device_type = device_type
        self._timeout = timeout
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="sonic_ep_ranks_")
        self._groups_formed = 0
        self._formed: int | None = None
        self._closed = False

    def run(
        self, function: Callable[..., Any], *arguments: Any, world_size: int, timeout: float | None = None
    ) -> list[Any]:
        """``function(rank, *arguments)`` on each of ``world_size`` ranks; what they returned, in rank order.

        function: of a module's top level (it travels by name), taking a ``Rank`` first. ``torch.distributed`` is
        initialised for it, unless ``world_size`` is 1, and memory fresh from ``torch.empty`` reads as NaN.
        timeout: seconds, instead of the pool's. Raises ``RankError`` if a rank fails, dies or takes too long.
        """
        if self._closed:
            raise RuntimeError("RankPool: got a call after close(), expected an open pool")
        while len(self._workers) < world_size:
            self._workers.append(_Worker(len(self._workers), self._device_type))
        if self._formed not in (None, 1, world_size):
            # NCCL waits for every rank of a group that is left: all leave it together, by a job without a store.
            self._call(_Job(function=repr, world_size=self._formed), self._timeout)
        if self._formed != world_size:
            # A new process group needs a new store.
            self._groups_formed += 1
            self._formed = world_size
        store = None if world_size == 1 else f"{self._folder.name}/store_{self._groups_formed}"
        job = _Job(function=function, world_size=world_size, arguments=arguments, store=store)
        return self._call(job, self._timeout if timeout is None else timeout)

    def pids(self) -> list[int]:
        """Process ids of the live ranks."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def stop(self) -> None:
        """End all ranks now. The next call starts fresh ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()
        self._formed = None

    def close(self) -> None:
        """End all ranks and remove the pool's files. Later calls raise."""
        self._closed = True
        self.stop()
        self._folder.cleanup()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, job: _Job, timeout: float) -> list[Any]:
        """What the ranks of the job return; on any failure all ranks are stopped."""
        workers = self._workers[: job.world_size]
        payload = pickle.dumps(job)
        try:
            for worker in workers:
                worker.send(payload)
            return _collect(workers, timeout)
        except BaseException:
            self.stop()
            raise


class _Worker:
    """A live rank, seen from the pool."""

    def __init__(self, rank: int, device_type: str) -> None:
        context = starting_context()
        self.rank = rank
        self.connection, theirs = context.Pipe()
        # The server has the environment of the time when it started.
        arguments = (rank, device_type, theirs, dict(os.environ) | SETTINGS[device_type])
        self.process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank {rank}")
        self.process.start()
        theirs.close()

    def send(self, payload: bytes) -> None:
        """Hand over a job. Raises ``RankError`` if the process has died since the last one."""
        try:
            self.connection.send_bytes(payload)
        except OSError:
            self.process.join(GRACE_SECONDS)
            raise RankError(self.rank, f"rank {self.rank} has died since, exit code {self.process.exitcode}") from None

    def receive(self) -> _Answer:
        """The answer to the last job, or that the process died."""
        try:
            answer: _Answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(GRACE_SECONDS)
            return _Answer(failure=f"the process died, exit code {self.process.exitcode}", died=True)
        return answer


def _collect(workers: Sequence[_Worker], timeout: float) -> list[Any]:
    """What all workers return. Raises ``RankError`` soon after the first failure, or when time is up."""
    answers: dict[int, _Answer] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < len(workers):
        waiting: dict[Any, _Worker] = {worker.connection: worker for worker in workers if worker.rank not in answers}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            worker = waiting[connection]
            answers[worker.rank] = worker.receive()
            if answers[worker.rank].failure is not None:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    missing = [worker.rank for worker in workers if worker.rank not in answers]
    failed = [rank for rank, answer in answers.items() if answer.failure is not None]
    # A process that died is the cause of what the others report of their connections.
    failed.sort(key=lambda rank: not answers[rank].died)
    size = len(workers)
    if failed:
        reports = "".join(f"\n--- rank {rank} of {size} ---\n{answers[rank].failure}" for rank in failed)
        stopped = f"\nstopped while they waited: ranks {missing}" if missing else ""
        raise RankError(failed[0], f"rank {failed[0]} of {size} failed{reports}{stopped}")
    if missing:
        raise RankError(missing[0], f"no answer within {timeout:g} s from ranks {missing} of {size}")
    return [answers[worker.rank].value for worker in workers]


def _serve(rank: int, device_type: str, connection: Connection, environment: dict[str, str]) -> None:
    """The main loop of a worker: answers jobs until the pool is gone."""
    # Before Triton is imported, and memory is first shared.
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C reaches all processes of a terminal; the pool stops its ranks itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    install_interpreter()
    _poison_new_memory()
    joined: str | None = None
    while True:
        try:
            payload = connection.recv_bytes()
        except EOFError:
            return
        try:
            job = pickle.loads(payload)
            device = device_of_rank(rank) if device_type == "cuda" else torch.device("cpu")
            if device.type == "cuda":
                torch.cuda.set_device(device)
            place = Rank(rank=rank, world_size=job.world_size, device=device)
            if job.store != joined:
                _join_group(place, job.store)
                joined = job.store
            answer = pickle.dumps(_Answer(value=job.function(place, *job.arguments)))
        except BaseException:
            answer = pickle.dumps(_Answer(failure=traceback.format_exc()))
        connection.send_bytes(answer)


def _poison_new_memory() -> None:
    """Memory fresh from ``torch.empty`` reads as NaN (integers: their largest value): no test passes by luck."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    # PyTorch fills only in its deterministic mode. Set by use_deterministic_algorithms it would import the compiler.
    torch.set_deterministic_debug_mode("warn")
    warnings.filterwarnings("ignore", message=".*deterministic.*")


def _join_group(rank: Rank, store: str | None) -> None:
    """Leave the last process group and enter the one of this store."""
    if dist.is_initialized():
        dist.destroy_process_group()
        compat.forget_destroyed_meshes()
    if store is not None:
        own_device = rank.device.type == "cuda" and rank.world_size <= torch.cuda.device_count()
        files = FileStore(store, rank.world_size)
        backend = "nccl" if own_device else "gloo"
        dist.init_process_group(backend, store=files, rank=rank.rank, world_size=rank.world_size)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
