"""Programs on several ranks that may fail: each rank a process, with its exit code and output."""

import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from limits import HANG_SECONDS

from sonic_ep.distributed.group import device_of_rank
from sonic_ep.testing import Rank
from sonic_ep.testing.interpreted import install_interpreter
from sonic_ep.testing.ranks import SETTINGS, starting_context


def start_program(folder: Path, source: str, *arguments: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A process that runs ``source`` on the CPU. Standard output and errors are one stream."""
    script = folder / "program.py"
    script.write_text(source)
    settings = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "always", *launcher, str(script), *arguments]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output_at_end(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=HANG_SECONDS)[0]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank ended. seconds: after ``Program.fault``."""

    code: int
    said: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """``body(program, rank, *arguments)`` on every rank. store_at_rank_0: a server, not a file."""

    body: Callable[..., None]
    arguments: tuple[Any, ...]
    world_size: int
    device_type: str
    folder: Path
    odd: int
    patience: float = HANG_SECONDS
    store_at_rank_0: bool = False

    def run(self) -> list[Ended]:
        """Run to the end. Kills ranks after ``patience`` seconds; and ``odd``, after ``fault``, as the last."""
        context = starting_context()
        ranks = [context.Process(target=run_rank, args=(self, rank)) for rank in range(self.world_size)]
        for process in ranks:
            process.start()
        deadline, ends = time.monotonic() + self.patience, [0.0] * len(ranks)
        while any(end == 0 for end in ends):
            others_ended = all(end > 0 for rank, end in enumerate(ends) if rank != self.odd)
            for rank, process in enumerate(ranks):
                if time.monotonic() > deadline or (rank == self.odd and others_ended and self.faulty):
                    process.kill()
                process.join(0.02)
                if process.exitcode is not None and ends[rank] == 0:
                    ends[rank] = time.time()
        fault = float(self.faulted.read_text()) if self.faulty else min(ends)
        return [
            Ended(code=process.exitcode, said=self.output_of(rank).read_text(), seconds=ends[rank] - fault)
            for rank, process in enumerate(ranks)
        ]

    def output_of(self, rank: int) -> Path:
        return self.folder / f"output_of_{rank}"

    def store(self, rank: int) -> dist.Store:
        if not self.store_at_rank_0:
            return dist.FileStore(str(self.folder / "store"), self.world_size)
        at = self.folder / "port"
        if rank == 0:
            server = dist.TCPStore("127.0.0.1", 0, self.world_size, is_master=True, wait_for_workers=False)
            at.with_suffix(".new").write_text(str(server.port))
            at.with_suffix(".new").rename(at)
            return server
        while not at.exists():
            time.sleep(0.02)
        return dist.TCPStore("127.0.0.1", int(at.read_text()), self.world_size, wait_for_workers=False)

    @property
    def faulted(self) -> Path:
        return self.folder / "fault"

    @property
    def faulty(self) -> bool:
        return self.faulted.exists() and bool(self.faulted.read_text())

    def fault(self) -> None:
        self.faulted.write_text(str(time.time()))


def run_rank(program: Program, rank: int) -> None:
    os.environ.update(SETTINGS[program.device_type])
    install_interpreter()
    output = os.open(program.output_of(rank), os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    # A rank that does not end prints where it is.
    faulthandler.dump_traceback_later(program.patience / 2, exit=False)
    own_device = program.device_type == "cuda" and program.world_size <= torch.cuda.device_count()
    device = device_of_rank(rank) if program.device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = program.store(rank)
    dist.init_process_group("nccl" if own_device else "gloo", store=store, rank=rank, world_size=program.world_size)
    del store
    program.body(program, Rank(rank=rank, world_size=program.world_size, device=device), *program.arguments)
    dist.destroy_process_group()
