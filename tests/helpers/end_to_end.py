"""End-to-end benchmarks of tiny layers, for the tests of the benchmark."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def python_in_root(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own in the root of the repository, on the CPU."""
    # With the variables of pytest-xdist about, pytest-benchmark takes itself for a part of its run and reports nothing.
    dropped = ("PYTEST_XDIST_", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **settings}
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
