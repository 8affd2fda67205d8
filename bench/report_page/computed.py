"""Modes and times at W and K that were not measured: ``sonic_ep.cost``'s seconds per byte at the measured rates."""

from __future__ import annotations

from dataclasses import dataclass

from schema import Document, Layer, PairTimes, Point, ShapeRecord, Suite, Sweep

from report_page.load import Documents
from report_page.selection import FORWARD, FORWARD_AND_BACKWARD, UNIFORM
from sonic_ep.config import EPConfig, ModePair
from sonic_ep.cost import Rates, Workload, choose_modes, combine_seconds_per_byte, dispatch_seconds_per_byte

COMPUTED = "computed, not measured"
EXTRAPOLATED_WORLD_SIZES = (4, 8, 16)
GRID_WORLD_SIZES = (2, 4, 8, 16)
GRID_TOP_K = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of GPU in a group of one size, with the rates of its latest file that has them all."""

    document: Document
    rates: Rates

    @property
    def identity(self) -> tuple[str | None, int]:
        """GPU and W: files that share both may stand together."""
        return identity(self.document)

    @property
    def world_size(self) -> int:
        """W."""
        return self.document.environment.world_size


@dataclass(frozen=True, kw_only=True)
class Winner:
    """What a sweep timed at one point, the fastest pair first."""

    sweep: Sweep
    shape: ShapeRecord
    pairs: list[PairTimes]

    @property
    def best(self) -> PairTimes:
        """The fastest."""
        return self.pairs[0]


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """The pair that the cost rule chooses at one W and K, and the fastest one where it was measured."""

    world_size: int
    top_k: int
    computed: ModePair
    measured: Winner | None

    @property
    def shown(self) -> ModePair:
        """The measured pair where there is one."""
        return self.computed if self.measured is None else self.measured.best.pair

    @property
    def how_known(self) -> str:
        """Whether the shown pair was measured."""
        return "computed" if self.measured is None else "measured"


@dataclass(frozen=True, kw_only=True)
class WinnerGrid:
    """Cells ordered by K, then W."""

    machine: Machine
    num_experts: int
    cells: list[GridCell]


@dataclass(frozen=True, kw_only=True)
class AtWorldSize:
    """Microseconds of one dispatch and one combine by mode, and the cheapest pair."""

    world_size: int
    dispatch_us: dict[str, float]
    combine_us: dict[str, float]
    cheapest: ModePair

    @property
    def forward_us(self) -> float:
        """One dispatch and one combine of the cheapest pair; backward takes as much again."""
        return self.dispatch_us[self.cheapest.dispatch.value] + self.combine_us[self.cheapest.combine.value]


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """One shape of a rank at several W. left_out: the W that do not divide E."""

    machine: Machine
    shape: ShapeRecord
    steps: list[AtWorldSize]
    left_out: list[int]


def identity(document: Document) -> tuple[str | None, int]:
    """GPU and W of a file."""
    return document.environment.gpu, document.environment.world_size


def machines(documents: Documents) -> list[Machine]:
    """Those whose rates are known, in the order in which they first appear."""
    found: dict[tuple[str | None, int], Machine] = {}
    for document in documents.everything:
        rates = None if document.environment.shares_gpus else document.rates_gb_per_s.for_costs()
        known = found.get(identity(document))
        newer = known is None or document.environment.date > known.document.environment.date
        if rates is not None and newer:
            found[identity(document)] = Machine(document=document, rates=rates)
    return list(found.values())


def at_world_size(shape: ShapeRecord, world_size: int, rates: Rates) -> AtWorldSize:
    """Dispatch and combine of ``shape.tokens`` a rank among ``world_size`` ranks, which have to divide E.

    A row of 8192 bytes, of which every token sends one to the only other rank, at 1 GB/s:

    >>> shape = ShapeRecord(tokens=1000, hidden=4096, num_experts=2, top_k=2, dtype="bfloat16")
    >>> rates = Rates(copy_engine=1e9, link_read=1e9, link_write=1e9, memory=4e12)
    >>> at_world_size(shape, 2, rates).forward_us
    16384.0
    """
    load = Workload(world_size=world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    scale = shape.rank_bytes * 1e6
    dispatch, combine = dispatch_seconds_per_byte(load, rates), combine_seconds_per_byte(load, rates)
    return AtWorldSize(
        world_size=world_size,
        dispatch_us={mode.value: seconds * scale for mode, seconds in dispatch.items()},
        combine_us={mode.value: seconds * scale for mode, seconds in combine.items()},
        cheapest=choose_modes(EPConfig(), load, rates),
    )


def extrapolations(documents: Documents) -> list[Extrapolation]:
    """One for each machine and each of its layer shapes."""
    return [
        _extrapolation(machine, shape) for machine in machines(documents) for shape in layer_shapes(documents, machine)
    ]


def _extrapolation(machine: Machine, shape: ShapeRecord) -> Extrapolation:
    sizes = sorted({*EXTRAPOLATED_WORLD_SIZES, machine.world_size} - {1})
    fitting = [size for size in sizes if shape.num_experts % size == 0]
    return Extrapolation(
        machine=machine,
        shape=shape,
        steps=[at_world_size(shape, size, machine.rates) for size in fitting],
        left_out=[size for size in sizes if size not in fitting],
    )


def layer_shapes(documents: Documents, machine: Machine) -> list[ShapeRecord]:
    """Shapes of the layers timed on ``machine``; without any, those of its suites, or its largest sweep's."""
    here = [document for document in documents.everything if identity(document) == machine.identity]
    layers = [layer.setup.rank_shape for layer in here if isinstance(layer, Layer)]
    entries = [entry.shape for suite in here if isinstance(suite, Suite) for entry in suite.entries]
    swept = [point.shape for _, point in _uniform_points(documents, machine)]
    largest = sorted(swept, key=lambda shape: shape.rank_bytes)[-1:]
    return list(dict.fromkeys(layers or [shape for shape in entries if shape.intermediate is not None] or largest))


def winner_grids(documents: Documents) -> list[WinnerGrid]:
    """One for each machine and each E of its sweeps, or of its layers where it has no sweep."""
    grids = []
    for machine in machines(documents):
        points = _uniform_points(documents, machine)
        shapes = [point.shape for _, point in points] or layer_shapes(documents, machine)
        grids += [_grid(machine, experts, shapes, points) for experts in sorted({s.num_experts for s in shapes})]
    return [grid for grid in grids if grid.cells]


def _grid(
    machine: Machine, num_experts: int, shapes: list[ShapeRecord], points: list[tuple[Sweep, Point]]
) -> WinnerGrid:
    own = machine.world_size
    sizes = [size for size in sorted({own, *GRID_WORLD_SIZES}) if size > 1 and num_experts % size == 0]
    swept = {shape.top_k for shape in shapes if shape.num_experts == num_experts}
    cells = [
        GridCell(
            world_size=size,
            top_k=top_k,
            computed=choose_modes(
                EPConfig(), Workload(world_size=size, top_k=top_k, num_experts=num_experts), machine.rates
            ),
            measured=_winner(points, num_experts, top_k) if size == own else None,
        )
        for top_k in sorted(swept | set(GRID_TOP_K))
        if top_k <= num_experts
        for size in sizes
    ]
    return WinnerGrid(machine=machine, num_experts=num_experts, cells=cells)


def _winner(points: list[tuple[Sweep, Point]], num_experts: int, top_k: int) -> Winner | None:
    """Of the largest point with this E and K: of forward and backward together where that was timed."""
    fitting = [(s, p) for s, p in points if (p.shape.num_experts, p.shape.top_k) == (num_experts, top_k)]
    if not fitting:
        return None
    sweep, point = max(fitting, key=lambda found: found[1].shape.rank_bytes)
    pairs = point.fastest(FORWARD_AND_BACKWARD) or point.fastest(FORWARD)
    return Winner(sweep=sweep, shape=point.shape, pairs=pairs) if pairs else None


def _uniform_points(documents: Documents, machine: Machine) -> list[tuple[Sweep, Point]]:
    """Points that may stand beside computed cells: the cost rule is that of the fast backend and uniform routing."""
    return [
        (sweep, point)
        for sweep in documents.of(Sweep)
        if identity(sweep) == machine.identity
        for point in sweep.points
        if point.routing == UNIFORM and point.profile.backend == "fast"
    ]
