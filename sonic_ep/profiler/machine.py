"""What measurements depend on: GPUs, the links between them, versions, and the code of this package."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PACKAGE = Path(__file__).parent.parent
PATIENCE_SECONDS = 20
# Belongs to every figure of two GPUs.
FLATTERED_WORLD_SIZE = 2
TWO_GPUS_NOTE = "two GPUs flatter rank_dedup and all_gather: with more of them a token crosses the link more often"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of one rank; None where there is no GPU or nothing reports it.

    gpus: how many this process sees. link: between the first two of them. code: a digest of this package's source.
    """

    gpu: str | None
    gpus: int
    link: str | None
    torch: str
    triton: str | None
    cuda: str | None
    nccl: str | None
    driver: str | None
    code: str


def this_machine(device: torch.device) -> Machine:
    """``device`` and the software that runs on it. Asks the driver, which takes up to a second."""
    on_gpu = device.type == "cuda"
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else ""
    return Machine(
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        gpus=torch.cuda.device_count() if on_gpu else 0,
        link=link_types(topology()).get((0, 1)) if on_gpu else None,
        torch=str(torch.__version__),
        triton=package_version("triton"),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        driver=driver.splitlines()[0].strip() if driver else None,
        code=code_digest(),
    )


def environment(device: torch.device, world_size: int, named_commit: str | None, command: str) -> dict[str, Any]:
    """The machine of a run as JSON. command: how to run it again."""
    gpus, note, information = torch.cuda.device_count(), None, Path("/proc/cpuinfo")
    if device.type != "cuda":
        note = "on the CPU: the times mean nothing for GPUs"
    elif world_size > gpus:
        note = f"{world_size} ranks took turns on {gpus} GPUs: the times mean nothing for a GPU each"
    elif world_size == FLATTERED_WORLD_SIZE:
        note = TWO_GPUS_NOTE
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        **asdict(this_machine(device)),
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "world_size": world_size,
        "process_group": dist.get_backend() if dist.is_initialized() else None,
        "commit": named_commit or commit(),
        "command": command,
        "date": date_now(),
        "note": note,
    }


def command_of(world_size: int, program: str, arguments: Sequence[str]) -> str:
    """A command line: ``program`` with ``arguments``, by torchrun if this process was."""
    launcher = f"torchrun --nproc_per_node={world_size}" if dist.is_initialized() else "python"
    interpreter = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return f"{interpreter}{launcher} {program} {shlex.join(arguments)}".rstrip()


def date_now() -> str:
    """UTC, ISO format."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def package_version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def code_digest(folder: Path = PACKAGE) -> str:
    """A digest of the source below ``folder``, wherever the folder lies."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit(folder: Path = PACKAGE) -> str | None:
    """The commit checked out in ``folder``, and whether files differ from it; None unless git tracks ``folder``."""
    git = partial(output_of, "git", "-C", str(folder))
    found = git("rev-parse", "HEAD").strip() if git("ls-files", ".") else ""
    return f"{found}{' with changes' if git('status', '--porcelain') else ''}" if found else None


def topology() -> str:
    """The matrix that ``nvidia-smi topo -m`` prints; empty if there is none."""
    return output_of("nvidia-smi", "topo", "-m") if torch.cuda.is_available() else ""


def link_types(matrix: str) -> dict[tuple[int, int], str]:
    """Link of each pair of GPUs, from the matrix of ``nvidia-smi topo -m``: "NVLink, 18 links (NV18)" for one."""
    rows = [line.split()[1:] for line in matrix.splitlines() if line.startswith("GPU")]
    links = {(a, b): link for a, row in enumerate(rows) for b, link in enumerate(row[: len(rows)]) if a != b}
    return {
        pair: f"NVLink, {link[2:]} links ({link})" if link.startswith("NV") else f"{link} (no NVLink)"
        for pair, link in links.items()
    }


def output_of(*command: str) -> str:
    """The output of a program; empty if it cannot be run or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True).stdout
    except (subprocess.SubprocessError, OSError, UnicodeDecodeError):
        return ""
