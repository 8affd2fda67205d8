"""Tables of the page: a column is a title and what it takes from each item."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median
from typing import Any

from schema import Document, Entry, Layer, Point, Profile, Suite, Sweep, pair_name

from report_page.computed import COMPUTED, Extrapolation, WinnerGrid
from report_page.load import short_commit
from report_page.selection import FORWARD, FORWARD_AND_BACKWARD, LayerGroup, limit_us
from report_page.spread import Repeated, WithinRun

MIB = 2**20
DATE_LETTERS = len("2026-01-31T12:00")
Columns = Mapping[str, str | Callable[[Any], object]]
MEDIAN_AND_SPREAD: Columns = {"median, µs": "median_us", "p10": "p10_us", "p90": "p90_us"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Text of a cell. kind: w for words, n for a number, good or bad for a verdict."""

    text: str
    kind: str = "w"


@dataclass(frozen=True, kw_only=True)
class Table:
    """The first cell of a row names it; empty columns are left out. flat: no cell wraps."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    flat: bool = False

    @property
    def numeric(self) -> set[str]:
        """Titles of the columns that hold numbers."""
        return {name for place, name in enumerate(self.columns) if any(row[place].kind == "n" for row in self.rows)}


def table(caption: str, items: Iterable[Any], columns: Columns, *, flat: bool = False) -> Table:
    """A row for each item; a column takes an attribute, or what its function gives."""
    takes = [attrgetter(take) if isinstance(take, str) else take for take in columns.values()]
    rows = [[_cell(take(item)) for take in takes] for item in items]
    kept = [place for place in range(len(takes)) if place == 0 or any(row[place].text for row in rows)]
    names = list(columns)
    shown = [[row[place] for place in kept] for row in rows]
    return Table(caption=caption, columns=[names[place] for place in kept], rows=shown, flat=flat)


def _cell(value: object) -> Cell:
    if isinstance(value, Cell):
        return value
    if isinstance(value, float):
        return number(value)
    return Cell(text="" if value is None else str(value), kind="n" if isinstance(value, int) else "w")


def number(value: float | None, places: int = 1, unit: str = "") -> Cell:
    """With a comma between thousands; empty for None.

    >>> number(26182.42).text, number(None).text, number(0.974, 2).text
    ('26,182.4', '', '0.97')
    """
    return Cell(text="" if value is None else f"{value:,.{places}f}{unit}", kind="n")


def verdict(good: bool, words: str) -> Cell:
    """Words with the colour of good or bad; the words alone have to say which."""
    return Cell(text=words, kind="good" if good else "bad")


def ratio(name: str) -> Callable[[Any], Cell]:
    """The attribute with three places."""
    return lambda item: number(getattr(item, name), 3)


def environments(documents: Sequence[Document]) -> Table:
    """One row for each file."""
    columns: Columns = {
        "file": "file",
        "kind": "kind",
        "GPU": lambda d: f"{d.environment.gpus} × {d.environment.gpu}" if d.environment.gpu else "none",
        "link": "environment.link",
        "W": "environment.world_size",
        "process group": "environment.process_group",
        **{name: f"environment.{name.lower()}" for name in ("torch", "triton", "CUDA", "NCCL", "driver")},
        "commit": lambda d: short_commit(d.environment),
        "date": lambda d: d.environment.date[:DATE_LETTERS].replace("T", " "),
        "code": "environment.code",
    }
    return table("Environment of each file", documents, columns, flat=True)


def rates(documents: Sequence[Document]) -> Table:
    """The measured rates of each file that has any."""
    columns: Columns = {
        "file": "file",
        "copy engine in": "rates_gb_per_s.copy_engine_in",
        "copy engine out": "rates_gb_per_s.copy_engine_out",
        "kernels reading": "rates_gb_per_s.read",
        "kernels writing": "rates_gb_per_s.write",
        "memory": "rates_gb_per_s.memory",
    }
    names = documents[0].rates_gb_per_s.__struct_fields__
    known = [d for d in documents if any(getattr(d.rates_gb_per_s, name) is not None for name in names)]
    caption = "Measured rates, GB/s: into and out of one rank, both directions busy; and a rank's own memory"
    return table(caption, known, columns)


def memory(group: LayerGroup) -> Table:
    """Formula beside measured."""
    uses = [(label, use) for label, layer in group.layers.items() for use in layer.known_memory]

    def mebibytes(nbytes: int | None) -> float | None:
        return None if nbytes is None else nbytes / MIB

    columns: Columns = {
        "modes and flags": lambda use: use[0],
        "memory": lambda use: use[1].what,
        "formula, MiB": lambda use: mebibytes(use[1].formula_bytes),
        "measured, MiB": lambda use: mebibytes(use[1].measured_bytes),
        "measured / formula": lambda use: (
            number(use[1].measured_bytes / use[1].formula_bytes, 3)
            if use[1].formula_bytes and use[1].measured_bytes is not None
            else None
        ),
    }
    return table(f"Memory of one rank: {group.title}", uses, columns)


def winners(grid: WinnerGrid) -> Table:
    """The measured cells: by how much, and whether the cost rule chooses the same."""
    columns: Columns = {
        "cell": lambda cell: f"W={cell.world_size}, K={cell.top_k}",
        "T of a rank": "measured.shape.tokens",
        "measured winner": "measured.best",
        "pass": "measured.best.pass_name",
        "median, µs": "measured.best.median_us",
        "second / winner": lambda cell: (
            number(cell.measured.pairs[1].median_us / cell.measured.best.median_us, 3)
            if len(cell.measured.pairs) > 1
            else None
        ),
        "computed": lambda cell: (
            verdict(True, "the same") if cell.shown == cell.computed else verdict(False, pair_name(cell.computed))
        ),
    }
    caption = f"Measured winners beside the computed ones, E={grid.num_experts}"
    return table(caption, [cell for cell in grid.cells if cell.measured is not None], columns)


def extrapolation(found: Extrapolation) -> Table:
    """Milliseconds by mode, and the cheapest pair."""
    rows: list[tuple[str, list[object]]] = []
    for kind in ("dispatch", "combine"):
        by_step = [getattr(step, f"{kind}_us") for step in found.steps]
        rows += [(f"{kind} {mode}", [number(us[mode] / 1e3, 3) for us in by_step]) for mode in by_step[0]]
    forward = [step.forward_us / 1e3 for step in found.steps]
    rows += [
        ("cheapest pair", [pair_name(step.cheapest) for step in found.steps]),
        ("its dispatch and combine, forward", [number(ms, 3) for ms in forward]),
        ("the same, forward and backward", [number(2 * ms, 3) for ms in forward]),
    ]

    def step_at(place: int) -> Callable[[Any], object]:
        return lambda row: row[1][place]

    steps = {f"W={step.world_size}": step_at(place) for place, step in enumerate(found.steps)}
    return table(f"{COMPUTED.capitalize()}: {found.shape}", rows, {"ms": lambda row: row[0], **steps})


def sweep(swept: Sweep) -> Table:
    """The picks, the best pairs, and the times of the former over those of the latter."""

    def best(pass_name: str) -> Callable[[Point], object]:
        return lambda point: next(iter(point.fastest(pass_name)), None)

    def over(choice: str, pass_name: str) -> Callable[[Point], object]:
        return lambda point: number(getattr(point, choice).get(pass_name), 3)

    columns: Columns = {
        "T and K": lambda point: f"T={point.shape.tokens}, K={point.shape.top_k}",
        "H": "shape.hidden",
        "I": "shape.intermediate",
        "E": "shape.num_experts",
        "dtype": "shape.dtype",
        "routing": "routing",
        "profiler's pick": lambda point: pair_name(point.picked),
        "best, forward": best(FORWARD),
        "best, forward and backward": best(FORWARD_AND_BACKWARD),
        "pick / best, f.": over("over_best", FORWARD),
        "pick / best, f.+b.": over("over_best", FORWARD_AND_BACKWARD),
        "cost rule's pick": lambda point: pair_name(point.predicted),
        "rule / best, f.": over("predicted_over_best", FORWARD),
        "rule / best, f.+b.": over("predicted_over_best", FORWARD_AND_BACKWARD),
    }
    caption = f"{swept.file}: f. is forward in training, f.+b. forward and backward"
    return table(caption, swept.points, columns)


def sweep_summary(swept: Sweep) -> str:
    """How far the picks are from the best pair, over all points and passes."""
    said = []
    for who, choice in (("The profiler's pick", "over_best"), ("The cost rule's pick", "predicted_over_best")):
        ratios = [over for point in swept.points for over in getattr(point, choice).values() if over is not None]
        if ratios:
            middle, most = f"{median(ratios):,.3f}", f"{max(ratios):,.3f}"
            said.append(f"{who} takes {middle} times the best pair's time in the middle, {most} at most.")
    return " ".join(said)


def within(runs: Sequence[WithinRun]) -> Table:
    """One row for each file."""
    columns: Columns = {
        "file": "document.file",
        "times": lambda run: len(run.measured),
        "in the middle, %": lambda run: number(run.typical_percent, 2),
        "widest, %": "widest.times.spread_percent",
        "the widest": lambda run: f"{run.widest.what} ({run.widest.where})",
    }
    return table("Within one run: p10 to p90 in percent of the median", runs, columns)


def between(again: Sequence[Repeated]) -> Table:
    """The same things in the same files: the median of each, and the difference."""
    places = {found.measured[0].where for found in again}

    def median_of(place: int) -> Callable[[Repeated], object]:
        return lambda found: found.measured[place].times.median_us

    def difference(found: Repeated) -> Cell:
        cell = number(found.difference_percent, 2, "%")
        return verdict(False, cell.text) if found.differs else cell

    columns: Columns = {
        "what": lambda found: found.measured[0].what,
        "where": lambda found: found.measured[0].where if len(places) > 1 else None,
        **{f"{file}, µs": median_of(place) for place, file in enumerate(again[0].files)},
        "difference": difference,
    }
    shared = f": {places.pop()}" if len(places) == 1 else ""
    return table(f"Medians in {' and '.join(again[0].files)}{shared}", again, columns)


def suite(found: Suite) -> list[Table]:
    """One table for each shape."""
    columns: Columns = {
        "what": "name",
        "how": "how",
        "median, µs": "median_us",
        "p10 to p90, %": "spread_percent",
        "GB/s": "gb_per_s",
        "of the ceiling, %": "percent",
        "ceiling": lambda entry: (entry.ceiling or "").removeprefix("the "),
        "floor, µs": "floor_us",
        "TFLOP/s": "tflop_per_s",
        "held against": lambda entry: "; ".join(f"{held.ratio:,.3f} times {held.what}" for held in entry.baselines),
        "bar": _threshold,
    }
    shapes = dict.fromkeys(entry.shape for entry in found.entries)
    return [table(str(shape), [e for e in found.entries if e.shape == shape], columns) for shape in shapes]


def _threshold(entry: Entry) -> object:
    if entry.threshold is None and entry.met is None:
        return None
    limit = "" if entry.threshold_us is None else f" ({entry.threshold_us:,.1f} µs)"
    words = f"{entry.threshold or 'bar'}{limit}"
    return words if entry.met is None else verdict(entry.met, f"{'met' if entry.met else 'MISSED'}: {words}")


def profile(found: Profile) -> list[Table]:
    """Each mode alone, and the pairs."""
    modes: Columns = {
        "mode": lambda mode: f"{mode.kind} {mode.mode}".strip(),
        **MEDIAN_AND_SPREAD,
        "into the busiest rank, MiB": lambda mode: mode.link_bytes / MIB,
        "GB/s": "gb_per_s",
        "of the ceiling, %": "percent",
        "ceiling": "ceiling",
    }
    pairs = sorted(found.pairs, key=lambda pair: pair.median_us)
    caption = f"Plan, dispatch and combine by pair, fastest first; chosen: {found.config.named()}"
    together = table(caption, pairs, {"pair": str, **MEDIAN_AND_SPREAD})
    return [table("Each mode alone", found.modes, modes), together]


def layer(found: Layer) -> list[Table]:
    """Everything that was timed beside the layer, what follows from it, and the errors."""
    times: Columns = {
        "pass": "pass_name",
        "what": "what",
        **MEDIAN_AND_SPREAD,
        "p10 to p90, %": "spread_percent",
        "TFLOP/s of a rank": "tflop_per_s",
        "of the group": "tflop_per_s_of_group",
    }
    derived: Columns = {
        "pass": "pass_name",
        "exposed communication, µs": "exposed_communication_us",
        "link, µs": "link_us",
        "GEMMs and link, µs": lambda d: limit_us(found, d.pass_name),
        "layer / GEMMs": ratio("over_gemms"),
        "layer / GEMMs and link": ratio("over_gemms_and_link"),
        "scaling efficiency": ratio("scaling_efficiency"),
        "layer / reference": lambda d: number(d.over_reference, 2),
    }

    def power_of_ten(name: str) -> Callable[[Any], Cell]:
        return lambda accuracy: Cell(text=f"{getattr(accuracy, name):.2e}", kind="n")

    accuracy: Columns = {
        "result": "name",
        **{name.replace("_", " "): power_of_ten(name) for name in ("error", "bound", "worst_row")},
        "its bound": power_of_ten("worst_row_bound"),
        "verdict": lambda accuracy: verdict(accuracy.ok, "green" if accuracy.ok else "RED"),
    }
    found_tables = [
        table("Times", found.times, times),
        table("Derived", found.derived, derived),
        table("Accuracy", found.accuracy, accuracy),
    ]
    return [each for each in found_tables if each.rows]
