"""The suites at smoke size, on one rank and on two, through pytest-benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]
PYTEST = ["-m", "pytest", "bench", "-p", "no:cacheprovider"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENTRY_FIELDS = {"name", "how", "shape", "rounds", "median_us", "p10_us", "p90_us", "min_us", "max_us"}
MODES = ("all_gather", "all_to_all", "rank_dedup")
LAYERS = {
    *(f"grouped_mm of a layer: {which}" for which in ("forward, inference", "forward and backward")),
    *(f"layer all_to_all, rank_dedup: {which}" for which in ("forward, inference", "forward and backward")),
    "layer all_to_all, rank_dedup, redispatch, cpu_sync: forward and backward",
    "layer all_to_all, rank_dedup, beside the reference: forward, inference",
    "reference layer: forward, inference",
}


def run(*words: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    """A Python of its own in the root of the repository, on the CPU."""
    # With the variables of pytest-xdist about, pytest-benchmark takes itself for a part of its run and reports nothing.
    dropped = ("PYTEST_XDIST_", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", **({"TRITON_INTERPRET": "1"} if interpreted else {})}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=ROOT, env=environment)


def results_of(done: subprocess.CompletedProcess[str], path: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def check_environment(found: dict[str, Any], world_size: int) -> None:
    assert found["world_size"] == world_size
    assert found["torch"] == torch.__version__
    assert found["commit"] == "a name"
    assert "pytest bench -p no:cacheprovider --results" in found["command"]
    assert "the times mean nothing" in found["note"]


def check_entries(entries: list[dict[str, Any]]) -> set[str]:
    """Every entry is whole, and on a CPU no share of a ceiling and no threshold is claimed. Their names."""
    for entry in entries:
        assert set(entry) >= ENTRY_FIELDS
        assert 0 < entry["min_us"] <= entry["median_us"] <= entry["max_us"]
        assert not {"ceiling", "percent", "bar", "met", "floor_us", "floor_by", "against"} & set(entry)
    return {entry["name"] for entry in entries}


@pytest.mark.fast
def test_smoke_on_one_rank(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "one.json"
    done = run(*PYTEST, f"--results={path}", "--commit", "a name")
    found = results_of(done, path)
    check_environment(found["environment"], 1)
    assert "rates_gb_per_s" not in found
    names = check_entries(found["entries"])
    assert {"plan", *(f"dispatch {mode}: barrier and link" for mode in MODES), *LAYERS} <= names
    assert not any(name.startswith("usual") for name in names)
    assert "no CUDA device, a smoke size on the CPU: the times mean nothing" in done.stdout


@pytest.mark.fast
def test_smoke_on_two_ranks(tmp_path: Path) -> None:
    path, theirs = tmp_path / "two.json", tmp_path / "pytest_benchmark.json"
    done = run(*TORCHRUN, *PYTEST, f"--results={path}", "--commit=a name", f"--benchmark-json={theirs}")
    found = results_of(done, path)
    check_environment(found["environment"], 2)
    names = check_entries(found["entries"])
    assert names >= LAYERS
    assert {name.split(":")[0] for name in names if name.startswith("usual")} == {
        "usual dispatch, all_to_all_single",
        "usual dispatch, all_gather",
        "usual combine, all_to_all_single",
        "usual combine, reduce_scatter",
    }
    for by_hand, field in ((bytes_by_hand(), "remote_bytes"), (memory_bytes_by_hand(), "memory_bytes")):
        by_name = {entry["name"]: entry.get(field) for entry in found["entries"]}
        assert {name: by_name[name] for name in by_hand} == by_hand
    # Rank 0 alone speaks.
    assert done.stdout.count("test session starts") == 1
    # The rounds of pytest-benchmark are those of the slowest rank.
    medians = sorted(bench["stats"]["median"] * 1e6 for bench in json.loads(theirs.read_text())["benchmarks"])
    assert medians == pytest.approx(sorted(entry["median_us"] for entry in found["entries"]), abs=0.1)


STALE = """
import sonic_ep.fast.dispatch.base as module

staging, calls = module.stage_tokens, []

def stage_once(x_TH, capacity, workspace, name="tokens"):
    calls.append(1)
    if len(calls) == 1:
        return staging(x_TH, capacity, workspace, name)
    return module.reserve_tokens(workspace, capacity, x_TH.shape[1] * x_TH.element_size(), name)

module.stage_tokens = stage_once
"""


@pytest.mark.fast
def test_what_is_right_in_its_first_call_only_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that were staged once, for inputs that never change, would look right for ever."""
    (tmp_path / "staging_once.py").write_text(STALE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = run(*TORCHRUN, *PYTEST, "-p", "staging_once", "-k", "bench_receive and all_to_all")
    assert done.returncode != 0
    assert "received by all_to_all" in done.stdout


def test_without_a_gpu_and_without_the_interpreter_it_says_what_is_missing() -> None:
    done = run("-m", "pytest", "bench/bench_plan.py", "-p", "no:cacheprovider", interpreted=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout
    assert "passed" not in done.stdout


def test_wrong_arguments() -> None:
    done = run("-m", "pytest", "bench/bench_plan.py", "-p", "no:cacheprovider", "--thek=1,2,3")
    assert done.returncode != 0
    assert "--thek: got '1,2,3', expected four whole numbers, T,H,E,K" in done.stdout + done.stderr


TOKENS, EXPERTS, TOP_K, ROW_BYTES = 6, 8, 2, 16 * torch.bfloat16.itemsize


def owners_by_hand(rank: int) -> torch.Tensor:
    """The rank of each choice (T, K) of the smoke size on two ranks, from ids drawn as the benches draw them."""
    noise = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2000 + rank))
    return noise.topk(TOP_K, dim=1).indices // (EXPERTS // 2)


def bytes_by_hand() -> dict[str, float]:
    """Bytes over the link of the smoke size on two ranks, the mean of both."""
    scores = TOKENS * TOP_K * 4
    away = [owners_by_hand(rank) != rank for rank in range(2)]
    pairs, slots = sum(int(of_rank.any(dim=1).sum()) for of_rank in away), sum(int(of_rank.sum()) for of_rank in away)
    return {
        "dispatch all_gather: barrier and link": TOKENS * ROW_BYTES,
        "dispatch all_to_all: barrier and link": pairs / 2 * ROW_BYTES,
        "dispatch rank_dedup: barrier and link": pairs / 2 * ROW_BYTES,
        "ids to rows, all_to_all: plan and dispatch": pairs / 2 * ROW_BYTES + TOKENS * TOP_K * 4,
        "combine all_to_all: barriers, sums and link": slots / 2 * ROW_BYTES,
        "combine reduce_scatter: barriers, sums and link": TOKENS * ROW_BYTES,
        "combine rank_dedup: barriers, sums and link": pairs / 2 * ROW_BYTES,
        "combine rank_dedup: scores, barriers, sums and link": pairs / 2 * ROW_BYTES + scores,
    }


def memory_bytes_by_hand() -> dict[str, float]:
    """Bytes that memory moves for the smoke size on two ranks, the mean of both."""
    owners = [owners_by_hand(rank) for rank in range(2)]
    kept, away = (
        sum(int(((owners[rank] == rank) == local).any(dim=1).sum()) for rank in range(2)) / 2 for local in (True, False)
    )
    rows, staged = TOKENS * TOP_K, 2 * TOKENS
    pulled = kept + away + rows
    found = {
        "dispatch all_to_all: barrier and link": pulled,
        "dispatch all_to_all: staging, barriers and link": staged + pulled,
        "dispatch rank_dedup: barrier and link": 2 * (kept + away),
        "ids to rows, rank_dedup: plan and dispatch": staged + 2 * (kept + away) + 2 * rows,
        "combine rank_dedup: barriers, sums and link": rows + 2 * away + TOKENS,
        "combine rank_dedup: scores, barriers, sums and link": rows + 2 * away + TOKENS,
    }
    return {name: moved * ROW_BYTES for name, moved in found.items()}
