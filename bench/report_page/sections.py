"""Sections of the page in their order; one without data is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from schema import Document, Layer, Profile, ProfileDocument, Suite, Sweep

from report_page import tables
from report_page.computed import COMPUTED, extrapolations, winner_grids
from report_page.computed_figures import extrapolation_picture, winner_picture
from report_page.drawing import Picture
from report_page.load import Documents, caveats, origin
from report_page.measured_figures import (
    bandwidth_picture,
    breakdown_picture,
    memory_picture,
    repeated_picture,
    within_picture,
)
from report_page.selection import bandwidths, layer_groups
from report_page.spread import LARGE_PERCENT, LARGE_US, LEAST_OF_HOST, Repeated, repeated, within_runs


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph or a heading. kind: p, h3, origin or caveat."""

    words: str
    kind: str = "p"


@dataclass(frozen=True, kw_only=True)
class Command:
    """How files were made, and their note."""

    files: list[str]
    command: str
    note: str | None


Part = Text | Command | Picture | tables.Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section. anchor: its id in the page."""

    anchor: str
    title: str
    parts: list[Part]


def sections(documents: Documents) -> list[Section]:
    """Those for which there is data."""
    found: dict[tuple[str, str], list[Part]] = {
        ("environment", "Environment"): _environment(documents),
        ("bandwidth", "Bandwidth against size"): _bandwidth(documents),
        ("breakdown", "Time breakdown of the layer"): _breakdown(documents),
        ("memory", "Memory for each setting of the flags"): _memory(documents),
        ("winners", "Mode winners over K and W"): _winners(documents),
        ("extrapolation", f"Dispatch and combine at larger W, {COMPUTED}"): _extrapolation(documents),
        ("sweep", "Sweep: what was picked, and what was best"): _sweep(documents),
        ("spread", "Run-to-run spread"): _spread(documents),
        ("suites", "Suites"): _suites(documents),
        ("layers", "Layers, end to end"): _layers(documents),
        ("profiles", "Profiles"): _profiles(documents),
    }
    return [Section(anchor=anchor, title=title, parts=parts) for (anchor, title), parts in found.items() if parts]


def _below(intro: str, parts: Sequence[Part]) -> list[Part]:
    """The parts below their introduction; nothing without any."""
    return [Text(words=intro), *parts] if parts else []


def _origin(documents: Sequence[Document]) -> list[Part]:
    notes = [Text(words=note, kind="caveat") for note in caveats(documents)]
    return [Text(words=f"From {origin(documents)}", kind="origin"), *notes]


def _environment(documents: Documents) -> list[Part]:
    alike: dict[tuple[str, str | None], list[str]] = {}
    for document in documents.everything:
        e = document.environment
        alike.setdefault((e.command, e.note), []).append(document.file)
    rates = tables.rates(documents.everything)
    commands = [Command(files=files, command=command, note=note) for (command, note), files in alike.items()]
    return [tables.environments(documents.everything), *commands, *([rates] if rates.rows else [])]


def _bandwidth(documents: Documents) -> list[Part]:
    intro = (
        "Bytes from others that reach the busiest rank, over the median time of the slowest rank, each mode with its "
        "own barriers, and dispatch with the gather into expert order that all_gather and rank_dedup leave; the lines "
        "across are the best rates of the same run by the same way over the link."
    )
    found = [bandwidth for sweep in documents.of(Sweep) for bandwidth in bandwidths(sweep)]
    return _below(intro, [bandwidth_picture(bandwidth, number) for number, bandwidth in enumerate(found, start=1)])


def _breakdown(documents: Documents) -> list[Part]:
    intro = (
        "Each part as it is timed by itself, and the rest of the layer: router, activation and what else there is. "
        "Parts that overlap in the layer may add up to more than it takes: the diamond and the number beside the bar "
        "are the layer's own time. The stroke is what the GEMMs alone and the link need."
    )
    found = [
        (group, pass_name)
        for group in layer_groups(documents.of(Layer), lambda layer: layer.breakdown)
        for pass_name in dict.fromkeys(b.pass_name for layer in group.layers.values() for b in layer.breakdown)
    ]
    return _below(intro, [breakdown_picture(*one, number) for number, one in enumerate(found, start=1)])


def _memory(documents: Documents) -> list[Part]:
    parts: list[Part] = []
    groups = layer_groups(documents.of(Layer), lambda layer: layer.known_memory)
    for number, group in enumerate(groups, start=1):
        parts += [memory_picture(group, number), tables.memory(group)]
    return _below("Bytes of one rank: by formula, and as the allocator counted them.", parts)


def _winners(documents: Documents) -> list[Part]:
    intro = (
        "Solid frame: the fastest of all pairs in a sweep with uniform routing, at its largest shape with this K. "
        "Dashed frame: computed, the pair that sonic_ep/cost.py predicts cheapest at the measured rates."
    )
    parts: list[Part] = []
    for number, grid in enumerate(winner_grids(documents), start=1):
        table = tables.winners(grid)
        parts += [winner_picture(grid, number), *([table] if table.rows else [])]
    return _below(intro, parts)


def _extrapolation(documents: Documents) -> list[Part]:
    intro = (
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
            parts.append(Text(words=f"{sizes}: left out, E={found.shape.num_experts} is no multiple."))
    return _below(intro, parts)


def _sweep(documents: Documents) -> list[Part]:
    parts: list[Part] = []
    for swept in documents.of(Sweep):
        if swept.points:
            parts += [*_origin([swept]), Text(words=tables.sweep_summary(swept)), tables.sweep(swept)]
    return parts


def _spread(documents: Documents) -> list[Part]:
    runs, again = within_runs(documents), repeated(documents)
    parts: list[Part] = [Text(words=between_words(again)), repeated_picture(again)] if again else []
    by_files: dict[tuple[str, ...], list[Repeated]] = {}
    for found in again:
        by_files.setdefault(found.files, []).append(found)
    parts += [tables.between(group) for group in by_files.values()]
    return [*parts, within_picture(runs), tables.within(runs)] if runs else parts


def between_words(again: Sequence[Repeated]) -> str:
    """How many medians differ, how many of these are the host's time, and whether the files are of one commit."""
    long = [found for found in again if found.least_us > LARGE_US]
    differing = [found for found in long if found.differs]
    counted = (
        f"{len(again)} medians are in more than one file. {LARGE_PERCENT:.0f}% or more apart: "
        f"{len(differing)} of the {len(long)} above {LARGE_US:.0f} µs."
    )
    of_host = sum(found.of_host for found in differing)
    if of_host:
        most = max((found.difference_percent for found in long if not found.of_host), default=0.0)
        counted += (
            f" {of_host} of these are the host's time, eager and more than {LEAST_OF_HOST:g} times as long as behind "
            f"other work; all others above {LARGE_US:.0f} µs differ by {most:.1f}% at most."
        )
    commits = {measurement.document.environment.commit for found in again for measurement in found.measured}
    apart = " The files are of different commits, so that their code differs as well." if len(commits) > 1 else ""
    return counted + apart


def _suites(documents: Documents) -> list[Part]:
    parts: list[Part] = []
    for suite in documents.of(Suite):
        if suite.entries:
            bars = [entry.met for entry in suite.entries if entry.met is not None]
            counted = [Text(words=f"{sum(bars)} of {len(bars)} bars are met.")] if bars else []
            parts += [Text(words=suite.file, kind="h3"), *_origin([suite]), *counted, *tables.suite(suite)]
    return parts


def _layers(documents: Documents) -> list[Part]:
    parts: list[Part] = []
    for layer in documents.of(Layer):
        words = Text(words=_layer_words(layer))
        parts += [Text(words=layer.file, kind="h3"), *_origin([layer]), words, *tables.layer(layer)]
    return parts


def _layer_words(layer: Layer) -> str:
    setup = layer.setup
    options = [
        setup.activation,
        setup.gate_layout,
        setup.score_order,
        "biases" if setup.add_bias else None,
        "renormalised scores" if setup.norm_topk_probs else None,
        f"{setup.routing} routing",
        f"{setup.backend} backend",
    ]
    return f"{setup.rank_shape}, W={setup.world_size}; {', '.join(filter(None, options))}; {layer.config.named()}."


def _profiles(documents: Documents) -> list[Part]:
    """Of every profile in a file of its own and of every layer's; the cache may give one profile to several runs."""
    files: dict[Profile, list[Document]] = {}
    owners: list[ProfileDocument | Layer] = [*documents.of(ProfileDocument), *documents.of(Layer)]
    for document in owners:
        if document.profile is not None:
            files.setdefault(document.profile, []).append(document)
    parts: list[Part] = []
    for profile, sources in files.items():
        shared = "" if profile.ranks_per_gpu in (None, 1) else f", {profile.ranks_per_gpu} ranks on one GPU"
        words = Text(words=f"{profile.shape}; {profile.backend} backend{shared}.")
        names = Text(words=", ".join(source.file for source in sources), kind="h3")
        parts += [names, *_origin(sources), words, *tables.profile(profile)]
    return parts
