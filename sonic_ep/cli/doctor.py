"""What this machine can run, and why not: the findings behind ``sonic-ep doctor``."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist

from sonic_ep.backend import BACKEND_PACKAGES, unavailable_reasons
from sonic_ep.fast.availability import symmetric_memory_reasons
from sonic_ep.group import EPGroup
from sonic_ep.profiler.machine import link_types, package_version, topology

PACKAGES = ("sonic-ep", "torch", "triton", "einops", "numpy", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class BackendHealth:
    """One backend and every reason why it cannot run here."""

    name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Health:
    """Everything the doctor found, as (subject, finding) lines, and the backends."""

    lines: tuple[tuple[str, str], ...]
    backends: tuple[BackendHealth, ...]

    def can_run(self, backend: str | None) -> bool:
        """Whether ``backend`` can run here, or any at all if None."""
        return any(not found.reasons for found in self.backends if backend in (None, found.name))


def examine() -> Health:
    """Look at this machine. Starts no process group and allocates nothing on a GPU."""
    group = EPGroup(rank=0, world_size=1)
    return Health(
        lines=(*_versions(), *_gpus(), *_links(), _symmetric_memory(), _process_groups()),
        backends=tuple(BackendHealth(name=name, reasons=unavailable_reasons(name, group)) for name in BACKEND_PACKAGES),
    )


def _versions() -> list[tuple[str, str]]:
    python = ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    packages = [(package, package_version(package) or "not installed") for package in PACKAGES]
    return [python, *packages, ("torch's CUDA", torch.version.cuda or "none: a CPU build")]


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPUs", "none")]
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        lines.append((f"GPU {index}", f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"))
    return lines


def _links() -> list[tuple[str, str]]:
    """Peer access and link of every pair of GPUs."""
    types = link_types(topology())
    lines = []
    for a, b in combinations(range(torch.cuda.device_count()), 2):
        peers = torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)
        link = types.get((a, b), "link unknown: nvidia-smi does not tell")
        lines.append((f"GPU {a} - GPU {b}", f"{'peer access' if peers else 'no peer access'}, {link}"))
    return lines


def _symmetric_memory() -> tuple[str, str]:
    reasons = symmetric_memory_reasons()
    return "symmetric memory", "no: " + "; ".join(reasons) if reasons else "yes"


def _process_groups() -> tuple[str, str]:
    if not dist.is_available():
        return "process groups", "none: this PyTorch was built without torch.distributed"
    names = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return "process groups", ", ".join(name for name, here in names.items() if here) or "none"
