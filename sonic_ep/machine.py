"""What a measurement depends on: GPUs, the links between them, versions, and this package's own code."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
CPU_INFORMATION = Path("/proc/cpuinfo")
PATIENCE_SECONDS = 20
# To be said beside every figure of two GPUs.
FLATTERED_WORLD_SIZE = 2
TWO_GPUS_NOTE = "two GPUs flatter rank_dedup and all_gather: with more of them a token crosses the link more often"
DIGEST_LETTERS = 12


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of one rank; None where there is no GPU, or where nothing tells.

    gpu: its name; gpus: how many this process sees. link: between the first two of them. cuda, nccl, driver: versions.
    code: a digest of this package's source.
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
    """What ``device`` is, and what runs on it. Asks the driver, which takes up to a second."""
    on_gpu = device.type == "cuda"
    return Machine(
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        gpus=torch.cuda.device_count() if on_gpu else 0,
        link=link_types(topology()).get((0, 1)) if on_gpu else None,
        torch=torch.__version__,
        triton=package_version("triton"),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        driver=_driver() if on_gpu else None,
        code=code_digest(),
    )


def processor() -> str:
    """What the processor calls itself; its architecture where it does not tell."""
    try:
        lines = CPU_INFORMATION.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def package_version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def code_digest(folder: Path = PACKAGE) -> str:
    """The same for the same source below ``folder``, wherever that lies."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGEST_LETTERS]


def commit(folder: Path = PACKAGE) -> str | None:
    """The commit checked out in ``folder``, and whether files differ from it; None without git.

    None as well for an installed copy that happens to lie inside somebody's repository.
    """
    if not output_of("git", "-C", str(folder), "ls-files", ".").strip():
        return None
    found = output_of("git", "-C", str(folder), "rev-parse", "HEAD").strip()
    changed = output_of("git", "-C", str(folder), "status", "--porcelain").strip()
    return f"{found}{' with changes' if changed else ''}" if found else None


def topology() -> str:
    """The matrix that ``nvidia-smi topo -m`` prints; empty if it cannot be had."""
    if not torch.cuda.is_available():
        return ""
    return output_of("nvidia-smi", "topo", "-m")


def link_types(matrix: str) -> dict[tuple[int, int], str]:
    r"""Link of each pair of GPUs, from the matrix of ``nvidia-smi topo -m``.

    >>> link_types("\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31")
    {(0, 1): 'NVLink, 18 links (NV18)', (1, 0): 'NVLink, 18 links (NV18)'}
    """
    rows = [line.split() for line in matrix.splitlines() if line.startswith("GPU")]
    found = {}
    for a, row in enumerate(rows):
        for b, word in enumerate(row[1 : len(rows) + 1]):
            if a != b:
                found[a, b] = f"NVLink, {word[2:]} links ({word})" if word.startswith("NV") else f"{word} (no NVLink)"
    return found


def output_of(*words: str) -> str:
    """What a program prints; empty if it cannot be run or fails."""
    if shutil.which(words[0]) is None:
        return ""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    except (subprocess.SubprocessError, OSError, UnicodeDecodeError):
        return ""
    return done.stdout


def _driver() -> str | None:
    found = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None
