"""What a run found, as a table and as JSON, and what it ran on."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sonic_ep.benchmark.workload import Shape
from sonic_ep.cost import LinkCeilings
from sonic_ep.profiler.machine import FLATTERED_WORLD_SIZE, TWO_GPUS_NOTE, commit, processor, this_machine
from sonic_ep.profiler.timing import Ceiling, Timing


@dataclass(frozen=True, kw_only=True)
class Bar:
    """The time that the median is held against, in seconds, and where it comes from."""

    text: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds that the link or the memory needs at the rate that was measured, whichever is more, and which it is."""

    seconds: float
    by: str


@dataclass(frozen=True, kw_only=True)
class MemoryTraffic:
    """Bytes that a rank's memory reads and writes, the mean over the ranks, and the rate of a large copy, bytes/s.

    Accesses that a cache answers count as well, so a time can be a little below what the memory would need.
    """

    nbytes: float
    bytes_per_second: float | None

    @property
    def seconds(self) -> float:
        """What the bytes take; nothing where no rate was measured."""
        return self.nbytes / self.bytes_per_second if self.bytes_per_second else 0.0


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that come to a rank over the link, the mean over the ranks, and the way they take.

    memory: what a rank's memory moves for it, where that is counted.
    """

    nbytes: float
    ceiling: Ceiling | None
    memory: MemoryTraffic | None = None

    @property
    def floor(self) -> Floor | None:
        """What the link or the memory needs, whichever is more; None without a ceiling."""
        if self.ceiling is None:
            return None
        link = Floor(seconds=self.nbytes / self.ceiling.bytes_per_second, by="link")
        if self.memory is None or self.memory.seconds <= link.seconds:
            return link
        return Floor(seconds=self.memory.seconds, by="memory")

    def at_least(self, share: float) -> Bar | None:
        """The bar of ``share`` of the ceiling; None without a ceiling."""
        if self.ceiling is None:
            return None
        bound = self.nbytes / (share * self.ceiling.bytes_per_second)
        return Bar(text=f"at least {share:.0%} of {self.ceiling.name}", seconds=bound)

    def at_most(self, times: float) -> Bar | None:
        """The bar of ``times`` what the bytes take at the ceiling; None without a ceiling."""
        if self.ceiling is None:
            return None
        bound = times * self.nbytes / self.ceiling.bytes_per_second
        return Bar(text=f"at most {times:g} times the bytes at {self.ceiling.name}", seconds=bound)


@dataclass(frozen=True, kw_only=True)
class Against:
    """What a median is held against: that of other work, timed in turn with it, and what bytes take beside that.

    measured, link: seconds, the latter at the ceilings of the link. most: the bar, so many times both together.
    """

    text: str
    measured: float
    link: float = 0.0
    most: float | None = None

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.measured + self.link

    @property
    def bar(self) -> Bar | None:
        """The bar, if there is one."""
        if self.most is None:
            return None
        return Bar(text=f"at most {self.most:g} times {self.text}", seconds=self.most * self.seconds)

    def as_json(self, median: float) -> dict[str, Any]:
        """Times in microseconds, and how many times that ``median`` is."""
        times = {"measured_us": self.measured, "link_us": self.link, "sum_us": self.seconds}
        micros = {name: round(seconds * 1e6, 2) for name, seconds in times.items()}
        return {"what": self.text, **micros, "ratio": round(median / self.seconds, 4)}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that was measured.

    flops: floating-point operations of a rank's matrix products, the mean over the ranks.
    """

    name: str
    how: str
    shape: Shape
    timing: Timing
    traffic: Traffic | None
    bar: Bar | None
    flops: float | None = None
    against: tuple[Against, ...] = ()

    @property
    def rate(self) -> float | None:
        """Remote bytes a second at the median."""
        return self.traffic.nbytes / self.timing.median if self.traffic else None

    @property
    def tflops(self) -> float | None:
        """10^12 floating-point operations a second at the median."""
        return None if self.flops is None else self.flops / self.timing.median / 1e12

    @property
    def share(self) -> float | None:
        """Share of the ceiling at the median. Raises ``AboveCeilingError`` where it cannot be."""
        if self.traffic is None or self.traffic.ceiling is None:
            return None
        return self.traffic.ceiling.share_of(self.traffic.nbytes, self.timing.median, f"{self.name}, {self.how}")

    @property
    def floor(self) -> Floor | None:
        """What the link or the memory needs for it; None where nothing of that is known."""
        return None if self.traffic is None else self.traffic.floor

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        return None if self.bar is None else self.timing.median <= self.bar.seconds

    def as_json(self) -> dict[str, Any]:
        """Times in microseconds, rates in GB/s."""
        found: dict[str, Any] = {"name": self.name, "how": self.how, "shape": shape_as_json(self.shape)}
        found |= self.timing.as_json()
        if self.traffic is not None and self.rate is not None:
            found |= {"remote_bytes": round(self.traffic.nbytes), "gb_per_s": round(self.rate / 1e9, 2)}
        if self.traffic is not None and self.traffic.memory is not None:
            found |= {"memory_bytes": round(self.traffic.memory.nbytes)}
        if self.traffic is not None and self.traffic.ceiling is not None and self.share is not None:
            found |= {"ceiling": self.traffic.ceiling.name, "percent": round(100 * self.share, 2)}
        if self.floor is not None:
            found |= {"floor_us": round(self.floor.seconds * 1e6, 2), "floor_by": self.floor.by}
        if self.tflops is not None:
            found |= {"tflop_per_s": round(self.tflops, 2)}
        if self.against:
            found |= {"against": [against.as_json(self.timing.median) for against in self.against]}
        if self.bar is not None:
            found |= {"bar": self.bar.text, "bar_us": round(self.bar.seconds * 1e6, 2), "met": self.met}
        return found


@dataclass(frozen=True, kw_only=True)
class Results:
    """What one run found. entries grow as it goes on; rank 0 writes them.

    memory_rate: reads and writes of a rank's memory in a large copy, in bytes/s.
    """

    environment: dict[str, Any]
    ceilings: LinkCeilings | None
    memory_rate: float | None = None
    entries: list[Entry] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it; ceilings in GB/s."""
        return {
            "kind": "suite",
            "environment": self.environment,
            "rates_gb_per_s": self.rates_as_json(),
            "entries": [entry.as_json() for entry in self.entries],
        }

    def rates_as_json(self) -> dict[str, float]:
        """Every rate that was measured, in GB/s."""
        return {name: round(rate / 1e9, 2) for name, rate in self._rates().items()}

    def write(self, path: Path) -> None:
        """As JSON; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n")

    def table(self) -> list[str]:
        """One line for each entry, below the ceilings."""
        names = [f"{entry.name}, T={entry.shape.tokens}" for entry in self.entries]
        width = max((len(name) for name in names), default=0)
        columns = f"{'median us':>10} {'p10':>9} {'p90':>9} {'GB/s':>6} {'%':>5} {'TF/s':>6} {'floor us':>9} {'by':<6}"
        header = f"{'what':<{width}} {'how':<6} {columns}  bar"
        lines = [f"{name:<{width}} {_figures(entry)}" for name, entry in zip(names, self.entries, strict=True)]
        return [*self._ceiling_lines(), header, *lines]

    def _ceiling_lines(self) -> list[str]:
        rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in self._rates().items())
        none = ["no ceilings: no link between GPUs was measured"] if self.ceilings is None else []
        return [*none, *([f"rates in GB/s: {rates}"] if rates else [])]

    def _rates(self) -> dict[str, float]:
        """Every rate that was measured, in bytes/s."""
        link = {} if self.ceilings is None else asdict(self.ceilings)
        return link if self.memory_rate is None else {**link, "memory": self.memory_rate}


def _figures(entry: Entry) -> str:
    """The columns of an entry behind its name."""
    middle, low, high = (entry.timing.quantile(share) * 1e6 for share in (0.5, 0.1, 0.9))
    rate = "" if entry.rate is None else f"{entry.rate / 1e9:.1f}"
    share = "" if entry.share is None else f"{100 * entry.share:.1f}"
    floor = f"{'':>9} {'':<6}" if entry.floor is None else f"{entry.floor.seconds * 1e6:>9.1f} {entry.floor.by:<6}"
    tflops = "" if entry.tflops is None else f"{entry.tflops:.1f}"
    figures = f"{middle:>10.1f} {low:>9.1f} {high:>9.1f} {rate:>6} {share:>5} {tflops:>6} {floor}"
    return f"{entry.how:<6} {figures}  {_judgement(entry)}"


def _judgement(entry: Entry) -> str:
    """The bar, and how many times what it is held against the entry took."""
    words = [f"{entry.timing.median / against.seconds:.3f} times {against.text}" for against in entry.against]
    if entry.bar is not None:
        bar = f"{'met' if entry.met else 'MISSED'}: {entry.bar.text} ({entry.bar.seconds * 1e6:.1f} us)"
        words = [bar, *words]
    return "; ".join(words)


def shape_as_json(shape: Shape) -> dict[str, Any]:
    """T of every rank, H, I where there are experts, E, K and the dtype."""
    dtype = str(shape.dtype).removeprefix("torch.")
    intermediate = {} if shape.intermediate is None else {"I": shape.intermediate}
    experts = {"E": shape.num_experts, "K": shape.top_k}
    return {"T": shape.tokens, "H": shape.hidden, **intermediate, **experts, "dtype": dtype}


def environment(device: torch.device, world_size: int, named_commit: str | None, command: str) -> dict[str, Any]:
    """What the run depends on; ``command``: how to run it again."""
    return {
        **asdict(this_machine(device)),
        "processor": processor(),
        "world_size": world_size,
        "process_group": dist.get_backend() if dist.is_initialized() else None,
        "commit": named_commit or commit(),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "note": _note(device.type == "cuda", world_size),
    }


def _note(on_gpu: bool, world_size: int) -> str | None:
    if not on_gpu:
        return "on the CPU: the times mean nothing for GPUs"
    gpus = torch.cuda.device_count()
    if world_size > gpus:
        return f"{world_size} ranks took turns on {gpus} GPUs: the times mean nothing for a GPU each"
    return TWO_GPUS_NOTE if world_size == FLATTERED_WORLD_SIZE else None


def command_of(world_size: int, words: str, arguments: Sequence[str]) -> str:
    """A command line: ``words`` with ``arguments``, by torchrun if this process was."""
    launcher = f"torchrun --nproc_per_node={world_size}" if dist.is_initialized() else "python"
    interpreter = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return f"{interpreter}{launcher} {words} {shlex.join(arguments)}".rstrip()
