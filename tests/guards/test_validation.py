"""A wrong call is refused with rank, got and expected, before any communication, and leaves nothing behind."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import EXPERTS, HIDDEN, TOKENS, good_call, good_routed_call
from on_ranks import on_ranks
from programs import output_at_end, start_program
from promises import promise

import sonic_ep
from sonic_ep import ClosedError, ExpertParallel
from sonic_ep.testing import Rank

# Ranks would wait for 60 s; a busy machine is slow.
LONG_BEFORE_THE_TIMEOUT_SECONDS = 40
BF16, FP16, INT, FP64 = torch.bfloat16, torch.float16, torch.int64, torch.float64


def rand(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(shape, **options)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=INT)


def repeated(*shape: int) -> torch.Tensor:
    return torch.zeros([1] * len(shape)).expand(shape)


WRONG_MOE: list[tuple[dict[str, Any], str]] = [
    ({"x": rand(HIDDEN)}, r"shape of x: got \(8,\), expected \(T, H\)"),
    ({"x": rand(3, 0)}, r"shape of x: got \(3, 0\)"),
    ({"x": repeated(5, 2**21 + 1)}, "hidden size H: got 2097153, expected at most 2097152"),
    ({"x": torch.ones(5, 8, dtype=torch.int32)}, "dtype of x: got torch.int32, expected torch.bf"),
    ({"x": rand(5, 8, dtype=FP64)}, "dtype of x: got torch.float64"),
    ({"x": rand(5, 8, device="meta")}, "device of x: got meta"),
    ({"x": rand(5, 8).to_sparse()}, "layout of x: got torch.sparse_coo, expected torch.strided"),
    ({"router_w": rand(4, 9)}, r"shape of router_w: got \(4, 9\), expected \(E, 8\)"),
    ({"router_w": rand(0, 8)}, r"shape of router_w: got \(0, 8\)"),
    ({"router_w": rand(4, 8, dtype=FP16)}, "dtype of router_w: got torch.float16"),
    ({"w1": rand(4, 8, 8, device="meta")}, "device of w1: got meta, expected cpu"),
    ({"w1": rand(4, 4, 8)}, r"shape of w1: got \(4, 4, 8\), expected \(4, 8, 8\) = \(e, 2I, H\)"),
    ({"w1": repeated(4, 2**21 + 2, 8), "w2": repeated(4, 8, 2**20 + 1)}, "2I of w1: got 2097154, expected at most"),
    ({"w1": rand(4, 8, 8, dtype=BF16)}, "dtype of w1: got torch.bfloat16, expected torch.f"),
    ({"w2": rand(4, 4, 8)}, r"shape of w2: got \(4, 4, 8\), expected \(4, 8, 8\)"),
    ({"w2": rand(8, 4)}, r"shape of w2: got \(8, 4\), expected \(e, 8, I\)"),
    ({"router_w": rand(6, 8)}, r"shape of w2: got \(4, 8, 4\), expected \(6, 8, 4\)"),
    ({"top_k": 5}, "top_k: got 5, expected at most E=4"),
    ({"top_k": 0}, "top_k: got 0, expected a whole number of at least 1"),
    ({"top_k": 1.5}, "top_k: got 1.5"),
    ({"b1": rand(4, 8)}, r"biases: got \['b1'\] alone, expected b1 and b2, or neither"),
    ({"b2": rand(4, 8)}, r"biases: got \['b2'\] alone"),
    ({"b1": rand(4, 4), "b2": rand(4, 8)}, r"shape of b1: got \(4, 4\), expected \(4, 8\) = \(e, outputs\)"),
    ({"b1": rand(4, 8), "b2": rand(3, 8)}, r"shape of b2: got \(3, 8\), expected \(4, 8\)"),
    ({"activation": "tanh"}, "activation: got 'tanh', expected one of 'swiglu', 'geglu'"),
    ({"gate_layout": "split"}, "gate_layout: got 'split', expected one of 'interleaved', 'concat'"),
    ({"norm_topk_probs": "no"}, "norm_topk_probs: got 'no', expected True or False"),
    ({"score_order": "none"}, "score_order: got 'none', expected one of 'topk_then_softmax'"),
]
WRONG_ROUTED: list[tuple[dict[str, Any], str]] = [
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


def named(case: object) -> str | None:
    return "+".join(case) if isinstance(case, dict) else None


@pytest.mark.parametrize(("changes", "message"), [*WRONG_MOE, *WRONG_ROUTED], ids=named)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    routed = changes.keys() & {"topk_idx", "topk_scores"}
    with ExpertParallel(max_tokens_per_rank=6) as ep, pytest.raises(ValueError, match=f"rank 0 of 1: {message}"):
        ep.moe_routed(**good_routed_call(**changes)) if routed else ep.moe(**good_call(**changes))


@pytest.mark.parametrize("argument", ["x", "router_w", "w1", "w2", "b1"])
def test_what_is_no_tensor(argument: str) -> None:
    with ExpertParallel() as ep, pytest.raises(TypeError, match=f"rank 0 of 1: {argument}: got list, expected a torch"):
        ep.moe(**good_call(**{"b2": rand(EXPERTS, HIDDEN), "b1": rand(EXPERTS, 8), argument: [1.0]}))


WRONG_OBJECTS: list[tuple[dict[str, Any], str]] = [
    ({"backend": "nccl"}, "ValueError: rank 0 of 1: backend: got 'nccl', expected one of 'auto', 'fast', 'reference'"),
    ({"max_tokens_per_rank": 0}, "ValueError: rank 0 of 1: max_tokens_per_rank: got 0, expected a whole number of at"),
    ({"max_tokens_per_rank": True}, "ValueError: rank 0 of 1: max_tokens_per_rank: got True"),
    ({"group": "world"}, "ValueError: rank 0 of 1: group: got str, expected ProcessGroup, 1-D DeviceMesh or None"),
    ({"config": {"dispatch": "auto"}}, "TypeError: rank 0 of 1: config: got dict, expected an EPConfig"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_OBJECTS)
def test_wrong_arguments_of_the_object(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        ExpertParallel(**arguments)
    assert f"{raised.type.__name__}: {raised.value}".startswith(message)


@on_ranks(2, pool="cpu_pool")
def test_wrong_on_all_ranks_is_refused_before_any_communication(rank: Rank) -> None:
    started = time.monotonic()
    with ExpertParallel(backend="reference") as ep:
        far = ids(TOKENS, 2) + torch.tensor([0, 8])
        calls: dict[Callable[[], object], str] = {
            lambda: ep.moe(**good_call(router_w=rand(3, HIDDEN))): "number of experts E: got 3, expected a multiple of",
            lambda: ep.moe_routed(**good_routed_call(topk_idx=far)): "topk_idx: got expert ids from 0 to 8, expected 0",
            lambda: ep.plan(ids(2, 1), num_experts=5): "number of experts E: got 5",
            lambda: sonic_ep.MoE(8, 4, num_experts=5, top_k=2, ep=ep): "number of experts E: got 5",
        }
        for call, message in calls.items():
            with pytest.raises(ValueError, match=f"rank {rank.rank} of 2: {message}"):
                call()
        assert time.monotonic() - started < LONG_BEFORE_THE_TIMEOUT_SECONDS
        assert ep.plan(ids(2, 1), num_experts=4).counts.tolist() == [4, 0, 0, 0]


@promise("usable-after-errors", "arguments")
@on_ranks(2, pool="cpu_pool")
def test_a_wrong_call_communicates_nothing(rank: Rank) -> None:
    right = torch.tensor([[rank.rank]])
    with ExpertParallel(backend="reference") as ep:
        for _ in range(2):
            if rank.rank == 0:
                for wrong in ({"b1": rand(2, 8)}, {"top_k": 9}, {"w1": rand(1, 8, 8)}):
                    with pytest.raises(ValueError, match="rank 0 of 2"):
                        ep.moe(**good_call(**wrong))
                for expert in (99, -7):
                    with pytest.raises(ValueError, match="expert ids"):
                        ep.plan(torch.tensor([[0, expert]]), num_experts=EXPERTS)
            assert ep.plan(right, num_experts=EXPERTS).counts.tolist() == [1, 1, 0, 0]
        assert ep._collectives._status_store.statuses() == {}


SCRIPT = """
import sys, time, torch, torch.distributed as dist, sonic_ep
dist.init_process_group("gloo")
ep = sonic_ep.ExpertParallel(backend="reference", max_tokens_per_rank=4)
x, w1, router_w = torch.randn(4, 8), torch.randn(2, 8, 8), torch.randn(4, 8)
w2, ids = w1[:, :, :4], torch.zeros(4, 1, dtype=torch.int64)
if dist.get_rank() == 0:
    print("calling", time.time(), flush=True)
"""
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
WRONG_PROGRAMS = {
    "ep.plan(ids, num_experts=3)": "number of experts E: got 3",
    "ep.plan(ids.expand(4, 5), num_experts=4)": "K of topk_idx: got 5, expected 1 to",
    "ep.plan(ids + 4, num_experts=4)": "topk_idx: got expert ids from 4 to 4",
    "ep.plan(torch.cat([ids, ids]), num_experts=4)": "tokens T: got 8, expected at most",
    "ep.moe(x, router_w, w1, w2, 2, b1=w1[:, 0])": "biases: got ['b1'] alone",
    "ep.moe(x.double(), router_w, w1, w2, 2)": "dtype of x: got torch.float64",
    "ep.moe(x, torch.randn(4, 9), w1, w2, 2)": "shape of router_w: got (4, 9)",
    "ep.moe(x.to('meta'), router_w, w1, w2, 2)": "device of x: got meta",
    "ep.close(); ep.moe(x, router_w, w1, w2, 2)": "this ExpertParallel is closed",
}


@pytest.mark.parametrize(
    ("call", "message"),
    [pytest.param(*case, marks=pytest.mark.thorough if n % 4 else ()) for n, case in enumerate(WRONG_PROGRAMS.items())],
)
def test_a_wrong_program_ends_at_once_and_leaves_nothing(call: str, message: str, tmp_path: Path) -> None:
    process = start_program(tmp_path, SCRIPT + call, launcher=LAUNCHER)
    said = output_at_end(process)
    took = time.time() - float(said.split("calling ")[1].split()[0])
    assert process.returncode != 0
    assert message in said
    assert "of 2: " in said
    assert took < 5
    assert not list(processes_in(tmp_path))


def processes_in(folder: Path) -> Iterator[bytes]:
    """Command lines of live processes that run a program of ``folder``."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if bytes(folder) in (line := process.read_bytes()):
                yield line


def test_a_plan_of_another_rank_and_calls_after_close_are_refused() -> None:
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
