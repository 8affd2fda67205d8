"""What a call costs the host, in units of one small ``torch`` operation, and what an eager call loses to its host.

Host time is the CPU's clock around the launches of a few calls, which begin on an idle GPU after a barrier: few enough
that no launch waits for the GPU. The unit is ``add_`` of a small tensor, timed in the same process before and after.
Where each rank has a GPU of its own, two more parts: the wall-clock time of eager calls over the GPU time of the same
calls in a CUDA graph, and small calls in graphs. Each result is checked before and after it is timed. A time above its
threshold is recorded as such, and is no error.

python bench/host_time.py --nproc 2 --json host.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from harness.context import (
    ROUNDS_OF_LARGE,
    ROUNDS_OF_SMALL,
    BenchCase,
    BenchContext,
    Method,
    Rounds,
    layer_context,
    other_inputs,
    run_script,
    thresholds_hold,
)
from harness.host_parts import host_parts
from harness.layer import LayerUnderTest, Pass
from harness.results import Threshold, micros, shape_record, time_fields
from harness.steady import freeze_garbage, own_core
from schema import Baseline, Entry, Suite
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import BACKEND_PACKAGES
from sonic_ep.cli import CommandParser, run_command
from sonic_ep.cli.measured import Run, add_output, checked_ranks
from sonic_ep.cli.options import Thiek, add_nproc, add_thiek, parse_count
from sonic_ep.config import AUTO, CombineMode, DispatchMode, EPConfig
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.profiler.agreement import gathered
from sonic_ep.profiler.measuring import Stage
from sonic_ep.profiler.problem import RoutingProblem, Shape
from sonic_ep.profiler.timing import Timing
from sonic_ep.profiler.verification import assert_bitwise
from sonic_ep.testing.layer_problem import LayerProblem
from sonic_ep.testing.oracle import Outcome

DISPATCH, ROWS, COMBINE, ROUND_TRIP = "dispatch", "ids to rows", "combine", "ids to combined rows"
UNIT = "add_ of a small tensor"
GRAPH_OF_SAME = "the same in a CUDA graph"

# Of each rank: the layer whose host time is measured; on the CPU; and the calls whose GPU time counts.
LAYER = Thiek(tokens=128, hidden=1024, intermediate=256, num_experts=32, top_k=8)
SMOKE = Thiek(tokens=8, hidden=32, intermediate=16, num_experts=8, top_k=2)
LARGE = Shape(tokens=4096, hidden=7168, num_experts=256, top_k=8)
SMALL = Shape(tokens=128, hidden=4096, num_experts=32, top_k=8)

# Thresholds: host time in units, wall-clock time over that of the graph, microseconds of small calls in graphs.
MOST_UNITS: Mapping[str, float] = {ROWS: 14, COMBINE: 6, Pass.INFERENCE.value: 35, Pass.STEP.value: 90}
MOST_OVER_GRAPH: Mapping[str, float] = {ROWS: 1.6, COMBINE: 1.3}
MOST_MICROS: Mapping[str, float] = {DISPATCH: 24, ROWS: 40, COMBINE: 26, ROUND_TRIP: 60}

CALLS_OF_UNIT, CALLS_OF_WALL = 50, 20
NOT_MEASURED = "wall and graphs were not measured: ranks have no GPU of their own"


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    text = "Host time of calls in units of a small operation, and eager calls over CUDA graphs: checked, then timed."
    found = CommandParser(prog="host_time.py", description=text)
    add_nproc(found)
    add_thiek(found, before="of the layer whose host time is measured: ")
    found.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="of sonic_ep")
    found.add_argument("--rounds", type=parse_count, default=None, metavar="N", help="rounds that are timed")
    add_output(found)
    found.set_defaults(command=run, check=lambda options: shape_of(options.thiek, checked_ranks(options)))
    return found


def shape_of(asked: Thiek | None, world_size: int) -> Shape:
    """T of a rank, H, I, E, K. Raises ``ValueError`` for what the ranks cannot divide."""
    if asked is None:
        one_rank = LAYER if torch.cuda.is_available() else SMOKE
        asked = replace(one_rank, tokens=one_rank.tokens * world_size)
    return Shape(**asdict(asked.of_rank(world_size)))


def run(options: argparse.Namespace) -> int:
    """Collective: check, time, tell, write after each part."""

    def documents(run: Run) -> Iterator[Suite]:
        place = run.place
        steady = own_core(place.rank, place.world_size)
        with torch.no_grad(), steady, freeze_garbage(), layer_context(run, options.commit) as found:
            context, own_gpus = in_words(found)
            host = HostClock.of(context, own_gpus, options.rounds)
            shape = shape_of(options.thiek, context.group.world_size)
            for most in (shape.tokens, None):
                used = measure_host(host, shape, run.backend, most)
                yield context.results.suite
            if used != "reference":
                measure_parts(host, shape)
                yield context.results.suite
            if own_gpus:
                measure_wall(host, LARGE, run.backend)
                yield context.results.suite
                measure_small(context, SMALL, run.backend)
                yield context.results.suite
            for line in context.results.table():
                run.say(line)

    return run_script(options, "bench/host_time.py", documents)


def in_words(context: BenchContext) -> tuple[BenchContext, bool]:
    """With a note on cores, and on what cannot be measured; and whether each rank has a GPU of its own."""
    own_gpus, machine = context.on_gpu, context.results.environment
    own_gpus = own_gpus and context.group.world_size <= torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    note = [machine.note, f"cores of a rank: {cores}", None if own_gpus else NOT_MEASURED]
    machine = msgspec.structs.replace(machine, note="; ".join(filter(None, note)))
    results, held = replace(context.results, environment=machine), thresholds_hold(context.device, machine.world_size)
    return replace(context, results=results, held=context.on_gpu and held), own_gpus


@dataclass(frozen=True, kw_only=True, eq=False)
class HostClock:
    """Times calls by the CPU's clock. calls: in a round, so few that their launches fit into the GPU's queue."""

    context: BenchContext
    calls: int
    rounds: Rounds

    @staticmethod
    def of(context: BenchContext, own_gpus: bool, rounds: int | None = None) -> HostClock:
        """Fewer calls where ranks share a GPU and a barrier takes a slice of time; one on the CPU."""
        calls, default = (8 if own_gpus else 3, Rounds(rounds=21, warmup=3))
        if not context.on_gpu:
            calls, default = 1, Rounds(rounds=1, warmup=0)
        return HostClock(context=context, calls=calls, rounds=replace(default, rounds=rounds or default.rounds))

    @cached_property
    def stage(self) -> Stage:
        """Checks what is timed here."""
        return Stage(timer=self.context.timer)

    def begin(self) -> None:
        """Collective: the GPU is idle, and all ranks are here."""
        self.finish()
        if self.context.group.world_size > 1:
            dist.barrier(self.context.group.process_group)
        # NCCL's barrier is a kernel.
        self.finish()

    def finish(self) -> None:
        """Until the GPU is idle."""
        if self.context.on_gpu:
            torch.cuda.synchronize(self.context.device)

    def seconds(self, call: Callable[[], object], calls: int) -> list[float]:
        """Collective: of one of ``calls`` calls on this rank's host, in each round."""
        return self._timed(call, calls, lambda: None)

    def wall(self, call: Callable[[], object], calls: int) -> Timing:
        """Collective: of one of ``calls`` calls until all are done, of the slowest rank in each round."""
        of_ranks = gathered(self.context.group, self._timed(call, calls, self.finish))
        return Timing(rounds=tuple(map(max, zip(*of_ranks, strict=True))))

    def units(self, call: Callable[[], object]) -> tuple[Timing, float]:
        """Collective: host time of a call, and the unit in seconds, both of the rank that takes most units."""
        unit = torch.zeros(64, device=self.context.device)
        add = partial(unit.add_, 1)
        before = self.seconds(add, CALLS_OF_UNIT)
        found = self.seconds(call, self.calls)
        after = self.seconds(add, CALLS_OF_UNIT)
        mine = (found, (median(before) + median(after)) / 2)
        slowest, seconds = max(gathered(self.context.group, mine), key=lambda of_rank: median(of_rank[0]) / of_rank[1])
        return Timing(rounds=tuple(slowest)), seconds

    def _timed(self, call: Callable[[], object], calls: int, end: Callable[[], None]) -> list[float]:
        for _ in range(self.rounds.warmup):
            call()
        found = []
        for _ in range(self.rounds.rounds):
            self.begin()
            start = perf_counter()
            for _ in range(calls):
                call()
            end()
            found.append((perf_counter() - start) / calls)
        self.finish()
        return found


def measure_host(host: HostClock, shape: Shape, backend: str, max_tokens: int | None) -> str:
    """Collective: record host times over ``max_tokens_per_rank=max_tokens``. Raises ``WrongResultError``.

    Returns the backend's name.
    """
    context, config = host.context, config_of(shape, host.context.group.world_size)
    problem = LayerProblem(shape=shape, group=context.group, device=context.device)
    layer = LayerUnderTest.of(context, problem, backend, config)
    routing = RoutingProblem(shape=shape, group=context.group, device=context.device)
    with open_ep(context, backend, config, max_tokens) as ep:
        parts = calls_of_parts(routing, ep)
        for case in (parts[ROWS], parts[COMBINE], *(layer_case(layer, ep, which) for which in Pass)):
            host.stage.prove(case)
            timing, unit = host.units(case.run)
            host.stage.prove(case)
            name = f"{case.name}, max_tokens_per_rank={'T' if max_tokens else None}"
            most = MOST_UNITS.get(case.name) if context.on_gpu else None
            context.results.entries.append(compared(name, shape, "host", timing, (UNIT, unit), most))
        return ep.backend


def measure_parts(host: HostClock, shape: Shape) -> None:
    """Collective: record host times of what a layer's calls are made of. They have no result to check."""
    for name, call in host_parts(shape, host.context.device).items():
        timing, unit = host.units(call)
        host.context.results.entries.append(compared(name, shape, "host", timing, (UNIT, unit)))


def measure_wall(host: HostClock, shape: Shape, backend: str) -> None:
    """Collective: record eager calls until all are done, and the same in CUDA graphs. Raises ``WrongResultError``."""
    context, config = host.context, config_of(shape, host.context.group.world_size)
    routing = RoutingProblem(shape=shape, group=context.group, device=context.device)
    with open_ep(context, backend, config, shape.tokens) as ep:
        parts = calls_of_parts(routing, ep)
        for case in (parts[ROWS], parts[COMBINE]):
            host.stage.prove(case)
            timing = host.wall(case.run, CALLS_OF_WALL)
            host.stage.prove(case)
            found = context.alternate([case], Method.GRAPH, ROUNDS_OF_LARGE)[case.name]
            graph = context.record(found).timing.median
            most = MOST_OVER_GRAPH[case.name] if context.held else None
            context.results.entries.append(compared(case.name, shape, "wall", timing, (GRAPH_OF_SAME, graph), most))
            context.free_cached_memory()


def measure_small(context: BenchContext, shape: Shape, backend: str) -> None:
    """Collective: record small calls, each in a CUDA graph. Raises ``WrongResultError``."""
    config = config_of(shape, context.group.world_size)
    routing = RoutingProblem(shape=shape, group=context.group, device=context.device)
    with open_ep(context, backend, config, shape.tokens) as ep:
        parts = calls_of_parts(routing, ep)
        limits = {
            name: Threshold(text=f"at most {most:g} us", seconds=most * 1e-6) for name, most in MOST_MICROS.items()
        }
        cases = [replace(parts[name], threshold=limit) for name, limit in limits.items()]
        for found in context.alternate(cases, Method.GRAPH, ROUNDS_OF_SMALL).values():
            context.record(found)


def config_of(shape: Shape, world_size: int) -> EPConfig:
    """The modes that "auto" takes, by name."""
    load = Workload(world_size=world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    modes = choose_modes(EPConfig(), load)
    return EPConfig(modes.dispatch, modes.combine)


def open_ep(context: BenchContext, backend: str, config: EPConfig, max_tokens: int | None) -> ExpertParallel:
    """Collective."""
    return ExpertParallel(context.group.process_group, backend, config, max_tokens_per_rank=max_tokens)


def compared(
    name: str, shape: Shape, how: str, timing: Timing, other: tuple[str, float], most: float | None = None
) -> Entry:
    """An entry over ``other``, words and seconds; most: the threshold as a multiple of it, or None."""
    text, seconds = other
    baseline = Baseline(what=text, measured_us=micros(seconds), ratio=round(timing.median / seconds, 4))
    limit: dict[str, Any] = {}
    if most is not None:
        met = timing.median <= most * seconds
        limit = {"threshold": f"at most {most:g} times {text}", "threshold_us": micros(most * seconds), "met": met}
    return Entry(name=name, how=how, shape=shape_record(shape), baselines=(baseline,), **limit, **time_fields(timing))


def calls_of_parts(problem: RoutingProblem, ep: ExpertParallel) -> dict[str, BenchCase]:
    """Collective. Plan, dispatch and combine of the problem without gradients, by name."""
    ids_TK, num_experts, x_TH, scores_TK = (
        problem.topk_idx_TK,
        problem.shape.num_experts,
        problem.x_TH,
        problem.scores_TK,
    )
    plan, rows_RH, mode = ep.plan(ids_TK, num_experts), problem.rows_RH, CombineMode(ep.config.combine)
    expected_RH = problem.received[DispatchMode.ALL_TO_ALL]

    def rows() -> Tensor:
        return ep.dispatch(x_TH, ep.plan(ids_TK, num_experts))

    def round_trip() -> Tensor:
        made = ep.plan(ids_TK, num_experts)
        return ep.combine(ep.dispatch(x_TH, made), scores_TK, made)

    def check_rows(got: Tensor) -> None:
        # Behind the valid rows there may be room for more.
        assert_bitwise(got[: len(expected_RH)], expected_RH, "rows")

    def check_sums(expected: Tensor) -> Callable[[Tensor], None]:
        return partial(assert_bitwise, expected=expected, name="sums")

    def case(name: str, call: Callable[[], Tensor], check: Callable[[Tensor], None]) -> BenchCase:
        return BenchCase(name=name, shape=problem.shape, run=call, check=check, other_inputs=problem.changed)

    cases = (
        case(DISPATCH, partial(ep.dispatch, x_TH, plan), check_rows),
        case(ROWS, rows, check_rows),
        case(COMBINE, partial(ep.combine, rows_RH, scores_TK, plan), check_sums(problem.sums[mode, True])),
        case(ROUND_TRIP, round_trip, check_sums(problem.round_trips[mode])),
    )
    return {case.name: case for case in cases}


def layer_case(layer: LayerUnderTest, ep: ExpertParallel, which: Pass) -> BenchCase:
    """Collective. A pass of ``ep.moe`` as a caller runs it, checked for the bits of the layer's answer."""
    call, answer, leaves = layer.problem.call, layer.answer, layer.problem.call.leaves
    x, router_w, w1, w2 = (leaves[name] for name in ("x", "router_w", "w1", "w2"))

    def forward(*, training: bool) -> Outcome:
        with torch.set_grad_enabled(training):
            return {"y": ep.moe(x, router_w, w1, w2, call.top_k).y}

    def step() -> dict[str, Tensor | None]:
        with torch.enable_grad():
            y = ep.moe(x, router_w, w1, w2, call.top_k).y
            y.backward(call.dy)
        found = {"y": y, "dx": x.grad, "drouter_w": router_w.grad, "dw1": w1.grad, "dw2": w2.grad}
        x.grad = router_w.grad = w1.grad = w2.grad = None
        return found

    def check(got: Outcome) -> None:
        for name, tensor in got.items():
            assert_bitwise(tensor, answer.outcome[name], name)

    run = step if which is Pass.STEP else partial(forward, training=which is Pass.TRAINING)
    changed = partial(other_inputs, *leaves.values(), call.dy)
    return BenchCase(name=which.value, shape=layer.shape, run=run, check=check, other_inputs=changed)


if __name__ == "__main__":
    sys.exit(run_command(parser(), sys.argv[1:], [__file__]))
