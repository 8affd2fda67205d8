"""What an end-to-end benchmark is asked for and what it found, as records and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from schema import AccuracyRecord, Derived, Layer, MemoryUse, PassTimes, SetupRecord

from harness.results import dtype_name
from sonic_ep.config import EPConfig
from sonic_ep.profiler import ProfileReport
from sonic_ep.profiler.problem import Shape
from sonic_ep.testing.checks import Accuracy
from sonic_ep.testing.layer_problem import LayerOptions

# With fewer tokens than that, one right result in a hundred and more has twice the error of another, by chance.
FEW_TOKENS = 128
PASS_OR_FAIL = {True: "PASS", False: "FAIL"}
# Fields of ``Derived``, as people read them.
DERIVED = {
    "exposed_communication_us": "exposed communication",
    "link_us": "link at its ceilings",
    "over_gemms": "over the GEMMs alone",
    "over_gemms_and_link": "over GEMMs and link",
    "scaling_efficiency": "scaling efficiency against one GPU",
    "over_reference": "over the reference",
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One layer and how it is run. shape: T of each rank. backend: its name. backward: whether it is timed."""

    shape: Shape
    world_size: int
    options: LayerOptions
    backend: str
    config: EPConfig
    backward: bool = True

    @property
    def record(self) -> SetupRecord:
        """Everything but the configuration; T is that of the whole group."""
        shape, options = self.shape, self.options
        sizes = (shape.hidden, shape.expert_width, shape.num_experts, shape.top_k)
        return SetupRecord(
            thiek=(shape.tokens * self.world_size, *sizes),
            world_size=self.world_size,
            dtype=dtype_name(shape),
            activation=options.activation,
            gate_layout=options.gate_layout,
            score_order=options.score_order.value,
            add_bias=options.biased,
            norm_topk_probs=options.norm_topk_probs,
            routing=options.routing,
            backend=self.backend,
        )

    def lines(self) -> list[str]:
        """For people."""
        words = msgspec.to_builtins(self.record)
        thiek = ",".join(map(str, words.pop("thiek")))
        lines = [f"T,H,I,E,K = {thiek} (T of the whole group)", ", ".join(f"{name} {words[name]}" for name in words)]
        if self.backend != "reference" and self.shape.tokens < FEW_TOKENS:
            lines.append(
                f"note: {self.shape.tokens} tokens a rank are few: below {FEW_TOKENS} the error of plain PyTorch, of "
                "which twice is admitted, is luck, and a correct layer may FAIL"
            )
        return lines


def report_lines(layer: Layer, profile: ProfileReport) -> list[str]:
    """Everything that was measured, as tables. The accuracies stand before them: ``accuracy_lines``."""
    tables = [profile.table(), memory_lines(layer.memory), time_lines(layer.times), derived_lines(layer.derived)]
    return [line for table in tables for line in ("", *table)]


def accuracy_record(accuracy: Accuracy) -> AccuracyRecord:
    """Errors and bounds by name."""
    got, bound = accuracy.got, accuracy.bound
    errors = {"error": got.norm, "worst_row": got.worst_row}
    bounds = {"bound": bound.norm, "worst_row_bound": bound.worst_row}
    return AccuracyRecord(name=accuracy.name, ok=accuracy.ok, **errors, **bounds)


def accuracy_lines(accuracies: Sequence[AccuracyRecord]) -> list[str]:
    """A table of errors against a wider dtype, each beside the most that it may be."""
    lines = [f"{'against a wider dtype':<22} {'error':>10} {'at most':>10} {'worst row':>10} {'at most':>10}"]
    for found in accuracies:
        numbers = (found.error, found.bound, found.worst_row, found.worst_row_bound)
        lines.append(f"{found.name:<22} {' '.join(f'{number:>10.2e}' for number in numbers)} {PASS_OR_FAIL[found.ok]}")
    return lines


def memory_lines(uses: Sequence[MemoryUse]) -> list[str]:
    """Measured beside the formula, in MiB."""
    lines = [f"{'memory, MiB':<30} {'measured':>12} {'formula':>12}"]
    for use in uses:
        measured, formula = (_number(nbytes, 12, 2**20) for nbytes in (use.measured_bytes, use.formula_bytes))
        lines.append(f"{use.what:<30} {measured} {formula}")
    if all(use.measured_bytes is None for use in uses):
        lines.append("not measured: the CPU has no allocator that could be asked")
    if all(use.formula_bytes is None for use in uses):
        lines.append("no formula: those are of the fast backend")
    return lines


def time_lines(times: Sequence[PassTimes]) -> list[str]:
    """Medians and spreads, rates of a rank and of the group."""
    width = max(len(timed.what) for timed in times)
    lines = [f"{'pass':<22} {'what':<{width}} {'ms':>10} {'p10..p90':>9} {'TFLOP/s a rank':>15} {'of the group':>13}"]
    for timed in times:
        figures = f"{timed.median_us / 1e3:>10.3f} {timed.spread_percent:>7.1f}%"
        rates = f"{_number(timed.tflop_per_s, 15)} {_number(timed.tflop_per_s_of_group, 13)}"
        lines.append(f"{timed.pass_name:<22} {timed.what:<{width}} {figures} {rates}".rstrip())
    return lines


def derived_lines(found: Sequence[Derived]) -> list[str]:
    """One line for each pass and figure."""
    lines = []
    for each in found:
        lines.append(f"{each.pass_name}:")
        for name, text in DERIVED.items():
            value, is_time = getattr(each, name), name.endswith("_us")
            if value is not None:
                lines.append(f"    {text:<38} {value / 1e3 if is_time else value:>9.3f}{' ms' * is_time}")
    return lines


def _number(value: float | None, width: int, unit: float = 1) -> str:
    return f"{'-' if value is None else f'{value / unit:.2f}':>{width}}"
