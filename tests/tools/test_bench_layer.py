"""The suite of the layer: what takes turns, what it costs at the least, and a wrong gradient."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from end_to_end import results_of
from harness.context import SMOKE, Finding, Method, SuiteContext
from harness.layer import LayerUnderTest, Pass
from on_ranks import on_ranks

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.config import ModePair
from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler.agreement import WrongResultError, gathered
from sonic_ep.profiler.problem import RoutingProblem
from sonic_ep.profiler.timing import RoundTimer
from sonic_ep.testing import Rank
from sonic_ep.testing.layer_problem import LayerOptions, LayerProblem
from sonic_ep.testing.oracle import LayerCall


def suite() -> Any:
    """The module of the suite, whose assertions pytest shall not rewrite here."""
    return importlib.import_module("bench_layer")


def context_of(rank: Rank, bandwidth: LinkBandwidth | None = None, workspace: Any = None) -> SuiteContext:
    """A context of the suites on the CPU."""
    barrier = workspace.barrier_before_write if workspace else lambda: None
    timer = RoundTimer(group=resolve_group(None), device=rank.device, barrier=barrier)
    return SuiteContext(timer=timer, results=results_of(bandwidth), workspace=workspace, sizes=SMOKE)


@on_ranks(2, pool="cpu_pool")
def test_flops_and_bytes_by_hand(rank: Rank) -> None:
    """Both ranks choose alike: 5 tokens have experts of rank 0, and 2 of rank 1."""
    context = context_of(rank, LinkBandwidth(copy_engine_in=1.0, copy_engine_out=1.0, read=2.0, write=4.0))
    place = {"shape": SMOKE.layer, "group": context.group, "device": rank.device}
    layer = LayerUnderTest.of(context, LayerProblem(**place), "reference", EPConfig())
    chosen_TK = torch.tensor([[0, 1], [4, 5], [0, 4], [2, 3], [2, 3], [1, 2]])
    vars(layer)["routing"] = RoutingProblem(**place, routing=chosen_TK)
    passes = (Pass.INFERENCE, Pass.STEP)
    seconds = [
        layer.link_seconds(ModePair(dispatch=mode, combine=CombineMode.RANK_DEDUP), which)
        for mode in (DispatchMode.RANK_DEDUP, DispatchMode.ALL_GATHER)
        for which in passes
    ]
    assert sum(gathered(context.group, int(layer.routing.valid_rows))) / 2 == 12
    forward = 2 * 12 * 16 * (2 * 8 + 8)
    row_bytes = 16 * 2
    # Rank 0 receives 5 tokens and sends back as many sums; rank 1 receives 2. The busier one counts.
    pairs = 5 * row_bytes
    back = pairs / 4.0
    once = [pairs / 2.0 + back, 6 * row_bytes / 1.0 + back]
    assert [layer.flops[which] for which in passes] == [forward, 3 * forward]
    assert seconds == pytest.approx([once[0], 2 * once[0], once[1], 2 * once[1]])


def test_what_takes_turns() -> None:
    layer, gpu = suite(), SimpleNamespace(on_gpu=True)
    step, forward = Pass.STEP, Pass.INFERENCE
    assert layer.together_with(gpu, layer.AGAIN, step, Method.QUEUED) == layer.SETTINGS
    assert layer.together_with(gpu, layer.AGAIN, step, Method.GRAPH) == (layer.BASE, layer.AGAIN)
    assert not any(other.again for other in layer.together_with(gpu, layer.BASE, forward, Method.QUEUED))
    for setting, which, method in ((layer.SYNC, step, Method.GRAPH), (layer.AGAIN, forward, Method.QUEUED)):
        with pytest.raises(pytest.skip.Exception):
            layer.together_with(gpu, setting, which, method)


@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_a_wrong_gradient_is_found_and_the_rest_is_timed(rank: Rank) -> None:
    """One rank's gradient of w1 is doubled in settings that gather x again."""
    from sonic_ep.fast.workspace import Workspace

    layer, honest, workspace = suite(), LayerCall.run, Workspace(resolve_group(None), rank.device)

    def doubled(self: LayerCall, ep: ExpertParallel, **which: bool) -> Any:
        found = honest(self, ep, **which)
        poison = ep.config.redispatch_x_in_backward and rank.rank == 1
        return {**found, "dw1": found["dw1"] * 2} if poison else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerCall, "run", doubled)
        batches = layer.LayerBatches.of(context_of(rank, workspace=workspace), LayerOptions())
        found = batches.measured((layer.BASE, layer.AGAIN), Pass.STEP, Method.EAGER)
    workspace.close()
    (wrong,) = [str(each) for each in found.values() if isinstance(each, WrongResultError)]
    assert wrong.startswith("rank 1 of 2: layer all_to_all, rank_dedup, redispatch: forward and backward: dw1: ")
    right = [each.entry.name for each in found.values() if isinstance(each, Finding)]
    step = ": forward and backward"
    assert right == [f"grouped_mm of a layer{step}", f"layer all_to_all, rank_dedup{step}"]
