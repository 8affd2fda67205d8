"""Which numbers a figure shows: rows of sizes of a sweep, and layers that may be compared."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from msgspec import to_builtins
from schema import Layer, Point, SetupRecord, ShapeRecord, Sweep

UNIFORM = "uniform"
FORWARD, FORWARD_AND_BACKWARD = "forward, training", "forward and backward"
LAYER, GEMMS = "layer", "grouped GEMMs"
# Setup fields that all layers of a group share; the others are named where they differ.
SHARED = ("thiek", "world_size", "dtype")


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
        """Of all points, ascending."""
        return sorted({size for line in self.lines.values() for size in line})


def bandwidths(sweeps: Sequence[Sweep]) -> list[Bandwidth]:
    """Dispatch and combine over the longest row of sizes with uniform routing of each sweep; none without any rate."""
    found = []
    for sweep in sweeps:
        points, fixed = longest_row([point for point in sweep.points if point.routing == UNIFORM])
        found += [_bandwidth(sweep, kind, fixed, points) for kind in ("dispatch", "combine")]
    return [bandwidth for bandwidth in found if bandwidth.lines]


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


def _bandwidth(sweep: Sweep, kind: str, fixed: str, points: Sequence[Point]) -> Bandwidth:
    lines: dict[str, dict[int, float]] = {}
    rates: dict[str, float] = to_builtins(sweep.rates_gb_per_s)
    limits: dict[str, float] = {}
    for point in points:
        for mode in point.profile.modes:
            if mode.kind == kind and mode.gb_per_s is not None:
                lines.setdefault(mode.mode, {})[point.shape.rank_bytes] = mode.gb_per_s
                if mode.ceiling in rates:
                    limits[mode.ceiling] = rates[mode.ceiling]
    return Bandwidth(sweep=sweep, kind=kind, fixed=fixed, lines=dict(sorted(lines.items())), limits=limits)


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


def limit_us(layer: Layer, pass_name: str) -> float | None:
    """The GEMMs alone and what the link needs, in one pass; None where either is unknown."""
    gemms = median_us(layer, pass_name, GEMMS)
    link = next((d.link_us for d in layer.derived if d.pass_name == pass_name and d.link_us is not None), None)
    return None if gemms is None or link is None else gemms + link


def total_us(layer: Layer, pass_name: str, parts: Mapping[str, float]) -> float:
    """What the layer took; the sum of its parts where that is unknown."""
    return median_us(layer, pass_name, LAYER) or sum(parts.values())


def median_us(layer: Layer, pass_name: str, what: str) -> float | None:
    """The first time of this in a pass; None where there is none."""
    return next((t.median_us for t in layer.times if (t.pass_name, t.what) == (pass_name, what)), None)
