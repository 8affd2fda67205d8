"""The end-to-end benchmark: complete where the layer is right, red and without a time where it is not."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import torch
from end_to_end import MANY, SHAPE, SMALLEST, context_on, few_rounds, run_on_rank, setup_of
from harness.end_to_end import run_end_to_end
from harness.layer import LayerUnderTest, Pass
from on_ranks import on_ranks
from schema import Layer

from sonic_ep import CombineMode, DispatchMode, ExpertParallel
from sonic_ep.config import ScoreOrder
from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler.agreement import WrongResultError, gathered
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.report import EVERY_MODE, EVERY_PAIR
from sonic_ep.testing import Rank, RankPool
from sonic_ep.testing.cases import pairwise
from sonic_ep.testing.oracle import LayerCall

OPTIONS: dict[str, tuple[Any, ...]] = {
    "dispatch": ("auto", *DispatchMode),
    "combine": ("auto", *CombineMode),
    **dict.fromkeys(("redispatch_x_in_backward", "cpu_sync_on_runtime", "biased", "norm_topk_probs"), (False, True)),
    "score_order": tuple(ScoreOrder),
    "gate_layout": ("interleaved", "concat"),
    "activation": ("swiglu", "gelu", "relu_sq"),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "routing": ("uniform", "skewed", "one_rank"),
    "backward": (True, False),
}
SETTINGS = pairwise(OPTIONS)
FAST_LINK = LinkBandwidth(copy_engine_in=1e15, copy_engine_out=1e15, read=1e15, write=1e15)


def trials() -> Iterator[Any]:
    """Every setting on one rank and on two; of a few, one of both runs every day on the CPU as well."""
    for place, setting in enumerate(SETTINGS):
        for world_size in (1, 2):
            everyday = place % 2 == 0 and place < 8 and world_size == 1 + place // 2 % 2
            yield pytest.param(setting, world_size, "reference", marks=() if everyday else pytest.mark.thorough)
        yield pytest.param(setting, 2, "fast", marks=pytest.mark.thorough)


def check(found: list[tuple[Layer, list[str]]], setting: dict[str, Any], backend: str, device_type: str) -> Layer:
    """What holds of every run: the document, which is the same on every rank and a valid one."""
    said, world_size = found[0][1], len(found)
    written = msgspec.json.encode(found[0][0])
    assert all((msgspec.json.encode(other), lines) == (written, said) for other, lines in found)
    document, backward = msgspec.json.decode(written, type=Layer), setting.get("backward", True)
    assert (document.setup.world_size, document.setup.backend) == (world_size, backend)
    check_accuracy(document, setting.get("biased", False))
    check_modes(document, setting)
    check_times(document, backward)
    check_memory(document, device_type == "cuda", backward)
    # Every figure has its line, and the accuracies stand before the first of them.
    text = "\n".join(said)
    assert sum(line.endswith("PASS") for line in said) == len(document.accuracy) * text.count("verifying ")
    assert "FAIL" not in text
    assert text.index("PASS") < text.index("picked: ") < text.index("memory, MiB") < text.index("TFLOP/s a rank")
    return document


def check_accuracy(document: Layer, biased: bool) -> None:
    names = ["o", "dx", "drouter_w", "dw1", "dw2", *(["db1", "db2"] if biased else [])]
    # The reference, whose accuracy sets the bound, is judged first.
    of_reference = [f"reference's {name}" for name in names] if document.setup.backend == "fast" else []
    assert [each.name for each in document.accuracy] == [*of_reference, *names]
    for each in document.accuracy:
        # The one score of a token does not depend on the router.
        constant = each.name.endswith("drouter_w") and document.setup.thiek[-1] == 1
        assert (each.ok, each.error == 0) == (True, constant)


def check_modes(document: Layer, setting: dict[str, Any]) -> None:
    """Everything is profiled; what was asked for is kept, and nothing is left to be chosen."""
    profile, setup, config = document.profile, document.setup, document.config
    assert profile is not None
    assert [(each.kind, each.mode) for each in profile.modes] == EVERY_MODE
    assert [(each.dispatch, each.combine) for each in profile.pairs] == EVERY_PAIR
    assert (profile.backend, profile.shape.routing, profile.config) == (setup.backend, "given", config)
    assert (sum(profile.shape.tokens), len(profile.shape.tokens)) == (setup.thiek[0], setup.world_size)
    for name in ("redispatch_x_in_backward", "cpu_sync_on_runtime"):
        assert getattr(config, name) == setting.get(name, False)
    for name, modes in (("dispatch", DispatchMode), ("combine", CombineMode)):
        asked, got = setting.get(name, "auto"), getattr(config, name)
        assert got in [mode.value for mode in modes] if asked == "auto" else got == asked.value


def check_times(document: Layer, backward: bool) -> None:
    passes = [which.value for which in Pass if backward or which is not Pass.STEP]
    alone, with_reference = document.setup.world_size == 1, document.setup.backend == "fast"
    slow = [] if alone else ["one GPU"]
    slow += [f"reference over {document.environment.process_group or 'one rank'}"] if with_reference else []
    names = ["grouped GEMMs", "layer", "given routing", *([] if alone else ["same rows locally"])]
    names += ["layer, beside these", *slow] if slow else []
    assert [(each.pass_name, each.what) for each in document.times] == [(p, n) for p in passes for n in names]
    assert [each.pass_name for each in document.derived] == [each.pass_name for each in document.breakdown] == passes
    expected = {"pass_name", "over_gemms"} | ({"over_reference"} if with_reference else set())
    expected |= set() if alone else {"exposed_communication_us", "scaling_efficiency"}
    expected |= {"link_us", "over_gemms_and_link"} if alone or document.rates_gb_per_s.read is not None else set()
    for each in document.derived:
        assert {name for name, value in msgspec.structs.asdict(each).items() if value is not None} == expected
        assert all(getattr(each, name) > 0 for name in expected & {"over_gemms", "scaling_efficiency"})
        assert not alone or each.link_us == 0
    for each in document.breakdown:
        assert list(each.parts) == ["plan", "dispatch", "grouped GEMMs", "combine", "rest"]
        assert all(part > 0 for name, part in each.parts.items() if name != "rest")


def check_memory(document: Layer, on_gpu: bool, backward: bool) -> None:
    names = ["saved activations", "peak of forward, inference", "peak of forward, training", "peak of backward"]
    assert [each.what for each in document.memory] == [*(names if backward else names[:-1]), "shared memory"]
    for each in document.memory:
        assert (each.formula_bytes is None) == (document.setup.backend == "reference")
        assert (each.measured_bytes is not None) == (on_gpu and each.what != "shared memory")


@pytest.mark.parametrize(("setting", "world_size", "backend"), list(trials()))
def test_a_report_is_complete(pool: RankPool, setting: dict[str, Any], world_size: int, backend: str) -> None:
    shape = MANY if pool._device_type == "cuda" else SHAPE
    found = pool.run(run_on_rank, setting, backend, shape, world_size=world_size)
    check(found, setting, backend, pool._device_type)


MODES = {"dispatch": DispatchMode.ALL_TO_ALL, "combine": CombineMode.RANK_DEDUP}
RANK_DEDUP = {"dispatch": DispatchMode.RANK_DEDUP, "combine": CombineMode.RANK_DEDUP, "backward": False}


ON_RANKS = [
    # With two tokens a right gradient of the scores has more than twice the error of plain PyTorch, by chance.
    pytest.param("fast", RANK_DEDUP, replace(SMALLEST, tokens=4), 2, marks=pytest.mark.thorough),
    ("reference", {}, SHAPE, 1),
    # A rank has fewer experts than a token chooses.
    ("reference", {}, replace(SHAPE, num_experts=4, top_k=4), 2),
]


@on_ranks(pool="cpu_pool")
@pytest.mark.parametrize(("backend", "setting", "shape", "world_size"), ON_RANKS)
def test_baselines_are_freed_and_with_ceilings_the_link_is_counted(
    rank: Rank, backend: str, setting: dict[str, Any], shape: Shape, world_size: int
) -> None:
    """Baselines are freed when the second batch of cases begins, and in the end."""
    made: list[weakref.ref[Any]] = []

    def watch(name: str) -> Any:
        honest = getattr(LayerUnderTest, name)

        def call(*arguments: Any, **options: Any) -> Any:
            assert name != "prove_one_gpu" or {each() for each in made} == {None}
            found = honest(*arguments, **options)
            made.append(weakref.ref(found))
            return found

        return patch.object(LayerUnderTest, name, call)

    started = patch.object(ExpertParallel, "__init__", autospec=True, side_effect=ExpertParallel.__init__)
    with started as starts, watch("prove_routed"), watch("products"), watch("prove_one_gpu"):
        run = run_on_rank(rank, setting, backend, shape, FAST_LINK)
    assert [each() for each in made] == [None] * (4 if world_size > 1 else 2)
    # All but the context's own.
    opened = [call.args[0] for call in starts.call_args_list[1:]]
    assert all(ep._call_guard.closed for ep in opened)
    if backend == "fast":
        assert {ep.config.cpu_sync_on_runtime for ep in opened if ep.backend == "reference"} == {True}
    document = check(gathered(resolve_group(None), run), setting, backend, "cpu")
    assert all((each.over_gemms_and_link or 0) <= (each.over_gemms or 0) for each in document.derived)
    assert document.rates_gb_per_s.read == 1e6
    assert document.profile is not None
    assert [each.ceiling for each in document.profile.modes].count("write") == 3


def times_of(part: str, factor: float, calls: int, backward: bool, patched: pytest.MonkeyPatch, rank: Rank) -> None:
    """Let ``part`` of rank 1's outcome of a pass be ``factor`` times what it is, in its call number ``calls``."""
    honest, counted = LayerCall.run, count()

    def corrupted(self: LayerCall, ep: ExpertParallel, **which: bool) -> Any:
        found = honest(self, ep, **which)
        # Of the layer, not of its baselines, in inference or where there are gradients.
        passed = {"training": True, "backward": True, **which} == {"training": backward, "backward": backward}
        wrong = "router_logits" in found and passed and next(counted) == calls and rank.rank == 1
        return {**found, part: found[part] * factor} if wrong else found

    patched.setattr(LayerCall, "run", corrupted)


def refused(rank: Rank, poison: Callable[[Any, Rank], None]) -> tuple[str, list[str], int]:
    """What a benchmark raises after ``poison`` has patched something, what it has said, and entries of results."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patched, context_on(rank) as context:
        few_rounds(patched)
        poison(patched, rank)
        with pytest.raises(WrongResultError) as raised:
            run_end_to_end(setup_of(MODES, rank.world_size, "reference", SHAPE), context, said.append)
        found = str(raised.value), said, len(context.results.entries)
        assert gathered(context.group, found) == [found] * rank.world_size
    return found


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize(("part", "name"), [("dw1", "dw1"), ("y", "o"), ("drouter_w", "drouter_w"), ("dx", "dx")])
def test_a_wrong_layer_fails_and_has_no_times(rank: Rank, part: str, name: str) -> None:
    message, said, entries = refused(rank, partial(times_of, part, 1.1, 0, True))
    assert message.startswith(f"rank 0 of 2: {name}: relative error ")
    assert f"; rank 1 of 2: {name}: relative error " in message
    assert entries == 0
    assert [line.partition(" ")[0] for line in said] == ["verifying", "against", "o", "dx", "drouter_w", "dw1", "dw2"]
    assert [line.split()[0] for line in said if line.endswith("FAIL")] == [name]


def corrupt_dispatch(patched: pytest.MonkeyPatch, rank: Rank) -> None:
    """A primitive that the layer does not call, but the profiler."""
    honest = ExpertParallel.dispatch

    def dispatch(self: ExpertParallel, *arguments: Any) -> Any:
        rows = honest(self, *arguments)
        return -rows if rank.rank == 1 and not self.config.cpu_sync_on_runtime else rows

    patched.setattr(ExpertParallel, "dispatch", dispatch)


# Two calls prove a pass, one round is timed, two calls prove it again; with gradients the layer was verified before.
@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize(
    ("poison", "what"),
    [
        (partial(times_of, "y", -1, 1, False), "layer: y"),
        (partial(times_of, "y", -1, 2, False), "layer: y"),
        (partial(times_of, "y", -1, 4, False), "layer: y"),
        (partial(times_of, "dw1", -1, 2, True), "layer: dw1"),
        (corrupt_dispatch, "dispatch by all_gather: rows"),
    ],
)
def test_a_pass_that_is_wrong_once_and_a_wrong_primitive_are_found(rank: Rank, poison: Any, what: str) -> None:
    message, said, entries = refused(rank, poison)
    assert message.startswith(f"rank 1 of 2: {what}: ")
    assert "rank 0" not in message
    assert poison is not corrupt_dispatch or entries == 0
    # Nothing but one table of accuracies was said.
    assert said[0].startswith("verifying ")
    assert [line.endswith("PASS") for line in said[2:]] == [True] * 5
