"""``bench/host_time.py``: what its clock counts, what it refuses, and what it records."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host_time
import pytest
import torch
from end_to_end import TORCHRUN, context_on, python_in_root
from harness.context import BenchCase, BenchContext, Rounds
from harness.host_parts import ALLOCATION, AUTOGRAD, GROUPED, LAUNCH, PRODUCT, host_parts
from harness.layer import LayerUnderTest, Pass
from host_time import COMBINE, DISPATCH, ROUND_TRIP, ROWS, UNIT, HostClock, compared, shape_of
from on_ranks import on_ranks
from report_page.load import read
from schema import Entry, Suite

from sonic_ep.cli.exit_codes import PASS
from sonic_ep.cli.options import parse_thiek
from sonic_ep.profiler.problem import RoutingProblem
from sonic_ep.profiler.timing import Timing
from sonic_ep.testing import Rank
from sonic_ep.testing.layer_problem import LayerProblem
from sonic_ep.testing.oracle import ALONE

HOST = (ROWS, COMBINE, *(which.value for which in Pass))
THIEK = "16,32,16,8,2"
ROUNDS = Rounds(rounds=3, warmup=1)


@dataclass
class Clock:
    """Seconds that pass where they are told to."""

    now: float = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def read(self) -> float:
        return self.now


class SlowGpu(HostClock):
    """A GPU that finishes 100 seconds later."""

    def finish(self) -> None:
        host_time.perf_counter.__self__.spend(100)  # type: ignore[attr-defined]


def test_host_time_is_that_of_launches_and_wall_time_ends_with_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(host_time, "perf_counter", clock.read)
    context: Any = SimpleNamespace(group=ALONE, device=torch.device("cpu"), on_gpu=False)
    host = SlowGpu(context=context, calls=4, rounds=ROUNDS)
    assert host.seconds(partial(clock.spend, 2), 4) == [2] * 3
    assert host.wall(partial(clock.spend, 2), 4).rounds == (27,) * 3


@on_ranks(2, pool="cpu_pool")
def test_the_rank_that_takes_most_units_counts(rank: Rank) -> None:
    """Though another has the longer time: its unit is longer, too."""
    with context_on(rank) as context:
        host = HostClock(context=context, calls=1, rounds=ROUNDS)
        units, times = iter([4.0, 6.0] if rank.rank else [1.0, 1.0]), [20.0, 30.0]
        with pytest.MonkeyPatch.context() as patched:

            def seconds(_: HostClock, __: object, calls: int) -> list[float]:
                return [next(units) if calls == host_time.CALLS_OF_UNIT else times[rank.rank]] * 3

            patched.setattr(HostClock, "seconds", seconds)
            assert host.units(print) == (Timing(rounds=(20.0,) * 3), 1.0)


def test_an_entry_says_whether_its_threshold_is_met() -> None:
    times = Timing(rounds=(28e-6, 28e-6, 40e-6))
    given = (ROWS, shape_of(parse_thiek(THIEK), 2), "host", times, (UNIT, 2e-6))
    for most, met in ((14, True), (13.9, False), (None, None)):
        entry = compared(*given, most)
        assert (entry.met, entry.median_us, entry.baselines[0].ratio) == (met, 28, 14)
    assert compared(*given, 14).threshold == f"at most 14 times {UNIT}"
    assert compared(*given, 14).threshold_us == 28


def test_shapes() -> None:
    assert shape_of(parse_thiek(THIEK), 2).tokens == 8
    assert shape_of(None, 3 if torch.cuda.is_available() else 2).tokens > 0
    for thiek, letter in (("15,32,16,8,2", "T"), ("16,32,16,7,2", "E")):
        with pytest.raises(ValueError, match=f"got {letter}=.*, expected a multiple of the 2 ranks"):
            shape_of(parse_thiek(thiek), 2)


def cases_on(context: BenchContext) -> list[BenchCase]:
    """Collective. All cases of the host, and the parts that are timed in graphs only."""
    group, device, shape = context.group, context.device, shape_of(parse_thiek(THIEK), 2)
    config = host_time.config_of(shape, group.world_size)
    layer = LayerUnderTest.of(context, LayerProblem(shape=shape, group=group, device=device), "reference", config)
    with host_time.open_ep(context, "reference", config, None) as ep:
        parts = host_time.calls_of_parts(RoutingProblem(shape=shape, group=group, device=device), ep)
        cases = [*parts.values(), *(host_time.layer_case(layer, ep, which) for which in Pass)]
        for case in cases:
            right = case.run()
            case.check(right)
            for name, tensor in [*right.items()] if isinstance(right, dict) else [("", right)]:
                wrong = tensor.detach().clone()
                wrong[0] = -wrong[0]
                with pytest.raises(AssertionError, match="elements differ"):
                    case.check({**right, name: wrong} if name else wrong)
    return cases


@on_ranks(2, pool="cpu_pool")
def test_wrong_results_are_refused_and_right_ones_recorded(rank: Rank) -> None:
    with context_on(rank) as context, torch.no_grad():
        names = [case.name for case in cases_on(context)]
        assert names == [DISPATCH, ROWS, COMBINE, ROUND_TRIP, *(which.value for which in Pass)]
        noted, own_gpus = host_time.in_words(context)
        assert noted.results.environment.note is not None
        assert host_time.NOT_MEASURED in noted.results.environment.note
        assert not own_gpus
        host, shape = HostClock.of(noted, own_gpus, rounds=2), shape_of(parse_thiek(THIEK), 2)
        assert host_time.measure_host(host, shape, "reference", None) == "reference"
        check_host_entries(noted.results.entries, "None")


@pytest.mark.fast
@on_ranks(1)
def test_parts_of_a_call_are_recorded_in_units(rank: Rank) -> None:
    with context_on(rank) as context, torch.no_grad():
        host, shape = HostClock.of(context, own_gpus=True, rounds=2), shape_of(parse_thiek(THIEK), 1)
        host_time.measure_parts(host, shape)
        entries = context.results.entries
        assert [entry.name for entry in entries] == [ALLOCATION, LAUNCH, PRODUCT, GROUPED, AUTOGRAD]
        assert all(entry.baselines[0].what == UNIT and entry.median_us > 0 for entry in entries)
        for call in host_parts(shape, rank.device).values():
            result = call()
            assert result is None or isinstance(result, torch.Tensor)


def check_host_entries(entries: list[Entry], most: str) -> None:
    """Each pass and part once, in units, and on the CPU no threshold."""
    assert [(entry.name, entry.how, entry.rounds) for entry in entries] == [
        (f"{name}, max_tokens_per_rank={most}", "host", 2) for name in HOST
    ]
    for entry in entries:
        (unit,) = entry.baselines
        assert unit.what == UNIT
        assert unit.measured_us is not None
        # Both are rounded to two digits of a microsecond.
        assert entry.median_us == pytest.approx(unit.ratio * unit.measured_us, rel=0.02)
        assert (entry.threshold, entry.met) == (None, None)


@on_ranks(1, pool="cuda_pool")
def test_eager_calls_are_compared_with_graphs_and_small_ones_timed_in_them(rank: Rank) -> None:
    small = replace(host_time.SMALL, hidden=256)
    with context_on(rank) as found, torch.no_grad():
        context = replace(found, held=True)
        host_time.measure_wall(HostClock.of(context, own_gpus=True, rounds=3), small, "fast")
        host_time.measure_small(context, small, "fast")
        entries = context.results.entries
    assert [(entry.name, entry.how) for entry in entries] == [
        *((name, how) for name in (ROWS, COMBINE) for how in ("graph", "wall")),
        *((name, "graph") for name in (DISPATCH, ROWS, COMBINE, ROUND_TRIP)),
    ]
    assert all((entry.met is None) == (place in (0, 2)) for place, entry in enumerate(entries))


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_the_smoke_size_runs_on_the_cpu(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "host.json"
    words = ("--backend", backend, "--thiek", "8,32,8,4,2", "--rounds", "2", "--commit", "a name", "--json", str(path))
    done = python_in_root(*TORCHRUN, "bench/host_time.py", *words, TRITON_INTERPRET="1")
    assert done.returncode == PASS, done.stdout + done.stderr
    document = read(path)
    assert isinstance(document, Suite)
    assert document.environment.note is not None
    assert document.environment.note.startswith("on the CPU")
    check_host_entries([*document.entries[:5]], "T")
    check_host_entries([*document.entries[5:10]], "None")
    assert len(document.entries) == (15 if backend == "fast" else 10)
