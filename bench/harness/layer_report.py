"""What an end-to-end benchmark found, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sonic_ep.benchmark.layer import Pass
from sonic_ep.benchmark.memory_use import MemoryUse
from sonic_ep.benchmark.results import Results
from sonic_ep.benchmark.setup import Setup
from sonic_ep.config import EPConfig
from sonic_ep.profiler import ProfileReport
from sonic_ep.profiler.report import config_as_json
from sonic_ep.testing.checks import Accuracy
from sonic_ep.testing.timing import Timing


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Time of one thing in one pass. flops: of a rank's matrix products; None where they are not counted."""

    which: Pass
    what: str
    timing: Timing
    flops: float | None
    world_size: int

    def as_json(self) -> dict[str, Any]:
        """Times in microseconds."""
        rate = None if self.flops is None else self.flops / self.timing.median / 1e12
        rates = {"tflop_per_s": rate, "tflop_per_s_of_group": None if rate is None else rate * self.world_size}
        rounded = {name: None if value is None else round(value, 3) for name, value in rates.items()}
        return {"pass": self.which.value, "what": self.what, **self.timing.as_json(), **rounded}


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What follows from times that took turns; None where there is nothing to hold against.

    exposed_communication, link: seconds. over_gemms, over_gemms_and_link, over_reference: the layer's time over
    theirs. scaling_efficiency: one GPU's time for as many tokens over the layer's.
    """

    which: Pass
    exposed_communication: float | None
    link: float | None
    over_gemms: float
    over_gemms_and_link: float | None
    scaling_efficiency: float | None
    over_reference: float | None

    def as_json(self) -> dict[str, Any]:
        """Times in microseconds."""
        return {
            "pass": self.which.value,
            "exposed_communication_us": _rounded(self.exposed_communication, 1e6, 2),
            "link_us": _rounded(self.link, 1e6, 2),
            "over_gemms": round(self.over_gemms, 4),
            "over_gemms_and_link": _rounded(self.over_gemms_and_link, 1, 4),
            "scaling_efficiency": _rounded(self.scaling_efficiency, 1, 4),
            "over_reference": _rounded(self.over_reference, 1, 4),
        }


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Where the time of a pass goes, in seconds by part: what was timed by itself, and the rest of the layer's time."""

    which: Pass
    parts: tuple[tuple[str, float], ...]

    def as_json(self) -> dict[str, Any]:
        """In microseconds."""
        return {"pass": self.which.value, "parts": {name: round(part * 1e6, 2) for name, part in self.parts}}


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """All of it. accuracy: of the configuration that was timed; all of it is green, or there would be no report."""

    results: Results
    setup: Setup
    config: EPConfig
    accuracy: tuple[Accuracy, ...]
    profile: ProfileReport
    memory: tuple[MemoryUse, ...]
    times: tuple[Timed, ...]
    derived: tuple[Derived, ...]
    breakdown: tuple[Breakdown, ...]

    def as_json(self) -> dict[str, Any]:
        """The document of kind "layer"."""
        return {
            "kind": "layer",
            "environment": self.results.environment,
            "rates_gb_per_s": self.results.rates_as_json(),
            "setup": self.setup.as_json(),
            "config": config_as_json(self.config),
            "accuracy": [accuracy_as_json(accuracy) for accuracy in self.accuracy],
            "profile": self.profile.as_part(),
            "memory": [use.as_json() for use in self.memory],
            "times": [timed.as_json() for timed in self.times],
            "derived": [each.as_json() for each in self.derived],
            "breakdown": [each.as_json() for each in self.breakdown],
        }

    def lines(self) -> list[str]:
        """Everything that was measured, as tables. The accuracies stand before them: ``accuracy_lines``."""
        return [
            *self.profile.table(),
            "",
            *memory_lines(self.memory),
            "",
            *time_lines(self.times),
            "",
            *derived_lines(self.derived),
        ]


def accuracy_as_json(accuracy: Accuracy) -> dict[str, Any]:
    """Errors and bounds by name."""
    got, bound = accuracy.got, accuracy.bound
    errors = {"error": got.norm, "bound": bound.norm, "worst_row": got.worst_row, "worst_row_bound": bound.worst_row}
    return {"name": accuracy.name, **errors, "ok": accuracy.ok}


def accuracy_lines(accuracies: Sequence[Accuracy]) -> list[str]:
    """A table of errors against a wider dtype, each beside the most that it may be."""
    lines = [f"{'against a wider dtype':<22} {'error':>10} {'at most':>10} {'worst row':>10} {'at most':>10}"]
    for found in accuracies:
        got, bound = found.got, found.bound
        numbers = (got.norm, bound.norm, got.worst_row, bound.worst_row)
        figures = " ".join(f"{number:>10.2e}" for number in numbers)
        lines.append(f"{found.name:<22} {figures} {'green' if found.ok else 'RED'}")
    return lines


def memory_lines(uses: Sequence[MemoryUse]) -> list[str]:
    """Measured beside the formula, in MiB."""
    lines = [f"{'memory, MiB':<30} {'measured':>12} {'formula':>12}"]
    for use in uses:
        lines.append(f"{use.what:<30} {_mebibytes(use.measured):>12} {_mebibytes(use.formula):>12}")
    if all(use.measured is None for use in uses):
        lines.append("not measured: the CPU has no allocator that could be asked")
    if all(use.formula is None for use in uses):
        lines.append("no formula: those are of the fast backend")
    return lines


def time_lines(times: Sequence[Timed]) -> list[str]:
    """Medians and spreads, rates of a rank and of the group."""
    width = max(len(timed.what) for timed in times)
    rates = f"{'TFLOP/s a rank':>15} {'of the group':>13}"
    lines = [f"{'pass':<22} {'what':<{width}} {'ms':>10} {'p10..p90':>9} {rates}"]
    for timed in times:
        spread = (timed.timing.quantile(0.9) - timed.timing.quantile(0.1)) / timed.timing.median
        row = timed.as_json()
        words = f"{timed.which.value:<22} {timed.what:<{width}} {timed.timing.median * 1e3:>10.3f} {spread:>8.1%}"
        lines.append(f"{words} {_number(row['tflop_per_s'], 15)} {_number(row['tflop_per_s_of_group'], 13)}".rstrip())
    return lines


def derived_lines(found: Sequence[Derived]) -> list[str]:
    """One line for each pass and figure."""
    lines = []
    for each in found:
        lines.append(f"{each.which.value}:")
        ms = {"exposed communication": each.exposed_communication, "link at its ceilings": each.link}
        lines += [f"    {name:<38} {value * 1e3:>9.3f} ms" for name, value in ms.items() if value is not None]
        ratios = {
            "over the GEMMs alone": each.over_gemms,
            "over GEMMs and link": each.over_gemms_and_link,
            "scaling efficiency against one GPU": each.scaling_efficiency,
            "over the reference": each.over_reference,
        }
        lines += [f"    {name:<38} {value:>9.3f}" for name, value in ratios.items() if value is not None]
    return lines


def _rounded(value: float | None, scale: float, digits: int) -> float | None:
    return None if value is None else round(value * scale, digits)


def _mebibytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**20:.2f}"


def _number(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>{width}}"
