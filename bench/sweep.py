"""A sweep: at each point of a grid the profile, and the layer end to end with each pair of modes, in turn.

It holds the profiler's pick, and what ``sonic_ep.cost`` predicts, against the pair that turns out to be the fastest.

python bench/sweep.py --nproc 2 --json sweep.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from harness.context import BenchContext, Method, layer_context, run_script
from harness.end_to_end import Setup, rounds_of
from harness.layer import LayerUnderTest, Pass
from harness.results import shape_record, time_fields
from schema import PairTimes, Point, Profile, Sweep

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import BACKEND_PACKAGES
from sonic_ep.cli import CommandParser, run_command
from sonic_ep.cli.measured import Run, add_output, checked_ranks
from sonic_ep.cli.options import DTYPES, add_nproc, parse_count
from sonic_ep.config import AUTO, CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.profiler import ProfileReport
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.routings import ROUTINGS, RoutingName
from sonic_ep.testing.layer_problem import LayerOptions

PASSES = (Pass.TRAINING, Pass.STEP)
# Slots of a rank, T*K, up to which a layer is small.
MOST_SLOTS_OF_GRAPHS = 2**14
PAIRS = tuple(ModePair(dispatch=dispatch, combine=combine) for dispatch in DispatchMode for combine in CombineMode)


def parse_point(text: str) -> tuple[int, int, RoutingName]:
    """T of each rank, K, and where tokens go."""
    parts = text.split(",")
    if len(parts) != 3 or parts[2] not in ROUTINGS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected T,K,{'|'.join(ROUTINGS)}")
    return parse_count(parts[0]), parse_count(parts[1]), cast(RoutingName, parts[2])


def parse_hie(text: str) -> tuple[int, int, int]:
    """H,I,E."""
    parts = [parse_count(part) for part in text.split(",")]
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"got {len(parts)} numbers in {text!r}, expected three: H,I,E")
    return parts[0], parts[1], parts[2]


# Over T, over K, over routings.
POINTS_ON_GPUS = (
    *(f"{tokens},8,uniform" for tokens in (64, 256, 1024, 4096, 16384, 65536)),
    *(f"{tokens},{top_k},uniform" for tokens in (1024, 16384) for top_k in (1, 2, 4)),
    *(f"{tokens},8,skewed" for tokens in (1024, 16384)),
    "4096,8,one_rank",
)
POINTS_ON_CPU = ("8,2,uniform", "8,1,uniform", "8,2,skewed", "8,2,one_rank")
HIE_ON_GPUS, HIE_ON_CPU = (4096, 1536, 64), (32, 16, 8)


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    text = "Profile and layer with every pair of modes, over sizes and routings."
    found = CommandParser(prog="sweep.py", description=text)
    add_nproc(found)
    text = "tokens of each rank, top-k, routing; may be repeated (default: a grid)"
    found.add_argument("--point", action="append", type=parse_point, metavar="T,K,ROUTING", help=text)
    found.add_argument("--hie", type=parse_hie, metavar="H,I,E", help="hidden, intermediate, experts")
    found.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of tokens and weights")
    found.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="which one is run")
    add_output(found)
    found.set_defaults(command=run, check=lambda options: setups_of(options, checked_ranks(options), options.backend))
    return found


def run(options: argparse.Namespace) -> int:
    """Collective: sweep, tell, and write after every point."""

    def documents(run: Run) -> Iterator[Sweep]:
        setups = setups_of(options, run.place.world_size, run.backend)
        with layer_context(run, options.commit) as context:
            yield from run_sweep(setups, context, run.say)

    return run_script(options, "bench/sweep.py", documents)


def setups_of(options: argparse.Namespace, world_size: int, backend: str) -> list[Setup]:
    """One for each point. Raises ``ValueError`` for a point that the ranks cannot run."""
    on_gpu = torch.cuda.is_available()
    hidden, intermediate, experts = options.hie or (HIE_ON_GPUS if on_gpu else HIE_ON_CPU)
    if experts % world_size:
        raise ValueError(f"--hie: got E={experts}, expected a multiple of the {world_size} ranks")
    points = options.point or [parse_point(text) for text in (POINTS_ON_GPUS if on_gpu else POINTS_ON_CPU)]
    for _, top_k, routing in points:
        held = experts // world_size if routing == "one_rank" else experts
        if top_k > held:
            raise ValueError(f"--point: got K={top_k}, expected at most {held} for {routing}")
    sizes = {"hidden": hidden, "intermediate": intermediate, "num_experts": experts}
    shapes = [Shape(tokens=tokens, top_k=top_k, dtype=DTYPES[options.dtype], **sizes) for tokens, top_k, _ in points]
    given: dict[str, Any] = {"world_size": world_size, "backend": backend, "config": EPConfig()}
    return [
        Setup(shape=shape, options=LayerOptions(routing=routing), **given)
        for shape, (_, _, routing) in zip(shapes, points, strict=True)
    ]


def run_sweep(setups: Sequence[Setup], context: BenchContext, say: Callable[[str], None]) -> Iterator[Sweep]:
    """Collective: what was found after each of ``setups``, all before it included. Raises ``WrongResultError``."""
    points: list[Point] = []
    for setup in setups:
        points.append(run_point(setup, context))
        say(point_line(points[-1]))
        yield context.results.document(Sweep, points=tuple(points))


def run_point(setup: Setup, context: BenchContext) -> Point:
    """Collective: the profile, and every pair end to end, each found right before."""
    first, predicted = setup.layer(context), setup.predicted()
    # Sums are rounded in one of two ways, so there are two answers: reduce_scatter and rank_dedup give the same bits.
    by_slots, by_ranks = (
        replace(first, config=replace(first.config, combine=combine))
        for combine in (CombineMode.ALL_TO_ALL, CombineMode.RANK_DEDUP)
    )
    layers = {mode: by_slots if mode is CombineMode.ALL_TO_ALL else by_ranks for mode in CombineMode}
    profile = setup.profiled(layers[predicted.combine])
    with ExitStack() as opened:
        over = [opened.enter_context(layers[pair.combine].over(setup.with_modes(pair))) for pair in PAIRS]
        times = [found for which in PASSES for found in pairs_in_turn(layers, over, which)]
    context.free_cached_memory()
    return point_of(setup, profile, times, predicted)


def pairs_in_turn(
    layers: Mapping[CombineMode, LayerUnderTest], over: Sequence[ExpertParallel], which: Pass
) -> list[PairTimes]:
    """Collective: all nine pairs, round by round. Raises ``WrongResultError`` on every rank if one is wrong on any."""
    context, shape = layers[CombineMode.ALL_TO_ALL].context, layers[CombineMode.ALL_TO_ALL].shape
    names = [f"{pair.dispatch.value}, {pair.combine.value}" for pair in PAIRS]
    cases = [layers[pair.combine].case(name, ep, which) for pair, name, ep in zip(PAIRS, names, over, strict=True)]
    method = method_of(context, over[0].backend, shape)
    found = context.alternate(cases, method, rounds_of(context))
    times = [time_fields(context.record(found[name]).timing) for name in names]
    return [
        PairTimes(**vars(pair), pass_name=which.value, how=method.value, **taken)
        for pair, taken in zip(PAIRS, times, strict=True)
    ]


def method_of(context: BenchContext, backend: str, shape: Shape) -> Method:
    """As a graph where the host would take longer to launch a layer than the GPU to run it, else behind queued work."""
    small = shape.tokens * shape.top_k <= MOST_SLOTS_OF_GRAPHS
    return Method.GRAPH if context.on_gpu and backend == "fast" and small else context.behind_work


def point_of(setup: Setup, profile: ProfileReport, times: Sequence[PairTimes], predicted: ModePair) -> Point:
    """The record of one point. predicted: the pair that ``sonic_ep.cost`` takes without a profile."""
    return Point(
        shape=shape_record(setup.shape),
        routing=setup.options.routing,
        profile=Profile.of(profile),
        pairs=tuple(times),
        picked=profile.picked,
        predicted=predicted,
        over_best=over_best(times, profile.picked),
        predicted_over_best=over_best(times, predicted),
    )


def over_best(times: Sequence[PairTimes], pair: ModePair) -> dict[str, float | None]:
    """By pass, how many times the best pair's time ``pair`` takes."""
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(each.pass_name for each in times):
        medians = {each.pair: each.median_us for each in times if each.pass_name == name}
        found[name] = round(medians[pair] / min(medians.values()), 4)
    return found


def point_line(point: Point) -> str:
    """The point as a line of text."""
    shape, best = point.shape, point.fastest(point.pairs[-1].pass_name)[0]
    words = [f"T={shape.tokens:<6} K={shape.top_k:<2} {point.routing:<8}"]
    picks = ("picked", point.picked, point.over_best), ("predicted", point.predicted, point.predicted_over_best)
    for name, pair, over in picks:
        ratios = "/".join(f"{ratio:.3f}" for ratio in over.values())
        words.append(f"{name} {pair.dispatch.value}+{pair.combine.value}: {ratios} of the best")
    words.append(f"best {best.dispatch.value}+{best.combine.value} {best.median_us / 1e3:.3f} ms")
    return "; ".join(words)


if __name__ == "__main__":
    sys.exit(run_command(parser(), sys.argv[1:], [__file__]))
