"""One step of the layer, kernel by kernel, and the layer over its GEMMs, both in CUDA graphs. On one GPU.

Each kernel is listed with its median time in eager steps and, where the bytes that it has to move are known, its rate
beside that of a large copy. Bytes are counted once: each operand read, each result written. GEMMs are PyTorch's grouped
products at the layer's own rows, whichever products the layer uses. The answer is checked before anything is timed.

python bench/timeline.py --json timeline.json
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from harness.context import BenchContext, Comparison, Finding, Method, Rounds, layer_context, run_script
from harness.layer import LayerUnderTest, Pass
from harness.results import micros, shape_record, time_fields
from schema import GIGA, Entry, Suite
from torch.profiler import ProfilerActivity, profile

from sonic_ep.api import ExpertParallel
from sonic_ep.cli import CommandParser, run_command
from sonic_ep.cli.measured import Run, add_output, checked_ranks
from sonic_ep.cli.options import parse_count
from sonic_ep.config import AUTO, EPConfig
from sonic_ep.profiler.agreement import WrongResultError
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.timing import Timing
from sonic_ep.testing.layer_problem import LayerProblem

# By the name of the model whose sizes they are; "large" is the shape that the project began with.
SHAPES: Mapping[str, Shape] = {
    "qwen3-30b": Shape(tokens=8192, hidden=2048, intermediate=768, num_experts=128, top_k=8),
    "olmoe": Shape(tokens=8192, hidden=2048, intermediate=1024, num_experts=64, top_k=8),
    "gpt-oss-20b": Shape(tokens=8192, hidden=2880, intermediate=2880, num_experts=32, top_k=4),
    "qwen3-235b": Shape(tokens=8192, hidden=4096, intermediate=1536, num_experts=128, top_k=8),
    "large": Shape(tokens=16384, hidden=4096, intermediate=1536, num_experts=128, top_k=8),
}
ROUNDS = Rounds(rounds=12, warmup=2)
STEPS = 6
CONFIG = EPConfig(dispatch="all_to_all", combine="rank_dedup")
PRODUCTS, LAYER = "{}: grouped products alone, {}", "{}: layer, {}"
# Grouped products, ours and PyTorch's, by the beginnings of their names, or what is in them.
GROUPED = re.compile(r"(hopper_)?(rows|weights)_kernel|.*cutlass.*device_kernel")
NEEDS_ONE_GPU = "bench/timeline.py: got {}, expected one rank on a GPU: a kernel must wait for no other rank"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers, not bytes, of a step's tensors on one rank; e = E experts."""

    shape: Shape

    @property
    def tokens(self) -> int:
        """Of x, (T, H)."""
        return self.shape.tokens * self.shape.hidden

    @property
    def rows(self) -> int:
        """Of the rows of all slots, (R, H)."""
        return self.shape.top_k * self.tokens

    @property
    def activated(self) -> int:
        """Of an activation, (R, I). The pre-activation has twice as many."""
        return self.shape.tokens * self.shape.top_k * self.shape.expert_width

    @property
    def weights(self) -> int:
        """Of w2, (e, H, I). w1 has twice as many."""
        return self.shape.num_experts * self.shape.hidden * self.shape.expert_width

    def products(self) -> list[tuple[str, int]]:
        """The six grouped products of a step, in order: what each computes, and the numbers that it moves."""
        wide = 2 * self.activated
        return [
            ("h", self.rows + 2 * self.weights + wide),
            ("y", self.activated + self.weights + self.rows),
            ("dA", self.rows + self.weights + self.activated),
            ("dw2", self.rows + self.activated + self.weights),
            ("dx of rows", wide + 2 * self.weights + self.rows),
            ("dw1", wide + self.rows + 2 * self.weights),
        ]

    def passes(self) -> dict[str, int]:
        """The numbers that each pass over rows moves, by its kernel."""
        return {
            "pull_to_rows_kernel": self.tokens + self.rows,
            "activate_kernel": 3 * self.activated,
            "exchange_partial_sums_kernel": self.rows + self.tokens,
            "activate_backward_kernel": 6 * self.activated,
        }


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """One kernel of a step. nbytes: that it has to move; None where that is not known."""

    name: str
    timing: Timing
    nbytes: int | None

    def entry(self, number: int, which: str, shape: Shape, memory_rate: float) -> Entry:
        """For a suite, with the time that its bytes take at ``memory_rate`` bytes/s."""
        found: dict[str, float | str] = {}
        if self.nbytes is not None:
            found = {"memory_bytes": self.nbytes, "gb_per_s": round(self.nbytes / self.timing.median / GIGA, 2)}
            found |= {"floor_us": micros(self.nbytes / memory_rate), "floor_by": "memory"}
        name = f"{which}: kernel {number:02}, {self.name}"
        given = {**found, **time_fields(self.timing)}
        return Entry(name=name, how=Method.EAGER.value, shape=shape_record(shape), **given)


def timeline(names: Sequence[str], steps: Sequence[Sequence[float]], shape: Shape) -> list[KernelTime]:
    """The kernels of a step in order. names: of one step; steps: seconds of each kernel in each step."""
    counts, itemsize = Counts(shape=shape), shape.dtype.itemsize
    products, passes, found = iter(counts.products()), counts.passes(), []
    for name, *seconds in zip(names, *steps, strict=True):
        numbers, text = passes.get(name), name
        if GROUPED.match(name):
            what, numbers = next(products)
            text = f"grouped product {what}"
        nbytes = None if numbers is None else numbers * itemsize
        found.append(KernelTime(name=text[:80], timing=Timing(rounds=tuple(seconds)), nbytes=nbytes))
    return found


def kernels_of(step: Callable[[], object], steps: int) -> tuple[list[str], list[list[float]]]:
    """Names of the kernels of a step, and the seconds of each in each of ``steps`` steps."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() or () if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    each, rest = divmod(len(events), steps)
    if rest:
        raise RuntimeError(f"got {len(events)} kernels in {steps} steps: they are not alike, so have no order")
    seconds = [[event.device_time * 1e-6 for event in events[at * each : (at + 1) * each]] for at in range(steps)]
    return [event.name for event in events[:each]], seconds


def measure(context: BenchContext, which: str, shape: Shape) -> None:
    """Record the layer and its grouped products in graphs, in turn; then its kernels."""
    problem = LayerProblem(shape=shape, group=context.group, device=context.device)
    layer = LayerUnderTest.of(context, problem, "fast", CONFIG)
    with layer.over() as ep:
        for found in in_graphs(context, which, layer, ep):
            context.record(found)
        context.free_cached_memory()
        names, steps = kernels_of(lambda: Pass.STEP.run(problem.call, ep), STEPS)
    assert context.results.memory_rate is not None
    for number, kernel in enumerate(timeline(names, steps, shape)):
        context.results.entries.append(kernel.entry(number, which, shape, context.results.memory_rate))


def in_graphs(
    context: BenchContext, which: str, layer: LayerUnderTest, ep: ExpertParallel
) -> Sequence[Finding | WrongResultError]:
    """Both passes of the layer, each behind the products of that pass."""
    products, cases = layer.products(), []
    for pass_of in (Pass.INFERENCE, Pass.STEP):
        name = PRODUCTS.format(which, pass_of.value)
        cases.append(layer.products_alone(name, pass_of, products))
        over = Comparison(name=name, text="grouped products")
        cases.append(layer.case(LAYER.format(which, pass_of.value), ep, pass_of, (over,)))
    return list(context.alternate(cases, Method.GRAPH, ROUNDS).values())


def run(options: argparse.Namespace) -> int:
    """Check, time, tell; write after each shape."""

    def documents(run: Run) -> Iterator[Suite]:
        with layer_context(run, options.commit) as context:
            for which in options.shape or SHAPES:
                shape = SHAPES[which]
                tokens = min(shape.tokens, options.most_tokens or shape.tokens)
                measure(context, which, replace(shape, tokens=tokens))
                yield context.results.suite
            for line in context.results.table():
                run.say(line)

    return run_script(options, "bench/timeline.py", documents)


def check(options: argparse.Namespace) -> None:
    """Raise ``ValueError`` where kernels would wait for other ranks, or there is no GPU."""
    if (ranks := checked_ranks(options)) != 1:
        raise ValueError(NEEDS_ONE_GPU.format(f"{ranks} ranks"))
    if not torch.cuda.is_available():
        raise ValueError(NEEDS_ONE_GPU.format("no GPU"))


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    found = CommandParser(prog="timeline.py", description="A step of the layer kernel by kernel, and over its GEMMs.")
    found.add_argument("--shape", action="append", choices=tuple(SHAPES), help="may be repeated (default: all)")
    found.add_argument("--most-tokens", type=parse_count, default=None, metavar="T", help="fewer tokens than a shape's")
    add_output(found)
    found.set_defaults(command=run, check=check, nproc=None, backend=AUTO)
    return found


if __name__ == "__main__":
    sys.exit(run_command(parser(), sys.argv[1:], [__file__]))
