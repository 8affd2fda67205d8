"""Times over all ranks, rates under their ceilings, and the engine that proves, times and confirms."""

from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
import torch.distributed as dist
from on_ranks import on_ranks

import sonic_ep.profiler.measuring as measuring
import sonic_ep.profiler.timing as module
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.profiler import WrongResultError
from sonic_ep.profiler.agreement import gathered, in_step
from sonic_ep.profiler.measuring import Stage, TimedWork
from sonic_ep.profiler.timing import AboveCeilingError, Ceiling, RoundTimer, Timing, captured, keep_busy
from sonic_ep.testing import Rank

ALONE = EPGroup(rank=0, world_size=1)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TIMER = RoundTimer(group=ALONE, device=CPU, barrier=lambda: None)


def test_quantiles_and_shares_of_a_ceiling() -> None:
    timing = Timing(rounds=tuple(float(number) for number in (50, 10, 30, 20, 40)))
    assert [timing.quantile(share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == [10.0, 14.0, 30.0, 46.0, 50.0]
    assert Timing(rounds=(7.0,)).quantile(0.9) == 7.0
    assert Timing(rounds=(3.0, 9.0, 2.0, 5.0)).median == 4.0
    ceiling = Ceiling(name="the read ceiling", bytes_per_second=200e9)
    assert ceiling.share_of(100e9, 1.0, "work") == 0.5
    assert ceiling.share_of(203e9, 1.0, "work") == pytest.approx(1.015)
    with pytest.raises(AboveCeilingError, match=r"dispatch: got 205\.0 GB/s.*200\.0 GB/s \(the read ceiling\)"):
        ceiling.share_of(205e9, 1.0, "dispatch")


@pytest.mark.parametrize("ahead", [True, False])
def test_the_device_is_kept_busy_before_ranks_enter_a_round(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    done = Mock()
    monkeypatch.setattr(module, "keep_busy", done.spin)
    timer = RoundTimer(group=ALONE, device=GPU, barrier=done.barrier, ahead=ahead, busy_seconds=0.25)
    timer.enter()
    timer.enter()
    assert done.mock_calls == [*[call.spin(GPU, 0.25)] * ahead, call.barrier()] * 2
    keep_busy(CPU)


class Clock:
    """Stands still but for what advances it."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patched.setattr(module, "perf_counter", lambda: self.now)

    def advance(self, seconds: float) -> None:
        self.now += seconds


def test_what_enters_a_round_is_not_timed_and_functions_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        clock.advance(seconds)

    timer = RoundTimer(group=ALONE, device=CPU, barrier=partial(work, "barrier", 8.0))
    timings = timer.time([partial(work, "a", 1.0), partial(work, "b", 2.0)], rounds=3, warmup=2)
    assert calls == ["barrier", "a", "barrier", "b"] * 5
    assert [timing.rounds for timing in timings] == [(1.0,) * 3, (2.0,) * 3]
    assert timer.time([], rounds=3) == []
    with pytest.raises(ValueError, match=r"rank 0 of 1: rounds: got 0, expected at least 1"):
        timer.time([], rounds=0)
    # A median comes after a few rounds of warm-up.
    takes = iter([0.0] * 3 + [16.0, 1.0, 4.0])
    assert TIMER.median(lambda: clock.advance(next(takes)), rounds=3) == 4.0
    assert not list(takes)
    function = Mock()
    TIMER.median(function, rounds=module.WARMUP + 1)
    assert function.call_count == 2 * module.WARMUP + 1


@on_ranks(3, pool="cpu_pool")
def test_all_ranks_get_the_time_of_the_slow_one(rank: Rank) -> None:
    group = resolve_group(None)
    with pytest.MonkeyPatch.context() as patched:
        clock = Clock(patched)
        timer = RoundTimer(group=group, device=CPU, barrier=dist.barrier)
        (timing,) = timer.time([lambda: clock.advance(1.0 + rank.rank)], rounds=3, warmup=1)
    assert gathered(group, timing.rounds) == [(3.0,) * 3] * 3


@on_ranks(2, pool="cuda_pool")
def test_graphs_are_timed_by_events(rank: Rank) -> None:
    """A kernel in a graph, entered over shared memory behind a spin."""
    from sonic_ep.fast.workspace import Workspace

    workspace = Workspace(resolve_group(None), rank.device)
    numbers = torch.zeros(1000, device=rank.device)
    replayed = captured(lambda: numbers.add_(1), rank.device)
    before = float(numbers[0])
    timer = RoundTimer(group=workspace.group, device=rank.device, barrier=workspace.barrier_before_write)
    (timing,) = timer.time([replayed], rounds=4, warmup=1)
    assert float(numbers[0]) == before + 5
    assert gathered(workspace.group, timing) == [timing] * 2
    # The spin of milliseconds before each round is not part of it.
    assert 0 < timing.median < 0.5e-3
    workspace.close()


@on_ranks(1, pool="cuda_pool")
def test_a_graph_keeps_the_memory_that_it_reads(rank: Rank) -> None:
    replayed = captured(partial(torch.add, torch.ones(1000, device=rank.device), 1), rank.device)
    # Freed memory of the same size would be taken again.
    other = torch.full((1000,), float("nan"), device=rank.device)
    assert replayed().eq(2).all()
    assert other.isnan().all()


def work_of(results: list[float], **changes: Any) -> TimedWork:
    """A work whose calls return ``results`` one by one, of which 1.0 is correct."""

    def check(result: torch.Tensor) -> None:
        assert float(result) == 1.0, f"got {float(result)}"

    found = iter(results)
    arguments = {"run": lambda: torch.tensor(next(found)), "check": check, "other_inputs": nullcontext, **changes}
    return TimedWork(name="work", **arguments)


def test_wrong_results_are_refused_before_and_after_they_are_timed() -> None:
    stage = Stage(timer=TIMER)
    with pytest.raises(WrongResultError, match="rank 0 of 1: work: got 2"):
        stage.prove(work_of([1.0, 2.0]))
    timed = stage.time([work_of([1.0, 2.0, 3.0]), work_of([3.0, 2.0, 1.0])], rounds=2, warmup=1)
    assert [float(result.last) for result in timed] == [3.0, 1.0]
    with pytest.raises(WrongResultError, match="rank 0 of 1: work: got 3"):
        stage.confirm(timed[0])
    stage.confirm(timed[1])
    # A proof poisons the result on other inputs, and that on the inputs.
    memory, seen = torch.ones(2), []

    def run() -> torch.Tensor:
        seen.append(memory.tolist())
        return memory.fill_(1.0)

    stage.prove(work_of([], run=run, check=lambda result: None))
    assert seen[0] == [1.0, 1.0]
    assert str(seen[1]) == str(memory.tolist()) == "[nan, nan]"


def test_as_many_rounds_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(measuring, "perf_counter", module.perf_counter)
    for seconds, fewest, rounds in ((0.0, 3, 50), (0.125, 3, 12), (2.0, 3, 3), (2.0, 1, 1)):
        work = work_of([], run=partial(clock.advance, seconds))
        assert Stage(timer=TIMER).rounds_within([work], 1.5, fewest=fewest, most=50) == rounds


@on_ranks(2, pool="cpu_pool")
def test_only_what_is_expected_is_raised_as_such(rank: Rank) -> None:
    group = resolve_group(None)
    for errors, kind in (
        ({1: ValueError("bad")}, WrongResultError),
        ({1: KeyError("bad")}, RuntimeError),
        ({0: KeyError("bad"), 1: ValueError("bad")}, RuntimeError),
    ):
        with pytest.raises(kind) as raised:
            in_step(group, Mock(side_effect=errors.get(rank.rank)), ValueError, WrongResultError)
        assert type(raised.value) is kind
        assert len(set(gathered(group, str(raised.value)))) == 1
        assert all(f"rank {failed} of 2: " in str(raised.value) for failed in errors)
    # A rank that cannot capture stops all.
    stage = Stage(timer=RoundTimer(group=group, device=CPU, barrier=dist.barrier), as_graphs=True)
    error = torch.OutOfMemoryError("no memory left") if rank.rank else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measuring, "captured", Mock(side_effect=error))
        with pytest.raises(RuntimeError, match=r"^rank 1 of 2: no memory left$"):
            stage.launched(work_of([]))
