"""Sections of the page, each None where the documents have nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sonic_ep.report import tables
from sonic_ep.report.charts import bandwidth_picture, breakdown_picture, memory_picture
from sonic_ep.report.computed import COMPUTED, extrapolations, winner_grids
from sonic_ep.report.documents import Documents, Layer
from sonic_ep.report.figures import Picture
from sonic_ep.report.grids import extrapolation_picture, repeated_picture, winner_picture, within_picture
from sonic_ep.report.markup import Markup, Table, element
from sonic_ep.report.measured import Profile
from sonic_ep.report.origin import Source, caveats, origin_sentence
from sonic_ep.report.selection import bandwidths, known_memory, layer_groups, memory_kinds, pass_names
from sonic_ep.report.spread import LARGE_PERCENT, LARGE_US, LEAST_OF_HOST, Repeated, repeated, within_runs

Part = Markup | Picture | Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section. anchor: its id in the page."""

    anchor: str
    title: str
    parts: tuple[Part, ...]


def sections(documents: Documents) -> tuple[Section, ...]:
    """Those for which there is data, in the order of the page."""
    makers: tuple[Callable[[Documents], Section | None], ...] = (
        environment_section,
        bandwidth_section,
        breakdown_section,
        memory_section,
        winner_section,
        extrapolation_section,
        sweep_section,
        spread_section,
        suite_section,
        layer_section,
        profile_section,
    )
    return tuple(section for maker in makers if (section := maker(documents)) is not None)


def environment_section(documents: Documents) -> Section | None:
    """Machines, versions, commands, notes, and rates."""
    rates = tables.rates(documents.everything)
    parts: list[Part] = [tables.environments(documents.everything), _commands(documents)]
    parts += [] if rates is None else [rates]
    return _section("environment", "Environment", parts)


def _commands(documents: Documents) -> Markup:
    """How each file was made and what it says of itself; files of the same words together."""
    alike: dict[tuple[str, str | None], list[str]] = {}
    for document in documents.everything:
        environment = document.source.environment
        alike.setdefault((environment.command, environment.note), []).append(document.source.file)
    items = []
    for (command, note), files in alike.items():
        words = [element("br"), f"Note: {note}"] if note else []
        items += [element("dt", ", ".join(files)), element("dd", element("code", command), *words)]
    return element("dl", *items)


def bandwidth_section(documents: Documents) -> Section | None:
    """Two figures for each sweep."""
    found = [bandwidth for sweep in documents.sweeps for bandwidth in bandwidths(sweep)]
    intro = _paragraph(
        "Bytes from others that reach the busiest rank, over the median time of the slowest rank, each mode with its "
        "own barriers, and dispatch with the gather into expert order that all_gather and rank_dedup leave; the lines "
        "across are the best rates of the same run by the same way over the link."
    )
    pictures = [bandwidth_picture(bandwidth, number) for number, bandwidth in enumerate(found, start=1)]
    return _section("bandwidth", "Bandwidth against size", [intro, *pictures]) if pictures else None


def breakdown_section(documents: Documents) -> Section | None:
    """One figure for each shape and pass."""
    groups = layer_groups(documents.layers, lambda layer: layer.breakdown)
    wanted = [(group, pass_name) for group in groups for pass_name in pass_names(group)]
    intro = _paragraph(
        "Each part as it is timed by itself, and the rest of the layer: router, activation and what else there is. "
        "Parts that overlap in the layer may add up to more than it takes: the diamond and the number beside the bar "
        "are the layer's own time. The stroke is what the GEMMs alone and the link need."
    )
    pictures = [breakdown_picture(*found, number) for number, found in enumerate(wanted, start=1)]
    return _section("breakdown", "Time breakdown of the layer", [intro, *pictures]) if pictures else None


def memory_section(documents: Documents) -> Section | None:
    """One figure and one table for each shape."""
    groups = layer_groups(documents.layers, known_memory)
    intro = _paragraph(
        "Bytes of one rank: the formula of sonic_ep/testing/memory_model.py, and what the allocator counted."
    )
    parts: list[Part] = []
    for number, group in enumerate(groups, start=1):
        parts += [memory_picture(group, memory_kinds(group), number), tables.memory(group)]
    return _section("memory", "Memory for each setting of the flags", [intro, *parts]) if parts else None


def winner_section(documents: Documents) -> Section | None:
    """One grid for each machine and E."""
    intro = _paragraph(
        "Solid frame: the fastest of all pairs in a sweep with uniform routing, at its largest shape with this K. "
        "Dashed frame: computed, the pair that sonic_ep/cost.py predicts cheapest at the measured rates."
    )
    parts: list[Part] = []
    for number, grid in enumerate(winner_grids(documents), start=1):
        table = tables.winners(grid)
        parts += [winner_picture(grid, number), *([] if table is None else [table])]
    return _section("winners", "Mode winners over K and W", [intro, *parts]) if parts else None


def extrapolation_section(documents: Documents) -> Section | None:
    """One figure and one table for each machine and shape."""
    intro = _paragraph(
        "Every number in this section is computed, none is measured: bytes over the link and through memory, at the "
        "measured rates, for as many tokens a rank at every W. It takes for granted that each GPU keeps its link rate "
        "in a larger group. Barriers, launches and the plan are not in it."
    )
    parts: list[Part] = []
    for number, found in enumerate(extrapolations(documents), start=1):
        if found.steps:
            parts += [extrapolation_picture(found, number), tables.extrapolation(found)]
        if found.left_out:
            sizes = ", ".join(f"W={size}" for size in found.left_out)
            parts.append(_paragraph(f"{sizes}: left out, E={found.shape.num_experts} is no multiple."))
    title = f"Dispatch and combine at larger W, {COMPUTED}"
    return _section("extrapolation", title, [intro, *parts]) if parts else None


def sweep_section(documents: Documents) -> Section | None:
    """One table for each sweep."""
    parts: list[Part] = []
    for swept in documents.sweeps:
        if swept.points:
            parts += [*_origin([swept.source]), _paragraph(tables.sweep_summary(swept)), tables.sweep(swept)]
    return _section("sweep", "Sweep: what was picked, and what was best", parts) if parts else None


def spread_section(documents: Documents) -> Section | None:
    """Between runs where files have anything in common, then within each run."""
    runs = within_runs(documents)
    again = repeated(documents)
    parts: list[Part] = [*_between(again)] if again else []
    if runs:
        parts += [within_picture(runs), tables.within(runs)]
    return _section("spread", "Run-to-run spread", parts) if parts else None


def _between(again: Sequence[Repeated]) -> list[Part]:
    parts: list[Part] = [_paragraph(between_words(again)), repeated_picture(again)]
    by_files: dict[tuple[str, ...], list[Repeated]] = {}
    for found in again:
        by_files.setdefault(found.files, []).append(found)
    return [*parts, *(tables.between(group) for group in by_files.values())]


def between_words(again: Sequence[Repeated]) -> str:
    """How many medians differ, how many of these are the host's time, and whether the files are of one commit."""
    long, differing = sum(found.is_long for found in again), sum(found.differs for found in again)
    counted = (
        f"{len(again)} medians are in more than one file. {LARGE_PERCENT:.0f}% or more apart: "
        f"{differing} of the {long} above {LARGE_US:.0f} µs."
    )
    of_host = sum(found.differs and found.of_host for found in again)
    if of_host:
        most = max((found.difference_percent for found in again if found.is_long and not found.of_host), default=0.0)
        counted += (
            f" {of_host} of these are the host's time, eager and more than {LEAST_OF_HOST:g} times as long as behind "
            f"other work; all others above {LARGE_US:.0f} µs differ by {most:.1f}% at most."
        )
    commits = {measurement.source.environment.commit for found in again for measurement in found.measured}
    apart = " The files are of different commits, so that their code differs as well." if len(commits) > 1 else ""
    return counted + apart


def suite_section(documents: Documents) -> Section | None:
    """Tables of every suite."""
    parts: list[Part] = []
    for suite in documents.suites:
        if suite.entries:
            bars = [entry.met for entry in suite.entries if entry.met is not None]
            counted = [_paragraph(f"{sum(bars)} of {len(bars)} bars are met.")] if bars else []
            parts += [element("h3", suite.source.file), *_origin([suite.source]), *counted, *tables.suite(suite)]
    return _section("suites", "Suites", parts) if parts else None


def layer_section(documents: Documents) -> Section | None:
    """Times, accuracy and what follows from them, of every layer document."""
    parts: list[Part] = []
    for layer in documents.layers:
        parts += [element("h3", layer.source.file), *_origin([layer.source]), _paragraph(layer_words(layer))]
        found = (tables.layer_times(layer), tables.layer_derived(layer), tables.layer_accuracy(layer))
        parts += [table for table in found if table.rows]
    return _section("layers", "Layers, end to end", parts) if parts else None


def layer_words(layer: Layer) -> str:
    """The setup and the settings of a layer."""
    setup = layer.setup
    options = [
        setup.activation,
        *([setup.gate_layout] if setup.gate_layout else []),
        setup.score_order,
        *(["biases"] if setup.add_bias else []),
        *(["renormalised scores"] if setup.norm_topk_probs else []),
        f"{setup.routing} routing",
        f"{setup.backend} backend",
    ]
    return f"{setup.rank_shape}, W={setup.world_size}; {', '.join(options)}; {layer.settings}."


def profile_section(documents: Documents) -> Section | None:
    """Modes and pairs, of every profile in a file of its own and of every layer's."""
    found = [(document.source, document.profile) for document in documents.profiles]
    found += [(layer.source, layer.profile) for layer in documents.layers if layer.profile is not None]
    # The profiler's cache may have given one profile to several runs.
    sources_of: dict[Profile, list[Source]] = {}
    for source, profile in found:
        sources_of.setdefault(profile, []).append(source)
    parts: list[Part] = []
    for profile, sources in sources_of.items():
        shared = "" if profile.ranks_per_gpu in (None, 1) else f", {profile.ranks_per_gpu} ranks on one GPU"
        words = _paragraph(f"{profile.shape}; {profile.backend} backend{shared}.")
        files = ", ".join(source.file for source in sources)
        parts += [element("h3", files), *_origin(sources), words]
        parts += [table for table in tables.profile(profile) if table.rows]
    return _section("profiles", "Profiles", parts) if parts else None


def _section(anchor: str, title: str, parts: Sequence[Part]) -> Section:
    return Section(anchor=anchor, title=title, parts=tuple(parts))


def _paragraph(text: str) -> Markup:
    return element("p", text)


def _origin(sources: Sequence[Source]) -> list[Markup]:
    """The sentence that says where numbers come from, and what to beware of."""
    notes = [element("p", note, class_="caveat") for note in caveats(sources)]
    return [element("p", f"From {origin_sentence(sources)}", class_="origin"), *notes]
