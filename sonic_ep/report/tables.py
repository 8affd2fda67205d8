"""Tables of the page, each from the values of one section."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from sonic_ep.report.computed import COMPUTED, Extrapolation, WinnerGrid
from sonic_ep.report.documents import Document, Entry, Layer, OverBest, Suite, Sweep, SweepPoint
from sonic_ep.report.markup import Markup, Table, number, verdict
from sonic_ep.report.measured import FORWARD, FORWARD_AND_BACKWARD, Profile, Shape, pair_name
from sonic_ep.report.selection import LayerGroup, known_memory, limit_us
from sonic_ep.report.spread import Repeated, WithinRun

MIB = 2**20
DATE_LETTERS = len("2026-01-31T12:00")


def environments(documents: Sequence[Document]) -> Table:
    """One row for each file."""
    rows = []
    for document in documents:
        e = document.source.environment
        gpu = f"{e.gpus} × {e.gpu}" if e.gpu else "none"
        versions = (e.torch, e.triton or "", e.cuda or "", e.nccl or "", e.driver or "")
        place = (gpu, e.link or "", str(e.world_size), e.process_group or "")
        when = (e.short_commit, e.date[:DATE_LETTERS].replace("T", " "), e.code)
        rows.append((document.source.file, document.source.kind, *place, *versions, *when))
    columns = ("file", "kind", "GPU", "link", "W", "process group", "torch", "triton", "CUDA", "NCCL", "driver")
    more = ("commit", "date", "code")
    return Table(
        caption="Environment of each file",
        columns=(*columns, *more),
        rows=tuple(rows),
        words=tuple(name for name in (*columns, *more) if name != "W"),
        flat=True,
    )


def rates(documents: Sequence[Document]) -> Table | None:
    """The measured rates of each file that has any."""
    rows = []
    for document in documents:
        r = document.source.rates
        found = (r.copy_engine_in, r.copy_engine_out, r.read, r.write, r.memory)
        if any(rate is not None for rate in found):
            rows.append((document.source.file, *map(number, found)))
    columns = ("file", "copy engine in", "copy engine out", "kernels reading", "kernels writing", "memory")
    caption = "Measured rates, GB/s: into and out of one rank, both directions busy; and a rank's own memory"
    return Table(caption=caption, columns=columns, rows=tuple(rows)) if rows else None


def memory(group: LayerGroup) -> Table:
    """Formula beside measured."""
    rows: list[tuple[str | Markup, ...]] = []
    for layer, label in zip(group.layers, group.labels, strict=True):
        for use in known_memory(layer):
            formula, measured = use.formula_bytes, use.measured_bytes
            ratio = measured / formula if formula and measured is not None else None
            sizes = (None if size is None else size / MIB for size in (formula, measured))
            rows.append((label, use.what, *map(number, sizes), number(ratio, 3)))
    columns = ("modes and flags", "memory", "formula, MiB", "measured, MiB", "measured / formula")
    return Table(caption=f"Memory of one rank: {group.title}", columns=columns, rows=tuple(rows), words=("memory",))


def winners(grid: WinnerGrid) -> Table | None:
    """The measured cells: by how much, and whether the cost rule chooses the same."""
    rows: list[tuple[str | Markup, ...]] = []
    for cell in grid.cells:
        won = cell.measured
        if won is not None:
            best = won.best.times.median_us
            margin = None if won.runner_up is None else won.runner_up.times.median_us / best
            same = won.best.pair == cell.computed
            rule = verdict(same, "the same") if same else verdict(same, pair_name(cell.computed))
            place = (f"W={cell.world_size}, K={cell.top_k}", str(won.shape.tokens), pair_name(won.best.pair))
            rows.append((*place, won.best.what, number(best), number(margin, 3), rule))
    columns = ("cell", "T of a rank", "measured winner", "pass", "median, µs", "second / winner", "computed")
    words = ("measured winner", "pass", "computed")
    caption = f"Measured winners beside the computed ones, E={grid.num_experts}"
    return Table(caption=caption, columns=columns, rows=tuple(rows), words=words) if rows else None


def extrapolation(found: Extrapolation) -> Table:
    """Milliseconds by mode, and the cheapest pair."""
    first = found.steps[0]
    rows: list[tuple[str | Markup, ...]] = [
        (f"dispatch {mode.value}", *(number(step.dispatch_us[mode] / 1e3, 3) for step in found.steps))
        for mode in first.dispatch_us
    ]
    rows += [
        (f"combine {mode.value}", *(number(step.combine_us[mode] / 1e3, 3) for step in found.steps))
        for mode in first.combine_us
    ]
    rows += [
        ("cheapest pair", *(pair_name(step.cheapest) for step in found.steps)),
        ("its dispatch and combine, forward", *(number(step.forward_us / 1e3, 3) for step in found.steps)),
        ("the same, forward and backward", *(number(step.forward_and_backward_us / 1e3, 3) for step in found.steps)),
    ]
    columns = ("ms", *(f"W={step.world_size}" for step in found.steps))
    return Table(caption=f"{COMPUTED.capitalize()}: {found.shape}", columns=columns, rows=tuple(rows))


def sweep(swept: Sweep) -> Table:
    """What was picked, what was best, and how far apart they are in both passes."""
    rows = tuple(_point_row(point) for point in swept.points)
    columns = ("T and K", "H", "I", "E", "dtype", "routing", "profiler's pick")
    best = ("best, forward", "best, forward and backward")
    ratios = ("pick / best, f.", "pick / best, f.+b.", "cost rule's pick", "rule / best, f.", "rule / best, f.+b.")
    words = ("dtype", "routing", "profiler's pick", *best, "cost rule's pick")
    caption = f"{swept.source.file}: f. is forward in training, f.+b. forward and backward"
    return Table(caption=caption, columns=(*columns, *best, *ratios), rows=rows, words=words)


def _point_row(point: SweepPoint) -> tuple[str | Markup, ...]:
    best = [point.best(pass_name) for pass_name in (FORWARD, FORWARD_AND_BACKWARD)]
    names = ["" if pair is None else pair_name(pair.pair) for pair in best]
    picked, predicted = _ratios(point.over_best), _ratios(point.predicted_over_best)
    s = point.shape
    sizes = (f"T={s.tokens}, K={s.top_k}", str(s.hidden), str(s.intermediate or ""), str(s.num_experts), s.dtype)
    return (*sizes, point.routing, pair_name(point.picked), *names, *picked, pair_name(point.predicted), *predicted)


def _ratios(found: Sequence[OverBest]) -> list[str]:
    by_pass = {over.pass_name: over.ratio for over in found}
    return [number(by_pass.get(pass_name), 3) for pass_name in (FORWARD, FORWARD_AND_BACKWARD)]


def sweep_summary(swept: Sweep) -> str:
    """How far the picks are from the best pair, over all points and both passes."""
    said = []
    for who, chosen in (("The profiler's pick", "over_best"), ("The cost rule's pick", "predicted_over_best")):
        ratios = [over.ratio for point in swept.points for over in getattr(point, chosen)]
        if ratios:
            middle, most = number(median(ratios), 3), number(max(ratios), 3)
            said.append(f"{who} takes {middle} times the best pair's time in the middle, {most} at most.")
    return " ".join(said)


def within(runs: Sequence[WithinRun]) -> Table:
    """One row for each file."""
    rows: list[tuple[str | Markup, ...]] = [
        (
            run.source.file,
            str(len(run.measured)),
            number(run.typical_percent, 2),
            number(run.widest.times.spread_percent, 1),
            f"{run.widest.what} ({run.widest.where})",
        )
        for run in runs
    ]
    columns = ("file", "times", "in the middle, %", "widest, %", "the widest")
    caption = "Within one run: p10 to p90 in percent of the median"
    return Table(caption=caption, columns=columns, rows=tuple(rows), words=("the widest",))


def between(again: Sequence[Repeated]) -> Table:
    """The same things in the same files: the median of each, and the difference."""
    places = dict.fromkeys(found.measured[0].where for found in again)
    rows: list[tuple[str | Markup, ...]] = []
    for found in again:
        medians = [number(measurement.times.median_us) for measurement in found.measured]
        words = f"{number(found.difference_percent, 2)}%"
        first = found.measured[0]
        where = first.where if len(places) > 1 else ""
        rows.append((first.what, where, *medians, verdict(False, words) if found.differs else words))
    columns = ("what", "where", *(f"{file}, µs" for file in again[0].files), "difference")
    shared = f": {next(iter(places))}" if len(places) == 1 else ""
    caption = f"Medians in {' and '.join(again[0].files)}{shared}"
    return Table(caption=caption, columns=columns, rows=tuple(rows), words=("where",))


def suite(found: Suite) -> tuple[Table, ...]:
    """One table for each shape."""
    shapes = dict.fromkeys(entry.shape for entry in found.entries)
    return tuple(_suite_table(shape, [e for e in found.entries if e.shape == shape]) for shape in shapes)


def _suite_table(shape: Shape, entries: Sequence[Entry]) -> Table:
    columns = ("what", "how", "median, µs", "p10 to p90, %", "GB/s", "of the ceiling, %", "ceiling", "floor, µs")
    more = ("TFLOP/s", "held against", "bar")
    rows = tuple(_entry_row(entry) for entry in entries)
    words = ("how", "ceiling", "held against", "bar")
    return Table(caption=str(shape), columns=(*columns, *more), rows=rows, words=words)


def _entry_row(entry: Entry) -> tuple[str | Markup, ...]:
    times = (number(entry.times.median_us), number(entry.times.spread_percent))
    link = (number(entry.gb_per_s), number(entry.percent), (entry.ceiling or "").removeprefix("the "))
    rest = (number(entry.floor_us), number(entry.tflop_per_s))
    against = "; ".join(f"{number(held.ratio, 3)} times {held.what}" for held in entry.against)
    return (entry.name, entry.how, *times, *link, *rest, against, _bar(entry))


def _bar(entry: Entry) -> str | Markup:
    if entry.bar is None and entry.met is None:
        return ""
    limit = "" if entry.bar_us is None else f" ({number(entry.bar_us)} µs)"
    words = f"{entry.bar or 'bar'}{limit}"
    return words if entry.met is None else verdict(entry.met, f"{'met' if entry.met else 'MISSED'}: {words}")


def profile(found: Profile) -> tuple[Table, ...]:
    """Each mode alone, and the pairs."""
    modes: tuple[tuple[str | Markup, ...], ...] = tuple(
        (
            f"{mode.kind} {mode.mode}".strip(),
            *(number(us) for us in (mode.times.median_us, mode.times.p10_us, mode.times.p90_us)),
            number(mode.link_bytes / MIB),
            number(mode.gb_per_s),
            number(mode.percent),
            mode.ceiling or "",
        )
        for mode in found.modes
    )
    columns = ("mode", "median, µs", "p10", "p90", "into the busiest rank, MiB", "GB/s", "of the ceiling, %", "ceiling")
    alone = Table(caption="Each mode alone", columns=columns, rows=modes, words=("ceiling",))
    pairs = tuple(
        (pair_name(p.pair), number(p.times.median_us), number(p.times.p10_us), number(p.times.p90_us))
        for p in sorted(found.pairs, key=lambda pair: pair.times.median_us)
    )
    together = Table(
        caption=f"Plan, dispatch and combine by pair, fastest first; chosen: {found.settings}",
        columns=("pair", "median, µs", "p10", "p90"),
        rows=pairs,
    )
    return alone, together


def layer_times(layer: Layer) -> Table:
    """Everything that was timed beside the layer."""
    rows = tuple(
        (
            timed.pass_name,
            timed.what,
            *(number(us) for us in (timed.times.median_us, timed.times.p10_us, timed.times.p90_us)),
            number(timed.times.spread_percent),
            number(timed.tflop_per_s),
            number(timed.tflop_per_s_of_group),
        )
        for timed in layer.times
    )
    columns = ("pass", "what", "median, µs", "p10", "p90", "p10 to p90, %", "TFLOP/s of a rank", "of the group")
    return Table(caption="Times", columns=columns, rows=rows, words=("what",))


def layer_derived(layer: Layer) -> Table:
    """What follows from the times."""
    rows = tuple(
        (
            d.pass_name,
            number(d.exposed_communication_us),
            number(d.link_us),
            number(limit_us(layer, d.pass_name)),
            number(d.over_gemms, 3),
            number(d.over_gemms_and_link, 3),
            number(d.scaling_efficiency, 3),
            number(d.over_reference, 2),
        )
        for d in layer.derived
    )
    columns = ("pass", "exposed communication, µs", "link, µs", "GEMMs and link, µs", "layer / GEMMs")
    more = ("layer / GEMMs and link", "scaling efficiency", "layer / reference")
    return Table(caption="Derived", columns=(*columns, *more), rows=rows)


def layer_accuracy(layer: Layer) -> Table:
    """Errors and their bounds."""
    rows: tuple[tuple[str | Markup, ...], ...] = tuple(
        (
            a.name,
            *(f"{value:.2e}" for value in (a.error, a.bound, a.worst_row, a.worst_row_bound)),
            verdict(a.ok, "green" if a.ok else "RED"),
        )
        for a in layer.accuracy
    )
    columns = ("result", "error", "bound", "worst row", "its bound", "verdict")
    return Table(caption="Accuracy", columns=columns, rows=rows, words=("verdict",))
