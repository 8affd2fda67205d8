"""``sonic-ep doctor``: what this machine can run, and why not."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations

import torch
import torch.distributed as dist

from sonic_ep.backend import BACKEND_PACKAGES, choose_backend, unavailable_reasons
from sonic_ep.cli.exit_codes import FAIL, PASS
from sonic_ep.config import AUTO
from sonic_ep.distributed.group import EPGroup
from sonic_ep.errors import BackendUnavailableError
from sonic_ep.fast.capabilities import symmetric_memory_reasons
from sonic_ep.profiler.machine import link_types, package_version, topology

PACKAGES = ("sonic-ep", "torch", "triton", "einops", "numpy")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """The options of ``sonic-ep doctor``."""
    parser.add_argument("--backend", choices=tuple(BACKEND_PACKAGES), help="exit 1 unless this one can run here")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    """Starts no process group and allocates nothing on a GPU."""
    for subject, finding in _findings():
        print(f"{subject:<17} {finding}")
    group = EPGroup(rank=0, world_size=1)
    found = {name: unavailable_reasons(name, group) for name in BACKEND_PACKAGES}
    for name, reasons in found.items():
        print(f"backend {name:<9} {'cannot run here:' if reasons else 'can run here'}")
        for reason in reasons:
            print(f"    - {reason}")
    with suppress(BackendUnavailableError):
        choice = choose_backend(AUTO, group)
        print(f"backend auto      takes {choice.name} here: {choice.why}")
    healthy = any(not reasons for name, reasons in found.items() if options.backend in (None, name))
    return PASS if healthy else FAIL


def _findings() -> Iterator[tuple[str, str]]:
    """Subjects, and what is found of each."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        yield package, package_version(package) or "not installed"
    yield "torch's CUDA", torch.version.cuda or "none: a CPU build"
    if not torch.cuda.is_available():
        yield "GPUs", "none"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = gpu.total_memory / 2**30
        yield f"GPU {index}", f"{gpu.name}, {size:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    types = link_types(topology())
    for a, b in combinations(range(torch.cuda.device_count()), 2):
        peers = torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)
        link = types.get((a, b), "link unknown: nvidia-smi does not tell")
        yield f"GPU {a} - GPU {b}", f"{'peer access' if peers else 'no peer access'}, {link}"
    reasons = symmetric_memory_reasons()
    yield "symmetric memory", "no: " + "; ".join(reasons) if reasons else "yes"
    if not dist.is_available():
        yield "process groups", "none: this PyTorch was built without torch.distributed"
        return
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    yield "process groups", ", ".join(name for name, here in backends.items() if here) or "none"
