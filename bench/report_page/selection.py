"""Which numbers are shown: rows of sizes of a sweep, layers that may be compared, and times of the same thing."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

from msgspec import to_builtins
from schema import Document, Layer, Point, ProfileDocument, SetupRecord, ShapeRecord, Suite, Sweep, Times

UNIFORM = "uniform"
FORWARD, FORWARD_AND_BACKWARD = "forward, training", "forward and backward"
LAYER, GEMMS = "layer", "grouped GEMMs"
# Setup fields that all layers of a group share; the others are named where they differ.
SHARED = ("thiek", "world_size", "dtype")
LARGE_US = 100.0
LARGE_PERCENT = 5.0
# An eager entry that takes so many times its time behind queued work waits for the host.
LEAST_OF_HOST = 1.5


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """GB/s of each mode of one kind over bytes of a rank's x, ascending; the measured ceilings of their ways.

    fixed: what all points share.
    """

    sweep: Sweep
    kind: str
    fixed: str
    lines: dict[str, dict[int, float]]
    limits: dict[str, float]

    @property
    def sizes(self) -> list[int]:
        """Bytes of x at all points, ascending."""
        return sorted({size for line in self.lines.values() for size in line})


def bandwidths(sweeps: Sequence[Sweep]) -> list[Bandwidth]:
    """Dispatch and combine over the longest row of sizes with uniform routing of each sweep; none without any rate."""
    found = []
    for sweep in sweeps:
        points, fixed = longest_row([point for point in sweep.points if point.routing == UNIFORM])
        rates: dict[str, float] = to_builtins(sweep.rates_gb_per_s)
        for kind in ("dispatch", "combine"):
            lines: dict[str, dict[int, float]] = {}
            limits: dict[str, float] = {}
            for size, mode in [(point.shape.rank_bytes, mode) for point in points for mode in point.profile.modes]:
                if mode.kind == kind and mode.gb_per_s is not None:
                    lines.setdefault(mode.mode, {})[size] = mode.gb_per_s
                    if mode.ceiling in rates:
                        limits[mode.ceiling] = rates[mode.ceiling]
            if lines:
                lines = dict(sorted(lines.items()))
                found.append(Bandwidth(sweep=sweep, kind=kind, fixed=fixed, lines=lines, limits=limits))
    return found


def longest_row(points: Sequence[Point]) -> tuple[list[Point], str]:
    """The most points of different size that share all but T, or all but H; and what they share."""
    rows: dict[str, dict[int, Point]] = {"": {}}
    for fixed in (lambda s: f"H={s.hidden}", lambda s: f"T={s.tokens}"):
        for point in points:
            shape: ShapeRecord = point.shape
            name = f"{fixed(shape)}, E={shape.num_experts}, K={shape.top_k}, {shape.dtype}"
            rows.setdefault(name, {}).setdefault(shape.rank_bytes, point)
    longest = max(rows, key=lambda name: len(rows[name]))
    return [rows[longest][size] for size in sorted(rows[longest])], longest


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers of one shape on one kind of machine, by labels that tell them apart."""

    layers: dict[str, Layer]

    @property
    def title(self) -> str:
        """Their shape and W."""
        setup = next(iter(self.layers.values())).setup
        return f"{setup.rank_shape}, W={setup.world_size}"

    def breakdowns(self, pass_name: str) -> dict[str, tuple[Layer, dict[str, float]]]:
        """By label, the layers whose pass was taken apart, and its parts."""
        parts = {label: {b.pass_name: b.parts for b in layer.breakdown} for label, layer in self.layers.items()}
        return {name: (self.layers[name], of[pass_name]) for name, of in parts.items() if pass_name in of}


def breakdowns(layers: Sequence[Layer]) -> list[tuple[LayerGroup, str]]:
    """Each group with each pass that was taken apart in any of its layers."""
    return [
        (group, pass_name)
        for group in layer_groups(layers, "breakdown")
        for pass_name in dict.fromkeys(b.pass_name for layer in group.layers.values() for b in layer.breakdown)
    ]


def layer_groups(layers: Sequence[Layer], wanted: str) -> list[LayerGroup]:
    """Groups of the layers whose attribute ``wanted`` holds anything, in the order of the files."""
    found: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        if getattr(layer, wanted):
            shared = tuple(getattr(layer.setup, name) for name in SHARED)
            found.setdefault((layer.environment.gpu, shared), []).append(layer)
    return [LayerGroup(layers=dict(zip(labels(group), group, strict=True))) for group in found.values()]


def labels(layers: Sequence[Layer]) -> list[str]:
    """Modes and flags of each, what else differs among their setups, and the file where that is not enough."""
    others = [name for name in SetupRecord.__struct_fields__ if name not in SHARED]
    differing = [name for name in others if len({getattr(layer.setup, name) for layer in layers}) > 1]
    names = []
    for layer in layers:
        values = {name: getattr(layer.setup, name) for name in differing}
        words = [value if isinstance(value, str) else f"{name}={value}" for name, value in values.items()]
        names.append(", ".join([layer.config.named("redispatch", "cpu_sync"), *words]))
    files = [layer.file for layer in layers]
    return [f"{name} ({file})" if names.count(name) > 1 else name for name, file in zip(names, files, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A layer's forward and backward, and what it is compared with. milliseconds: by what took them, in order."""

    layer: Layer
    milliseconds: dict[str, float]
    over_gemms_and_link: float | None
    over_reference: float | None
    scaling_efficiency: float | None


def headline(layers: Sequence[Layer]) -> Headline | None:
    """Of the first layer with uniform routing whose forward and backward was timed; None without one."""
    for layer in layers:
        total = median_us(layer, FORWARD_AND_BACKWARD, LAYER)
        derived = next((found for found in layer.derived if found.pass_name == FORWARD_AND_BACKWARD), None)
        if layer.setup.routing == UNIFORM and total and derived is not None:
            times = {
                "GEMMs alone": median_us(layer, FORWARD_AND_BACKWARD, GEMMS),
                "GEMMs and link": limit_us(layer, FORWARD_AND_BACKWARD),
                "the layer": total,
                "one GPU, as many tokens": derived.scaling_efficiency and total * derived.scaling_efficiency,
                "reference over NCCL": derived.over_reference and total / derived.over_reference,
            }
            return Headline(
                layer=layer,
                milliseconds={name: us / 1e3 for name, us in times.items() if us},
                over_gemms_and_link=derived.over_gemms_and_link,
                over_reference=derived.over_reference,
                scaling_efficiency=derived.scaling_efficiency,
            )
    return None


def limit_us(layer: Layer, pass_name: str) -> float | None:
    """The GEMMs alone and what the link needs, in one pass; None where either is unknown."""
    gemms = median_us(layer, pass_name, GEMMS)
    link = next((d.link_us for d in layer.derived if d.pass_name == pass_name and d.link_us is not None), None)
    return None if gemms is None or link is None else gemms + link


def total_us(layer: Layer, pass_name: str, parts: Mapping[str, float]) -> float:
    """Microseconds of the layer; the sum of its parts where that is unknown."""
    return median_us(layer, pass_name, LAYER) or sum(parts.values())


def median_us(layer: Layer, pass_name: str, what: str) -> float | None:
    """The first median of ``what`` in a pass; None where there is none."""
    return next((t.median_us for t in layer.times if (t.pass_name, t.what) == (pass_name, what)), None)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One time of one file. where: shape or setup. also: what else is equal for the same thing in another file.

    of_host: whether it is the host's time, and not the GPU's.
    """

    document: Document
    what: str
    where: str
    also: Hashable = None
    times: Times
    of_host: bool = False


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The same thing in two or more files, and its median in each. of_host: in any of them."""

    what: str
    where: str
    documents: list[Document]
    medians_us: list[float]
    of_host: bool

    @property
    def files(self) -> list[str]:
        """In the order of ``documents``."""
        return [document.file for document in self.documents]

    @property
    def difference_percent(self) -> float:
        """How much the largest median is above the smallest, in percent of that."""
        return 100 * (max(self.medians_us) / min(self.medians_us) - 1)

    @property
    def differs(self) -> bool:
        """Above 100 us, and by 5 percent or more."""
        return min(self.medians_us) > LARGE_US and self.difference_percent >= LARGE_PERCENT


def repeated(documents: Sequence[Document]) -> list[Repeated]:
    """What more than one file has, the largest difference first. Where a file has it twice, its first counts.

    Profiles within layers and sweeps are left out: the profiler's cache may give one measurement to several files.
    """
    found: dict[Hashable, dict[str, Measurement]] = {}
    for document in documents:
        machine = (document.kind, document.environment.gpu, document.environment.world_size)
        for one in measurements(document):
            found.setdefault((machine, one.what, one.where, one.also), {}).setdefault(document.file, one)
    several = [
        Repeated(
            what=measured[0].what,
            where=measured[0].where,
            documents=[measurement.document for measurement in measured],
            medians_us=[measurement.times.median_us for measurement in measured],
            of_host=any(measurement.of_host for measurement in measured),
        )
        for measured in map(list, map(dict.values, found.values()))
        if len(measured) > 1
    ]
    return sorted(several, key=lambda again: again.difference_percent, reverse=True)


def measurements(document: Document) -> Iterator[Measurement]:
    """Every time in a document."""
    one = partial(Measurement, document=document)
    if isinstance(document, Suite):
        queued = {(entry.name, entry.shape): entry.median_us for entry in document.entries if entry.how == "queued"}
        for entry in document.entries:
            behind_work = queued.get((entry.name, entry.shape), inf)
            of_host = entry.how == "eager" and entry.median_us > LEAST_OF_HOST * behind_work
            yield one(what=f"{entry.name}, {entry.how}", where=str(entry.shape), times=entry, of_host=of_host)
    if isinstance(document, ProfileDocument):
        found = document.profile
        here = partial(one, where=f"{found.shape}, {found.backend}", also=found.ranks_per_gpu)
        for mode in found.modes:
            yield here(what=str(mode), times=mode)
        for pair in found.pairs:
            yield here(what=f"{pair.pass_name}, {pair}", times=pair)
    if isinstance(document, Layer):
        where = f"{document.setup.rank_shape}, {document.config.named()}"
        for timed in document.times:
            yield one(what=f"{timed.what}, {timed.pass_name}", where=where, also=document.setup, times=timed)
    if isinstance(document, Sweep):
        for point in document.points:
            where = f"{point.shape}, {point.routing} routing, {point.profile.backend}"
            for pair in point.pairs:
                yield one(what=f"layer, {pair.pass_name}, {pair}", where=where, times=pair)


def between_words(again: Sequence[Repeated]) -> str:
    """How many medians differ, how many of these are the host's time, and whether the files are of one commit."""
    long = [found for found in again if min(found.medians_us) > LARGE_US]
    differing = [found for found in long if found.differs]
    said = (
        f"{len(again)} medians are in more than one file. {LARGE_PERCENT:.0f}% or more apart: "
        f"{len(differing)} of the {len(long)} above {LARGE_US:.0f} µs."
    )
    of_host = sum(found.of_host for found in differing)
    if of_host:
        most = max((found.difference_percent for found in long if not found.of_host), default=0.0)
        said += (
            f" {of_host} of these are the host's time, eager and more than {LEAST_OF_HOST:g} times as long as behind "
            f"other work; all others above {LARGE_US:.0f} µs differ by {most:.1f}% at most."
        )
    commits = {document.environment.commit for found in again for document in found.documents}
    return said + " The files are of different commits, so that their code differs as well." * (len(commits) > 1)
