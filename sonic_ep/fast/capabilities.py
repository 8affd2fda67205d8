"""Requirements of the fast backend on a machine, as reasons why it cannot run."""

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from itertools import permutations

import torch

from sonic_ep.compat import release_of

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (9, 0)


def software_reasons() -> tuple[str, ...]:
    """Python packages that are missing or too old."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return ("triton is not installed",)
    old = f"triton {found} is installed, expected {_dotted(MINIMUM_TRITON)} or newer"
    return (old,) if release_of(found) < MINIMUM_TRITON else ()


def interpreter_reasons() -> tuple[str, ...]:
    """Why Triton's interpreter cannot run kernels on CPU tensors."""
    if missing := software_reasons():
        return missing
    triton, numpy = version("triton"), version("numpy")
    wanted = "expected triton 3.7 or newer, or numpy older than 2.4"
    # Before 3.7 it calls int() on arrays of one element, which numpy refuses since 2.4.
    fails = release_of(triton) < (3, 7) and release_of(numpy) >= (2, 4)
    return (f"the interpreter of triton {triton} fails with numpy {numpy}: {wanted}",) if fails else ()


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors. Needs triton."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def auto_reasons() -> tuple[str, ...]:
    """Why "auto" does not choose this backend where it can run."""
    slow = ("Triton's interpreter runs its kernels, which is for tests: thousands of times slower",)
    return slow if interpreted() else ()


def device_reasons() -> tuple[str, ...]:
    """Why the GPUs of this machine do not suffice."""
    if not torch.cuda.is_available():
        hint = "for tests on the CPU, set TRITON_INTERPRET=1 before Python starts"
        return (f"no CUDA device: torch.cuda.is_available() is False ({hint})",)
    expected = f"expected {_dotted(MINIMUM_CAPABILITY)} or newer"
    found = enumerate(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    old = [(index, capability) for index, capability in found if capability < MINIMUM_CAPABILITY]
    too_old = (f"GPU {index} has compute capability {_dotted(number)}, {expected}" for index, number in old)
    return (*too_old, *symmetric_memory_reasons())


def symmetric_memory_reasons() -> tuple[str, ...]:
    """Why the GPUs of this machine cannot map each other's memory; empty if they can."""
    if not torch.cuda.is_available():
        return ("no CUDA device",)
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return (f"torch {torch.__version__} has no symmetric memory",)
    pairs = permutations(range(torch.cuda.device_count()), 2)
    blind = [f"{a}->{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    return (f"no peer access between GPUs {', '.join(blind)}",) if blind else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
