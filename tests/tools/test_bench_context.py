"""How a case of the suites is checked and timed, what it is held against, and how it is recorded."""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from end_to_end import SMALLEST, context_on, results_of
from harness.context import (
    ROUNDS_OF_LARGE,
    ROUNDS_OF_SMALL,
    BenchCase,
    BenchContext,
    Comparison,
    Finding,
    Method,
    Rounds,
    other_inputs,
    thresholds_hold,
)
from harness.results import LinkTraffic
from on_ranks import on_ranks

from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler.agreement import WrongResultError
from sonic_ep.profiler.measuring import KeepLast
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.timing import AboveCeilingError, Ceiling, RoundTimer, Timing
from sonic_ep.testing import Rank, assert_bitwise

LARGEST_NUMBER = torch.finfo(torch.bfloat16).max
CEILINGS = LinkBandwidth(copy_engine_in=1e9, copy_engine_out=2e9, read=3e9, write=4e9)


def case_of(name: str = "work", calls: list[str] | None = None, wrong_from: float = math.inf, **more: Any) -> BenchCase:
    """A case that notes its calls in ``calls``, and is wrong from one of its own on."""
    noted: list[str] = [] if calls is None else calls

    def run() -> int:
        noted.append(name)
        return noted.count(name)

    def check(got: int) -> None:
        if got >= wrong_from:
            raise AssertionError(f"wrong in call {got}")

    given = {"shape": SMALLEST, "run": run, "check": check, "other_inputs": other_inputs, **more}
    return BenchCase(name=name, **given)


def context_of(device: str = "cpu", bandwidth: LinkBandwidth | None = None, **more: Any) -> BenchContext:
    """A context of one rank."""
    group = EPGroup(rank=0, world_size=1)
    timer = RoundTimer(group=group, device=torch.device(device), barrier=lambda: None)
    return BenchContext(timer=timer, results=replace(results_of(bandwidth), **more))


@pytest.fixture
def seconds_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds take 1, 2, 3 and so on seconds, in the order in which they run."""

    def seconds(self: RoundTimer, functions: Sequence[Callable[[], object]]) -> list[float]:
        for function in functions:
            function()
        return [float(place + 1) for place in range(len(functions))]

    monkeypatch.setattr(RoundTimer, "_seconds_on_host", seconds)


def test_the_last_round_alone_is_kept() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert [before for before in made if before() is not None] == [], "an earlier round takes memory"
        result = torch.tensor([float(len(made))])
        made.append(weakref.ref(result))
        return result

    keep = KeepLast(make, 5)
    for _ in range(4):
        keep()
        assert keep.result is None
    keep()
    assert keep.result.tolist() == [4.0]
    assert made[-1]() is keep.result


def test_other_inputs_are_others_and_then_the_very_same() -> None:
    floats = torch.tensor([[0.0, -0.0], [float("nan"), float("inf")], [LARGEST_NUMBER, 1e-40]], dtype=torch.bfloat16)
    inputs = [floats, torch.tensor([3, 5, -1]), torch.ones(0, 4), torch.tensor([2.0])]
    before, places = [tensor.clone() for tensor in inputs], [tensor.data_ptr() for tensor in inputs]
    with other_inputs(*inputs):
        assert_bitwise(inputs[0], -before[0][[2, 0, 1]], "rows one further, with the other sign")
        assert inputs[1].tolist() == [-1, 3, 5]
        assert inputs[3].tolist() == [-2.0]
    for tensor, right, place in zip(inputs, before, places, strict=True):
        assert_bitwise(tensor, right, "an input")
        assert tensor.data_ptr() == place


def test_inputs_that_overlap_come_back_and_one_given_twice_is_turned_once() -> None:
    given = torch.arange(1.0, 7.0).view(3, 2).requires_grad_()
    before, part = given.detach().clone(), given.detach()[1:]
    with other_inputs(given, given, part):
        assert given.tolist() == [[-5.0, -6.0], [3.0, 4.0], [1.0, 2.0]]
    assert_bitwise(given.detach(), before, "overlapping inputs")


def test_inputs_come_back_after_an_error_and_where_one_cannot_be_turned() -> None:
    given, repeated = torch.tensor([1.0, 2.0]), torch.tensor([3.0]).expand(2)
    with pytest.raises(RuntimeError), other_inputs(given, repeated):
        pytest.fail("a tensor whose elements share memory was turned")
    with pytest.raises(ZeroDivisionError), other_inputs(given):
        _ = 1 / 0
    assert given.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("tokens", "method", "expected"),
    [
        (2**20, Method.EAGER, ROUNDS_OF_SMALL),
        (2**20, Method.QUEUED, ROUNDS_OF_LARGE),
        (2**20, Method.GRAPH, ROUNDS_OF_LARGE),
        (16, Method.QUEUED, ROUNDS_OF_SMALL),
    ],
)
def test_what_the_host_may_take_longer_for_has_more_rounds(
    tokens: int, method: Method, expected: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Rounds] = []

    def alternate(self: BenchContext, cases: Any, method: Method, rounds: Rounds) -> dict[str, WrongResultError]:
        asked.append(rounds)
        return {"work": WrongResultError("not run")}

    monkeypatch.setattr(BenchContext, "alternate", alternate)
    with pytest.raises(WrongResultError, match="not run"):
        context_of("cuda").run(case_of(shape=Shape(tokens=tokens, hidden=64, num_experts=8, top_k=2)), method)
    assert asked == [expected]


@pytest.mark.usefixtures("seconds_in_order")
def test_cases_take_turns() -> None:
    calls: list[str] = []
    cases = [case_of(name, calls) for name in "abc"]
    found = context_of().alternate(cases, Method.EAGER, Rounds(rounds=3, warmup=1))
    # Each is proved by two calls before and two behind.
    assert "".join(calls) == "aabbcc" + "abc" * 4 + "aabbcc"
    rounds = {"a": (1.0, 4.0, 7.0), "b": (2.0, 5.0, 8.0), "c": (3.0, 6.0, 9.0)}
    assert {name: finding.timing.rounds for name, finding in found.items()} == rounds


# Two calls prove it, two rounds are timed, two calls prove it again.
@pytest.mark.usefixtures("seconds_in_order")
@pytest.mark.parametrize(("wrong_from", "calls_of_it"), [(1, 2), (3, 4), (5, 6)], ids=["before", "timed", "after"])
def test_a_wrong_case_stops_no_other(wrong_from: int, calls_of_it: int) -> None:
    calls: list[str] = []
    context = context_of()
    cases = [
        case_of("a", calls, wrong_from),
        case_of("b", calls, compared_with=(Comparison(name="a", text="a", most=1.0),)),
    ]
    found = context.alternate(cases, Method.EAGER, Rounds(rounds=2, warmup=0))
    assert (calls.count("a"), calls.count("b")) == (calls_of_it, 6)
    # It would keep graphs and their memory alive until the end of the run.
    assert found["a"].__traceback__ is None
    with pytest.raises(WrongResultError, match=f"rank 0 of 1: a: wrong in call {calls_of_it}"):
        context.record(found["a"])
    assert context.record(found["b"]).entry.baselines == ()
    assert [entry.name for entry in context.results.entries] == ["b"]


@pytest.mark.usefixtures("seconds_in_order")
@pytest.mark.parametrize(("most", "met"), [(1.0, True), (0.9, False)])
def test_thresholds_are_of_the_medians_compared(most: float, met: bool) -> None:
    """Medians 3 and 4 s: with 1 s of link beside them 4 s, of which 1.0 times is met and 0.9 times is not."""
    against = Comparison(name="a", text="products and bytes", link=1.0, most=most)
    cases = [case_of("a"), case_of("b", compared_with=(against,), flops=8e12)]
    context = context_of()
    found = context.alternate(cases, Method.EAGER, Rounds(rounds=3, warmup=0))
    said = msgspec.to_builtins(context.record(found["b"]).entry)
    assert list(said["against"]) == [
        {"what": "products and bytes", "measured_us": 3e6, "link_us": 1e6, "sum_us": 4e6, "ratio": 1.0}
    ]
    assert (said["tflop_per_s"], said["bar_us"], said["met"]) == (2.0, most * 4e6, met)
    line = context.results.table()[-1]
    assert f"{'met' if met else 'MISSED'}: at most {most:g} times products and bytes" in line
    assert line.endswith("1.000 times products and bytes")


def traffic_of(**more: Any) -> LinkTraffic:
    """100 GB against a ceiling of 200 GB/s."""
    ceiling = Ceiling(name="the read ceiling", bytes_per_second=200e9)
    return LinkTraffic(nbytes=100e9, ceiling=ceiling, memory_rate=1000e9, **more)


def finding_of(seconds: float) -> Finding:
    """The traffic in ``seconds``, with the threshold of 80% of its ceiling."""
    case = case_of(traffic=traffic_of(), threshold=traffic_of().at_least(0.8))
    return Finding.of(case, Method.EAGER, {"work": Timing(rounds=(seconds,) * 3)})


def test_thresholds_are_times() -> None:
    for threshold in (traffic_of().at_least(0.8), traffic_of().at_most(1.25)):
        assert threshold is not None
        assert threshold.seconds == pytest.approx(0.625)
    assert (finding_of(0.6).entry.met, finding_of(0.7).entry.met) == (True, False)
    assert LinkTraffic(nbytes=1, ceiling=None).at_least(0.5) is None


def test_an_entry_as_json_and_in_the_table() -> None:
    entry = finding_of(0.7).entry
    found = msgspec.to_builtins(entry)
    assert found["shape"] == {"T": 2, "H": 8, "I": 8, "E": 2, "K": 1, "dtype": "bfloat16"}
    assert (found["gb_per_s"], found["percent"], found["met"], found["floor_us"]) == (142.86, 71.43, False, 500_000)
    line = context_of(entries=[entry]).results.table()[-1]
    assert "MISSED: at least 80% of the read ceiling" in line
    assert "500000.0 link" in line


def test_every_measured_rate_is_reported() -> None:
    results = context_of(bandwidth=CEILINGS, memory_rate=5e9).results
    expected = {"copy_engine_in": 1.0, "copy_engine_out": 2.0, "read": 3.0, "write": 4.0, "memory": 5.0}
    assert msgspec.to_builtins(results.suite)["rates_gb_per_s"] == expected
    assert "memory 5.0" in results.table()[0]
    alone = context_of(memory_rate=5e9).results
    assert alone.table()[:2] == ["no ceilings: no link between GPUs was measured", "rates in GB/s: memory 5.0"]


def test_the_floor_is_that_of_the_slower() -> None:
    assert traffic_of(memory_bytes=400e9).floor == (0.5, "link")
    assert traffic_of(memory_bytes=600e9).floor == (0.6, "memory")
    assert LinkTraffic(nbytes=1, ceiling=None).floor is None


# Two calls prove the case before it is timed, two rounds are timed, two calls prove it again.
@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize(("first_wrong", "calls"), [(1, 2), (3, 4), (5, 6)], ids=["before", "timed", "after"])
def test_what_is_wrong_on_one_rank_fails_on_all(rank: Rank, first_wrong: int, calls: int) -> None:
    made: list[str] = []
    with context_on(rank) as context:
        case = case_of("work", made, first_wrong if rank.rank == 1 else math.inf)
        with pytest.raises(WrongResultError) as wrong:
            context.run(case, Method.EAGER)
        assert str(wrong.value) == f"rank 1 of 2: work: wrong in call {calls}"
        assert (len(made), context.results.entries) == (calls, [])


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


@pytest.mark.parametrize(
    ("name", "gpus", "ranks", "expected"),
    [
        ("NVIDIA H200", 2, 2, True),
        ("NVIDIA H200", 4, 2, True),
        ("NVIDIA H200", 1, 2, False),
        ("NVIDIA H200", 8, 8, False),
        ("NVIDIA GH200 480GB", 2, 2, False),
        ("NVIDIA H100 80GB HBM3", 2, 2, False),
    ],
)
def test_thresholds_are_for_two_h200(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, ranks: int, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert thresholds_hold(torch.device("cuda", 0), ranks) == expected
