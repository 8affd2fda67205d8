"""What a figure shows of the documents: lines of bandwidth, bars of a layer's parts and of its memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields

from sonic_ep.report.documents import Breakdown, Layer, MemoryUse, Setup, Sweep, SweepPoint
from sonic_ep.report.measured import GEMMS, LAYER, UNIFORM
from sonic_ep.report.origin import Source

# Setup fields that every layer of one group shares; the others are named where they differ.
SHARED = ("group_tokens", "hidden", "intermediate", "num_experts", "top_k", "world_size", "dtype")


@dataclass(frozen=True, kw_only=True)
class RatePoint:
    """One measured rate. size_bytes: of a rank's x."""

    size_bytes: int
    gb_per_s: float


@dataclass(frozen=True, kw_only=True)
class RateLine:
    """One mode over sizes, ascending. ceiling: the name of its way over the link."""

    mode: str
    ceiling: str | None
    points: tuple[RatePoint, ...]


@dataclass(frozen=True, kw_only=True)
class CeilingLine:
    """The measured rate of one way over the link."""

    name: str
    gb_per_s: float


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """All modes of one kind, dispatch or combine. fixed: what all points share, in words."""

    source: Source
    kind: str
    fixed: str
    lines: tuple[RateLine, ...]
    ceilings: tuple[CeilingLine, ...]


def bandwidths(sweep: Sweep) -> tuple[Bandwidth, ...]:
    """Dispatch and combine over the longest row of sizes with uniform routing and one K; empty without any rate."""
    points, fixed = longest_row([point for point in sweep.points if point.routing == UNIFORM])
    found = [_bandwidth(sweep.source, kind, fixed, points) for kind in ("dispatch", "combine")]
    return tuple(bandwidth for bandwidth in found if bandwidth.lines)


def longest_row(points: Sequence[SweepPoint]) -> tuple[tuple[SweepPoint, ...], str]:
    """The most points of different size that share all but T, or all but H; and what they share."""
    rows: dict[str, dict[int, SweepPoint]] = {}
    for vary_tokens in (True, False):
        for point in points:
            shape = point.shape
            fixed = f"H={shape.hidden}" if vary_tokens else f"T={shape.tokens}"
            name = f"{fixed}, E={shape.num_experts}, K={shape.top_k}, {shape.dtype}"
            rows.setdefault(name, {}).setdefault(shape.rank_bytes, point)
    if not rows:
        return (), ""
    fixed = max(rows, key=lambda name: len(rows[name]))
    return tuple(rows[fixed][size] for size in sorted(rows[fixed])), fixed


def _bandwidth(source: Source, kind: str, fixed: str, points: Sequence[SweepPoint]) -> Bandwidth:
    rates: dict[str, list[RatePoint]] = {}
    ways: dict[str, str | None] = {}
    for point in points:
        for mode in point.profile.modes:
            if mode.kind == kind and mode.gb_per_s is not None:
                found = RatePoint(size_bytes=point.shape.rank_bytes, gb_per_s=mode.gb_per_s)
                rates.setdefault(mode.mode, []).append(found)
                ways[mode.mode] = mode.ceiling
    names = dict.fromkeys(name for name in ways.values() if name is not None)
    ceilings = [(name, source.rates.ceiling(name)) for name in names]
    return Bandwidth(
        source=source,
        kind=kind,
        fixed=fixed,
        lines=tuple(RateLine(mode=mode, ceiling=ways[mode], points=tuple(rates[mode])) for mode in sorted(rates)),
        ceilings=tuple(CeilingLine(name=name, gb_per_s=rate) for name, rate in ceilings if rate is not None),
    )


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers of one shape on one kind of machine, which may be compared; a label for each."""

    layers: tuple[Layer, ...]
    labels: tuple[str, ...]

    @property
    def title(self) -> str:
        """Their shape and W."""
        setup = self.layers[0].setup
        return f"{setup.rank_shape}, W={setup.world_size}"

    @property
    def sources(self) -> tuple[Source, ...]:
        """The files."""
        return tuple(layer.source for layer in self.layers)


def layer_groups(layers: Sequence[Layer], wanted: Callable[[Layer], object]) -> tuple[LayerGroup, ...]:
    """Groups of those layers for which ``wanted`` gives anything, in the order of the files."""
    found: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        if wanted(layer):
            shared = tuple(getattr(layer.setup, name) for name in SHARED)
            found.setdefault((layer.source.environment.gpu, shared), []).append(layer)
    return tuple(LayerGroup(layers=tuple(group), labels=labels(group)) for group in found.values())


def labels(layers: Sequence[Layer]) -> tuple[str, ...]:
    """Modes and flags of each, what else of the setup differs among them, and the file where that is not enough."""
    differing = [name for name in _other_fields() if len({getattr(layer.setup, name) for layer in layers}) > 1]
    names = [", ".join([layer.settings.short, *_named(layer.setup, differing)]) for layer in layers]
    return tuple(
        f"{name} ({layer.source.file})" if names.count(name) > 1 else name
        for name, layer in zip(names, layers, strict=True)
    )


def _other_fields() -> tuple[str, ...]:
    return tuple(field.name for field in fields(Setup) if field.name not in SHARED)


def _named(setup: Setup, names: Sequence[str]) -> list[str]:
    values = [(name, getattr(setup, name)) for name in names]
    return [value if isinstance(value, str) else f"{name}={value}" for name, value in values]


@dataclass(frozen=True, kw_only=True)
class PassBar:
    """The parts of one layer in one pass.

    layer_us: what the layer took. limit_us: GEMMs alone and link. None where they are unknown.
    """

    label: str
    breakdown: Breakdown
    layer_us: float | None
    limit_us: float | None


def pass_bars(group: LayerGroup, pass_name: str) -> tuple[PassBar, ...]:
    """A bar for each layer of the group whose pass was taken apart."""
    return tuple(
        PassBar(
            label=label,
            breakdown=breakdown,
            layer_us=median_us(layer, pass_name, LAYER),
            limit_us=limit_us(layer, pass_name),
        )
        for layer, label in zip(group.layers, group.labels, strict=True)
        for breakdown in layer.breakdown
        if breakdown.pass_name == pass_name
    )


def pass_names(group: LayerGroup) -> tuple[str, ...]:
    """Passes that were taken apart in any layer of the group."""
    return tuple(dict.fromkeys(breakdown.pass_name for layer in group.layers for breakdown in layer.breakdown))


def limit_us(layer: Layer, pass_name: str) -> float | None:
    """GEMMs alone and what the link needs, in one pass; None where either is unknown."""
    gemms = median_us(layer, pass_name, GEMMS)
    link = [d.link_us for d in layer.derived if d.pass_name == pass_name and d.link_us is not None]
    return gemms + link[0] if gemms is not None and link else None


def median_us(layer: Layer, pass_name: str, what: str) -> float | None:
    """The first time of this in a pass; None where there is none."""
    return next((t.times.median_us for t in layer.times if (t.pass_name, t.what) == (pass_name, what)), None)


@dataclass(frozen=True, kw_only=True)
class MemoryBar:
    """One kind of memory of one layer, in bytes of a rank."""

    label: str
    formula_bytes: int | None
    measured_bytes: int | None


def memory_kinds(group: LayerGroup) -> tuple[str, ...]:
    """Kinds of memory of which any layer of the group knows a number."""
    return tuple(dict.fromkeys(use.what for layer in group.layers for use in known_memory(layer)))


def known_memory(layer: Layer) -> tuple[MemoryUse, ...]:
    """Those of which formula or measurement is known: the reference has no formula, the CPU no allocator to ask."""
    return tuple(use for use in layer.memory if (use.formula_bytes, use.measured_bytes) != (None, None))


def memory_bars(group: LayerGroup, what: str) -> tuple[MemoryBar, ...]:
    """A bar for each layer of the group that knows this kind of memory."""
    return tuple(
        MemoryBar(label=label, formula_bytes=use.formula_bytes, measured_bytes=use.measured_bytes)
        for layer, label in zip(group.layers, group.labels, strict=True)
        for use in known_memory(layer)
        if use.what == what
    )
