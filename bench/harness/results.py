"""What a run found: thresholds, traffic and floors, the entries, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import msgspec
import torch
from schema import GIGA, Document, Entry, Environment, RatesRecord, ShapeRecord, Suite

from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler.bandwidth import LINK_BYTES, ROUNDS, measured_bandwidth, memory_rate
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.timing import Ceiling, RoundTimer, Timing

DocumentT = TypeVar("DocumentT", bound=Document)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The time in seconds that the median is compared with, and where it comes from."""

    text: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LinkTraffic:
    """Bytes that come to a rank over the link, the mean over the ranks, and what its memory moves meanwhile.

    memory_rate: that of a large copy, in bytes/s. A cache can answer faster, so a time can be a little below the floor.
    """

    nbytes: float
    ceiling: Ceiling | None
    memory_bytes: float | None = None
    memory_rate: float | None = None

    @property
    def floor(self) -> tuple[float, str] | None:
        """Seconds that the link or the memory needs, whichever is more, and which; None without a ceiling."""
        if self.ceiling is None:
            return None
        link = self.nbytes / self.ceiling.bytes_per_second
        memory = self.memory_bytes / self.memory_rate if self.memory_bytes and self.memory_rate else 0.0
        return (memory, "memory") if memory > link else (link, "link")

    def at_least(self, share: float) -> Threshold | None:
        """The threshold of ``share`` of the ceiling; None without a ceiling."""
        return self.at_most(1 / share, f"at least {share:.0%} of")

    def at_most(self, times: float, text: str | None = None) -> Threshold | None:
        """The threshold of ``times`` what the bytes take at the ceiling; None without a ceiling."""
        if self.ceiling is None:
            return None
        text = f"{text or f'at most {times:g} times the bytes at'} {self.ceiling.name}"
        return Threshold(text=text, seconds=times * self.nbytes / self.ceiling.bytes_per_second)

    def figures(self, median: float, name: str) -> dict[str, Any]:
        """Fields of an ``Entry`` with this median. Raises ``AboveCeilingError`` if it is above the ceiling."""
        found: dict[str, Any] = {"remote_bytes": round(self.nbytes), "gb_per_s": round(self.nbytes / median / GIGA, 2)}
        if self.memory_bytes is not None:
            found["memory_bytes"] = round(self.memory_bytes)
        if self.ceiling is not None and self.floor is not None:
            share, (seconds, by) = self.ceiling.share_of(self.nbytes, median, name), self.floor
            found |= {"ceiling": self.ceiling.name, "percent": round(100 * share, 2)}
            found |= {"floor_us": micros(seconds), "floor_by": by}
        return found


@dataclass(frozen=True, kw_only=True)
class Results:
    """What one run found so far. memory_rate: reads and writes of a large copy, in bytes/s."""

    environment: Environment
    bandwidth: LinkBandwidth | None
    memory_rate: float | None = None
    entries: list[Entry] = field(default_factory=list)

    def document(self, kind: type[DocumentT], **content: Any) -> DocumentT:
        """A document of this run, with every rate that was measured."""
        link = {} if self.bandwidth is None else asdict(self.bandwidth)
        found = link if self.memory_rate is None else {**link, "memory": self.memory_rate}
        rates = {name: round(rate / GIGA, 2) for name, rate in found.items()}
        # Left out where nothing was measured: the default is not written.
        given: dict[str, Any] = {"rates_gb_per_s": RatesRecord(**rates)} if rates else {}
        return kind(environment=self.environment, **given, **content)

    @property
    def suite(self) -> Suite:
        """The entries as a document."""
        return self.document(Suite, entries=tuple(self.entries))

    def table(self) -> list[str]:
        """One line for each entry, below the ceilings."""
        names = [f"{entry.name}, T={entry.shape.tokens}" for entry in self.entries]
        width = max((len(name) for name in names), default=0)
        columns = f"{'median us':>10} {'p10':>9} {'p90':>9} {'GB/s':>6} {'%':>5} {'TF/s':>6} {'floor us':>9} {'by':<6}"
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in msgspec.to_builtins(self.suite.rates_gb_per_s).items())
        return [
            *([] if self.bandwidth else ["no ceilings: no link between GPUs was measured"]),
            *([f"rates in GB/s: {rates}"] if rates else []),
            f"{'what':<{width}} {'how':<6} {columns}  threshold",
            *(f"{name:<{width}} {_columns(entry)}" for name, entry in zip(names, self.entries, strict=True)),
        ]


def measured_results(
    timer: RoundTimer, environment: Mapping[str, Any], nbytes: int = LINK_BYTES, rounds: int = ROUNDS
) -> Results:
    """Collective: no entries yet, and the ceilings, measured now. nbytes: over the link, each way."""
    device = timer.device
    with torch.no_grad():
        return Results(
            environment=msgspec.convert(environment, Environment),
            bandwidth=measured_bandwidth(timer.group, device, nbytes, rounds),
            memory_rate=memory_rate(device, lambda copy: timer.median(copy, rounds)) if device.type == "cuda" else None,
        )


def time_fields(timing: Timing) -> dict[str, Any]:
    """The fields of ``Times``."""
    return {**timing.as_json()}


def micros(seconds: float) -> float:
    """Microseconds, rounded as records have them."""
    return round(seconds * 1e6, 2)


def shape_record(shape: Shape) -> ShapeRecord:
    """``shape`` for a document, in which a dtype is spelt without ``torch.``."""
    return ShapeRecord(**{**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")})


def _columns(entry: Entry) -> str:
    """Those of an entry behind its name; at last the threshold, and how many times its baselines the entry took."""
    rate, share, tflops, floor = (
        "" if value is None else f"{value:.1f}"
        for value in (entry.gb_per_s, entry.percent, entry.tflop_per_s, entry.floor_us)
    )
    figures = f"{entry.median_us:>10.1f} {entry.p10_us:>9.1f} {entry.p90_us:>9.1f} {rate:>6} {share:>5} {tflops:>6}"
    judged = [f"{baseline.ratio:.3f} times {baseline.what}" for baseline in entry.baselines]
    if entry.met is not None:
        judged.insert(0, f"{'met' if entry.met else 'MISSED'}: {entry.threshold} ({entry.threshold_us:.1f} us)")
    return f"{entry.how:<6} {figures} {floor:>9} {entry.floor_by or '':<6}  {'; '.join(judged)}"
