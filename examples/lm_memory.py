"""What a process of ``train_lm.py --soak`` holds between its steps, and whether that grows."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PROCESS = Path("/proc/self")
# The least that is kept of a batch if anything is: one int32 or fp32 for each token.
LEAST_BYTES_PER_TOKEN = 4
# What is taken at a time: by glibc, M_TOP_PAD in the arena of each thread; by Python; and of a device, a page.
C_ARENA_BYTES = 128 * 1024
PYTHON_ARENA_BYTES = 1024 * 1024
DEVICE_PAGE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a process holds after so many steps, when everything that is cached has been given back.

    resident, anonymous: bytes of the process, and those that no file stands behind. tensors: objects of Python's.
    On a GPU, else None: allocated, reserved: bytes of PyTorch's allocator. peak: the most that was asked of it since
    the sample before. used: bytes of the device that are taken, by whatever, and so of symmetric memory too.
    """

    step: int
    resident: int
    anonymous: int
    descriptors: int
    threads: int
    tensors: int
    allocated: int | None = None
    reserved: int | None = None
    peak: int | None = None
    used: int | None = None


# These have to be exactly equal between any two steps.
EQUAL: dict[str, Callable[[Sample], int | None]] = {
    "descriptors": lambda sample: sample.descriptors,
    "threads": lambda sample: sample.threads,
    "tensors": lambda sample: sample.tensors,
    "allocated": lambda sample: sample.allocated,
    "reserved": lambda sample: sample.reserved,
}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Memory as the system or the driver counts it, and how much of it is taken at a time."""

    of: Callable[[Sample], int | None]
    at_a_time: Callable[[Sample], int]


# These are counted in pages, and grow when code is first loaded.
BOUNDED = {
    "anonymous": Taken(
        of=lambda sample: sample.anonymous,
        at_a_time=lambda sample: PYTHON_ARENA_BYTES + C_ARENA_BYTES * sample.threads,
    ),
    "used": Taken(of=lambda sample: sample.used, at_a_time=lambda _sample: DEVICE_PAGE_BYTES),
}


class Watch:
    """Takes a sample of this process after each of the steps ``at``."""

    def __init__(self, device: torch.device, at: range) -> None:
        self.device, self.at = device, at
        self.samples: list[Sample] = []

    def look(self, done: int) -> None:
        """Call this after each step. done: the number of steps that are done."""
        if done in self.at:
            self.samples.append(sample_of(done, self.device))


def sample_of(step: int, device: torch.device) -> Sample:
    """What this process holds now. Gives caches back first: Python's, the allocator's and the C library's."""
    on_device = _of_gpu(device) if device.type == "cuda" else {}
    gc.collect()
    # Not every C library has it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _padding: None)
    trim(0)
    status = (PROCESS / "status").read_text()
    return Sample(
        step=step,
        resident=_kilobytes(status, "VmRSS"),
        anonymous=_kilobytes(status, "RssAnon"),
        descriptors=len(list((PROCESS / "fd").iterdir())),
        threads=len(list((PROCESS / "task").iterdir())),
        tensors=sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
        **on_device,
    )


def _kilobytes(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{PROCESS}/status: got no line {name}, expected one of Linux's")
    return 1024 * int(found[1])


def _of_gpu(device: torch.device) -> dict[str, int]:
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    peak = torch.cuda.memory_stats(device)["requested_bytes.all.peak"]
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak": peak,
        "used": total - free,
    }


@dataclass(frozen=True, kw_only=True)
class Level:
    """One thing that a rank holds, from the end of the warm-up on.

    values: by sample. most: how far above the first of them another may be; None: not at all, and not below either.
    """

    name: str
    values: tuple[int, ...]
    most: int | None = None

    @property
    def rise(self) -> int:
        """How far above the first value the highest one is."""
        return max(self.values) - self.values[0]

    @property
    def flat(self) -> bool:
        """Whether all values are within what ``most`` allows."""
        return len(set(self.values)) == 1 if self.most is None else self.rise <= self.most

    def __str__(self) -> str:
        allowed = "expected no change" if self.most is None else f"expected at most {self.most} more"
        later = f"then {min(self.values)} to {max(self.values)}"
        return f"{self.name}: got {self.values[0]} after the warm-up, {later}, {allowed}"


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank held during a run: all its samples, and the levels of those from the end of the warm-up on."""

    rank: int
    samples: tuple[Sample, ...]
    levels: tuple[Level, ...]

    @property
    def flat(self) -> bool:
        """Whether no level has moved."""
        return all(level.flat for level in self.levels)

    @property
    def faults(self) -> list[str]:
        """The levels that have moved."""
        return [f"rank {self.rank}, {level}" for level in self.levels if not level.flat]


def held(rank: int, samples: Sequence[Sample], tokens: Sequence[int], warm_up: int) -> Held:
    """The samples of a rank, judged. tokens: T of each step. warm_up: the steps that are not.

    What is counted in pages may grow by one number for each token, or by as much as is taken at a time if that is more,
    as in a short run.
    """
    settled = [sample for sample in samples if sample.step >= warm_up]
    if len(settled) < 2:
        raise ValueError(f"got {len(settled)} samples behind a warm-up of {warm_up} steps, expected two at least")
    least_leak = LEAST_BYTES_PER_TOKEN * sum(tokens[settled[0].step : settled[-1].step])
    levels = [_level(name, of, settled, None) for name, of in EQUAL.items()]
    for name, taken in BOUNDED.items():
        levels.append(_level(name, taken.of, settled, max(least_leak, taken.at_a_time(settled[0]))))
    return Held(rank=rank, samples=tuple(samples), levels=tuple(level for level in levels if level.values))


def _level(name: str, of: Callable[[Sample], int | None], samples: Sequence[Sample], most: int | None) -> Level:
    values = [of(sample) for sample in samples]
    return Level(name=name, values=tuple(value for value in values if value is not None), most=most)
