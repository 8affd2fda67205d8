"""How a case of the suites is checked and timed, what it is held against, and how it is recorded."""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
import torch
from end_to_end import SMALLEST, context_on, results_of
from harness.context import BenchCase, BenchContext, Comparison, Finding, Method, Rounds, other_inputs, thresholds_hold
from harness.results import LinkTraffic
from on_ranks import on_ranks
from schema import Entry

from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler.agreement import WrongResultError
from sonic_ep.profiler.measuring import KeepLast
from sonic_ep.profiler.timing import AboveCeilingError, Ceiling, RoundTimer, Timing
from sonic_ep.profiler.verification import expect
from sonic_ep.testing import Rank, assert_bitwise

LARGEST_NUMBER = torch.finfo(torch.bfloat16).max
CEILINGS = LinkBandwidth(copy_engine_in=1e9, copy_engine_out=2e9, read=3e9, write=4e9)


def case_of(name: str = "work", calls: list[str] | None = None, wrong_from: float = math.inf, **more: Any) -> BenchCase:
    """A case that notes its calls in ``calls``, and is wrong from one of its own on."""
    noted: list[str] = [] if calls is None else calls

    def run() -> int:
        noted.append(name)
        return noted.count(name)

    given = {"shape": SMALLEST, "run": run, "other_inputs": other_inputs, **more}
    return BenchCase(name=name, check=lambda got: expect(got < wrong_from, f"wrong in call {got}"), **given)


def context_of(device: str = "cpu", bandwidth: LinkBandwidth | None = None, **more: Any) -> BenchContext:
    """A context of one rank."""
    timer = RoundTimer(group=EPGroup(rank=0, world_size=1), device=torch.device(device), barrier=lambda: None)
    return BenchContext(timer=timer, results=replace(results_of(bandwidth), **more))


def test_the_last_round_alone_is_kept() -> None:
    numbers, alive = count(), weakref.WeakSet()

    def make() -> torch.Tensor:
        assert not alive, "an earlier round takes memory"
        result = torch.tensor(next(numbers))
        alive.add(result)
        return result

    keep = KeepLast(make, 5)
    for _ in range(5):
        assert keep.result is None
        keep()
    assert (keep.result.item(), len(alive)) == (4, 1)


def test_other_inputs_are_others_and_then_the_very_same() -> None:
    floats = torch.tensor([[0.0, -0.0], [float("nan"), float("inf")], [LARGEST_NUMBER, 1e-40]], dtype=torch.bfloat16)
    inputs = [floats, torch.tensor([3, 5, -1]), torch.ones(0, 4), torch.tensor([2.0])]
    before, places = [tensor.clone() for tensor in inputs], [tensor.data_ptr() for tensor in inputs]
    with other_inputs(*inputs):
        assert_bitwise(inputs[0], -before[0][[2, 0, 1]], "rows one further, with the other sign")
        assert (inputs[1].tolist(), inputs[3].tolist()) == ([-1, 3, 5], [-2.0])
    for tensor, right, place in zip(inputs, before, places, strict=True):
        assert_bitwise(tensor, right, "an input")
        assert tensor.data_ptr() == place
    # One given twice is turned once, and inputs that overlap come back.
    given = torch.arange(1.0, 7.0).view(3, 2).requires_grad_()
    copy, part = given.detach().clone(), given.detach()[1:]
    with other_inputs(given, given, part):
        assert given.tolist() == [[-5.0, -6.0], [3.0, 4.0], [1.0, 2.0]]
    assert_bitwise(given.detach(), copy, "overlapping inputs")
    # So they do after an error, and where one cannot be turned, since its elements share memory.
    given, shared = torch.tensor([1.0, 2.0]), torch.tensor([3.0]).expand(2)
    with pytest.raises(RuntimeError), other_inputs(given, shared):
        pytest.fail("a tensor whose elements share memory was turned")
    with pytest.raises(ZeroDivisionError), other_inputs(given):
        raise ZeroDivisionError
    assert given.tolist() == [1.0, 2.0]


def test_cases_take_turns_and_medians_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds take 1, 2 and 3 seconds, in the order in which they run."""

    def seconds(self: RoundTimer, functions: Sequence[Callable[[], object]]) -> list[float]:
        for function in functions:
            function()
        return [float(place + 1) for place in range(len(functions))]

    monkeypatch.setattr(RoundTimer, "_seconds_on_host", seconds)
    for most, met, held in ((1.0, True, True), (0.9, False, True), (0.9, None, False)):
        # Medians 4, 5 and 6 s: with 1 s of link beside 4 s, of which 1.0 times is met and 0.9 times is not.
        calls: list[str] = []
        against = Comparison(name="a", text="products and bytes", link=1.0, most=most)
        cases = [case_of("a", calls), case_of("b", calls, compared_with=(against,), flops=10e12), case_of("c", calls)]
        context = replace(context_of(), held=held)
        found = context.alternate(cases, Method.EAGER, Rounds(rounds=3, warmup=1))
        # Each is proved by two calls before and two behind.
        assert "".join(calls) == "aabbcc" + "abc" * 4 + "aabbcc"
        rounds = {"a": (1.0, 4.0, 7.0), "b": (2.0, 5.0, 8.0), "c": (3.0, 6.0, 9.0)}
        assert {name: finding.timing.rounds for name, finding in found.items()} == rounds
        said = msgspec.to_builtins(context.record(found["b"]).entry)
        times = {"measured_us": 4e6, "link_us": 1e6, "sum_us": 5e6, "ratio": 1.0}
        assert list(said["against"]) == [{"what": "products and bytes", **times}]
        assert (said["tflop_per_s"], said.get("bar_us"), said.get("met")) == (2.0, most * 5e6 if held else None, met)


def traffic_of(**more: Any) -> LinkTraffic:
    """100 GB against a ceiling of 200 GB/s."""
    ceiling = Ceiling(name="the read ceiling", bytes_per_second=200e9)
    return LinkTraffic(nbytes=100e9, ceiling=ceiling, memory_rate=1000e9, **more)


def entry_of(seconds: float) -> Entry:
    """The traffic in ``seconds``, with the threshold of 80% of its ceiling."""
    case = case_of(traffic=traffic_of(), threshold=traffic_of().at_least(0.8))
    return Finding.of(case, Method.EAGER, {"work": Timing(rounds=(seconds,) * 3)}, held=True).entry


def test_thresholds_are_times_and_floors_those_of_the_slower_and_every_rate_is_reported() -> None:
    thresholds = [traffic_of().at_least(0.8), traffic_of().at_most(1.25)]
    assert [threshold and threshold.seconds for threshold in thresholds] == pytest.approx([0.625, 0.625])
    entry = entry_of(0.7)
    assert (entry_of(0.6).met, entry.met) == (True, False)
    assert traffic_of(memory_bytes=400e9).floor == (0.5, "link")
    assert traffic_of(memory_bytes=600e9).floor == (0.6, "memory")
    unknown = LinkTraffic(nbytes=1, ceiling=None)
    assert unknown.at_least(0.5) is unknown.floor is None
    shape = {"T": 2, "H": 8, "I": 8, "E": 2, "K": 1, "dtype": "bfloat16"}
    expected = {"shape": shape, "gb_per_s": 142.86, "percent": 71.43, "met": False, "floor_us": 500_000}
    assert msgspec.to_builtins(entry).items() >= expected.items()
    results = context_of(entries=[entry], bandwidth=CEILINGS, memory_rate=5e9).results
    rates = {"copy_engine_in": 1.0, "copy_engine_out": 2.0, "read": 3.0, "write": 4.0, "memory": 5.0}
    assert msgspec.to_builtins(results.suite)["rates_gb_per_s"] == rates
    first, *_, last = results.table()
    assert "memory 5.0" in first
    assert all(words in last for words in ("MISSED: at least 80% of the read ceiling", "500000.0 link"))
    unmeasured = context_of(memory_rate=5e9).results.table()
    assert unmeasured[:2] == ["no ceilings: no link between GPUs was measured", "rates in GB/s: memory 5.0"]


# Two calls prove a case before it is timed, two rounds are timed, two calls prove it again.
@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize(("wrong_from", "calls_of_it"), [(1, 2), (3, 4), (5, 6)], ids=["before", "timed", "after"])
def test_a_case_that_is_wrong_on_one_rank_fails_on_all_and_stops_no_other(
    rank: Rank, wrong_from: int, calls_of_it: int
) -> None:
    calls: list[str] = []
    against = Comparison(name="a", text="a", most=1.0)
    wrong = case_of("a", calls, wrong_from if rank.rank == 1 else math.inf)
    cases = [wrong, case_of("b", calls, compared_with=(against,))]
    with context_on(rank) as context:
        found = context.alternate(cases, Method.EAGER, Rounds(rounds=2, warmup=0))
        assert (calls.count("a"), calls.count("b")) == (calls_of_it, 6)
        # It would keep graphs and their memory alive until the end of the run.
        assert found["a"].__traceback__ is None
        with pytest.raises(WrongResultError, match=f"^rank 1 of 2: a: wrong in call {calls_of_it}$"):
            context.record(found["a"])
        assert context.record(found["b"]).entry.baselines == ()
        assert [entry.name for entry in context.results.entries] == ["b"]


@on_ranks(2, pool="cpu_pool")
def test_what_is_faster_than_the_link_is_no_result_and_ranks_meet_before_every_round(rank: Rank) -> None:
    barriers: list[int] = []
    with context_on(rank) as context:
        traffic = LinkTraffic(nbytes=1e9, ceiling=Ceiling(name="a slow link", bytes_per_second=1.0))
        with pytest.raises(AboveCeilingError, match=r"work, eager: got .*a slow link"):
            context.run(case_of(traffic=traffic), Method.EAGER)
        assert context.results.entries == []
        barrier = context.timer.barrier
        counting = replace(context.timer, barrier=lambda: (barriers.append(1), barrier()))
        found = replace(context, timer=counting).run(case_of(), Method.EAGER)
        assert len(barriers) == len(found.timing.rounds) == 2


def test_thresholds_are_for_two_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    h200, others = "NVIDIA H200", ("NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3")
    held, not_held = [(h200, 2, 2), (h200, 4, 2)], [(h200, 1, 2), (h200, 8, 8), *((name, 2, 2) for name in others)]
    for name, gpus, ranks in (*held, *not_held):
        monkeypatch.setattr(torch.cuda, "device_count", Mock(return_value=gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", Mock(return_value=name))
        assert thresholds_hold(torch.device("cuda", 0), ranks) == ((name, gpus, ranks) in held)
