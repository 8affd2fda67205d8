"""Benches of plan, dispatch, combine and the layer, on one rank or under torchrun, through pytest-benchmark.

Every rank runs every bench, the same number of rounds; rank 0 alone reports. pytest-benchmark would time what one rank
sees and choose the rounds by it. So the rounds are measured first, over all ranks, and then told to it: its timer is a
clock that stands still but for the seconds that each round took.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import schema
import torch
from harness.context import SMOKE, Finding, Method, RunCase, Sizes, SuiteContext, Tell, thresholds_hold
from harness.results import Results, measured_results
from harness.steady import freeze_garbage, own_core

from sonic_ep.backend import unavailable_reasons
from sonic_ep.cli.launch import Place, joined_group, launched_by_torchrun
from sonic_ep.distributed.group import resolve_group
from sonic_ep.fast.workspace import Workspace
from sonic_ep.profiler.agreement import WrongResultError
from sonic_ep.profiler.machine import command_of, environment
from sonic_ep.profiler.problem import RoutingProblem, Shape
from sonic_ep.profiler.timing import AboveCeilingError, RoundTimer
from sonic_ep.testing.interpreted import install_interpreter

SIZES_ON_GPUS = Sizes(
    large=Shape(tokens=16384, hidden=4096, num_experts=64, top_k=8),
    small=Shape(tokens=128, hidden=4096, num_experts=32, top_k=8),
    layer=Shape(tokens=16384, hidden=4096, intermediate=1536, num_experts=64, top_k=8),
    plans=(262_144, 1_048_576),
)

CLOCK = pytest.StashKey[SimpleNamespace]()
RESULTS = pytest.StashKey[Results]()
HELD_BACK = pytest.StashKey[io.StringIO]()


def rank() -> int:
    """This process among those of torchrun."""
    return int(os.environ["RANK"]) if launched_by_torchrun() else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where results go, and what is run."""
    group = parser.getgroup("sonic_ep benches")
    group.addoption("--results", type=Path, metavar="PATH", help="write what was found as JSON, bench/results/*.json")
    group.addoption("--commit", metavar="NAME", help="the commit to name in the results where git cannot tell")
    text = "a large shape without thresholds: T of each rank, ..."
    group.addoption("--thek", type=parse_thek, metavar="T,H,E,K", help=text)


def pytest_cmdline_main(config: pytest.Config) -> None:
    """Ranks other than 0 keep pytest-benchmark from writing anything."""
    if rank() > 0:
        config.option.benchmark_disable = True
        config.option.benchmark_only = config.option.benchmark_autosave = False
        config.option.benchmark_json = config.option.benchmark_save = None


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Ranks other than 0 hold their output back, unless they fail."""
    config.stash[CLOCK] = SimpleNamespace(now=0.0)
    loud = config.pluginmanager.get_plugin("terminalreporter")
    if rank() > 0 and loud is not None:
        config.stash[HELD_BACK] = io.StringIO()
        config.pluginmanager.unregister(loud)
        config.pluginmanager.register(type(loud)(config, config.stash[HELD_BACK]), "terminalreporter")


def pytest_report_header() -> str:
    """Whether the times are worth reading."""
    if torch.cuda.is_available():
        return f"sonic_ep benches: {torch.cuda.device_count()} CUDA devices"
    return "sonic_ep benches: no CUDA device, a smoke size on the CPU: the times mean nothing"


def pytest_itemcollected(item: pytest.Item) -> None:
    """pytest-benchmark reads the clock that the measured rounds move."""
    clock = item.config.stash[CLOCK]
    item.add_marker(pytest.mark.benchmark(timer=lambda: clock.now))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """After a failure that not all ranks share they are out of step, so it is the end of the run."""
    report = yield
    shared = call.excinfo is not None and call.excinfo.errisinstance((WrongResultError, AboveCeilingError))
    if report.failed and launched_by_torchrun() and not shared:
        item.session.shouldfail = f"{item.name} failed, and ranks may be out of step"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """The table of what was found, and what a failed rank held back."""
    results = config.stash.get(RESULTS, None)
    if results is not None:
        terminalreporter.section("sonic_ep: median over rounds of the slowest rank")
        for line in results.table():
            terminalreporter.write_line(line)
    if HELD_BACK in config.stash and exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        print(f"--- rank {rank()} ---\n{config.stash[HELD_BACK].getvalue()}", file=sys.stderr)


@pytest.fixture(scope="session")
def context(request: pytest.FixtureRequest) -> Iterator[SuiteContext]:
    """The group and its shared memory, and the rates of the link and of memory, measured first."""
    install_interpreter()
    options = request.config.option
    with joined_group() as place, ExitStack() as opened:
        if place.device.type == "cuda":
            opened.enter_context(own_core(place.rank, place.world_size))
            opened.enter_context(freeze_garbage())
        group, sizes = resolve_group(None), chosen_sizes(place, options.thek)
        reasons = unavailable_reasons("fast", group)
        if reasons:
            pytest.skip(f"backend 'fast' cannot run here: {'; '.join(reasons)}")
        command = command_of(group.world_size, "-m pytest", [*map(str, request.config.invocation_params.args)])
        workspace = Workspace(group, place.device)
        timer = RoundTimer(group=group, device=place.device, barrier=workspace.barrier_before_write)
        machine = environment(place.device, group.world_size, options.commit, command)
        results = measured_results(timer, machine, sizes.large.tokens * sizes.large.row_bytes)
        request.config.stash[RESULTS] = results
        held = options.thek is None and thresholds_hold(place.device, place.world_size)
        yield SuiteContext(timer=timer, results=results, held=held, workspace=workspace, sizes=sizes)
        workspace.close()


@pytest.fixture(scope="session")
def large(context: SuiteContext) -> RoutingProblem:
    """The large shape, drawn."""
    return RoutingProblem(shape=context.sizes.large, group=context.group, device=context.device)


@pytest.fixture(params=list(Method), ids=lambda method: method.value)
def method(context: SuiteContext, request: pytest.FixtureRequest) -> Method:
    """Each way to launch that there is on this device."""
    chosen: Method = request.param
    if chosen is not Method.EAGER and not context.on_gpu:
        pytest.skip("the CPU has neither a queue nor graphs")
    return chosen


@pytest.fixture
def run(context: SuiteContext, tell: Tell) -> RunCase:
    """Check a case, time it, and tell what came of it."""
    return lambda case, method: tell(context.run(case, method))


@pytest.fixture
def tell(context: SuiteContext, benchmark: Any, request: pytest.FixtureRequest) -> Tell:
    """Write the results so far, and tell pytest-benchmark what each round of the last one took."""
    clock, path = request.config.stash[CLOCK], request.config.getoption("--results")

    def advance(seconds: float) -> None:
        clock.now += seconds

    def write_and_tell(found: Finding) -> None:
        rounds = iter(found.timing.rounds)
        benchmark.extra_info.update(msgspec.to_builtins(found.entry))
        benchmark.pedantic(advance, setup=lambda: ((next(rounds),), {}), rounds=len(found.timing.rounds))
        # After every entry, so that a run that is cut short leaves what it found.
        if path is not None and context.group.rank == 0:
            schema.write(context.results.suite, path)

    return write_and_tell


def chosen_sizes(place: Place, large: Shape | None) -> Sizes:
    """The sizes for this place, the large shape replaced by the one that is given."""
    sizes = SIZES_ON_GPUS if place.device.type == "cuda" else SMOKE
    if large is None:
        return sizes
    layer = replace(large, intermediate=sizes.layer.intermediate)
    return replace(sizes, large=large, layer=layer, plans=(place.world_size * large.tokens * large.top_k,))


def parse_thek(text: str) -> Shape:
    """T,H,E,K."""
    try:
        tokens, hidden, num_experts, top_k = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected four whole numbers, T,H,E,K") from None
    return Shape(tokens=tokens, hidden=hidden, num_experts=num_experts, top_k=top_k)
