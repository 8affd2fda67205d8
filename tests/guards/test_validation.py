"""Any call is right, bit for bit, or refused with rank, got and expected, before any communication."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any

import edge_calls as calls
import pytest
import torch
from backends import BACKENDS, both_backends
from calls import EXPERTS, HIDDEN, TOKENS, call_of, good_call, good_routed_call
from hostile import NO_TENSORS, THINGS, WAYS
from limits import HANG_SECONDS
from on_ranks import on_ranks
from promises import promise
from torch import nn
from torch import randn as rand

import sonic_ep
from sonic_ep import ClosedError, EPConfig, ExpertParallel, MoE, RouterConfig
from sonic_ep.distributed import collectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.testing import Rank

BF16, FP16, INT = torch.bfloat16, torch.float16, torch.int64


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=INT)


def repeated(*shape: int) -> torch.Tensor:
    return torch.zeros([1] * len(shape)).expand(shape)


WRONG_MOE: list[tuple[dict[str, Any], str]] = [
    ({"x": rand(HIDDEN)}, r"shape of x: got \(8,\), expected \(T, H\)"),
    ({"x": rand(3, 0)}, r"shape of x: got \(3, 0\)"),
    ({"x": repeated(5, 2**21 + 1)}, "hidden size H: got 2097153, expected at most 2097152"),
    ({"x": torch.ones(5, 8, dtype=torch.int32)}, "dtype of x: got torch.int32, expected torch.bf"),
    ({"x": rand(5, 8, dtype=torch.float64)}, "dtype of x: got torch.float64"),
    ({"x": rand(5, 8, device="meta")}, "device of x: got meta"),
    ({"x": rand(5, 8).to_sparse()}, "layout of x: got torch.sparse_coo, expected torch.strided"),
    ({"router_w": rand(4, 9)}, r"shape of router_w: got \(4, 9\), expected \(E, 8\)"),
    ({"router_w": rand(0, 8)}, r"shape of router_w: got \(0, 8\)"),
    ({"router_w": rand(4, 8, dtype=FP16)}, "dtype of router_w: got torch.float16"),
    ({"w1": rand(4, 8, 8, device="meta")}, "device of w1: got meta, expected cpu"),
    ({"w1": rand(4, 4, 8)}, r"shape of w1: got \(4, 4, 8\), expected \(4, 8, 8\) = \(e, 2I, H\)"),
    ({"w1": repeated(4, 2**21 + 2, 8), "w2": repeated(4, 8, 2**20 + 1)}, "2I of w1: got 2097154, expected at most"),
    (
        {"w1": rand(4, 8, 8, dtype=BF16)},
        r"dtype of w1: got torch.bfloat16, expected torch.float32, the dtype of x: pass x.to\(torch.bfloat16\), or "
        "cast the layer to torch.float32; under autocast x may be fp32 after a norm",
    ),
    (
        {"x": rand(5, 7)},
        r"shape of x: got \(5, 7\), expected a last dimension of H=8, as router_w \(4, 8\), w1 \(4, 8, 8\), w2 ",
    ),
    ({"x": rand(5, 7), "w1": rand(4, 8, 9)}, r"shape of router_w: got \(4, 8\), expected \(E, 7\) = \(E, H\), H as x"),
    ({"w1": rand(4, 8, 9)}, r"shape of w1: got \(4, 8, 9\), .*H as x; stored as \(e, H, 2I\), pass its transpose"),
    ({"w2": rand(4, 4, 8)}, r"shape of w2: got \(4, 4, 8\), expected \(4, 8, 8\)"),
    ({"w2": rand(8, 4)}, r"shape of w2: got \(8, 4\), expected \(e, 8, I\)"),
    ({"router_w": rand(6, 8)}, r"shape of w2: got \(4, 8, 4\), expected \(6, 8, 4\)"),
    ({"top_k": 5}, "top_k: got 5, expected at most E=4"),
    ({"top_k": 0}, "top_k: got 0, expected a whole number of at least 1"),
    ({"top_k": 1.5}, "top_k: got 1.5"),
    ({"b1": rand(4, 8)}, r"biases: got \['b1'\] alone, expected b1 and b2, or neither"),
    ({"b2": rand(4, 8)}, r"biases: got \['b2'\] alone"),
    ({"b1": rand(4, 4), "b2": rand(4, 8)}, r"shape of b1: got \(4, 4\), expected \(4, 8\) = \(e, rows of w1\)"),
    ({"b1": rand(4, 8), "b2": rand(3, 8)}, r"shape of b2: got \(3, 8\), expected \(4, 8\)"),
    ({"activation": "tanh"}, "activation: got 'tanh', expected one of 'swiglu', 'geglu'"),
    ({"gate_layout": "split"}, "gate_layout: got 'split', expected one of 'interleaved', 'concat'"),
    ({"norm_topk_probs": "no"}, "norm_topk_probs: got 'no', expected True or False"),
    ({"score_order": "none"}, "score_order: got 'none', expected one of 'topk_then_softmax'"),
    (
        {"router": RouterConfig(), "norm_topk_probs": True},
        "router: got a RouterConfig with score_order or norm_topk_probs, expected one or the other",
    ),
    ({"router": RouterConfig(), "score_order": "softmax_then_topk"}, "router: got a RouterConfig with score_order"),
    ({"router": {"scale": 2}}, "router: got dict, expected a RouterConfig or None"),
    ({"router": RouterConfig(num_groups=3)}, "num_groups: got 3, expected a divisor of E=4"),
    ({"router": RouterConfig(num_groups=4)}, "group_top: got 2, expected at most 1: E=4 experts in num_groups=4"),
    ({"router": RouterConfig(num_groups=2), "top_k": 3}, "top_k: got 3, expected at most 2: E=4 .* top_groups=1 stay"),
    ({"router_b": rand(5)}, r"shape of router_b: got \(5,\), expected \(4,\) = \(E,\), as router_w"),
    ({"router_b": rand(4, 1)}, r"shape of router_b: got \(4, 1\)"),
    ({"router_b": rand(4, dtype=FP16)}, "dtype of router_b: got torch.float16"),
    ({"router_b": [1.0]}, "router_b: got list, expected a torch"),
    ({"correction_bias": rand(3)}, r"shape of correction_bias: got \(3,\)"),
    ({"correction_bias": rand(4, dtype=BF16)}, "dtype of correction_bias: got torch.bfloat16, expected torch.float32"),
    ({"correction_bias": rand(4, device="meta")}, "device of correction_bias: got meta, expected cpu"),
    (
        {"correction_bias": rand(4, requires_grad=True)},
        "correction_bias: got one that requires a gradient, expected one",
    ),
]
WRONG_MOE += [
    ({"b2": rand(EXPERTS, HIDDEN), "b1": rand(EXPERTS, 8), name: [1.0]}, f"{name}: got list, expected a torch")
    for name in ("x", "router_w", "w1", "w2", "b1")
]
GATE_AND_UP = (rand(4, 4, 8), rand(4, 4, 8))
WRONG_MOE += [
    ({"w1": GATE_AND_UP, "activation": "relu"}, "w1: got gate and up with activation 'relu', expected one tensor"),
    ({"w1": GATE_AND_UP[:1]}, "w1: got 1 tensors, expected a tuple of two tensors, gate and up"),
    ({"w1": (rand(4, 4, 8), rand(4, 8, 8))}, r"shape of w1\[1\]: got \(4, 8, 8\), expected \(4, 4, 8\) = \(e, I, H\)"),
    ({"w1": ([1.0], rand(4, 4, 8))}, r"w1\[0\]: got list, expected a torch"),
    ({"w1": GATE_AND_UP, "b1": rand(4, 8), "b2": rand(4, 8)}, "b1: got a Tensor, expected a tuple of two tensors"),
    ({"w1": GATE_AND_UP, "b1": (rand(4, 4), rand(4, 4))}, r"biases: got \['b1'\] alone"),
    ({"b1": (rand(4, 4), rand(4, 4)), "b2": rand(4, 8)}, "b1: got a tuple, expected one tensor, as w1"),
    (
        {"x": rand(5, 8, dtype=BF16)},
        r"dtype of w1: got torch.float32, expected torch.bfloat16, the dtype of x: pass x.to\(torch.float32\), or cast "
        r"the layer to torch.bfloat16; under torch.autocast\('cpu'\) fp32 weights are cast",
    ),
    ({"activation": torch.relu}, "activation: got <built-in method relu"),
]
WRONG_ROUTED: list[tuple[dict[str, Any], str]] = [
    ({"x": rand(5, 7)}, r"shape of x: got \(5, 7\), expected a last dimension of H=8, as "),
    ({"topk_idx": torch.zeros(5, 2)}, "dtype of topk_idx: got torch.float32, expected torch.int32 or"),
    ({"topk_idx": ids(5)}, r"shape of topk_idx: got \(5,\)"),
    ({"topk_idx": ids(4, 2)}, "tokens of topk_idx: got 4, expected T=5"),
    ({"topk_idx": ids(5, 0)}, "K of topk_idx: got 0, expected 1 to E=4"),
    ({"topk_idx": ids(5, 5)}, "K of topk_idx: got 5, expected 1 to E=4"),
    ({"topk_idx": ids(5, 2) + torch.tensor([0, 4])}, "topk_idx: got expert ids from 0 to 4, expected 0 to 3, or -1"),
    ({"topk_idx": ids(5, 2) - torch.tensor([0, 2])}, "topk_idx: got expert ids from -2 to 0"),
    ({"topk_idx": ids(5, 2) + torch.tensor([0, 2**32])}, "topk_idx: got expert ids from 0 to 4294967296"),
    ({"topk_scores": torch.ones(5, 2, dtype=INT)}, "dtype of topk_scores: got torch.int64"),
    ({"topk_scores": rand(5, 3)}, r"shape of topk_scores: got \(5, 3\), expected \(5, 2\)"),
    ({"x": rand(7, HIDDEN), "topk_idx": ids(7, 2), "topk_scores": rand(7, 2)}, "tokens T: got 7, expected at most C=6"),
]


WRONG_OBJECTS: list[tuple[dict[str, Any], str]] = [
    ({"backend": "nccl"}, "backend: got 'nccl', expected one of 'auto', 'fast', 'reference'"),
    ({"max_tokens_per_rank": 0}, "max_tokens_per_rank: got 0, expected a whole number of at"),
    ({"max_tokens_per_rank": True}, "max_tokens_per_rank: got True"),
    ({"group": "world"}, "group: got str, expected ProcessGroup, 1-D DeviceMesh or None"),
    ({"config": {"dispatch": "auto"}}, "config: got dict, expected an EPConfig"),
]


def called(changes: dict[str, Any]) -> None:
    if changes.keys() <= inspect.signature(ExpertParallel).parameters.keys():
        ExpertParallel(**changes)
    with ExpertParallel(max_tokens_per_rank=6) as ep:
        routed = changes.keys() & {"topk_idx", "topk_scores"}
        ep.moe_routed(**good_routed_call(**changes)) if routed else ep.moe(**good_call(**changes))


WRONG = [pytest.param(*case, id="+".join(case[0])) for case in (*WRONG_MOE, *WRONG_ROUTED, *WRONG_OBJECTS)]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    error = TypeError if "got list" in message or "got dict" in message else ValueError
    with pytest.raises(error, match=f"^rank 0 of 1: {message}"):
        called(changes)


@promise("usable-after-errors", "arguments")
@on_ranks(2, pool="cpu_pool")
def test_wrong_on_all_ranks_or_on_one_is_refused_before_any_communication(rank: Rank) -> None:
    right = torch.tensor([[rank.rank]])
    with ExpertParallel(backend="reference", timeout=2 * HANG_SECONDS) as ep, pytest.MonkeyPatch.context() as patch:
        # A rank reports errors, and that it waits, which on a busy machine it may.
        patch.setattr(collectives, "ANNOUNCE_SECONDS", HANG_SECONDS)
        far = ids(TOKENS, 2) + torch.tensor([0, 8])
        on_both: dict[Callable[[], object], str] = {
            lambda: ep.moe(**good_call(router_w=rand(3, HIDDEN))): "number of experts E: got 3, expected a multiple of",
            lambda: ep.moe_routed(**good_routed_call(topk_idx=far)): "topk_idx: got expert ids from 0 to 8, expected 0",
            lambda: ep.plan(ids(2, 1), num_experts=5): "number of experts E: got 5",
            lambda: MoE(8, 4, num_experts=5, top_k=2, ep=ep): "number of experts E: got 5",
        }
        on_one: dict[Callable[[], object], str] = {
            lambda: ep.moe(**call_of(2, b1=rand(2, 8))): "biases: got",
            lambda: ep.moe(**call_of(2, top_k=9)): "top_k: got 9",
            lambda: ep.moe(**call_of(2, w1=rand(1, 8, 8))): "shape of w",
            lambda: ep.plan(torch.tensor([[0, 99]]), num_experts=EXPERTS): "topk_idx: got expert ids from 0 to 99",
            lambda: ep.plan(torch.tensor([[0, -7]]), num_experts=EXPERTS): "topk_idx: got expert ids from -7 to 0",
            lambda: sonic_ep.moe(**call_of(2, top_k=0), backend="reference"): "top_k: got 0",
        }
        for call, message in (on_both | (on_one if rank.rank == 0 else {})).items():
            with pytest.raises(ValueError, match=f"rank {rank.rank} of 2: {message}"):
                call()
            assert ep._collectives._begun == 0
        for _ in range(2):
            assert ep.plan(right, num_experts=EXPERTS).counts.tolist() == [1, 1, 0, 0]
        assert ep._collectives._status_store.statuses() == {}
    assert sonic_ep.moe(**call_of(2), backend="reference").tokens_per_expert.sum() == 2 * 2 * TOKENS


def test_a_plan_of_another_rank_and_calls_after_close_or_the_end_of_the_group_are_refused() -> None:
    # The caller still refers to a group that has been destroyed.
    still_held = nn.Identity()
    with pytest.raises(ClosedError, match="rank 1 of 2: the process group has been destroyed"):
        _ = EPGroup(rank=1, world_size=2, handle=weakref.ref(still_held)).process_group
    ep = ExpertParallel(backend="reference")
    x, plan, scores = rand(1, HIDDEN), ep.plan(ids(1, 1), 4), torch.ones(1, 1)
    foreign = replace(plan, rank=1)
    for call in (partial(ep.dispatch, x, foreign), partial(ep.combine, x, scores, foreign)):
        with pytest.raises(ValueError, match="plan: got a plan for rank 1 of 1, expected one for rank 0 of 1"):
            call()
    ep.close()
    ep.close()
    for call in (
        *(partial(ep.moe, **good_call()), partial(ep.moe_routed, **good_routed_call()), ep.check),
        *(partial(ep.plan, ids(1, 1), 4), partial(ep.dispatch, x, plan), partial(ep.combine, x, scores, plan)),
        partial(ep.agree, 1, torch.device("cpu")),
    ):
        with pytest.raises(ClosedError, match="rank 0 of 1: this ExpertParallel is closed"):
            call()


# Interpreted, moe and the parts do what moe_routed does.
every_call = pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(*call, marks=pytest.mark.thorough if call == ("fast", "moe_routed") else ())
        for call in product(BACKENDS, calls.ARGUMENTS)
    ],
)
# Only where there is one token, one expert and one choice is this another way.
OF_ONES = "odd strides of one"


@promise("arguments")
@on_ranks(1)
@every_call
def test_values_count_and_not_how_they_are_held(rank: Rank, backend: str, name: str) -> None:
    """Those of arguments, and of gradients that come in."""
    found = {}
    for sizes, ways in ((calls.SIZES, set(WAYS) - {OF_ONES}), (calls.ONES, {OF_ONES})):
        with ExpertParallel(backend=backend) as ep:
            arguments = calls.leaves(calls.arguments_of(name, ep, rank.device, sizes))
            base = calls.outcome(name, ep, arguments)
            for way in sorted(ways):
                changes = {tensor: WAYS[way](calls.plain(arguments[tensor])) for tensor in calls.tensors_of(arguments)}
                found[way] = calls.complaint(name, ep, arguments, changes, base)
            for hold in (*WAYS.values(), THINGS["zeros of no memory"]) if sizes == calls.SIZES else ():
                kept = torch.equal(calls.plain(hold(calls.whole((3, 4)))), calls.whole((3, 4)))
                expected = base if kept else calls.outcome(name, ep, arguments, lambda g, h=hold: calls.plain(h(g)))
                calls.assert_same(calls.outcome(name, ep, arguments, hold), expected)
    assert_no_complaints(found)


def assert_no_complaints(found: dict[object, str | None]) -> None:
    assert {what: said for what, said in found.items() if said} == {}


# Elements of which no memory holds a copy.
IMMENSE = 2**45
IMMENSE_SHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "of immense rows": lambda tensor: tensor.flatten()[:1].expand(*tensor.shape[:-1], IMMENSE),
    "of immensely many rows": lambda tensor: tensor[:1].expand(IMMENSE, *tensor.shape[1:]),
    # Two dimensions that are one only after a copy.
    "of immensely many rows twice": lambda tensor: tensor[:2, None].expand(2, IMMENSE // 2, *tensor.shape[1:]),
}


@promise("arguments")
@on_ranks(1)
@every_call
@pytest.mark.parametrize("immense", [False, True])
def test_any_thing_for_a_tensor_is_right_or_refused(rank: Rank, backend: str, immense: bool, name: str) -> None:
    """immense: one number, or one row, repeated to a wrong shape. Nothing is copied before all shapes are right."""
    found = {}
    makers = IMMENSE_SHAPES if immense else {**WAYS, **THINGS} if backend == "reference" else THINGS
    with ExpertParallel(backend=backend, max_tokens_per_rank=calls.SIZES.tokens if immense else None) as ep:
        arguments = calls.leaves(calls.arguments_of(name, ep, rank.device))
        base = [] if immense else calls.outcome(name, ep, arguments)
        for tensor, (what, make) in product(calls.tensors_of(arguments), makers.items()):
            # Rows of any width are right where no weight says which.
            if what != "of immense rows" or (name, tensor) not in {("dispatch", "x"), ("combine", "rows")}:
                changes = {tensor: make(calls.plain(arguments[tensor]))}
                found[tensor, what] = calls.complaint(name, ep, arguments, changes, base)
    assert_no_complaints(found)


# What of NO_TENSORS an argument may be.
FLAG, NONE, COUNT, HUGE = {"True", "False"}, {"None"}, {"None", "a huge number"}, {"a huge number"}
FLAGS = ("redispatch_x_in_backward", "cpu_sync_on_runtime", "check_collective", "bias", "norm_topk_probs")
OF_ROUTERS = ("router", "router_b", "correction_bias")
MAY_BE: dict[str, set[str]] = {
    **dict.fromkeys((*FLAGS, "reduce_router_grad", "return_routing"), FLAG),
    **dict.fromkeys(("group", "config", "device", *OF_ROUTERS), NONE),
    "scale": {"a half", "two, a float", "a huge number"},
    **dict.fromkeys(("num_groups", "group_top"), HUGE),
    **dict.fromkeys(("max_tokens_per_rank", "max_rows"), COUNT),
    "timeout": {"None", "a half", "two, a float", "a huge number"},
    "dtype": {"None", "a dtype"},
    "router_dtype": {"None", "a dtype"},
}
MAY_BE_OF_LAYER = {**MAY_BE, **dict.fromkeys(("router_bias", "correction_bias", "distribute"), FLAG), "ep": NONE}


def complaints_of(
    make: Callable[..., Any],
    right: dict[str, Any],
    names: Iterable[str],
    may_be: Mapping[str, set[str]] = MappingProxyType(MAY_BE),
) -> dict[object, str | None]:
    """What is wrong with ``make`` when one argument is no tensor of any kind."""
    found: dict[object, str | None] = {}
    for name, (what, value) in product(names, NO_TENSORS.items()):
        made, found[name, what] = calls.attempt(partial(make, **{**right, name: value}))
        if made is not None:
            found[name, what] = "" if what in may_be.get(name, set()) else "was taken"
        if isinstance(made, ExpertParallel):
            made.close()
    return found


@promise("arguments")
@on_ranks(1)
@both_backends
def test_numbers_and_names_are_right_or_refused(rank: Rank, backend: str) -> None:
    """Every argument of every call, and of every object, that is no tensor."""
    with ExpertParallel(backend=backend) as ep:
        for call in calls.ARGUMENTS:
            arguments = calls.arguments_of(call, ep, rank.device)
            tensors = {*THINGS, *calls.tensors_of(arguments), "b1", "b2"}
            names = [name for name in inspect.signature(getattr(ep, call)).parameters if name not in tensors]
            assert_no_complaints(complaints_of(lambda c=call, **given: calls.run(c, ep, given), arguments, names))
        layer = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 2, "top_k": 1, "ep": ep}
        assert_no_complaints(complaints_of(MoE, layer, inspect.signature(MoE).parameters, MAY_BE_OF_LAYER))
    for make in (EPConfig, ExpertParallel, RouterConfig):
        assert_no_complaints(complaints_of(make, {}, inspect.signature(make).parameters))


def test_what_it_is_called_when_printed() -> None:
    ep = ExpertParallel(backend="reference", config=EPConfig(combine="rank_dedup"), max_tokens_per_rank=7)
    known = "ExpertParallel(backend='reference', rank=0, world_size=1, max_tokens_per_rank=7, config=EPConfig("
    assert repr(ep).startswith(known)
    assert "closed" not in repr(ep)
    ep.close()
    assert repr(ep).endswith("(closed, or ended by an error)")
