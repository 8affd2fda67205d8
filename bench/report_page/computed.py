"""Modes and times at W and K that were not measured: ``sonic_ep.cost``'s seconds per byte at the measured rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from schema import Document, Layer, PairTimes, Point, ShapeRecord, Suite, Sweep

from report_page.selection import FORWARD, FORWARD_AND_BACKWARD, UNIFORM
from sonic_ep.config import EPConfig, ModePair
from sonic_ep.cost import Rates, Workload, choose_modes, combine_seconds_per_byte, dispatch_seconds_per_byte

COMPUTED = "computed, not measured"
EXTRAPOLATED_WORLD_SIZES = (4, 8, 16)
GRID_WORLD_SIZES = (2, 4, 8, 16)
GRID_TOP_K = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class RatedMachine:
    """One kind of GPU in a group of one size: its files, and the latest of them that has all rates."""

    files: list[Document]
    document: Document
    rates: Rates

    @property
    def world_size(self) -> int:
        """W of the files."""
        return self.document.environment.world_size

    @property
    def points(self) -> list[tuple[Sweep, Point]]:
        """Points comparable with computed cells: the cost rule is for the fast backend and uniform routing."""
        found = [(sweep, point) for sweep in self.files if isinstance(sweep, Sweep) for point in sweep.points]
        return [(sweep, point) for sweep, point in found if (point.routing, point.profile.backend) == (UNIFORM, "fast")]

    @property
    def layer_shapes(self) -> list[ShapeRecord]:
        """Shapes of the layers; without any, those of the suites, or the largest sweep's."""
        layers = [layer.setup.rank_shape for layer in self.files if isinstance(layer, Layer)]
        entries = [entry.shape for suite in self.files if isinstance(suite, Suite) for entry in suite.entries]
        swept = sorted((point.shape for _, point in self.points), key=lambda shape: shape.rank_bytes)
        return list(dict.fromkeys(layers or [shape for shape in entries if shape.intermediate] or swept[-1:]))


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """The pair that the cost rule chooses at one W and K. measured: what a sweep timed there, the fastest pair first.

    sweep, point: where it was measured; None where it was not.
    """

    world_size: int
    top_k: int
    computed: ModePair
    measured: list[PairTimes]
    sweep: Sweep | None
    point: Point | None

    @property
    def shown(self) -> ModePair:
        """The measured pair where there is one."""
        return self.measured[0].pair if self.measured else self.computed

    @property
    def how_known(self) -> str:
        """Whether the shown pair was measured."""
        return "measured" if self.measured else "computed"


@dataclass(frozen=True, kw_only=True)
class WinnerGrid:
    """Cells ordered by K, then W."""

    machine: RatedMachine
    num_experts: int
    cells: list[GridCell]


@dataclass(frozen=True, kw_only=True)
class AtWorldSize:
    """Microseconds of one dispatch and one combine by mode, and of both with the cheapest pair."""

    world_size: int
    dispatch_us: dict[str, float]
    combine_us: dict[str, float]
    cheapest: ModePair
    forward_us: float


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """One shape of a rank at several W. left_out: the W that do not divide E."""

    machine: RatedMachine
    shape: ShapeRecord
    steps: list[AtWorldSize]
    left_out: list[int]


def machines(documents: Sequence[Document]) -> list[RatedMachine]:
    """Those whose rates are known, in the order in which they first appear."""
    files: dict[tuple[str | None, int], list[Document]] = {}
    for document in documents:
        files.setdefault((document.environment.gpu, document.environment.world_size), []).append(document)
    found = []
    for here in files.values():
        own = [document for document in here if not document.environment.shares_gpus]
        rated = [(document, rates) for document in own if (rates := document.rates_gb_per_s.for_costs())]
        if rated:
            document, rates = max(rated, key=lambda each: each[0].environment.date)
            found.append(RatedMachine(files=here, document=document, rates=rates))
    return found


def at_world_size(shape: ShapeRecord, world_size: int, rates: Rates) -> AtWorldSize:
    """Dispatch and combine of ``shape.tokens`` a rank among ``world_size`` ranks, which have to divide E.

    A row of 8192 bytes, of which every token sends one to the only other rank, at 1 GB/s:

    >>> shape = ShapeRecord(tokens=1000, hidden=4096, num_experts=2, top_k=2, dtype="bfloat16")
    >>> rates = Rates(copy_engine=1e9, link_read=1e9, link_write=1e9, memory=4e12)
    >>> at_world_size(shape, 2, rates).forward_us
    16384.0
    """
    load = Workload(world_size=world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    scale, cheapest = shape.rank_bytes * 1e6, choose_modes(EPConfig(), load, rates)
    dispatch = {mode: seconds * scale for mode, seconds in dispatch_seconds_per_byte(load, rates).items()}
    combine = {mode: seconds * scale for mode, seconds in combine_seconds_per_byte(load, rates).items()}
    return AtWorldSize(
        world_size=world_size,
        dispatch_us={mode.value: us for mode, us in dispatch.items()},
        combine_us={mode.value: us for mode, us in combine.items()},
        cheapest=cheapest,
        forward_us=dispatch[cheapest.dispatch] + combine[cheapest.combine],
    )


def extrapolations(documents: Sequence[Document]) -> list[Extrapolation]:
    """One for each machine and each of its layer shapes."""
    found = []
    for machine in machines(documents):
        sizes = sorted({*EXTRAPOLATED_WORLD_SIZES, machine.world_size} - {1})
        for shape in machine.layer_shapes:
            steps = [at_world_size(shape, size, machine.rates) for size in sizes if shape.num_experts % size == 0]
            left_out = [size for size in sizes if shape.num_experts % size]
            found.append(Extrapolation(machine=machine, shape=shape, steps=steps, left_out=left_out))
    return found


def winner_grids(documents: Sequence[Document]) -> list[WinnerGrid]:
    """One for each machine and each E of its sweeps, or of its layers where it has no sweep."""
    grids = []
    for machine in machines(documents):
        shapes = [point.shape for _, point in machine.points] or machine.layer_shapes
        for experts in sorted({shape.num_experts for shape in shapes}):
            sizes = [size for size in sorted({machine.world_size, *GRID_WORLD_SIZES} - {1}) if experts % size == 0]
            choices = {shape.top_k for shape in shapes if shape.num_experts == experts} | set(GRID_TOP_K)
            places = [(top_k, size) for top_k in sorted(choices) if top_k <= experts for size in sizes]
            loads = [Workload(world_size=size, top_k=top_k, num_experts=experts) for top_k, size in places]
            if loads:
                cells = [_cell(machine, load) for load in loads]
                grids.append(WinnerGrid(machine=machine, num_experts=experts, cells=cells))
    return grids


def _cell(machine: RatedMachine, load: Workload) -> GridCell:
    """Measured at the largest point with this W, E and K: forward and backward together where that was timed."""
    here = (load.world_size, load.num_experts, load.top_k)
    fitting = [(s, p) for s, p in machine.points if (machine.world_size, p.shape.num_experts, p.shape.top_k) == here]
    sweep, point = max(fitting, key=lambda found: found[1].shape.rank_bytes, default=(None, None))
    return GridCell(
        world_size=load.world_size,
        top_k=load.top_k,
        computed=choose_modes(EPConfig(), load, machine.rates),
        measured=point.fastest(FORWARD_AND_BACKWARD) or point.fastest(FORWARD) if point else [],
        sweep=sweep,
        point=point,
    )
