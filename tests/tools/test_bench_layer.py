"""The bench of the layer: works that take turns, what they are held against, and what counts as a right answer."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sonic_ep import CombineMode, DispatchMode, EPConfig
from sonic_ep.benchmark import arena, layer_problem, oracle, results, workload
from sonic_ep.benchmark.layer import LayerUnderTest, Pass
from sonic_ep.config import ModePair
from sonic_ep.cost import LinkCeilings
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler.timing import Timing
from sonic_ep.testing import Rank, RankPool, timing

BENCH = Path(__file__).parents[2] / "bench"


def suite_of_the_layer() -> Any:
    """The module of the suite; suites are no package."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("bench_layer")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture
def suite() -> Any:
    return suite_of_the_layer()


def arena_of(ceilings: LinkCeilings | None = None, **given: Any) -> Any:
    """An arena on the CPU, where times mean nothing."""
    place = {"group": resolve_group(None), "device": torch.device("cpu"), "workspace": None, "fence": None, **given}
    found = results.Results(environment={}, ceilings=ceilings)
    return arena.SuiteArena(sizes=workload.SMOKE, results=found, **place)


def seconds_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds take 1, 2, 3 and so on seconds, in the order in which they run."""

    def measure(function: Callable[[], object], *, rounds: int, warmup: int, **_: Any) -> Timing:
        for _ in range(rounds + warmup):
            function()
        return Timing(rounds=tuple(float(place + 1) for place in range(rounds)))

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(arena, "meeting", lambda *_, **__: None)


def work_of(name: str, calls: list[str], wrong_from: int | None = None, **more: Any) -> Any:
    """Work that notes its calls in ``calls``, and is wrong from one of its own on."""

    def function() -> int:
        calls.append(name)
        return calls.count(name)

    def check(got: int) -> None:
        if wrong_from is not None and got >= wrong_from:
            raise AssertionError(f"{name} is wrong in call {got}")

    return arena.Work(name=name, shape=workload.SMOKE.small, function=function, check=check, **more)


def test_works_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_in_order(monkeypatch)
    calls: list[str] = []
    works = [work_of(name, calls) for name in "abc"]
    found = arena_of().alternate(works, arena.How.EAGER, arena.Rounds(timed=3, warmup=1))
    # Each is proved by two calls before and two behind.
    assert "".join(calls) == "aabbcc" + "abc" * 4 + "aabbcc"
    assert {name: entry.timing.rounds for name, entry in found.items()} == {
        "a": (1.0, 4.0, 7.0),
        "b": (2.0, 5.0, 8.0),
        "c": (3.0, 6.0, 9.0),
    }


# Two calls prove it, two rounds are timed, two calls prove it again.
@pytest.mark.parametrize(("wrong_from", "calls_of_it"), [(1, 2), (3, 4), (5, 6)], ids=["before", "timed", "after"])
def test_what_is_wrong_leaves_the_others_their_turns(
    monkeypatch: pytest.MonkeyPatch, wrong_from: int, calls_of_it: int
) -> None:
    seconds_in_order(monkeypatch)
    calls: list[str] = []
    here = arena_of()
    beside = (arena.Beside(name="a", text="a", most=1.0),)
    works = [work_of("a", calls, wrong_from), work_of("b", calls, beside=beside)]
    found = here.alternate(works, arena.How.EAGER, arena.Rounds(timed=2, warmup=0))
    assert (calls.count("a"), calls.count("b")) == (calls_of_it, 6)
    # It would keep graphs and their memory alive until the end of the run.
    assert found["a"].__traceback__ is None
    with pytest.raises(arena.WrongError, match=f"rank 0: a is wrong in call {calls_of_it}"):
        here.record(found["a"])
    assert here.record(found["b"]).against == ()
    assert [entry.name for entry in here.results.entries] == ["b"]


def test_bars_are_of_the_medians_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians 3 and 4 s: with 1 s of link beside them 4 s, of which 1.0 times is met and 0.9 times is not."""
    seconds_in_order(monkeypatch)
    for most, met in ((1.0, True), (0.9, False)):
        beside = arena.Beside(name="a", text="products and bytes", link=1.0, most=most)
        works = [work_of("a", []), work_of("b", [], beside=(beside,), flops=8e12)]
        here = arena_of()
        found = here.alternate(works, arena.How.EAGER, arena.Rounds(timed=3, warmup=0))
        entry = here.record(found["b"])
        said = entry.as_json()
        assert said["against"] == [
            {"what": "products and bytes", "measured_us": 3e6, "link_us": 1e6, "sum_us": 4e6, "ratio": 1.0}
        ]
        assert (said["tflop_per_s"], said["bar_us"], said["met"]) == (2.0, most * 4e6, met)
        line = here.results.table()[-1]
        assert f"{'met' if met else 'MISSED'}: at most {most:g} times products and bytes" in line
        assert line.endswith("1.000 times products and bytes")


def layer_of(**more: Any) -> Any:
    """The smoke size on one rank."""
    shape = replace(workload.SMOKE.layer, **more)
    return layer_problem.LayerProblem(shape=shape, group=resolve_group(None), device=torch.device("cpu"))


def outcomes() -> tuple[Any, Any]:
    """The oracle's in bf16 and in fp32."""
    problem = layer_of()
    return tuple(oracle.dense_outcome(problem, dtype, at_a_time=6) for dtype in (torch.bfloat16, torch.float32))


def test_every_gradient_is_held_against_the_truth() -> None:
    plain, truth = outcomes()
    assert oracle.faults_of(plain, truth, plain) == ()
    for name in ("y", "x_grad", "router_w_grad", "w1_grad", "w2_grad"):
        bad = replace(plain, **{name: getattr(plain, name) * 1.1})
        (fault,) = oracle.faults_of(bad, truth, plain)
        assert fault.startswith(f"{name}: relative error")


def test_routers_have_no_near_ties() -> None:
    problem = layer_of(tokens=4000)
    logits = problem.inputs.x.float() @ problem.inputs.router_w.float().t()
    largest = logits.detach().sort(dim=1, descending=True).values
    top_k = problem.shape.top_k
    assert float((largest[:, top_k - 1] - largest[:, top_k]).min()) >= 1e-3
    # Drawn without a second thought there are some.
    drawn = torch.randn(4000, problem.shape.hidden, generator=torch.Generator().manual_seed(100_000)).bfloat16()
    assert bool(layer_problem.near_ties(drawn.float() @ problem.inputs.router_w.float().t(), top_k).any())


def counted_on_ranks(rank: Rank) -> tuple[list[float], list[float], float]:
    """Flops and link seconds of the smoke size, as the bench counts them; and the rows of this rank."""
    ceilings = LinkCeilings(copy_engine_in=1.0, copy_engine_out=1.0, read=2.0, write=4.0)
    group = resolve_group(None)
    here = arena_of(ceilings, group=group, device=rank.device)
    problem = layer_problem.LayerProblem(shape=here.sizes.layer, group=group, device=rank.device)
    chosen_TK = torch.tensor([[0, 1], [4, 5], [0, 4], [2, 3], [2, 3], [1, 2]])
    routed = workload.Problem(shape=problem.shape, group=group, device=rank.device, chosen_TK=chosen_TK)
    layer = LayerUnderTest(arena=here, oracle=oracle.Oracle(problem=problem), backend="reference", config=EPConfig())
    vars(layer)["routed"] = routed
    passes = (Pass.INFERENCE, Pass.STEP)
    flops = [layer.flops(which) for which in passes]
    modes = [
        ModePair(dispatch=mode, combine=CombineMode.RANK_DEDUP)
        for mode in (DispatchMode.RANK_DEDUP, DispatchMode.ALL_GATHER)
    ]
    seconds = [layer.link_seconds(mode, which) for mode in modes for which in passes]
    return flops, seconds, float(routed.valid_rows)


def test_flops_and_bytes_by_hand(cpu_pool: RankPool) -> None:
    """Both ranks choose alike: 5 tokens have experts of rank 0, and 2 of rank 1."""
    found = cpu_pool.run(counted_on_ranks, world_size=2)
    rows = sum(rows for _, _, rows in found) / 2
    assert rows == 12
    forward = 2 * rows * 16 * (2 * 8 + 8)
    row_bytes = 16 * 2
    # Rank 0 receives 5 tokens and sends home as many sums; rank 1 receives 2. The busier one counts.
    pairs = 5 * row_bytes
    back = pairs / 4.0
    once = [pairs / 2.0 + back, 6 * row_bytes / 1.0 + back]
    for flops, seconds, _ in found:
        assert flops == [forward, 3 * forward]
        assert seconds == pytest.approx([once[0], 2 * once[0], once[1], 2 * once[1]])


def test_what_takes_turns(suite: Any) -> None:
    layer, how = suite, arena.How
    gpu = SimpleNamespace(on_gpu=True)
    step, forward = Pass.STEP, Pass.INFERENCE
    assert layer.together_with(gpu, layer.AGAIN, step, how.QUEUED) == layer.SETTINGS
    assert layer.together_with(gpu, layer.AGAIN, step, how.GRAPH) == (layer.BASE, layer.AGAIN)
    assert not any(other.again for other in layer.together_with(gpu, layer.BASE, forward, how.QUEUED))
    for setting, which, way in ((layer.SYNC, step, how.GRAPH), (layer.AGAIN, forward, how.QUEUED)):
        with pytest.raises(pytest.skip.Exception):
            layer.together_with(gpu, setting, which, way)


def spoiled_layers(rank: Rank) -> tuple[list[str], list[str]]:
    """One rank's gradient of w1 is doubled in settings that gather x again: what is wrong, and what is recorded."""
    suite = suite_of_the_layer()
    from sonic_ep.fast.workspace import Workspace

    group = resolve_group(None)
    workspace = Workspace(group, rank.device)
    here = arena_of(
        group=group, device=rank.device, workspace=workspace, barrier_before_write=workspace.barrier_before_write
    )
    step = layer_problem.LayerProblem.forward_backward

    def doubled(self: Any, ep: Any, inputs: Any) -> Any:
        found = step(self, ep, inputs)
        poison = ep.config.redispatch_x_in_backward and rank.rank == 1
        return replace(found, w1_grad=found.w1_grad * 2) if poison else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_problem.LayerProblem, "forward_backward", doubled)
        bout = suite.Bout.of_layer(here, layer_problem.LayerOptions())
        found = bout.of((suite.BASE, suite.AGAIN), Pass.STEP, arena.How.EAGER)
    workspace.close()
    wrong = [str(entry) for entry in found.values() if isinstance(entry, arena.WrongError)]
    return wrong, [entry.name for entry in found.values() if isinstance(entry, results.Entry)]


@pytest.mark.fast
def test_a_wrong_gradient_is_found_and_the_rest_is_timed(cpu_pool: RankPool) -> None:
    for wrong, right in cpu_pool.run(spoiled_layers, world_size=2):
        assert len(wrong) == 1
        assert wrong[0].startswith("rank 1: layer all_to_all, rank_dedup, redispatch: forward and backward: w1_grad: ")
        assert right == [
            "grouped_mm of a layer: forward and backward",
            "layer all_to_all, rank_dedup: forward and backward",
        ]
