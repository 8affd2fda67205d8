"""Which numbers a figure shows: rows of sizes of a sweep, and layers that may be compared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

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
    ceilings: dict[str, float]


def bandwidths(sweep: Sweep) -> list[Bandwidth]:
    """Dispatch and combine over the longest row of sizes with uniform routing; none without any rate."""
    points, fixed = longest_row([point for point in sweep.points if point.routing == UNIFORM])
    found = [_bandwidth(sweep, kind, fixed, points) for kind in ("dispatch", "combine")]
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
    return [point for _, point in sorted(rows[longest].items(), key=lambda item: item[0])], longest


def _bandwidth(sweep: Sweep, kind: str, fixed: str, points: Sequence[Point]) -> Bandwidth:
    lines: dict[str, dict[int, float]] = {}
    ceilings: dict[str, float] = {}
    for point in points:
        for mode in point.profile.modes:
            if mode.kind == kind and mode.gb_per_s is not None:
                lines.setdefault(mode.mode, {})[point.shape.rank_bytes] = mode.gb_per_s
                rate = getattr(sweep.rates_gb_per_s, mode.ceiling or "", None)
                ceilings |= {} if rate is None else {str(mode.ceiling): rate}
    return Bandwidth(sweep=sweep, kind=kind, fixed=fixed, lines=dict(sorted(lines.items())), ceilings=ceilings)


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers of one shape on one kind of machine, by labels that tell them apart."""

    layers: dict[str, Layer]

    @property
    def title(self) -> str:
        """Their shape and W."""
        setup = next(iter(self.layers.values())).setup
        return f"{setup.rank_shape}, W={setup.world_size}"


def layer_groups(layers: Sequence[Layer], wanted: Callable[[Layer], object]) -> list[LayerGroup]:
    """Groups of the layers for which ``wanted`` gives anything, in the order of the files."""
    found: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        if wanted(layer):
            shared = tuple(getattr(layer.setup, name) for name in SHARED)
            found.setdefault((layer.environment.gpu, shared), []).append(layer)
    return [LayerGroup(layers=dict(zip(labels(group), group, strict=True))) for group in found.values()]


def labels(layers: Sequence[Layer]) -> list[str]:
    """Modes and flags of each, what else differs among their setups, and the file where that is not enough."""
    others = [name for name in SetupRecord.__struct_fields__ if name not in SHARED]
    differing = [name for name in others if len({getattr(layer.setup, name) for layer in layers}) > 1]
    names = [
        ", ".join([layer.config.named("redispatch", "cpu_sync"), *(_value(layer.setup, name) for name in differing)])
        for layer in layers
    ]
    return [
        f"{name} ({layer.file})" if names.count(name) > 1 else name for name, layer in zip(names, layers, strict=True)
    ]


def _value(setup: SetupRecord, name: str) -> str:
    value: Any = getattr(setup, name)
    return value if isinstance(value, str) else f"{name}={value}"


def limit_us(layer: Layer, pass_name: str) -> float | None:
    """The GEMMs alone and what the link needs, in one pass; None where either is unknown."""
    gemms = median_us(layer, pass_name, GEMMS)
    link = next((d.link_us for d in layer.derived if d.pass_name == pass_name and d.link_us is not None), None)
    return None if gemms is None or link is None else gemms + link


def median_us(layer: Layer, pass_name: str, what: str) -> float | None:
    """The first time of this in a pass; None where there is none."""
    return next((t.median_us for t in layer.times if (t.pass_name, t.what) == (pass_name, what)), None)
