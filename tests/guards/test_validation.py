"""Arguments of public calls: every wrong one is refused with rank, got and expected, at once, and nothing is left."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import EXPERTS, HIDDEN, TOKENS, good_call, good_routed_call
from limits import HANG_SECONDS
from on_ranks import on_ranks
from torch import ones, rand, randn, zeros

import sonic_ep
from sonic_ep import ClosedError, ExpertParallel
from sonic_ep.testing import Rank

INT, FP64 = torch.int64, torch.float64
# Ranks would wait for 60 s; the machine may be busy.
LONG_BEFORE_THE_TIMEOUT_SECONDS = 40


def wide(rows: int, *more: int) -> torch.Tensor:
    """(4, rows, ...) of one number in memory."""
    return zeros(1, 1, 1).expand(4, rows, *more)


# Changes of a right call, and what is said of them.
WRONG_MOE: list[tuple[dict[str, Any], str]] = [
    ({"x": randn(HIDDEN)}, r"shape of x: got \(8,\), expected \(T, H\)"),
    ({"x": randn(3, 0)}, r"shape of x: got \(3, 0\)"),
    ({"x": zeros(1, 1).expand(5, 2**21 + 1)}, "hidden size H: got 2097153, expected at most 2097152"),
    ({"x": ones(5, 8, dtype=torch.int32)}, "dtype of x: got torch.int32, expected torch.bf"),
    ({"x": randn(5, 8, dtype=FP64)}, "dtype of x: got torch.float64"),
    ({"x": randn(5, 8, device="meta")}, "device of x: got meta"),
    ({"x": randn(5, 8).to_sparse()}, "layout of x: got torch.sparse_coo, expected torch.strided"),
    ({"router_w": randn(4, 9)}, r"shape of router_w: got \(4, 9\), expected \(E, 8\)"),
    ({"router_w": randn(0, 8)}, r"shape of router_w: got \(0, 8\)"),
    ({"router_w": randn(4, 8).half()}, "dtype of router_w: got torch.float16"),
    ({"router_w": randn(6, 8)}, r"shape of w2: got \(4, 8, 4\), expected \(6, 8, 4\)"),
    ({"w1": randn(4, 8, 8, device="meta")}, "device of w1: got meta, expected cpu"),
    ({"w1": randn(4, 4, 8)}, r"shape of w1: got \(4, 4, 8\), expected \(4, 8, 8\) = \(e, 2I, H\)"),
    ({"w1": wide(2**21 + 2, 8), "w2": wide(8, 2**20 + 1)}, "2I of w1: got 2097154, expected at most 2097152"),
    ({"w1": randn(4, 8, 8).bfloat16()}, "dtype of w1: got torch.bfloat16, expected torch.f"),
    ({"w2": randn(4, 4, 8)}, r"shape of w2: got \(4, 4, 8\), expected \(4, 8, 8\)"),
    ({"w2": randn(8, 4)}, r"shape of w2: got \(8, 4\), expected \(e, 8, I\)"),
    ({"top_k": 5}, "top_k: got 5, expected at most E=4"),
    ({"top_k": 0}, "top_k: got 0, expected a whole number of at least 1"),
    ({"top_k": 1.5}, "top_k: got 1.5"),
    ({"b1": randn(4, 8)}, r"biases: got \['b1'\] alone, expected b1 and b2, or neither"),
    ({"b2": randn(4, 8)}, r"biases: got \['b2'\] alone"),
    ({"b1": randn(4, 4), "b2": randn(4, 8)}, r"shape of b1: got \(4, 4\), expected \(4, 8\) = \(e, outputs\)"),
    ({"b1": randn(4, 8), "b2": randn(3, 8)}, r"shape of b2: got \(3, 8\), expected \(4, 8\)"),
    ({"activation": "tanh"}, "activation: got 'tanh', expected one of 'swiglu', 'geglu'"),
    ({"gate_layout": "split"}, "gate_layout: got 'split', expected one of 'interleaved', 'concat'"),
    ({"norm_topk_probs": "no"}, "norm_topk_probs: got 'no', expected True or False"),
    ({"score_order": "none"}, "score_order: got 'none', expected one of 'topk_then_softmax'"),
]
SEVEN = {"x": randn(7, HIDDEN), "topk_idx": zeros(7, 2, dtype=INT), "topk_scores": rand(7, 2)}
WRONG_ROUTED: list[tuple[dict[str, Any], str]] = [
    ({"topk_idx": zeros(5, 2)}, "dtype of topk_idx: got torch.float32, expected torch.int32 or"),
    ({"topk_idx": zeros(5, dtype=INT)}, r"shape of topk_idx: got \(5,\)"),
    ({"topk_idx": zeros(4, 2, dtype=INT)}, "tokens of topk_idx: got 4, expected T=5"),
    ({"topk_idx": zeros(5, 0, dtype=INT)}, "K of topk_idx: got 0, expected 1 to E=4"),
    ({"topk_idx": zeros(5, 5, dtype=INT)}, "K of topk_idx: got 5, expected 1 to E=4"),
    (
        {"topk_idx": torch.tensor([[0, 4]] * 5)},
        "topk_idx: got expert ids from 0 to 4, expected 0 to 3, or -1",
    ),
    ({"topk_idx": torch.tensor([[0, -2]] * 5)}, "topk_idx: got expert ids from -2 to 0"),
    ({"topk_idx": torch.tensor([[0, 2**32]] * 5)}, "topk_idx: got expert ids from 0 to 4294967296"),
    ({"topk_scores": ones(5, 2, dtype=INT)}, "dtype of topk_scores: got torch.int64"),
    ({"topk_scores": rand(5, 3)}, r"shape of topk_scores: got \(5, 3\), expected \(5, 2\)"),
    (SEVEN, r"tokens T: got 7, expected at most C=6"),
]
CALLS = [*(("moe", *wrong) for wrong in WRONG_MOE), *(("moe_routed", *wrong) for wrong in WRONG_ROUTED)]


@pytest.mark.parametrize(("call", "changes", "message"), CALLS, ids=[f"{call}-{said}"[:40] for call, _, said in CALLS])
def test_wrong_arguments(call: str, changes: dict[str, Any], message: str) -> None:
    right = good_call if call == "moe" else good_routed_call
    with ExpertParallel(max_tokens_per_rank=6) as ep, pytest.raises(ValueError, match=rf"rank 0 of 1: .*{message}"):
        getattr(ep, call)(**right(**changes))


@pytest.mark.parametrize("argument", ["x", "router_w", "w1", "w2", "b1"])
def test_what_is_no_tensor(argument: str) -> None:
    changes = {"b2": randn(EXPERTS, HIDDEN), "b1": randn(EXPERTS, 8), argument: [1.0]}
    words = f"rank 0 of 1: {argument}: got list, expected a torch"
    with ExpertParallel() as ep, pytest.raises(TypeError, match=words):
        ep.moe(**good_call(**changes))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "nccl"}, ValueError, "backend: got 'nccl', expected one of 'auto', 'fast', 'reference'"),
        ({"max_tokens_per_rank": 0}, ValueError, "max_tokens_per_rank: got 0, expected a whole number of at least 1"),
        ({"max_tokens_per_rank": True}, ValueError, "max_tokens_per_rank: got True"),
        ({"group": "world"}, ValueError, "group: got str, expected ProcessGroup, 1-D DeviceMesh or None"),
        ({"config": {"dispatch": "auto"}}, TypeError, "config: got dict, expected an EPConfig"),
    ],
)
def test_wrong_arguments_of_the_object(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"rank 0 of 1: {message}"):
        ExpertParallel(**arguments)


@on_ranks(2, pool="cpu_pool")
def test_wrong_on_all_ranks_is_refused_before_any_communication(rank: Rank) -> None:
    """Communication works before and after."""
    started = time.monotonic()
    with ExpertParallel(backend="reference") as ep:
        calls: list[tuple[Callable[[], object], str]] = [
            (
                lambda: ep.moe(**good_call(router_w=randn(3, HIDDEN))),
                "number of experts E: got 3, expected a multiple of",
            ),
            (lambda: ep.moe_routed(**good_routed_call(topk_idx=torch.tensor([[0, 8]] * TOKENS))), "ids from 0 to 8"),
            (lambda: ep.plan(zeros(2, 1, dtype=INT), num_experts=5), "number of experts E: got 5"),
            (lambda: sonic_ep.MoE(8, 4, num_experts=5, top_k=2, ep=ep), "number of experts E: got 5"),
        ]
        for call, message in calls:
            with pytest.raises(ValueError, match=f"rank {rank.rank} of 2: .*{message}"):
                call()
        assert time.monotonic() - started < LONG_BEFORE_THE_TIMEOUT_SECONDS
        assert ep.plan(zeros(2, 1, dtype=INT), num_experts=4).counts.tolist() == [4, 0, 0, 0]


@on_ranks(2, pool="cpu_pool")
def test_a_wrong_call_communicates_nothing(rank: Rank) -> None:
    """On one rank alone, before any right call and after one: the others never notice."""
    ids = torch.tensor([[rank.rank]])
    with ExpertParallel(backend="reference") as ep:
        for _ in range(2):
            if rank.rank == 0:
                for changes in ({"b1": randn(2, 8)}, {"top_k": 9}, {"w1": randn(1, 8, 8)}):
                    with pytest.raises(ValueError, match="rank 0 of 2"):
                        ep.moe(**good_call(**changes))
                for wrong in (99, -7):
                    with pytest.raises(ValueError, match="expert ids"):
                        ep.plan(torch.tensor([[0, wrong]]), num_experts=EXPERTS)
            assert ep.plan(ids, num_experts=EXPERTS).counts.tolist() == [1, 1, 0, 0]
            assert ep._collectives._status_store.statuses() == {}


SCRIPT = """
import sys, time, torch, torch.distributed as dist, sonic_ep
dist.init_process_group("gloo")
ep = sonic_ep.ExpertParallel(backend="reference", max_tokens_per_rank=4)
x, w = torch.randn(4, 8), torch.randn(2, 8, 8)
if dist.get_rank() == 0:
    print("calling", time.time(), flush=True)
{call}
"""
PROGRAMS = {
    "id out of range": ("ep.plan(torch.full((4, 1), 4), num_experts=4)", "topk_idx: got expert ids from 4 to 4"),
    "tokens above C": (
        "ep.plan(torch.zeros(5, 1, dtype=torch.int64), num_experts=4)",
        "tokens T: got 5, expected at most",
    ),
    "dtype": ("ep.moe(x.double(), torch.randn(4, 8), w, w[:, :, :4], 2)", "dtype of x: got torch.float64"),
    "closed": ("ep.close(); ep.moe(x, torch.randn(4, 8), w, w[:, :, :4], 2)", "this ExpertParallel is closed"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_program_ends_at_once_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    call, message = PROGRAMS[name]
    script = tmp_path / f"wrong_{name.replace(' ', '_')}.py"
    script.write_text(SCRIPT.format(call=call))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=HANG_SECONDS)
    ended = time.time()
    called = float(done.stdout.split("calling ")[1].split()[0])
    assert done.returncode != 0
    assert message in done.stderr
    assert "of 2: " in done.stderr
    assert ended - called < LONG_BEFORE_THE_TIMEOUT_SECONDS
    assert not processes_running(script)


def processes_running(script: Path) -> list[str]:
    """Command lines of live processes that run ``script``."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(script) in line:
            found.append(line)
    return found


def test_a_closed_object_says_so() -> None:
    ep = ExpertParallel()
    plan = ep.plan(zeros(1, 1, dtype=INT), 4)
    ep.close()
    ep.close()
    for call in (
        lambda: ep.moe(**good_call()),
        lambda: ep.moe_routed(**good_routed_call()),
        lambda: ep.plan(zeros(1, 1, dtype=INT), 4),
        lambda: ep.dispatch(zeros(1, HIDDEN), plan),
        lambda: ep.combine(zeros(1, HIDDEN), ones(1, 1), plan),
        lambda: ep.agree(1, torch.device("cpu")),
        lambda: ep.check(),
    ):
        with pytest.raises(ClosedError, match="rank 0 of 1: this ExpertParallel is closed: make a new one"):
            call()


def test_a_plan_of_another_rank_is_refused() -> None:
    with ExpertParallel(backend="reference") as ep:
        plan = replace(ep.plan(zeros(1, 1, dtype=INT), 4), rank=1)
        for call in (
            lambda: ep.dispatch(zeros(1, HIDDEN), plan),
            lambda: ep.combine(zeros(1, HIDDEN), ones(1, 1), plan),
        ):
            with pytest.raises(ValueError, match="plan: got a plan for rank 1 of 1, expected one for rank 0 of 1"):
                call()
