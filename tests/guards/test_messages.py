"""Errors about arguments name the tensor that is wrong, what it was compared with, and what to do."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import EXPERTS, HIDDEN, good_call, good_routed_call
from on_ranks import on_ranks
from torch import nn
from torch import randn as rand

from sonic_ep import EPConfig, ExpertParallel, MoE, RouterConfig
from sonic_ep.testing import Rank

BF16, FP16 = torch.bfloat16, torch.float16


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def repeated(*shape: int) -> torch.Tensor:
    return torch.zeros([1] * len(shape)).expand(shape)


X_OF_7 = r"shape of x: got \(5, 7\), expected a last dimension of H=8"
W1_AS_W2_AND_X = r"expected \(4, 8, 8\) = \(e, 2I, H\), e and I as w2 \(4, 8, 4\), H as x \(5, 8\)"
WRONG_MOE: list[tuple[dict[str, Any], str]] = [
    ({"x": rand(HIDDEN)}, r"shape of x: got \(8,\), expected \(T, H\) or .*: pass x\[None\] for one token"),
    ({"x": rand(3, 0)}, r"shape of x: got \(3, 0\)"),
    ({"x": repeated(5, 2**21 + 1)}, "hidden size H: got 2097153, expected at most 2097152"),
    (
        {"x": torch.ones(5, 8, dtype=torch.int32)},
        "dtype of x: got torch.int32, expected torch.bf.*: pass hidden states",
    ),
    ({"x": rand(5, 8, dtype=torch.float64)}, "dtype of x: got torch.float64"),
    ({"x": rand(5, 8, device="meta")}, "device of x: got meta"),
    ({"x": rand(5, 8).to_sparse()}, r"layout of x: got torch.sparse_coo, expected torch.strided: pass x.to_dense\(\)"),
    (
        {"router_w": rand(4, 9)},
        r"shape of router_w: got \(4, 9\), expected \(E, 8\) = \(E, H\), H as x \(5, 8\), E at .* 1$",
    ),
    ({"router_w": rand(8, 4)}, r"shape of router_w: got \(8, 4\), .*: stored as \(H, E\), pass router_w.T"),
    ({"router_w": rand(0, 8)}, r"shape of router_w: got \(0, 8\)"),
    ({"router_w": rand(4, 8, dtype=FP16)}, r"dtype of router_w: got torch.float16, expected torch.float32: cast it \("),
    (
        {"w1": rand(4, 8, 8, device="meta")},
        "device of w1: got meta, expected cpu, as the tensors before it: it has no val",
    ),
    ({"w1": rand(4, 4, 8)}, rf"shape of w1: got \(4, 4, 8\), {W1_AS_W2_AND_X}: 'swiglu' has a gate and takes 2I rows"),
    (
        {"activation": "relu"},
        r"shape of w1: got \(4, 8, 8\), expected \(4, 4, 8\) .*: 'relu' has no gate and takes I rows",
    ),
    ({"w1": repeated(4, 2**21 + 2, 8), "w2": repeated(4, 8, 2**20 + 1)}, "2I of w1: got 2097154, expected at most"),
    (
        {"w1": rand(4, 8, 8, dtype=BF16)},
        "dtype of w1: got torch.bfloat16, expected torch.float32, the dtype of x: cast this",
    ),
    (
        {"w2": rand(4, 8, 4, dtype=torch.float64)},
        "dtype of w2: got torch.float64, expected torch.float32, the dtype of x",
    ),
    (
        {"x": rand(5, 7)},
        rf"{X_OF_7}, as router_w \(4, 8\), w1 \(4, 8, 8\), w2 \(4, 8, 4\): pass x of the layer's hidden size",
    ),
    ({"x": rand(5, 4)}, r"shape of x: got \(5, 4\), expected a last dimension of H=8, as router_w"),
    (
        {"x": rand(5, 7), "w1": rand(4, 8, 9)},
        r"shape of router_w: got \(4, 8\), expected \(E, 7\) = .*, H as x \(5, 7\)",
    ),
    ({"w1": rand(4, 8, 9)}, rf"shape of w1: got \(4, 8, 9\), {W1_AS_W2_AND_X}$"),
    ({"w1": rand(3, 8, 8)}, rf"shape of w1: got \(3, 8, 8\), {W1_AS_W2_AND_X}$"),
    ({"w2": rand(4, 8, 5)}, r"shape of w1: got \(4, 8, 8\), expected \(4, 10, 8\) = .*, e and I as w2 \(4, 8, 5\)"),
    (
        {"w1": rand(4, 8, 6), "w2": rand(4, 8, 3)},
        r"shape of w1: .*: stored as \(e, H, rows\), pass w1.transpose\(1, 2\)",
    ),
    (
        {"w2": rand(4, 4, 8)},
        r"shape of w2: got \(4, 4, 8\), expected \(e, 8, I\) .*: stored as .*, pass w2.transpose\(1, 2\)",
    ),
    ({"w2": rand(4, 9, 4)}, r"shape of w2: got \(4, 9, 4\), expected \(e, 8, I\) = \(e, H, I\), H as x \(5, 8\)$"),
    ({"w2": rand(8, 4)}, r"shape of w2: got \(8, 4\), expected \(e, 8, I\)"),
    ({"router_w": rand(6, 8)}, "experts of w2: got 4, expected e=6: router_w has E=6 experts, the group W=1 ranks$"),
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
    (
        {"norm_topk_probs": ids(9)},
        r"norm_topk_probs: got torch.int64 torch.strided \(9,\) on cpu, expected True or False",
    ),
    ({"correction_bias": rand(3)}, r"shape of correction_bias: got \(3,\)"),
    ({"correction_bias": rand(4, dtype=BF16)}, "dtype of correction_bias: got torch.bfloat16, expected torch.float32"),
    ({"correction_bias": rand(4, device="meta")}, "device of correction_bias: got meta, expected cpu"),
    (
        {"correction_bias": rand(4, requires_grad=True)},
        r"correction_bias: got one that requires .*, expected one that does not: .*: pass correction_bias.detach\(\)",
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
    (
        {"w1": (rand(4, 4, 8), rand(4, 8, 8))},
        r"shape of w1\[1\]: got \(4, 8, 8\), .* = \(e, I, H\).*: pass gate and up in one",
    ),
    ({"w1": GATE_AND_UP, "x": rand(5, 7)}, rf"{X_OF_7}, .*, w1\[0\] \(4, 4, 8\), w1\[1\] \(4, 4, 8\), w2 "),
    ({"w1": ([1.0], rand(4, 4, 8))}, r"w1\[0\]: got list, expected a torch"),
    ({"w1": GATE_AND_UP, "b1": rand(4, 8), "b2": rand(4, 8)}, "b1: got a Tensor, expected a tuple of two tensors"),
    ({"w1": GATE_AND_UP, "b1": (rand(4, 4), rand(4, 4))}, r"biases: got \['b1'\] alone"),
    ({"b1": (rand(4, 4), rand(4, 4)), "b2": rand(4, 8)}, "b1: got a tuple, expected one tensor, as w1"),
    (
        {"x": rand(5, 8, dtype=BF16)},
        r"dtype of x: got torch.bfloat16, expected torch.float32, as w1, w2: pass x.to\(torch.float32\), or cast the "
        r"layer with layer.to\(torch.bfloat16\), or call it under torch.autocast\('cpu'\), which casts fp32 weights",
    ),
    (
        {**good_call(dtype=BF16), "x": rand(5, 8)},
        r"dtype of x: got torch.float32, expected torch.bfloat16, as router_w, w1, w2: pass x.to\(torch.bfloat16\), "
        r"or cast the layer with layer.to\(torch.float32\)$",
    ),
    ({"activation": torch.relu}, "activation: got <built-in method relu"),
]
WRONG_ROUTED: list[tuple[dict[str, Any], str]] = [
    ({"x": rand(5, 7)}, rf"{X_OF_7}, as w1 \(4, 8, 8\), w2 "),
    # Weights that lie the other way round agree with each other, too.
    (
        {"w1": rand(4, 8, 4), "w2": rand(4, 4, 8), "activation": "relu"},
        r"shape of w2: got \(4, 4, 8\).* pass w2.transpose",
    ),
    (
        {"topk_idx": torch.zeros(5, 2)},
        "dtype of topk_idx: got torch.float32, expected torch.int32 or .*: cast it, unless ids",
    ),
    ({"topk_idx": ids(5)}, r"shape of topk_idx: got \(5,\)"),
    (
        {"topk_idx": ids(1, 5, 2)},
        r"shape of topk_idx: got \(1, 5, 2\), expected \(T, K\).*: pass topk_idx.flatten\(0, -2\)",
    ),
    ({"topk_idx": ids(4, 2)}, "tokens of topk_idx: got 4, expected T=5"),
    ({"topk_idx": ids(5, 0)}, "K of topk_idx: got 0, expected 1 to E=4"),
    ({"topk_idx": ids(5, 5)}, "K of topk_idx: got 5, expected 1 to E=4"),
    ({"topk_idx": ids(5, 2) + torch.tensor([0, 4])}, "topk_idx: got expert ids from 0 to 4, expected 0 to 3, or -1"),
    ({"topk_idx": ids(5, 2) - torch.tensor([0, 2])}, "topk_idx: got expert ids from -2 to 0"),
    ({"topk_idx": ids(5, 2) + torch.tensor([0, 2**32])}, "topk_idx: got expert ids from 0 to 4294967296"),
    ({"topk_scores": torch.ones(5, 2, dtype=torch.int64)}, "dtype of topk_scores: got torch.int64"),
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
        ep.moe(**good_call(**changes))


def called_routed(changes: dict[str, Any]) -> None:
    with ExpertParallel(max_tokens_per_rank=6) as ep:
        ep.moe_routed(**good_routed_call(**changes))


WRONG = [pytest.param(called, *case, id="+".join(case[0])) for case in (*WRONG_MOE, *WRONG_OBJECTS)]
WRONG += [pytest.param(called_routed, *case, id="+".join(("routed", *case[0]))) for case in WRONG_ROUTED]


@pytest.mark.parametrize(("call", "changes", "message"), WRONG)
def test_wrong_arguments(call: Callable[[dict[str, Any]], None], changes: dict[str, Any], message: str) -> None:
    error = TypeError if "got list" in message or "got dict" in message else ValueError
    with pytest.raises(error, match=f"^rank 0 of 1: {message}"):
        call(changes)


def test_x_is_blamed_for_its_dtype_only_where_it_is_wrong() -> None:
    """Under autocast x may be of half precision where weights are fp32, and of fp32 by a norm."""
    half, biases = rand(5, HIDDEN, dtype=BF16), {"b1": rand(4, 8)}
    with ExpertParallel(backend="reference") as ep, torch.autocast("cpu", dtype=BF16):
        with pytest.raises(ValueError, match=r"rank 0 of 1: biases: got \['b1'\] alone"):
            ep.moe(**good_call(x=half, **biases))
        with pytest.raises(
            ValueError, match=r"dtype of x: got torch.float32, .*\(under autocast, norms and sums may return"
        ):
            ep.moe(**{**good_call(dtype=BF16), "x": half.float()})
        with pytest.raises(
            ValueError, match=r"dtype of w2: got torch.float16, expected torch.bfloat16 or torch.float32: the"
        ):
            ep.moe(**good_call(x=half, w2=rand(4, 8, 4, dtype=FP16)))


def test_an_error_about_x_shows_no_other() -> None:
    with ExpertParallel(backend="reference") as ep, pytest.raises(ValueError, match="shape of x") as raised:
        ep.moe(**good_call(x=rand(5, 7)))
    assert raised.value.__suppress_context__


def test_layers_say_what_to_pass() -> None:
    layer = MoE(HIDDEN, 4, EXPERTS, 2)
    x = rand(3, HIDDEN)
    with pytest.raises(TypeError, match=r"x: got MoEOutput, expected a torch.Tensor: pass its .y"):
        layer(layer(x))
    with pytest.raises(TypeError, match=r"router_w: got Linear, expected a torch.Tensor: pass its weight"):
        called({"router_w": nn.Linear(HIDDEN, EXPERTS)})
    with pytest.raises(
        TypeError, match="Experts: got x without a routing, expected topk_idx and topk_scores, or router=:"
    ):
        layer.experts(x)
    with pytest.raises(
        ValueError, match=r"dtype of x: got torch.float32, expected torch.bfloat16, as router_w, w1, w2"
    ):
        MoE(HIDDEN, 4, EXPERTS, 2, dtype=BF16)(x)
    ungated = MoE(HIDDEN, 4, EXPERTS, 2, activation="relu")
    with pytest.raises(
        ValueError, match=r"got a checkpoint of 'no gate', .*: build the layer with the activation of the check"
    ):
        layer.load_state_dict(ungated.state_dict())


@on_ranks(2, pool="cpu_pool")
def test_all_experts_on_every_rank_are_refused(rank: Rank) -> None:
    with ExpertParallel(backend="reference") as ep:
        share = r"expected e=2: router_w has E=4 experts, the group W=2 ranks: pass this rank's share"
        with pytest.raises(ValueError, match=rf"rank {rank.rank} of 2: experts of w2: got 4, {share}"):
            ep.moe(**good_call())


def test_what_it_is_called_when_printed() -> None:
    """One line, also of one that has ended. Nothing of the group is asked."""
    ep = ExpertParallel(backend="reference", config=EPConfig(combine="rank_dedup"), max_tokens_per_rank=7)
    flags = "redispatch_x_in_backward=False, cpu_sync_on_runtime=False, max_rows=None"
    config = f"config=EPConfig(dispatch='auto', combine='rank_dedup', {flags})"
    known = f"ExpertParallel(backend='reference', rank=0, world_size=1, max_tokens_per_rank=7, {config})"
    assert repr(ep) == known
    ep.close()
    assert repr(ep) == f"{known} (closed)"
    lost = ExpertParallel(backend="reference")
    lost._collectives.call_lock.end("has ended: an error")
    assert repr(lost).endswith(" (ended by an error)")
