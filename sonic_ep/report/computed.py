"""What no machine here has measured: modes and times at other W and K, from bytes at the measured rates.

Every number is ``sonic_ep.cost``'s seconds per byte of a token's row, times the bytes of a rank's x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import Rates, Workload, choose_modes, combine_seconds_per_byte, dispatch_seconds_per_byte
from sonic_ep.report.documents import Documents, Sweep, SweepPoint
from sonic_ep.report.measured import FAST, FORWARD, FORWARD_AND_BACKWARD, UNIFORM, PairTimes, Shape
from sonic_ep.report.origin import Source

COMPUTED = "computed, not measured"
EXTRAPOLATED_WORLD_SIZES = (4, 8, 16)
GRID_WORLD_SIZES = (2, 4, 8, 16)
GRID_TOP_K = (1, 2, 4, 8)
MICRO = 1e6


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of GPU in a group of one size, with the rates of its latest file that has them all."""

    source: Source
    rates: Rates

    @property
    def identity(self) -> tuple[str | None, int]:
        """What files have to share for their numbers to stand together: the GPU and W."""
        return identity(self.source)


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The fastest of the pairs that a sweep timed at one point; runner_up: the second, None where there is none."""

    source: Source
    shape: Shape
    best: PairTimes
    runner_up: PairTimes | None


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """The pair that the cost rule chooses at one W and K, and the one that was fastest, where that was measured."""

    world_size: int
    top_k: int
    computed: ModePair
    measured: Winner | None


@dataclass(frozen=True, kw_only=True)
class WinnerGrid:
    """Cells ordered by K, then W."""

    machine: Machine
    num_experts: int
    cells: tuple[GridCell, ...]


@dataclass(frozen=True, kw_only=True)
class AtWorldSize:
    """Times of one dispatch and one combine by mode, in microseconds, and the cheapest pair."""

    world_size: int
    dispatch_us: Mapping[DispatchMode, float]
    combine_us: Mapping[CombineMode, float]
    cheapest: ModePair

    @property
    def forward_us(self) -> float:
        """One dispatch and one combine of the cheapest pair."""
        return self.dispatch_us[self.cheapest.dispatch] + self.combine_us[self.cheapest.combine]

    @property
    def forward_and_backward_us(self) -> float:
        """Two of each: the gradient of a dispatch is a combine, that of a combine a dispatch."""
        return 2 * self.forward_us


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """One shape of a rank at several W. left_out: the W that do not divide E."""

    machine: Machine
    shape: Shape
    steps: tuple[AtWorldSize, ...]
    left_out: tuple[int, ...]


def identity(source: Source) -> tuple[str | None, int]:
    """GPU and W of a file."""
    return source.environment.gpu, source.environment.world_size


def machines(documents: Documents) -> tuple[Machine, ...]:
    """Those whose rates are known, in the order in which they first appear."""
    found: dict[tuple[str | None, int], Machine] = {}
    for document in documents.everything:
        source = document.source
        rates = None if source.environment.shares_gpus else source.rates.for_costs()
        known = found.get(identity(source))
        newer = known is None or source.environment.date > known.source.environment.date
        if rates is not None and newer:
            found[identity(source)] = Machine(source=source, rates=rates)
    return tuple(found.values())


def at_world_size(shape: Shape, world_size: int, rates: Rates) -> AtWorldSize:
    """Dispatch and combine of ``shape.tokens`` a rank among ``world_size`` ranks, which have to divide E.

    A row of 8192 bytes, of which every token sends one to the only other rank, at 1 GB/s:

    >>> shape = Shape(tokens=1000, hidden=4096, intermediate=None, num_experts=2, top_k=2, dtype="bfloat16")
    >>> rates = Rates(copy_engine=1e9, link_read=1e9, link_write=1e9, memory=4e12)
    >>> at_world_size(shape, 2, rates).forward_us
    16384.0
    """
    load = Workload(world_size=world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    scale = shape.rank_bytes * MICRO
    dispatch = {mode: seconds * scale for mode, seconds in dispatch_seconds_per_byte(load, rates).items()}
    combine = {mode: seconds * scale for mode, seconds in combine_seconds_per_byte(load, rates).items()}
    return AtWorldSize(
        world_size=world_size,
        dispatch_us=MappingProxyType(dispatch),
        combine_us=MappingProxyType(combine),
        cheapest=choose_modes(EPConfig(), load, rates),
    )


def extrapolations(documents: Documents) -> tuple[Extrapolation, ...]:
    """One for each machine and each of its layer shapes."""
    return tuple(
        _extrapolation(machine, shape)
        for machine in machines(documents)
        for shape in layer_shapes(documents, machine.identity)
    )


def _extrapolation(machine: Machine, shape: Shape) -> Extrapolation:
    own = machine.source.environment.world_size
    sizes = sorted({*EXTRAPOLATED_WORLD_SIZES, *([own] if own > 1 else [])})
    fitting = [size for size in sizes if shape.num_experts % size == 0]
    return Extrapolation(
        machine=machine,
        shape=shape,
        steps=tuple(at_world_size(shape, size, machine.rates) for size in fitting),
        left_out=tuple(size for size in sizes if size not in fitting),
    )


def layer_shapes(documents: Documents, machine: tuple[str | None, int]) -> tuple[Shape, ...]:
    """Shapes of the layers that were timed on ``machine``; without any, those of its suites, or its largest sweep's."""
    found = [layer.setup.rank_shape for layer in documents.layers if identity(layer.source) == machine]
    if not found:
        suites = [suite for suite in documents.suites if identity(suite.source) == machine]
        entries = [entry for suite in suites for entry in suite.entries]
        found = [entry.shape for entry in entries if entry.shape.intermediate is not None]
    if not found:
        swept = [point.shape for _, point in _uniform_points(documents, machine)]
        found = sorted(swept, key=lambda shape: shape.rank_bytes)[-1:]
    return tuple(dict.fromkeys(found))


def winner_grids(documents: Documents) -> tuple[WinnerGrid, ...]:
    """One for each machine and each E of its sweeps, or of its layers where it has no sweep."""
    grids = []
    for machine in machines(documents):
        points = _uniform_points(documents, machine.identity)
        shapes = [point.shape for _, point in points] or list(layer_shapes(documents, machine.identity))
        grids += [
            _grid(machine, num_experts, shapes, points) for num_experts in sorted({s.num_experts for s in shapes})
        ]
    return tuple(grid for grid in grids if grid.cells)


def _grid(
    machine: Machine, num_experts: int, shapes: list[Shape], points: list[tuple[Sweep, SweepPoint]]
) -> WinnerGrid:
    own = machine.source.environment.world_size
    sizes = [size for size in sorted({own, *GRID_WORLD_SIZES}) if size > 1 and num_experts % size == 0]
    swept = {shape.top_k for shape in shapes if shape.num_experts == num_experts}
    choices = [top_k for top_k in sorted(swept | set(GRID_TOP_K)) if top_k <= num_experts]
    cells = [
        GridCell(
            world_size=size,
            top_k=top_k,
            computed=choose_modes(
                EPConfig(), Workload(world_size=size, top_k=top_k, num_experts=num_experts), machine.rates
            ),
            measured=_winner(points, num_experts, top_k) if size == own else None,
        )
        for top_k in choices
        for size in sizes
    ]
    return WinnerGrid(machine=machine, num_experts=num_experts, cells=tuple(cells))


def _winner(points: list[tuple[Sweep, SweepPoint]], num_experts: int, top_k: int) -> Winner | None:
    """Of the largest point with this E and K: of forward and backward together where that was timed."""
    fitting = [
        (sweep, point)
        for sweep, point in points
        if (point.shape.num_experts, point.shape.top_k) == (num_experts, top_k)
    ]
    if not fitting:
        return None
    sweep, point = max(fitting, key=lambda found: found[1].shape.rank_bytes)
    for pass_name in (FORWARD_AND_BACKWARD, FORWARD):
        timed = [pair for pair in point.pairs if pair.what == pass_name]
        if timed:
            best, *others = sorted(timed, key=lambda pair: pair.times.median_us)
            return Winner(source=sweep.source, shape=point.shape, best=best, runner_up=others[0] if others else None)
    return None


def _uniform_points(documents: Documents, machine: tuple[str | None, int]) -> list[tuple[Sweep, SweepPoint]]:
    """What may stand beside computed cells: the cost rule is that of the fast backend and of uniform routing."""
    return [
        (sweep, point)
        for sweep in documents.sweeps
        if identity(sweep.source) == machine
        for point in sweep.points
        if point.routing == UNIFORM and point.profile.backend == FAST
    ]
