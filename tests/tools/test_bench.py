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


def checked(done: subprocess.CompletedProcess[str], path: Path, world_size: int) -> list[dict[str, Any]]:
    """The entries: each is whole, and on a CPU no share of a ceiling and no threshold is claimed."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    environment = found["environment"]
    expected = {"world_size": world_size, "torch": torch.__version__, "commit": "a name"}
    assert environment.items() >= expected.items()
    assert "pytest bench -p no:cacheprovider --results" in environment["command"]
    assert "the times mean nothing" in environment["note"]
    for entry in found["entries"]:
        assert set(entry) >= ENTRY_FIELDS
        assert 0 < entry["min_us"] <= entry["median_us"] <= entry["max_us"]
        assert not {"ceiling", "percent", "bar", "met", "floor_us", "floor_by", "against"} & set(entry)
    return found["entries"]


@pytest.mark.fast
def test_smoke_on_one_rank(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "one.json"
    done = run(*PYTEST, f"--results={path}", "--commit", "a name", "-k", "plan or link or nccl or inference")
    names = {entry["name"] for entry in checked(done, path, 1)}
    assert "rates_gb_per_s" not in json.loads(path.read_text())
    layers = {name for name in LAYERS if name.endswith("inference")}
    assert {"plan", *(f"dispatch {mode}: barrier and link" for mode in MODES), *layers} <= names
    assert not any(name.startswith("usual") for name in names)
    assert "no CUDA device, a smoke size on the CPU: the times mean nothing" in done.stdout


@pytest.mark.fast
def test_smoke_on_two_ranks(tmp_path: Path) -> None:
    path, theirs = tmp_path / "two.json", tmp_path / "pytest_benchmark.json"
    done = run(*TORCHRUN, *PYTEST, f"--results={path}", "--commit=a name", f"--benchmark-json={theirs}")
    entries = checked(done, path, 2)
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name.keys() >= LAYERS
    assert {name.split(":")[0] for name in by_name if name.startswith("usual")} == {
        "usual dispatch, all_to_all_single",
        "usual dispatch, all_gather",
        "usual combine, all_to_all_single",
        "usual combine, reduce_scatter",
    }
    for field, by_hand in bytes_by_hand().items():
        assert {name: by_name[name][field] for name in by_hand} == by_hand
    # Rank 0 alone speaks.
    assert done.stdout.count("test session starts") == 1
    # The rounds of pytest-benchmark are those of the slowest rank.
    medians = sorted(bench["stats"]["median"] * 1e6 for bench in json.loads(theirs.read_text())["benchmarks"])
    assert medians == pytest.approx(sorted(entry["median_us"] for entry in entries), abs=0.1)


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
    done = run(*PYTEST, "-k", "bench_plan", interpreted=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout
    assert "passed" not in done.stdout


def test_wrong_arguments() -> None:
    done = run(*PYTEST, "--thek=1,2,3")
    assert done.returncode != 0
    assert "--thek: got '1,2,3', expected four whole numbers, T,H,E,K" in done.stdout + done.stderr


TOKENS, EXPERTS, TOP_K, ROW_BYTES = 6, 8, 2, 16 * torch.bfloat16.itemsize


def bytes_by_hand() -> dict[str, dict[str, float]]:
    """Of the smoke size on two ranks, the mean of both: over the link, and through memory."""
    owner_RTK = torch.stack(
        [
            # The rank of each choice, from ids drawn as the benches draw them.
            torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2000 + rank)).topk(TOP_K, dim=1).indices
            // (EXPERTS // 2)
            for rank in range(2)
        ]
    )
    is_own = owner_RTK == torch.arange(2)[:, None, None]
    kept, away = (float(which.any(dim=2).sum()) / 2 for which in (is_own, ~is_own))
    slots_away, rows = float((~is_own).sum()) / 2, TOKENS * TOP_K
    staged, pulled, deduped = 2 * TOKENS, kept + away + rows, 2 * (kept + away)
    ids = scores = rows * 4 / ROW_BYTES
    link = {
        "dispatch all_gather: barrier and link": TOKENS,
        "dispatch all_to_all: barrier and link": away,
        "dispatch rank_dedup: barrier and link": away,
        "ids to rows, all_to_all: plan and dispatch": away + ids,
        "combine all_to_all: barriers, sums and link": slots_away,
        "combine reduce_scatter: barriers, sums and link": TOKENS,
        "combine rank_dedup: barriers, sums and link": away,
        "combine rank_dedup: scores, barriers, sums and link": away + scores,
    }
    memory = {
        "dispatch all_to_all: barrier and link": pulled,
        "dispatch all_to_all: staging, barriers and link": staged + pulled,
        "dispatch rank_dedup: barrier and link": deduped,
        "ids to rows, rank_dedup: plan and dispatch": staged + deduped + 2 * rows,
        "combine rank_dedup: barriers, sums and link": rows + 2 * away + TOKENS,
        "combine rank_dedup: scores, barriers, sums and link": rows + 2 * away + TOKENS,
    }
    found = {"remote_bytes": link, "memory_bytes": memory}
    return {field: {name: count * ROW_BYTES for name, count in counts.items()} for field, counts in found.items()}
