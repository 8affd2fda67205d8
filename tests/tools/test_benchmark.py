"""The end-to-end benchmark: complete where the layer is right, red and without a time where it is not."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import msgspec
import pytest
import torch
from end_to_end import MANY, SHAPE, SMALLEST, Kept, run_on_rank, said_before, watched_on_rank
from harness.layer import Pass
from harness.layer_report import DERIVED, accuracy_lines
from schema import Layer

from sonic_ep import CombineMode, DispatchMode, ExpertParallel
from sonic_ep.config import ScoreOrder
from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler import WrongResultError
from sonic_ep.profiler.report import EVERY_MODE, EVERY_PAIR
from sonic_ep.testing import Rank, RankPool
from sonic_ep.testing.cases import pairwise
from sonic_ep.testing.oracle import LayerCall

OPTIONS: dict[str, tuple[Any, ...]] = {
    "dispatch": ("auto", *DispatchMode),
    "combine": ("auto", *CombineMode),
    "redispatch_x_in_backward": (False, True),
    "cpu_sync_on_runtime": (False, True),
    "biased": (False, True),
    "norm_topk_probs": (False, True),
    "score_order": tuple(ScoreOrder),
    "gate_layout": ("interleaved", "concat"),
    "activation": ("swiglu", "gelu", "relu_sq"),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "routing": ("uniform", "skewed", "one_rank"),
    "backward": (True, False),
}
SETTINGS = pairwise(OPTIONS)
NO_GRADIENTS = {"training": False, "backward": False}
FAST_LINK = LinkBandwidth(copy_engine_in=1e15, copy_engine_out=1e15, read=1e15, write=1e15)


def trials() -> Iterator[Any]:
    """Every setting on one rank and on two; each second of them on the CPU as well, in turn on one and on two."""
    for place, setting in enumerate(SETTINGS):
        for world_size in (1, 2):
            everyday = place % 2 == 0 and place < 16 and world_size == 1 + place // 2 % 2
            yield pytest.param(setting, world_size, marks=() if everyday else pytest.mark.thorough)


def passes_of(setting: dict[str, Any]) -> list[str]:
    return [which.value for which in Pass if which is not Pass.STEP or setting.get("backward", True)]


def timed_of(backend: str, world_size: int, by: str | None) -> list[str]:
    """What is timed in each pass."""
    slow = [] if world_size == 1 else ["one GPU"]
    slow += [] if backend == "reference" else [f"reference over {by or 'one rank'}"]
    local = [] if world_size == 1 else ["same rows locally"]
    return ["grouped GEMMs", "layer", "given routing", *local, *(["layer, beside these", *slow] if slow else [])]


def check_accuracy(document: Layer, biased: bool) -> None:
    names = ["o", "dx", "drouter_w", "dw1", "dw2", *(["db1", "db2"] if biased else [])]
    # The reference, whose accuracy sets the bound, is judged first.
    of_reference = [f"reference's {name}" for name in names] if document.setup.backend == "fast" else []
    assert [each.name for each in document.accuracy] == [*of_reference, *names]
    for each in document.accuracy:
        assert each.ok
        # The one score of a token does not depend on the router.
        constant = each.name.endswith("drouter_w") and document.setup.thiek[-1] == 1
        assert (each.error == 0) == constant


def check_config(document: Layer, setting: dict[str, Any]) -> None:
    """What was asked for is kept, and nothing is left to be chosen."""
    assert document.profile is not None
    config = document.config
    assert config == document.profile.config
    for name in ("redispatch_x_in_backward", "cpu_sync_on_runtime"):
        assert getattr(config, name) == setting.get(name, False)
    for name, modes in (("dispatch", DispatchMode), ("combine", CombineMode)):
        asked, got = setting.get(name, "auto"), getattr(config, name)
        assert got in [mode.value for mode in modes] if asked == "auto" else got == asked.value


def check_profile(document: Layer, backend: str, world_size: int) -> None:
    profile = document.profile
    assert profile is not None
    assert [(each.kind, each.mode) for each in profile.modes] == EVERY_MODE
    assert [(each.dispatch, each.combine) for each in profile.pairs] == EVERY_PAIR
    assert (profile.backend, profile.shape.routing) == (backend, "given")
    assert document.setup.thiek[0] == sum(profile.shape.tokens)
    assert len(profile.shape.tokens) == world_size


def check_derived(document: Layer, passes: list[str], backend: str, world_size: int) -> None:
    assert [each.pass_name for each in document.derived] == passes
    alone, link_known = world_size == 1, world_size == 1 or document.rates_gb_per_s.read is not None
    for each in document.derived:
        there = {name for name, value in msgspec.structs.asdict(each).items() if value is not None}
        assert there == {
            *("pass_name", "over_gemms"),
            *(() if alone else ("exposed_communication_us", "scaling_efficiency")),
            *(("link_us", "over_gemms_and_link") if link_known else ()),
            *(() if backend == "reference" else ("over_reference",)),
        }
        assert all(getattr(each, name) > 0 for name in there & {"over_gemms", "scaling_efficiency"})
        assert not alone or each.link_us == 0
    assert [each.pass_name for each in document.breakdown] == passes
    for each in document.breakdown:
        assert list(each.parts) == ["plan", "dispatch", "grouped GEMMs", "combine", "rest"]
        assert all(part > 0 for name, part in each.parts.items() if name != "rest")


def check_memory(document: Layer, backend: str, on_gpu: bool, backward: bool) -> None:
    names = ["saved activations", "peak of forward, inference", "peak of forward, training", "peak of backward"]
    assert [each.what for each in document.memory] == [*(names if backward else names[:-1]), "shared memory"]
    for each in document.memory:
        assert (each.formula_bytes is None) == (backend == "reference")
        assert (each.measured_bytes is not None) == (on_gpu and each.what != "shared memory")


def check_said(said: list[str], document: Layer) -> None:
    """Every figure has its line, and the accuracies stand before the first of them."""
    text = "\n".join(said)
    passed = [line for line in said if line.endswith("PASS")]
    assert len(passed) == len(document.accuracy) * text.count("verifying ")
    assert "FAIL" not in text
    assert f"picked: dispatch {document.config.dispatch}, combine {document.config.combine}" in text
    assert text.index("PASS") < text.index("picked: ") < text.index("memory, MiB") < text.index("TFLOP/s a rank")
    for start in [
        *(f"{each.pass_name:<22} {each.what} " for each in document.times),
        *(f"{each.what} " for each in document.memory),
    ]:
        assert sum(line.startswith(start) for line in said) == 1
    for name, figure in DERIVED.items():
        lines = [line for line in said if line.strip().startswith(f"{figure} ")]
        assert len(lines) == sum(getattr(each, name) is not None for each in document.derived)


def check(found: list[tuple[Layer, list[str]]], setting: dict[str, Any], backend: str, device_type: str) -> Layer:
    """What holds of every run: the document, which is the same on every rank and a valid one."""
    said, world_size, passes = found[0][1], len(found), passes_of(setting)
    assert all(
        (msgspec.json.encode(other), lines) == (msgspec.json.encode(found[0][0]), said) for other, lines in found
    )
    document = msgspec.json.decode(msgspec.json.encode(found[0][0]), type=Layer)
    names = timed_of(backend, world_size, document.environment.process_group)
    assert (document.setup.world_size, document.setup.backend) == (world_size, backend)
    assert [(each.pass_name, each.what) for each in document.times] == [(p, n) for p in passes for n in names]
    check_accuracy(document, setting.get("biased", False))
    check_config(document, setting)
    check_profile(document, backend, world_size)
    check_derived(document, passes, backend, world_size)
    check_memory(document, backend, device_type == "cuda", setting.get("backward", True))
    check_said(said, document)
    return document


@pytest.mark.parametrize(("setting", "world_size"), list(trials()))
def test_a_report_is_complete(pool: RankPool, setting: dict[str, Any], world_size: int) -> None:
    found = pool.run(run_on_rank, setting, world_size=world_size)
    check(found, setting, "reference", pool._device_type)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["fast"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_report_of_the_fast_backend_is_complete(pool: RankPool, setting: dict[str, Any], backend: str) -> None:
    shape = MANY if pool._device_type == "cuda" else SHAPE
    found = pool.run(run_on_rank, setting, backend, shape, world_size=2)
    check(found, setting, backend, pool._device_type)


@pytest.mark.parametrize("backend", ["fast"])
def test_the_fast_backend_against_the_reference(cpu_pool: RankPool, backend: str) -> None:
    setting = {"dispatch": DispatchMode.RANK_DEDUP, "combine": CombineMode.RANK_DEDUP, "backward": False}
    found = cpu_pool.run(watched_on_rank, setting, backend, SMALLEST, world_size=2)
    document = check([(document, said) for document, said, _ in found], setting, backend, "cpu")
    assert any(each.what == "reference over gloo" for each in document.times)
    assert [kept for _, _, kept in found] == [Kept(alive=[], open=[], exact=True)] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_baselines_are_freed(cpu_pool: RankPool, world_size: int) -> None:
    found = cpu_pool.run(watched_on_rank, {}, "reference", SHAPE, world_size=world_size)
    assert [kept for _, _, kept in found] == [Kept(alive=[], open=[], exact=True)] * world_size


def test_a_rank_may_have_fewer_experts_than_a_token_chooses(cpu_pool: RankPool) -> None:
    for document, _ in cpu_pool.run(run_on_rank, {}, "reference", replace(SHAPE, num_experts=4, top_k=4), world_size=2):
        assert {"same rows locally", "one GPU"} <= {timed.what for timed in document.times}


def test_with_ceilings_the_link_is_counted(cpu_pool: RankPool) -> None:
    found = cpu_pool.run(run_on_rank, {"backward": False}, "reference", SHAPE, FAST_LINK, world_size=2)
    document = check(found, {"backward": False}, "reference", "cpu")
    assert all((each.over_gemms_and_link or 0) <= (each.over_gemms or 0) for each in document.derived)
    assert document.rates_gb_per_s.read == 1e6
    assert document.profile is not None
    assert [each.ceiling for each in document.profile.modes].count("write") == 3


def times_of(part: str, factor: float, calls: int, backward: bool, patched: pytest.MonkeyPatch, rank: Rank) -> None:
    """Let ``part`` of rank 1's outcome of a pass be ``factor`` times what it is, in its call number ``calls``."""
    honest, counted = LayerCall.run, count()

    def corrupted(self: LayerCall, ep: ExpertParallel, **which: bool) -> Any:
        found = honest(self, ep, **which)
        # Of the layer, not of its baselines.
        if "router_logits" not in found or (which != NO_GRADIENTS) != backward:
            return found
        wrong = next(counted) == calls and rank.rank == 1
        return {**found, part: found[part] * factor} if wrong else found

    patched.setattr(LayerCall, "run", corrupted)


def refused(cpu_pool: RankPool, poison: Any) -> tuple[str, list[str], int]:
    """``said_before`` of both ranks, which agree."""
    found, other = cpu_pool.run(said_before, WrongResultError, poison, world_size=2)
    assert found == other
    return found


@pytest.mark.parametrize(("part", "name"), [("dw1", "dw1"), ("y", "o"), ("drouter_w", "drouter_w"), ("dx", "dx")])
def test_a_wrong_layer_fails_and_has_no_times(cpu_pool: RankPool, part: str, name: str) -> None:
    message, said, entries = refused(cpu_pool, partial(times_of, part, 1.1, 0, True))
    assert message.startswith(f"rank 0 of 2: {name}: relative error ")
    assert f"; rank 1 of 2: {name}: relative error " in message
    assert entries == 0
    assert said[0].startswith("verifying ")
    assert said[1] == accuracy_lines([])[0]
    assert [line.split()[0] for line in said[2:]] == ["o", "dx", "drouter_w", "dw1", "dw2"]
    assert [line.split()[0] for line in said if line.endswith("FAIL")] == [name]


def corrupt_dispatch(patched: pytest.MonkeyPatch, rank: Rank) -> None:
    """A primitive that the layer does not call, but the profiler."""
    honest = ExpertParallel.dispatch

    def dispatch(self: ExpertParallel, *arguments: Any) -> Any:
        rows = honest(self, *arguments)
        return -rows if rank.rank == 1 and not self.config.cpu_sync_on_runtime else rows

    patched.setattr(ExpertParallel, "dispatch", dispatch)


def only_the_accuracies(said: list[str]) -> bool:
    """Nothing but one table of accuracies, or two, was said."""
    starts = all(line.startswith("verifying ") for line in said[::7])
    return starts and all(line.endswith("PASS") for place, line in enumerate(said) if place % 7 > 1)


def test_a_wrong_primitive_fails_and_has_no_times(cpu_pool: RankPool) -> None:
    message, said, entries = refused(cpu_pool, corrupt_dispatch)
    assert message.startswith("rank 1 of 2: dispatch by all_gather: rows: ")
    assert entries == 0
    assert only_the_accuracies(said)


# Of the passes that come first there are two calls that prove it, one round that is timed, two that prove it again.
@pytest.mark.parametrize("calls", [1, 2, 4], ids=["before", "timed", "after"])
def test_a_pass_that_is_wrong_once_is_found(cpu_pool: RankPool, calls: int) -> None:
    message, said, _ = refused(cpu_pool, partial(times_of, "y", -1, calls, False))
    assert message.startswith("rank 1 of 2: layer: y: ")
    assert "rank 0" not in message
    assert only_the_accuracies(said)
