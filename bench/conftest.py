"""Benches of plan, dispatch, combine and the layer, on one rank or under torchrun, through pytest-benchmark.

Every rank runs every bench, the same number of rounds; rank 0 alone reports. pytest-benchmark would time what one rank
sees and choose the rounds by it. So the rounds are measured first, over all ranks, and then told to it: its timer is a
clock that stands still but for the seconds that each round took.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sonic_ep.ceilings import stopwatch

from sonic_ep.backend import unavailable_reasons
from sonic_ep.benchmark.arena import How, SuiteArena, Work, WrongError
from sonic_ep.benchmark.results import Entry, Results, command_of, environment
from sonic_ep.benchmark.steady import little_to_collect, on_own_core
from sonic_ep.benchmark.workload import BARS, SMOKE, Problem, Shape, Sizes, bars_hold
from sonic_ep.cli.launch import Place, joined_group, launched_by_torchrun
from sonic_ep.distributed.group import resolve_group
from sonic_ep.fast.workspace import Workspace
from sonic_ep.profiler.bandwidth import measured_ceilings, memory_rate
from sonic_ep.profiler.timing import AboveCeilingError


class RecordedClock:
    """A clock that only ``advance`` moves."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """Seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self._now += seconds


CLOCK = pytest.StashKey[RecordedClock]()
RESULTS = pytest.StashKey[Results]()
UNHEARD = pytest.StashKey[io.StringIO]()
STATUS = pytest.StashKey[int]()


def rank() -> int:
    """This process among those of torchrun."""
    return int(os.environ["RANK"]) if launched_by_torchrun() else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where results go, and what is run."""
    group = parser.getgroup("sonic_ep benches")
    group.addoption("--results", type=Path, metavar="PATH", help="write what was found as JSON, bench/results/*.json")
    group.addoption("--commit", metavar="NAME", help="the commit to name in the results where git cannot tell")
    group.addoption("--thek", metavar="T,H,E,K", help="a large shape other than that of the bars: T of each rank, ...")


def pytest_cmdline_main(config: pytest.Config) -> None:
    """Ranks other than 0 keep pytest-benchmark from writing anything."""
    if rank() > 0:
        config.option.benchmark_disable = True
        config.option.benchmark_only = config.option.benchmark_autosave = False
        config.option.benchmark_json = config.option.benchmark_save = None


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Ranks other than 0 keep what they have to say to themselves, unless they fail."""
    config.stash[CLOCK] = RecordedClock()
    loud = config.pluginmanager.get_plugin("terminalreporter")
    if rank() > 0 and loud is not None:
        config.stash[UNHEARD] = io.StringIO()
        config.pluginmanager.unregister(loud)
        config.pluginmanager.register(type(loud)(config, config.stash[UNHEARD]), "terminalreporter")


def pytest_report_header() -> str:
    """Whether the times are worth reading."""
    if torch.cuda.is_available():
        return f"sonic_ep benches: {torch.cuda.device_count()} CUDA devices"
    return "sonic_ep benches: no CUDA device, a smoke size on the CPU: the times mean nothing"


def pytest_itemcollected(item: pytest.Item) -> None:
    """pytest-benchmark reads the clock that the measured rounds move."""
    item.add_marker(pytest.mark.benchmark(timer=item.config.stash[CLOCK].read))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """After a failure that not all ranks share they are out of step, so it is the end of the run."""
    report = yield
    shared = call.excinfo is not None and call.excinfo.errisinstance((WrongError, AboveCeilingError))
    if report.failed and launched_by_torchrun() and not shared:
        item.session.shouldfail = f"{item.name} failed, and ranks may be out of step"
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Whether a rank has to say what it kept to itself."""
    session.config.stash[STATUS] = int(exitstatus)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of what was found."""
    results = config.stash.get(RESULTS, None)
    if results is not None:
        terminalreporter.section("sonic_ep: median over rounds of the slowest rank")
        for line in results.table():
            terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """What a failed rank kept to itself."""
    if UNHEARD in config.stash and config.stash.get(STATUS, 1) not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        print(f"--- rank {rank()} ---\n{config.stash[UNHEARD].getvalue()}", file=sys.stderr)


@pytest.fixture(scope="session")
def place() -> Iterator[Place]:
    """This rank, in the group for the whole run."""
    with joined_group() as joined, ExitStack() as steady:
        if joined.device.type == "cuda":
            steady.enter_context(on_own_core(joined.rank, joined.world_size))
            steady.enter_context(little_to_collect())
        yield joined


@pytest.fixture(scope="session")
def arena(place: Place, request: pytest.FixtureRequest) -> Iterator[SuiteArena]:
    """The group and its shared memory, and the rates of the link and of memory, measured first."""
    sizes = chosen_sizes(place, request.config.getoption("--thek"))
    group = resolve_group(None)
    reasons = unavailable_reasons("fast", group)
    if reasons:
        pytest.skip(f"backend 'fast' cannot run here: {'; '.join(reasons)}")
    workspace = Workspace(group, place.device)
    with torch.no_grad():
        ceilings = measured_ceilings(group, place.device, sizes.large.tokens * sizes.large.row_bytes)
        on_gpu = place.device.type == "cuda"
        memory = (
            memory_rate(place.device, stopwatch(workspace.barrier_before_write, place.device, group))
            if on_gpu
            else None
        )
    arguments = [str(word) for word in request.config.invocation_params.args]
    command = command_of(group.world_size, "-m pytest", arguments)
    found = environment(place.device, group.world_size, request.config.getoption("--commit"), command)
    results = Results(environment=found, ceilings=ceilings, memory_rate=memory)
    request.config.stash[RESULTS] = results
    yield SuiteArena(
        group=group,
        device=place.device,
        barrier_before_write=workspace.barrier_before_write,
        results=results,
        workspace=workspace,
        sizes=sizes,
    )
    workspace.close()


@pytest.fixture(scope="session")
def large(arena: SuiteArena) -> Problem:
    """The large shape, drawn."""
    return Problem(shape=arena.sizes.large, group=arena.group, device=arena.device)


@pytest.fixture(scope="session")
def small(arena: SuiteArena) -> Problem:
    """The small shape, drawn."""
    return Problem(shape=arena.sizes.small, group=arena.group, device=arena.device)


@pytest.fixture(params=list(How), ids=lambda how: how.value)
def how(arena: SuiteArena, request: pytest.FixtureRequest) -> How:
    """Each way to launch that there is on this device."""
    chosen: How = request.param
    if chosen is not How.EAGER and not arena.on_gpu:
        pytest.skip("the CPU has neither a queue nor graphs")
    return chosen


@pytest.fixture
def run(arena: SuiteArena, tell: Callable[[Entry], None]) -> Callable[[Work, How], None]:
    """Check a piece of work, time it, and tell what came of it."""
    return lambda work, how: tell(arena.run(work, how))


@pytest.fixture
def tell(arena: SuiteArena, benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Entry], None]:
    """Write the results so far, and tell pytest-benchmark what each round of the last one took."""
    clock, path = request.config.stash[CLOCK], request.config.getoption("--results")

    def write_and_tell(entry: Entry) -> None:
        rounds = iter(entry.timing.rounds)
        benchmark.extra_info.update(entry.as_json())
        benchmark.pedantic(clock.advance, setup=lambda: ((next(rounds),), {}), rounds=len(entry.timing.rounds))
        # After every entry, so that a run that is cut short leaves what it found.
        if path is not None and arena.group.rank == 0:
            arena.results.write(path)

    return write_and_tell


def chosen_sizes(place: Place, thek: str | None) -> Sizes:
    """The sizes for this place, the large shape replaced by ``thek``, if given. Raises ``pytest.UsageError``."""
    sizes = BARS if place.device.type == "cuda" else SMOKE
    if thek is not None:
        large = shape_of(thek)
        layer = replace(large, intermediate=sizes.layer.intermediate)
        plans = (place.world_size * large.tokens * large.top_k,)
        return replace(sizes, large=large, layer=layer, plans=plans).without_bars()
    return sizes if bars_hold(place.device, place.world_size) else sizes.without_bars()


def shape_of(thek: str) -> Shape:
    """The shape that four numbers name. Raises ``pytest.UsageError``."""
    try:
        tokens, hidden, num_experts, top_k = (int(word) for word in thek.split(","))
    except ValueError:
        raise pytest.UsageError(f"--thek: got {thek!r}, expected four whole numbers, T,H,E,K") from None
    return Shape(tokens=tokens, hidden=hidden, num_experts=num_experts, top_k=top_k)
