"""Programs on several ranks that may fail: each rank a process, with its exit code and output."""

import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from limits import HANG_SECONDS

from sonic_ep.distributed.group import device_of_rank
from sonic_ep.testing import Rank
from sonic_ep.testing.interpreted import install_interpreter
from sonic_ep.testing.ranks import SETTINGS, starting_context


def run_program(folder: Path, source: str, *arguments: Sequence[str]) -> list[tuple[int, str]]:
    """Exit code and output of processes that run ``source`` on the CPU at once, one with each of ``arguments``."""
    script = folder / "program.py"
    script.write_text(source)
    settings = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "always", str(script)]
    options: dict[str, Any] = {"env": settings, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([*command, *one], **options) for one in arguments]
    outputs = [process.communicate(timeout=HANG_SECONDS)[0] for process in started]
    return [(process.returncode, said) for process, said in zip(started, outputs, strict=True)]


def exits(
    folder: Path, body: Callable[..., None], *arguments: Any, world_size: int, odd: int, device_type: str, served: bool
) -> list[tuple[int | None, str]]:
    """Exit code and output of each rank of ``body(rank, *arguments)``.

    odd: the rank to kill once the others have ended; ranks that hang are killed, too. served: rank 0 serves the store.
    """
    common = (world_size, device_type, folder, served, body, *arguments)
    ranks = [starting_context().Process(target=_run_rank, args=(rank, *common)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + HANG_SECONDS
    for rank in sorted(range(world_size), key=lambda rank: rank == odd):
        ranks[rank].join(0 if rank == odd else max(0, deadline - time.monotonic()))
        ranks[rank].kill()
        ranks[rank].join()
    return [(process.exitcode, (folder / f"output_of_{rank}").read_text()) for rank, process in enumerate(ranks)]


def _run_rank(
    rank: int, world_size: int, device_type: str, folder: Path, served: bool, body: Callable[..., None], *arguments: Any
) -> None:
    os.environ.update(SETTINGS[device_type])
    install_interpreter()
    output = os.open(folder / f"output_of_{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    # A rank that does not end prints where it is.
    faulthandler.dump_traceback_later(HANG_SECONDS / 2, exit=False)
    own_device = device_type == "cuda" and world_size <= torch.cuda.device_count()
    device = device_of_rank(rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store: dist.Store = dist.FileStore(str(folder / "store"), world_size)
    if served:
        port = int(store.get("port")) if rank else 0
        files, store = store, dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
        files.set("port", str(store.port))
    dist.init_process_group("nccl" if own_device else "gloo", store=store, rank=rank, world_size=world_size)
    del store
    body(Rank(rank=rank, world_size=world_size, device=device), *arguments)
    dist.destroy_process_group()
