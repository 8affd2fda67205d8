"""End-to-end benchmarks of tiny layers, for the tests of the benchmark."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import harness.end_to_end as module
import pytest
import schema
import torch
import torch.distributed as dist
from harness.context import BenchContext, Rounds
from harness.layer import LayerUnderTest
from harness.layer_report import Setup
from harness.products import Products
from harness.results import Results

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler import profiler
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.timing import RoundTimer
from sonic_ep.testing import Rank
from sonic_ep.testing.layer_problem import LayerOptions, LayerProblem

SHAPE = Shape(tokens=7, hidden=16, intermediate=8, num_experts=12, top_k=2)
# Enough tokens that no error is luck; on GPUs.
MANY = Shape(tokens=256, hidden=64, intermediate=32, num_experts=8, top_k=4)
# Of the layer and of the profile, as interpreters of kernels can afford.
SMALLEST = Shape(tokens=2, hidden=8, intermediate=8, num_experts=2, top_k=1)
MODES = EPConfig(dispatch="all_to_all", combine="rank_dedup")
CONFIG_NAMES = ("dispatch", "combine", "redispatch_x_in_backward", "cpu_sync_on_runtime")


def few_rounds(patched: pytest.MonkeyPatch) -> None:
    """One round of each on the CPU, where times mean nothing, and few on GPUs."""
    patched.setattr(module, "ROUNDS_ON_CPU", Rounds(rounds=1, warmup=0))
    patched.setattr(profiler, "SECONDS_OF_ROUNDS", 0.0)


def results_of(bandwidth: LinkBandwidth | None = None, **more: Any) -> Results:
    """Results of a machine without GPUs."""
    machine = schema.Environment(gpus=0, torch="2", world_size=1, command="python", date="today", **more)
    return Results(environment=machine, bandwidth=bandwidth)


@contextmanager
def context_on(rank: Rank, bandwidth: LinkBandwidth | None = None) -> Iterator[BenchContext]:
    """A context for the world of ``rank``."""
    with ExpertParallel(backend="reference") as ep:
        results = results_of(bandwidth, process_group=dist.get_backend() if rank.world_size > 1 else None)
        timer = RoundTimer(group=ep.group, device=rank.device, barrier=lambda: ep.meet(rank.device))
        yield BenchContext(timer=timer, results=results)


@contextmanager
def layer_on(rank: Rank, shape: Shape = SHAPE, options: LayerOptions | None = None) -> Iterator[LayerUnderTest]:
    """A layer of the reference."""
    with context_on(rank) as context:
        options = options or LayerOptions()
        problem = LayerProblem(shape=shape, group=context.group, device=rank.device, options=options)
        yield LayerUnderTest.of(context, problem, "reference", MODES)


def setup_of(setting: dict[str, Any], world_size: int, backend: str, shape: Shape) -> Setup:
    """What ``setting`` asks for; what it leaves out is the default."""
    left = dict(setting)
    backward = left.pop("backward", True)
    config = EPConfig(**{name: left.pop(name) for name in CONFIG_NAMES if name in left})
    sizes = {name: getattr(shape, name) for name in ("tokens", "hidden", "intermediate", "num_experts", "top_k")}
    return Setup(
        shape=Shape(**sizes, dtype=left.pop("dtype", torch.bfloat16)),
        world_size=world_size,
        options=LayerOptions(**left),
        backend=backend,
        config=config,
        backward=backward,
    )


def run_on_rank(
    rank: Rank,
    setting: dict[str, Any],
    backend: str = "reference",
    shape: Shape = SHAPE,
    bandwidth: LinkBandwidth | None = None,
) -> tuple[schema.Layer, list[str]]:
    """The document, and all that was said."""
    said: list[str] = []
    setup = setup_of(setting, rank.world_size, backend, shape)
    with pytest.MonkeyPatch.context() as patched, context_on(rank, bandwidth) as context:
        few_rounds(patched)
        return module.run_end_to_end(setup, context, said.append), said


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a benchmark did not free. alive: when the second batch of cases begins, and in the end.

    open: backends of layers that are not closed; exact: whether every layer of the reference beside a fast one had
    exact sizes.
    """

    alive: list[str]
    open: list[str]
    exact: bool


def watched_on_rank(
    rank: Rank, setting: dict[str, Any], backend: str, shape: Shape
) -> tuple[schema.Layer, list[str], Kept]:
    """``run_on_rank``, and what was kept meanwhile."""
    made: list[ExpertParallel] = []
    alive: list[str] = []
    watched: list[weakref.ref[Any]] = []

    def look() -> None:
        alive.extend(type(found).__name__ for found in (each() for each in watched) if found is not None)

    def watching(function: Callable[..., Any], *, at_once: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if at_once:
                look()
            found = function(*arguments, **options)
            watched.append(weakref.ref(found))
            return found

        return call

    def start(self: ExpertParallel, *arguments: Any, **options: Any) -> None:
        made.append(self)
        honest(self, *arguments, **options)

    honest = ExpertParallel.__init__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ExpertParallel, "__init__", start)
        patched.setattr(module, "prove_routed", watching(module.prove_routed))
        patched.setattr(Products, "of", watching(Products.of))
        patched.setattr(module, "prove_one_gpu", watching(module.prove_one_gpu, at_once=True))
        document, said = run_on_rank(rank, setting, backend, shape)
    seen = len(watched)
    look()
    assert seen == (4 if rank.world_size > 1 else 2), "the benchmark makes other things than those that are watched"
    references = [ep.config.cpu_sync_on_runtime for ep in made if ep.backend == "reference" and backend == "fast"]
    # The context's own is closed when the benchmark has ended.
    still_open = [ep.backend for ep in made[1:] if not ep._call_guard.closed]
    return document, said, Kept(alive=alive, open=still_open, exact=all(references[1:]))


def said_before(rank: Rank, error: type[Exception], poison: Callable[[Any, Rank], None]) -> tuple[str, list[str], int]:
    """What a benchmark raises after ``poison`` has patched something, what it has said, and entries of results."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patched, context_on(rank) as context:
        few_rounds(patched)
        poison(patched, rank)
        with pytest.raises(error) as raised:
            module.run_end_to_end(setup_of({}, rank.world_size, "reference", SHAPE), context, said.append)
        assert type(raised.value) is error
        return str(raised.value), said, len(context.results.entries)
