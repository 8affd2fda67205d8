"""A sweep: at each point of a grid the profile, and the layer end to end with each pair of modes, in turn.

It holds the profiler's pick, and what ``sonic_ep.cost`` predicts, against the pair that turns out to be the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.arena import Arena, How
from sonic_ep.benchmark.end_to_end import Pace, modes_of, profiled, with_modes
from sonic_ep.benchmark.layer import LayerUnderTest, Pass
from sonic_ep.benchmark.layer_problem import LayerProblem
from sonic_ep.benchmark.oracle import Oracle
from sonic_ep.benchmark.results import shape_as_json
from sonic_ep.benchmark.setup import Setup
from sonic_ep.benchmark.workload import Shape
from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.profiler import ProfileReport
from sonic_ep.testing.timing import Timing

Say = Callable[[str], None]

PASSES = (Pass.TRAINING, Pass.STEP)
# Slots of a rank, T*K, up to which a layer is small.
MOST_SLOTS_OF_GRAPHS = 2**14
PAIRS = tuple(ModePair(dispatch=dispatch, combine=combine) for dispatch in DispatchMode for combine in CombineMode)


@dataclass(frozen=True, kw_only=True)
class PairTime:
    """The layer end to end with one pair of modes, launched like ``how``."""

    pair: ModePair
    which: Pass
    how: How
    timing: Timing

    def as_json(self) -> dict[str, Any]:
        """Times in microseconds."""
        launched = {"pass": self.which.value, "how": self.how.value}
        return {**pair_as_json(self.pair), **launched, **self.timing.as_json()}


@dataclass(frozen=True, kw_only=True)
class PointReport:
    """What was found at one point. predicted: the pair that ``sonic_ep.cost`` takes without a profile."""

    setup: Setup
    profile: ProfileReport
    times: tuple[PairTime, ...]
    predicted: ModePair

    @property
    def picked(self) -> ModePair:
        """The profiler's pair."""
        return modes_of(self.profile.config)

    def best(self, which: Pass) -> PairTime:
        """The pair that was the fastest end to end."""
        return min(self._of(which), key=lambda found: found.timing.median)

    def over_best(self, pair: ModePair) -> dict[str, float]:
        """By pass, how many times the best pair's time ``pair`` takes."""
        passes = dict.fromkeys(found.which for found in self.times)
        return {which.value: self._median(pair, which) / self.best(which).timing.median for which in passes}

    def as_json(self) -> dict[str, Any]:
        """One of the points of a document of kind "sweep"."""
        return {
            "shape": shape_as_json(self.setup.shape),
            "routing": self.setup.options.routing.value,
            "profile": self.profile.as_part(),
            "pairs": [found.as_json() for found in self.times],
            "picked": pair_as_json(self.picked),
            "predicted": pair_as_json(self.predicted),
            "over_best": _rounded(self.over_best(self.picked)),
            "predicted_over_best": _rounded(self.over_best(self.predicted)),
        }

    def line(self) -> str:
        """For people."""
        shape = self.setup.shape
        words = [f"T={shape.tokens:<6} K={shape.top_k:<2} {self.setup.options.routing.value:<8}"]
        for name, pair in (("picked", self.picked), ("predicted", self.predicted)):
            ratios = "/".join(f"{ratio:.3f}" for ratio in self.over_best(pair).values())
            words.append(f"{name} {pair.dispatch.value}+{pair.combine.value}: {ratios} of the best")
        best = self.best(self.times[-1].which)
        words.append(f"best {best.pair.dispatch.value}+{best.pair.combine.value} {best.timing.median * 1e3:.3f} ms")
        return "; ".join(words)

    def _of(self, which: Pass) -> list[PairTime]:
        return [found for found in self.times if found.which is which]

    def _median(self, pair: ModePair, which: Pass) -> float:
        (found,) = (found for found in self._of(which) if found.pair == pair)
        return found.timing.median


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """All points, and where they were measured."""

    arena: Arena
    points: tuple[PointReport, ...]

    def as_json(self) -> dict[str, Any]:
        """The document of kind "sweep"."""
        results = self.arena.results
        return {
            "kind": "sweep",
            "environment": results.environment,
            "rates_gb_per_s": results.rates_as_json(),
            "points": [point.as_json() for point in self.points],
        }


def run_sweep(setups: Sequence[Setup], arena: Arena, say: Say) -> Iterator[SweepReport]:
    """Collective: what was found after each of ``setups``, all before it included. Raises ``WrongError``."""
    points: list[PointReport] = []
    for setup in setups:
        points.append(run_point(setup, arena))
        say(points[-1].line())
        yield SweepReport(arena=arena, points=tuple(points))


def run_point(setup: Setup, arena: Arena) -> PointReport:
    """Collective: the profile, and every pair end to end, each found right before."""
    problem = LayerProblem(shape=setup.shape, group=arena.group, device=arena.device, options=setup.options)
    shape, oracle = setup.shape, Oracle(problem=problem)
    load = Workload(world_size=arena.group.world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    predicted = choose_modes(EPConfig(), load)
    # Sums are rounded in one of two ways, so there are two answers.
    layers = layers_by_combine(setup, arena, oracle, predicted)
    profile = profiled(layers[predicted.combine], setup)
    with ExitStack() as stack:
        opened = [stack.enter_context(layer_of_pair(layers, pair)) for pair in PAIRS]
        times = [found for which in PASSES for found in pairs_in_turn(layers, opened, which)]
    arena.give_back_memory()
    return PointReport(setup=setup, profile=profile, times=tuple(times), predicted=predicted)


def layers_by_combine(
    setup: Setup, arena: Arena, oracle: Oracle, modes: ModePair
) -> Mapping[CombineMode, LayerUnderTest]:
    """The layer whose answer counts for each combine mode: the partial sums of two of them are the same bits."""

    def layer(combine: CombineMode) -> LayerUnderTest:
        config = with_modes(setup.config, replace(modes, combine=combine))
        return LayerUnderTest(arena=arena, oracle=oracle, backend=setup.backend, config=config)

    by_slots, by_ranks = layer(CombineMode.ALL_TO_ALL), layer(CombineMode.RANK_DEDUP)
    return {
        CombineMode.ALL_TO_ALL: by_slots,
        CombineMode.REDUCE_SCATTER: by_ranks,
        CombineMode.RANK_DEDUP: by_ranks,
    }


def layer_of_pair(layers: Mapping[CombineMode, LayerUnderTest], pair: ModePair) -> ExpertParallel:
    """The layer with these modes."""
    layer = layers[pair.combine]
    return layer.over(with_modes(layer.config, pair))


def pairs_in_turn(
    layers: Mapping[CombineMode, LayerUnderTest], opened: Sequence[ExpertParallel], which: Pass
) -> list[PairTime]:
    """Collective: all nine pairs, round by round. Raises ``WrongError`` on every rank if one is wrong on any."""
    arena, shape = layers[CombineMode.ALL_TO_ALL].arena, layers[CombineMode.ALL_TO_ALL].problem.shape
    works = [
        layers[pair.combine].work(f"{pair.dispatch.value}, {pair.combine.value}", ep, which)
        for pair, ep in zip(PAIRS, opened, strict=True)
    ]
    how = how_of(arena, opened[0].backend, shape)
    found = arena.alternate(works, how, Pace.of(arena).usual)
    return [
        PairTime(pair=pair, which=which, how=how, timing=arena.record(found[work.name]).timing)
        for pair, work in zip(PAIRS, works, strict=True)
    ]


def how_of(arena: Arena, backend: str, shape: Shape) -> How:
    """As a graph where the host would take longer to launch a layer than the GPU to run it, else behind queued work."""
    small = shape.tokens * shape.top_k <= MOST_SLOTS_OF_GRAPHS
    return How.GRAPH if arena.on_gpu and backend == "fast" and small else arena.behind_work


def pair_as_json(pair: ModePair) -> dict[str, str]:
    """By name."""
    return {"dispatch": pair.dispatch.value, "combine": pair.combine.value}


def _rounded(ratios: Mapping[str, float]) -> dict[str, float]:
    return {name: round(ratio, 4) for name, ratio in ratios.items()}
