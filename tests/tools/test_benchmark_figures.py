"""Figures of the end-to-end benchmark and of the sweep, by hand from made-up times; formulas of memory."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from end_to_end import MODES, SHAPE, SMALLEST, context_on, few_rounds, layer_on, setup_of
from harness.context import BenchCase, Finding, Method
from harness.end_to_end import EndToEnd
from harness.layer import Pass
from harness.memory_use import memory_use
from harness.results import time_fields
from on_ranks import on_ranks
from profiles import Asked, profile
from schema import PairTimes
from sweep import PAIRS, over_best, point_of, run_sweep

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode, ModePair
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.profiler.agreement import WrongResultError, gathered
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.timing import Timing
from sonic_ep.testing import Rank
from sonic_ep.testing.oracle import LayerCall

SECONDS = {"grouped GEMMs": 2.0, "layer": 3.0, "given routing": 2.75, "same rows locally": 2.25}
SLOW_SECONDS = {"layer, beside these": 5.0, "one GPU": 4.0, "reference over nccl": 20.0}


def end_to_end(link: float | None = None, **micros: float) -> EndToEnd:
    """Made up, on 4 ranks: what the link takes, and by mode what was profiled by itself."""
    kinds = {("plan", ""): 1e5, ("dispatch", "all_to_all"): 2e5, ("combine", "rank_dedup"): 3e5}
    medians = {each: Mock(median_us=micros.get(each[0], taken)) for each, taken in kinds.items()}
    modes = [SimpleNamespace(kind=kind, mode=mode, spread=spread) for (kind, mode), spread in medians.items()]
    layer = Mock(config=MODES, **{"link_seconds.return_value": link, "context.group.world_size": 4})
    layer.context.results.environment.process_group = "nccl"
    return EndToEnd(layer=layer, setup=None, profile=SimpleNamespace(modes=modes), ep=None)  # type: ignore[arg-type]


def findings_of(seconds: dict[str, float], **more: Any) -> dict[str, Finding]:
    timings = {name: Timing(rounds=(taken,)) for name, taken in seconds.items()}
    given = {"shape": SHAPE, "run": None, "check": None, "other_inputs": None, **more}
    return {name: Finding.of(BenchCase(name=name, **given), Method.QUEUED, timings) for name in seconds}


def test_derived_by_hand() -> None:
    found = end_to_end(link=0.5).derived(Pass.STEP, findings_of({**SECONDS, **SLOW_SECONDS}))
    ratios = {"over_gemms": 1.5, "over_gemms_and_link": 1.2, "scaling_efficiency": 0.8, "over_reference": 0.25}
    micros = {"exposed_communication_us": 0.5e6, "link_us": 0.5e6}
    assert msgspec.to_builtins(found) == {"pass": "forward and backward", **micros, **ratios}
    less = end_to_end().derived(Pass.TRAINING, findings_of({"grouped GEMMs": 2.0, "layer": 3.0}))
    assert {name for name, value in msgspec.to_builtins(less).items() if value is not None} == {"pass", "over_gemms"}


def test_the_breakdown_by_hand() -> None:
    """A forward has one trip there and back, a backward one more; the plan is made once."""
    times = findings_of(SECONDS)
    forward = end_to_end().breakdown(Pass.TRAINING, times)
    assert forward.parts == {"plan": 1e5, "dispatch": 2e5, "grouped GEMMs": 2e6, "combine": 3e5, "rest": 4e5}
    step = end_to_end(dispatch=1e4, combine=1e5).breakdown(Pass.STEP, times)
    assert step.parts == {"plan": 1e5, "dispatch": 2e4, "grouped GEMMs": 2e6, "combine": 2e5, "rest": 6.8e5}
    # Parts that overlap in the layer take longer one by one.
    assert end_to_end(dispatch=9e5).breakdown(Pass.TRAINING, times).parts["rest"] == 0


def test_rates_by_hand() -> None:
    found = findings_of({**SECONDS, **SLOW_SECONDS}, flops=8e12)
    counted = replace(found["layer"], timing=Timing(rounds=(1.0, 2.0, 4.0)))
    timed, without = (end_to_end().timed(Pass.STEP, each) for each in (counted, replace(counted, flops=None)))
    assert (timed.tflop_per_s, timed.tflop_per_s_of_group) == (4.0, 16.0)
    assert (timed.median_us, timed.min_us, timed.max_us, timed.rounds) == (2e6, 1e6, 4e6, 3)
    assert (without.tflop_per_s, without.tflop_per_s_of_group) == (None, None)
    # What runs on one rank is no group.
    rates = [end_to_end().timed(Pass.STEP, finding) for finding in found.values()]
    ranks = {each.what: round((each.tflop_per_s_of_group or 0) / (each.tflop_per_s or 1)) for each in rates}
    assert ranks == {**dict.fromkeys(found, 4), "same rows locally": 1, "one GPU": 1}


# The worked example of sonic_ep.plan: W*C*K = 12 rows.
DOCUMENTED = Shape(tokens=3, hidden=8, intermediate=4, num_experts=4, top_k=2)


@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_formulas_of_a_layer(rank: Rank) -> None:
    # The docstring of sonic_ep.testing.memory_model has the first and the last: 192 + 192 + 48 + 208, and 5120.
    formulas = {False: [640, 640, 928, 696, 5120], True: [448, 640, 736, 984, 5632]}
    with layer_on(rank, DOCUMENTED) as layer:
        for again, expected in formulas.items():
            config = replace(MODES, redispatch_x_in_backward=again)
            with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=DOCUMENTED.tokens) as ep:
                found = memory_use(layer.given_routing(), layer.shape, ep, backward=True)
            assert [(use.measured_bytes, use.formula_bytes) for use in found] == [(None, nbytes) for nbytes in expected]


A2A, DEDUP = (ModePair(dispatch=DispatchMode(name), combine=CombineMode(name)) for name in ("all_to_all", "rank_dedup"))
PASSES = (Pass.TRAINING, Pass.STEP)
TRAINING, STEP = (which.value for which in PASSES)


def test_a_point_by_hand() -> None:
    """All pairs take 4 s in a forward and 8 s with a backward, but for those named here. Picked: A2A."""
    other = ModePair(dispatch=DispatchMode.ALL_GATHER, combine=CombineMode.ALL_TO_ALL)
    seconds = {**dict.fromkeys(product(PASSES[:1], PAIRS), 4.0), **dict.fromkeys(product(PASSES[1:], PAIRS), 8.0)}
    seconds |= {(Pass.TRAINING, other): 2.0, (Pass.STEP, A2A): 6.0}
    times = [
        PairTimes(**vars(pair), pass_name=which.value, how="queued", **time_fields(Timing(rounds=(taken,) * 3)))
        for (which, pair), taken in seconds.items()
    ]
    found = replace(profile(Asked()), config=EPConfig(A2A.dispatch, A2A.combine))
    made_up = point_of(setup_of({"routing": "skewed"}, 1, "reference", SHAPE), found, times, DEDUP)
    assert (made_up.picked, made_up.predicted) == (A2A, DEDUP)
    assert made_up.over_best == {TRAINING: 2.0, STEP: 1.0}
    assert made_up.predicted_over_best == over_best(made_up.pairs, DEDUP) == {TRAINING: 2.0, STEP: 1.3333}
    assert (made_up.shape.tokens, made_up.routing, len(made_up.pairs)) == (7, "skewed", 18)


@pytest.mark.thorough
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
