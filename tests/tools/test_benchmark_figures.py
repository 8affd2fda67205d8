"""Figures of the end-to-end benchmark and of the sweep, by hand from made-up times; memory beside its formulas."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from end_to_end import MODES, SHAPE, SMALLEST, context_on, few_rounds, layer_on, setup_of
from harness.context import BenchCase, Finding, Method
from harness.end_to_end import EndToEnd, time_lines
from harness.layer import Pass
from harness.memory_use import memory_use
from harness.results import time_fields
from on_ranks import on_ranks
from schema import PairTimes
from sweep import MOST_SLOTS_OF_GRAPHS, PAIRS, method_of, over_best, point_line, point_of, run_sweep

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode, ModePair
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.profiler import NetworkProfiler
from sonic_ep.profiler.agreement import WrongResultError, gathered
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.timing import Timing
from sonic_ep.testing import Rank, RankPool
from sonic_ep.testing.layer_problem import LayerProblem
from sonic_ep.testing.oracle import LayerCall, RoutedCall

REFERENCE = "reference over nccl"
SECONDS = {"grouped GEMMs": 2.0, "layer": 3.0, "given routing": 2.75, "same rows locally": 2.25}
SLOW_SECONDS = {"layer, beside these": 5.0, "one GPU": 4.0, REFERENCE: 20.0}
ALLOCATED_BYTES = 512
# Received rows, hidden, scores, seven fields of the plan, and y.
MOST_SAVED_TENSORS = 11


def end_to_end(link: float | None, world_size: int = 4, **micros: float) -> EndToEnd:
    """Made up: what the link takes, and by mode what was profiled by itself."""
    found = {"plan": 1e5, "all_to_all": 2e5, "rank_dedup": 3e5, **micros}
    kinds = {"plan": "plan", "all_to_all": "dispatch", "rank_dedup": "combine"}
    modes = [
        SimpleNamespace(kind=kinds[name], mode="" if name == "plan" else name, spread=SimpleNamespace(median_us=taken))
        for name, taken in found.items()
    ]
    results = SimpleNamespace(environment=SimpleNamespace(process_group="nccl"))
    context = SimpleNamespace(results=results, group=SimpleNamespace(world_size=world_size))
    layer = SimpleNamespace(context=context, config=MODES, link_seconds=lambda modes, which: link)
    return EndToEnd(layer=layer, setup=None, profile=SimpleNamespace(modes=modes), ep=None)  # type: ignore[arg-type]


def findings_of(seconds: dict[str, float], **more: Any) -> dict[str, Finding]:
    timings = {name: Timing(rounds=(taken,)) for name, taken in seconds.items()}
    given = {"shape": SHAPE, "run": None, "check": None, "other_inputs": None, **more}
    return {name: Finding.of(BenchCase(name=name, **given), Method.QUEUED, timings) for name in seconds}


def test_derived_by_hand() -> None:
    found = end_to_end(link=0.5).derived(Pass.STEP, findings_of({**SECONDS, **SLOW_SECONDS}))
    assert msgspec.to_builtins(found) == {
        "pass": "forward and backward",
        "exposed_communication_us": 0.5e6,
        "link_us": 0.5e6,
        "over_gemms": 1.5,
        "over_gemms_and_link": 1.2,
        "scaling_efficiency": 0.8,
        "over_reference": 0.25,
    }
    less = end_to_end(link=None).derived(Pass.TRAINING, findings_of({"grouped GEMMs": 2.0, "layer": 3.0}))
    assert {name for name, value in msgspec.to_builtins(less).items() if value is not None} == {"pass", "over_gemms"}


def test_the_breakdown_by_hand() -> None:
    """A forward has one trip there and back, a backward one more; the plan is made once."""
    times = findings_of(SECONDS)
    forward = end_to_end(link=None).breakdown(Pass.TRAINING, times)
    assert forward.parts == {"plan": 1e5, "dispatch": 2e5, "grouped GEMMs": 2e6, "combine": 3e5, "rest": 4e5}
    step = end_to_end(link=None, all_to_all=1e4, rank_dedup=1e5).breakdown(Pass.STEP, times)
    assert step.parts == {"plan": 1e5, "dispatch": 2e4, "grouped GEMMs": 2e6, "combine": 2e5, "rest": 6.8e5}
    # Parts that overlap in the layer take longer one by one.
    over = end_to_end(link=None, all_to_all=9e5).breakdown(Pass.TRAINING, times)
    assert over.parts["rest"] == 0


def test_rates_by_hand() -> None:
    (counted,) = findings_of({"layer": 2.0}, flops=8e12).values()
    (uncounted,) = findings_of({"layer": 2.0}).values()
    counted = replace(counted, timing=Timing(rounds=(1.0, 2.0, 4.0)))
    timed, without = (end_to_end(link=None).timed(Pass.STEP, found) for found in (counted, uncounted))
    assert (timed.tflop_per_s, timed.tflop_per_s_of_group) == (4.0, 16.0)
    assert (timed.median_us, timed.min_us, timed.max_us, timed.rounds) == (2e6, 1e6, 4e6, 3)
    assert (without.tflop_per_s, without.tflop_per_s_of_group) == (None, None)
    lines = time_lines([timed, without])
    assert lines[1].split()[-4:] == ["2000.000", "120.0%", "4.00", "16.00"]
    assert lines[2].split()[-2:] == ["-", "-"]
    # What runs on one rank is no group.
    found = findings_of({**SECONDS, **SLOW_SECONDS}, flops=1e12)
    rates = [end_to_end(link=None).timed(Pass.STEP, finding) for finding in found.values()]
    ranks = {each.what: round((each.tflop_per_s_of_group or 0) / (each.tflop_per_s or 1)) for each in rates}
    assert ranks == {**dict.fromkeys(found, 4), "same rows locally": 1, "one GPU": 1}


# The worked example of sonic_ep.plan: W*C*K = 12 rows.
DOCUMENTED = Shape(tokens=3, hidden=8, intermediate=4, num_experts=4, top_k=2)


@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_formulas_of_a_layer(rank: Rank) -> None:
    names = ["saved activations", "peak of forward, inference", "peak of forward, training", "peak of backward"]
    # The docstring of sonic_ep.testing.memory_model has the first and the last: 192 + 192 + 48 + 216, and 3584.
    formulas = {False: [648, 648, 936, 696, 3584], True: [456, 648, 744, 984, 4096]}
    with layer_on(rank, DOCUMENTED) as layer:
        for again, expected in formulas.items():
            config = replace(MODES, redispatch_x_in_backward=again)
            with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=DOCUMENTED.tokens) as ep:
                found = memory_use(layer.given_routing(), layer.shape, ep, backward=True)
            assert all(use.measured_bytes is None for use in found)
            assert {use.what: use.formula_bytes for use in found} == dict(
                zip([*names, "shared memory"], expected, strict=True)
            )


# Rows, tokens and weights are multiples of 2 MiB, as are the allocator's segments.
LARGE = Shape(tokens=2048, hidden=1024, intermediate=512, num_experts=16, top_k=4)


@on_ranks(2, pool="cuda_pool")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_what_is_measured_is_the_formula(rank: Rank, again: bool) -> None:
    config = replace(MODES, redispatch_x_in_backward=again)
    with (
        context_on(rank) as context,
        ExpertParallel(backend="fast", config=config, max_tokens_per_rank=LARGE.tokens) as ep,
    ):
        random = LayerProblem(shape=LARGE, group=context.group, device=rank.device).call
        token_T = torch.arange(LARGE.tokens, device=rank.device)
        call = RoutedCall(
            x=random.x,
            dy=random.dy,
            experts=random.experts,
            topk_idx=(token_T[:, None] * 5 + torch.arange(LARGE.top_k, device=rank.device) * 3) % LARGE.num_experts,
            topk_scores=torch.rand((LARGE.tokens, LARGE.top_k), device=rank.device).requires_grad_(),
        )
        found = memory_use(call, LARGE, ep, backward=True)
        assert gathered(context.group, found) == [found] * 2
    saved, *peaks, shared = found
    # A product takes about 100 KB for itself while it runs.
    for use, more in [(saved, MOST_SAVED_TENSORS * ALLOCATED_BYTES), *((peak, 2**19) for peak in peaks)]:
        assert 0 <= (use.measured_bytes or 0) - (use.formula_bytes or 0) <= more, use
        assert use.formula_bytes is not None
    assert shared.measured_bytes is None


A2A, DEDUP = (ModePair(dispatch=DispatchMode(name), combine=CombineMode(name)) for name in ("all_to_all", "rank_dedup"))
PASSES = (Pass.TRAINING, Pass.STEP)
TRAINING, STEP = (which.value for which in PASSES)


def profile_of_sweep(rank: Rank) -> Any:
    with ExpertParallel(backend="reference") as ep:
        profiler = NetworkProfiler(ep, cache=None, rounds=1)
        return profiler.profile(tokens=2, hidden=8, top_k=1, num_experts=2, dtype=torch.bfloat16)


def test_a_point_by_hand(cpu_pool: RankPool) -> None:
    """All pairs take 4 s in a forward and 8 s with a backward, but for those named here. Picked: A2A."""
    other = ModePair(dispatch=DispatchMode.ALL_GATHER, combine=CombineMode.ALL_TO_ALL)
    seconds = {(Pass.TRAINING, other): 2.0, (Pass.STEP, A2A): 6.0}
    times = [
        PairTimes(
            dispatch=pair.dispatch,
            combine=pair.combine,
            pass_name=which.value,
            how="queued",
            **time_fields(Timing(rounds=(seconds.get((which, pair), otherwise),) * 3)),
        )
        for which, otherwise in zip(PASSES, (4.0, 8.0), strict=True)
        for pair in PAIRS
    ]
    (profile,) = cpu_pool.run(profile_of_sweep, world_size=1)
    profile = replace(profile, config=EPConfig(A2A.dispatch, A2A.combine))
    made_up = point_of(setup_of({"routing": "skewed"}, 1, "reference", SHAPE), profile, times, DEDUP)
    assert (made_up.picked, made_up.predicted) == (A2A, DEDUP)
    assert made_up.over_best == {TRAINING: 2.0, STEP: 1.0}
    assert made_up.predicted_over_best == over_best(made_up.pairs, DEDUP) == {TRAINING: 2.0, STEP: 1.3333}
    assert point_line(made_up) == (
        "T=7      K=2  skewed  ; picked all_to_all+all_to_all: 2.000/1.000 of the best; "
        "predicted rank_dedup+rank_dedup: 2.000/1.333 of the best; best all_to_all+all_to_all 6000.000 ms"
    )
    document = msgspec.to_builtins(made_up)
    assert document["shape"] == {"T": 7, "H": 16, "I": 8, "E": 12, "K": 2, "dtype": "bfloat16"}
    assert document["routing"] == "skewed"
    assert len(document["pairs"]) == 18
    first = {"dispatch": "all_gather", "combine": "all_to_all", "pass": TRAINING, "how": "queued"}
    micros = dict.fromkeys(("median_us", "p10_us", "p90_us", "min_us", "max_us"), 2e6)
    assert document["pairs"][0] == {**first, "rounds": 3, **micros}


@on_ranks(2, pool="cpu_pool")
def test_a_sweep_and_one_with_a_wrong_pair_that_says_nothing_of_the_point(rank: Rank) -> None:
    """Rank 1 gets every output of one dispatch mode wrong."""
    said: list[str] = []
    setups = [setup_of(setting, rank.world_size, "reference", SMALLEST) for setting in ({}, {"routing": "one_rank"})]
    honest = LayerCall.run

    def wrong(self: LayerCall, ep: ExpertParallel, **which: bool) -> Any:
        found, fault = honest(self, ep, **which), which == {"training": True, "backward": False}
        fault = fault and rank.rank == 1 and ep.config.dispatch is DispatchMode.RANK_DEDUP
        return {**found, "y": -found["y"]} if fault else found

    with pytest.MonkeyPatch.context() as patched, context_on(rank) as context:
        few_rounds(patched)
        first, both = (msgspec.to_builtins(document) for document in run_sweep(setups, context, said.append))
        assert len(said) == 2
        patched.setattr(LayerCall, "run", wrong)
        with pytest.raises(WrongResultError, match=r"^rank 1 of 2: rank_dedup, all_to_all: y: "):
            list(run_sweep(setups[:1], context, said.append))
        assert len(said) == 2
        assert gathered(context.group, (first, both, said)) == [(first, both, said)] * 2
    assert both["kind"] == "sweep"
    assert first["points"] == both["points"][:1]
    assert [each["routing"] for each in both["points"]] == ["uniform", "one_rank"]
    for each in both["points"]:
        names = [(pair["pass"], pair["dispatch"], pair["combine"]) for pair in each["pairs"]]
        assert names == [(w.value, pair.dispatch.value, pair.combine.value) for w in PASSES for pair in PAIRS]
        assert all(pair["median_us"] > 0 and pair["how"] == "eager" for pair in each["pairs"])
        assert min(each["over_best"].values()) >= 1
        chosen = choose_modes(EPConfig(), Workload(world_size=2, top_k=1, num_experts=2))
        assert each["predicted"] == {"dispatch": chosen.dispatch.value, "combine": chosen.combine.value}
        assert each["picked"].items() <= each["profile"]["config"].items()


def test_how_a_pair_is_launched() -> None:
    gpu = SimpleNamespace(on_gpu=True, behind_work=Method.QUEUED)
    cpu = SimpleNamespace(on_gpu=False, behind_work=Method.EAGER)
    small = replace(SHAPE, tokens=MOST_SLOTS_OF_GRAPHS // 2, top_k=2)
    large = replace(small, tokens=small.tokens + 1)
    assert method_of(gpu, "fast", small) is Method.GRAPH
    assert method_of(gpu, "fast", large) is method_of(gpu, "reference", small) is Method.QUEUED
    assert method_of(cpu, "fast", small) is Method.EAGER
