"""The public edge: every wrong call is refused with rank, got and expected, at once, and nothing is left behind."""

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

import sonic_ep
from sonic_ep import ClosedError, ExpertParallel
from sonic_ep.testing import Rank, RankPool

WRONG_MOE: dict[str, tuple[dict[str, Any], str]] = {
    "x of one dimension": ({"x": torch.randn(HIDDEN)}, r"shape of x: got \(8,\), expected \(T, H\)"),
    "x without features": ({"x": torch.randn(3, 0)}, r"shape of x: got \(3, 0\)"),
    "x too wide": (
        {"x": torch.zeros(1, 1).expand(5, 2**21 + 1)},
        "hidden size H: got 2097153, expected at most 2097152",
    ),
    "x of integers": ({"x": torch.ones(5, 8, dtype=torch.int32)}, "dtype of x: got torch.int32, expected torch.bf"),
    "x of fp64": ({"x": torch.randn(5, 8, dtype=torch.float64)}, "dtype of x: got torch.float64"),
    "x on meta": ({"x": torch.randn(5, 8, device="meta")}, "device of x: got meta"),
    "x sparse": ({"x": torch.randn(5, 8).to_sparse()}, "layout of x: got torch.sparse_coo, expected torch.strided"),
    "router_w too wide": ({"router_w": torch.randn(4, 9)}, r"shape of router_w: got \(4, 9\), expected \(E, 8\)"),
    "router_w of no expert": ({"router_w": torch.randn(0, 8)}, r"shape of router_w: got \(0, 8\)"),
    "router_w in another half": ({"router_w": torch.randn(4, 8).half()}, "dtype of router_w: got torch.float16"),
    "w1 on meta": ({"w1": torch.randn(4, 8, 8, device="meta")}, "device of w1: got meta, expected cpu"),
    "w1 not gated": (
        {"w1": torch.randn(4, 4, 8)},
        r"shape of w1: got \(4, 4, 8\), expected \(4, 8, 8\) = \(e, 2I, H\)",
    ),
    "w1 and w2 too wide": (
        {"w1": torch.zeros(1, 1, 1).expand(4, 2**21 + 2, 8), "w2": torch.zeros(1, 1, 1).expand(4, 8, 2**20 + 1)},
        "2I of w1: got 2097154, expected at most 2097152",
    ),
    "w1 in another dtype": (
        {"w1": torch.randn(4, 8, 8).bfloat16()},
        "dtype of w1: got torch.bfloat16, expected torch.f",
    ),
    "w2 transposed": ({"w2": torch.randn(4, 4, 8)}, r"shape of w2: got \(4, 4, 8\), expected \(4, 8, 8\)"),
    "w2 of two dimensions": ({"w2": torch.randn(8, 4)}, r"shape of w2: got \(8, 4\), expected \(e, 8, I\)"),
    "experts of another number": (
        {"router_w": torch.randn(6, 8)},
        r"shape of w2: got \(4, 8, 4\), expected \(6, 8, 4\)",
    ),
    "K above E": ({"top_k": 5}, "top_k: got 5, expected at most E=4"),
    "K of zero": ({"top_k": 0}, "top_k: got 0, expected a whole number of at least 1"),
    "K no number": ({"top_k": 1.5}, "top_k: got 1.5"),
    "b1 alone": ({"b1": torch.randn(4, 8)}, r"biases: got \['b1'\] alone, expected b1 and b2, or neither"),
    "b2 alone": ({"b2": torch.randn(4, 8)}, r"biases: got \['b2'\] alone"),
    "b1 too short": (
        {"b1": torch.randn(4, 4), "b2": torch.randn(4, 8)},
        r"shape of b1: got \(4, 4\), expected \(4, 8\) = \(e, outputs\)",
    ),
    "b2 too short": (
        {"b1": torch.randn(4, 8), "b2": torch.randn(3, 8)},
        r"shape of b2: got \(3, 8\), expected \(4, 8\)",
    ),
    "activation": ({"activation": "tanh"}, "activation: got 'tanh', expected one of 'swiglu', 'geglu'"),
    "gate layout": ({"gate_layout": "split"}, "gate_layout: got 'split', expected one of 'interleaved', 'concat'"),
    "norm": ({"norm_topk_probs": "no"}, "norm_topk_probs: got 'no', expected True or False"),
    "score order": ({"score_order": "none"}, "score_order: got 'none', expected one of 'topk_then_softmax'"),
}

WRONG_ROUTED: dict[str, tuple[dict[str, Any], str]] = {
    "ids of floats": ({"topk_idx": torch.zeros(5, 2)}, "dtype of topk_idx: got torch.float32, expected torch.int32 or"),
    "ids of one dimension": ({"topk_idx": torch.zeros(5, dtype=torch.int64)}, r"shape of topk_idx: got \(5,\)"),
    "ids for other tokens": (
        {"topk_idx": torch.zeros(4, 2, dtype=torch.int64)},
        "tokens of topk_idx: got 4, expected T=5",
    ),
    "no choice": ({"topk_idx": torch.zeros(5, 0, dtype=torch.int64)}, "K of topk_idx: got 0, expected 1 to E=4"),
    "K above E": ({"topk_idx": torch.zeros(5, 5, dtype=torch.int64)}, "K of topk_idx: got 5, expected 1 to E=4"),
    "id too large": (
        {"topk_idx": torch.tensor([[0, 4]] * 5)},
        "topk_idx: got expert ids from 0 to 4, expected 0 to 3, or -1 for a dropped slot",
    ),
    "id too small": ({"topk_idx": torch.tensor([[0, -2]] * 5)}, "topk_idx: got expert ids from -2 to 0"),
    "id beyond int32": ({"topk_idx": torch.tensor([[0, 2**32]] * 5)}, "topk_idx: got expert ids from 0 to 4294967296"),
    "scores of integers": (
        {"topk_scores": torch.ones(5, 2, dtype=torch.int64)},
        "dtype of topk_scores: got torch.int64",
    ),
    "scores of another shape": (
        {"topk_scores": torch.rand(5, 3)},
        r"shape of topk_scores: got \(5, 3\), expected \(5, 2\)",
    ),
    "too many tokens": (
        {
            "x": torch.randn(7, HIDDEN),
            "topk_idx": torch.zeros(7, 2, dtype=torch.int64),
            "topk_scores": torch.rand(7, 2),
        },
        r"tokens T: got 7, expected at most C=6",
    ),
}


@pytest.mark.parametrize("name", WRONG_MOE)
def test_wrong_arguments_of_moe(name: str) -> None:
    changes, message = WRONG_MOE[name]
    with ExpertParallel(max_tokens_per_rank=6) as ep, pytest.raises(ValueError, match=message) as raised:
        ep.moe(**good_call(**changes))
    assert "rank 0 of 1" in str(raised.value)


@pytest.mark.parametrize("name", WRONG_ROUTED)
def test_wrong_arguments_of_moe_routed(name: str) -> None:
    changes, message = WRONG_ROUTED[name]
    with ExpertParallel(max_tokens_per_rank=6) as ep, pytest.raises(ValueError, match=message) as raised:
        ep.moe_routed(**good_routed_call(**changes))
    assert "rank 0 of 1" in str(raised.value)


@pytest.mark.parametrize("argument", ["x", "router_w", "w1", "w2", "b1"])
def test_what_is_no_tensor(argument: str) -> None:
    with ExpertParallel() as ep, pytest.raises(TypeError, match=f"rank 0 of 1: {argument}: got list, expected a torch"):
        ep.moe(**good_call(**{"b2": torch.randn(EXPERTS, HIDDEN), "b1": torch.randn(EXPERTS, 8), argument: [1.0]}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "nccl"}, "backend: got 'nccl', expected one of 'auto', 'fast', 'reference'"),
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank: got 0, expected a whole number of at least 1"),
        ({"max_tokens_per_rank": True}, "max_tokens_per_rank: got True"),
        ({"group": "world"}, "group: got str, expected ProcessGroup, 1-D DeviceMesh or None"),
    ],
)
def test_wrong_arguments_of_the_object(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rank 0 of 1: {message}"):
        ExpertParallel(**arguments)


def test_config_of_another_type() -> None:
    with pytest.raises(TypeError, match="config: got dict, expected an EPConfig"):
        ExpertParallel(config={"dispatch": "auto"})  # type: ignore[arg-type]


def wrong_everywhere(rank: Rank) -> list[str]:
    """The messages of calls that are wrong on all ranks alike; communication works before and after."""
    messages = []
    started = time.monotonic()
    with ExpertParallel(backend="reference") as ep:
        calls: list[Callable[[], object]] = [
            lambda: ep.moe(**good_call(router_w=torch.randn(3, HIDDEN))),
            lambda: ep.moe_routed(**good_routed_call(topk_idx=torch.tensor([[0, 8]] * TOKENS))),
            lambda: ep.plan(torch.zeros(2, 1, dtype=torch.int64), num_experts=5),
            lambda: sonic_ep.MoE(8, 4, num_experts=5, top_k=2, ep=ep),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=f"rank {rank.rank} of 2") as raised:
                call()
            messages.append(str(raised.value))
        assert time.monotonic() - started < 5
        assert ep.plan(torch.zeros(2, 1, dtype=torch.int64), num_experts=4).counts.tolist() == [4, 0, 0, 0]
    return messages


def test_wrong_on_all_ranks_is_refused_before_any_communication(cpu_pool: RankPool) -> None:
    for messages in cpu_pool.run(wrong_everywhere, world_size=2):
        assert "number of experts E: got 3, expected a multiple of the group's W=2 ranks" in messages[0]
        assert "topk_idx: got expert ids from 0 to 8, expected 0 to 7" in messages[1]
        assert "number of experts E: got 5" in messages[2]
        assert "number of experts E: got 5" in messages[3]


def nothing_moves(rank: Rank) -> None:
    """A wrong call on one rank alone neither sends nor waits: the others never notice."""
    with ExpertParallel(backend="reference") as ep:
        if rank.rank == 0:
            for wrong in (good_call(b1=torch.randn(2, 8)), good_call(top_k=9), good_call(w1=torch.randn(1, 8, 8))):
                with pytest.raises(ValueError, match="rank 0 of 2"):
                    ep.moe(**wrong)
            for ids in ([[0, 99]], [[0, -7]]):
                with pytest.raises(ValueError, match="expert ids"):
                    ep.plan(torch.tensor(ids), num_experts=EXPERTS)
        assert ep.plan(torch.tensor([[rank.rank]]), num_experts=EXPERTS).counts.tolist() == [1, 1, 0, 0]


def test_a_wrong_call_communicates_nothing(cpu_pool: RankPool) -> None:
    cpu_pool.run(nothing_moves, world_size=2)


SCRIPT = """
import sys, time, torch, torch.distributed as dist, sonic_ep
dist.init_process_group("gloo")
ep = sonic_ep.ExpertParallel(backend="reference", max_tokens_per_rank=4)
x, w = torch.randn(4, 8), torch.randn(2, 8, 8)
if dist.get_rank() == 0:
    print("calling", time.time(), flush=True)
{call}
"""

CALLS = {
    "experts not divided": (
        "ep.plan(torch.zeros(4, 1, dtype=torch.int64), num_experts=3)",
        "number of experts E: got 3",
    ),
    "K above E": (
        "ep.plan(torch.zeros(4, 5, dtype=torch.int64), num_experts=4)",
        "K of topk_idx: got 5, expected 1 to",
    ),
    "id out of range": ("ep.plan(torch.full((4, 1), 4), num_experts=4)", "topk_idx: got expert ids from 4 to 4"),
    "tokens above C": (
        "ep.plan(torch.zeros(5, 1, dtype=torch.int64), num_experts=4)",
        "tokens T: got 5, expected at most",
    ),
    "b1 alone": ("ep.moe(x, torch.randn(4, 8), w, w[:, :, :4], 2, b1=w[:, 0])", "biases: got ['b1'] alone"),
    "dtype": ("ep.moe(x.double(), torch.randn(4, 8), w, w[:, :, :4], 2)", "dtype of x: got torch.float64"),
    "shape": ("ep.moe(x, torch.randn(4, 9), w, w[:, :, :4], 2)", "shape of router_w: got (4, 9)"),
    "device": ("ep.moe(x.to('meta'), torch.randn(4, 8), w, w[:, :, :4], 2)", "device of x: got meta"),
    "closed": ("ep.close(); ep.moe(x, torch.randn(4, 8), w, w[:, :, :4], 2)", "got one that is closed"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_program_ends_within_five_seconds_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    call, message = CALLS[name]
    script = tmp_path / f"wrong_{name.replace(' ', '_')}.py"
    script.write_text(SCRIPT.format(call=call))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=HANG_SECONDS)
    ended = time.time()
    called = float(done.stdout.split("calling ")[1].split()[0])
    assert done.returncode != 0
    assert message in done.stderr
    assert "of 2: " in done.stderr
    assert ended - called < 5
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
    plan = ep.plan(torch.zeros(1, 1, dtype=torch.int64), 4)
    ep.close()
    ep.close()
    for call in (
        lambda: ep.moe(**good_call()),
        lambda: ep.moe_routed(**good_routed_call()),
        lambda: ep.plan(torch.zeros(1, 1, dtype=torch.int64), 4),
        lambda: ep.dispatch(torch.zeros(1, HIDDEN), plan),
        lambda: ep.combine(torch.zeros(1, HIDDEN), torch.ones(1, 1), plan),
        lambda: ep.agree(1, torch.device("cpu")),
        lambda: ep.check(),
    ):
        with pytest.raises(ClosedError, match="rank 0 of 1: ExpertParallel: got one that is closed, expected an open"):
            call()


def wrong_between_right_ones(rank: Rank) -> None:
    """What is refused before anything moves is no error that others have to hear of."""
    ids = torch.tensor([[rank.rank]])
    with ExpertParallel(backend="reference") as ep:
        ep.plan(ids, num_experts=EXPERTS)
        if rank.rank == 0:
            with pytest.raises(ValueError, match="expert ids"):
                ep.plan(torch.tensor([[0, 99]]), num_experts=EXPERTS)
        assert not ep._collectives._astray
        assert ep.plan(ids, num_experts=EXPERTS).counts.tolist() == [1, 1, 0, 0]
        assert ep._collectives._status_store.statuses() == {}


def test_a_wrong_call_after_a_right_one_tells_nobody(cpu_pool: RankPool) -> None:
    cpu_pool.run(wrong_between_right_ones, world_size=2)


def test_a_plan_of_another_rank_is_refused() -> None:
    with ExpertParallel(backend="reference") as ep:
        plan = replace(ep.plan(torch.zeros(1, 1, dtype=torch.int64), 4), rank=1)
        for call in (
            lambda: ep.dispatch(torch.zeros(1, HIDDEN), plan),
            lambda: ep.combine(torch.zeros(1, HIDDEN), torch.ones(1, 1), plan),
        ):
            with pytest.raises(ValueError, match="plan: got a plan for rank 1 of 1, expected one for rank 0 of 1"):
                call()
