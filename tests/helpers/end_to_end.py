"""End-to-end benchmarks of tiny layers, for the tests of the benchmark."""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness.end_to_end as module
import pytest
import schema
import torch.distributed as dist
from harness.context import BenchContext, Rounds
from harness.layer import LayerUnderTest
from harness.results import Results
from limits import HANG_SECONDS

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

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
Run = tuple[schema.Layer, list[str]]


def python_in_root(*words: str, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    """A Python of its own in the root of the repository, on the CPU."""
    # With the variables of pytest-xdist about, pytest-benchmark takes itself for a part of its run and reports nothing.
    dropped = ("PYTEST_XDIST_", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | (
        {"TRITON_INTERPRET": "1"} if interpreted else {}
    )
    options = {"capture_output": True, "text": True, "timeout": HANG_SECONDS, "cwd": Path(__file__).parents[2]}
    return subprocess.run([sys.executable, *words], env=environment, **options)


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
        given = {"options": options or LayerOptions(), "group": context.group, "device": rank.device}
        yield LayerUnderTest.of(context, LayerProblem(shape=shape, **given), "reference", MODES)


def setup_of(setting: dict[str, Any], world_size: int, backend: str, shape: Shape) -> module.Setup:
    """What ``setting`` asks for; what it leaves out is the default."""
    left = {"backward": True, "dtype": shape.dtype, **setting}
    config = EPConfig(**{name: left.pop(name) for name in CONFIG_NAMES if name in left})
    given = {"backward": left.pop("backward"), "world_size": world_size, "backend": backend, "config": config}
    return module.Setup(shape=replace(shape, dtype=left.pop("dtype")), options=LayerOptions(**left), **given)


def run_on_rank(
    rank: Rank, setting: dict[str, Any], backend: str, shape: Shape = SHAPE, bandwidth: LinkBandwidth | None = None
) -> Run:
    """The document, and all that was said."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patched, context_on(rank, bandwidth) as context:
        few_rounds(patched)
        return module.run_end_to_end(setup_of(setting, rank.world_size, backend, shape), context, said.append), said


def watched_on_rank(rank: Rank, setting: dict[str, Any], backend: str, *more: Any) -> tuple[Run, list[str], list[bool]]:
    """``run_on_rank``, what it did not free or close, and ``cpu_sync_on_runtime`` of references beside a fast layer.

    Not freed: baselines when the second batch of cases begins, and in the end.
    """
    alive: list[str] = []
    watched: list[weakref.ref[Any]] = []
    started = patch.object(ExpertParallel, "__init__", autospec=True, side_effect=ExpertParallel.__init__)

    def look() -> None:
        alive.extend(type(found).__name__ for found in (each() for each in watched) if found is not None)

    def watch(name: str) -> None:
        function: Callable[..., Any] = getattr(LayerUnderTest, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "prove_one_gpu":
                look()
            found = function(*arguments, **options)
            watched.append(weakref.ref(found))
            return found

        patched.setattr(LayerUnderTest, name, call)

    with pytest.MonkeyPatch.context() as patched, started as starts:
        for name in ("prove_routed", "products", "prove_one_gpu"):
            watch(name)
        run = run_on_rank(rank, setting, backend, *more)
    seen = len(watched)
    look()
    assert seen == (4 if rank.world_size > 1 else 2), "the benchmark makes other things than those that are watched"
    # The context's own is closed when the benchmark has ended.
    made = [call.args[0] for call in starts.call_args_list[1:]]
    still_open = [ep.backend for ep in made if not ep._call_guard.closed]
    exact = [ep.config.cpu_sync_on_runtime for ep in made if ep.backend == "reference" and backend == "fast"]
    return run, alive + still_open, exact
