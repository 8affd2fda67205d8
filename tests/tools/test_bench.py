"""The suites at smoke size, on one rank and on two, through pytest-benchmark."""

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from end_to_end import TORCHRUN, python_in_root

run = partial(python_in_root, TRITON_INTERPRET="1")
PYTEST = ["-m", "pytest", "bench", "-p", "no:cacheprovider"]
ENTRY_FIELDS = {"name", "how", "shape", "rounds", "median_us", "p10_us", "p90_us", "min_us", "max_us"}
LAYERS = ("grouped_mm of a layer", "layer all_to_all, rank_dedup")
BESIDE, AGAIN = (f"{LAYERS[1]}, {words}" for words in ("beside the reference", "redispatch, cpu_sync"))
OF_INFERENCE = {f"{name}: forward, inference" for name in (*LAYERS, BESIDE, "reference layer")}
OF_TRAINING = {f"{name}: forward and backward" for name in (*LAYERS, AGAIN)}


def checked(done: subprocess.CompletedProcess[str], path: Path, world_size: int) -> list[dict[str, Any]]:
    """The entries: each is whole, and on a CPU no share of a ceiling and no threshold is claimed."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    environment = found["environment"]
    assert environment.items() >= {"world_size": world_size, "torch": torch.__version__, "commit": "a name"}.items()
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
    dispatches = {f"dispatch {mode}: barrier and link" for mode in ("all_gather", "all_to_all", "rank_dedup")}
    assert {"plan", *dispatches, *OF_INFERENCE} <= names
    assert not any(name.startswith("usual") for name in names)
    assert "no CUDA device, a smoke size on the CPU: the times mean nothing" in done.stdout


@pytest.mark.thorough
@pytest.mark.fast
def test_smoke_on_two_ranks(tmp_path: Path) -> None:
    path, theirs = tmp_path / "two.json", tmp_path / "pytest_benchmark.json"
    done = run(*TORCHRUN, *PYTEST, f"--results={path}", "--commit=a name", f"--benchmark-json={theirs}")
    entries = checked(done, path, 2)
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name.keys() >= OF_INFERENCE | OF_TRAINING
    usual = {"dispatch, all_to_all_single", "dispatch, all_gather", "combine, all_to_all_single"}
    found = {name.split(":")[0].removeprefix("usual ") for name in by_name if name.startswith("usual")}
    assert found == {*usual, "combine, reduce_scatter"}
    for field, rows in rows_by_hand().items():
        assert {name: by_name[name][field] / ROW_BYTES for name in rows} == rows
    # Rank 0 alone speaks.
    assert done.stdout.count("test session starts") == 1
    # The rounds of pytest-benchmark are those of the slowest rank.
    medians = sorted(bench["stats"]["median"] * 1e6 for bench in json.loads(theirs.read_text())["benchmarks"])
    assert medians == pytest.approx(sorted(entry["median_us"] for entry in entries), abs=0.1)


STALE = """
import sonic_ep.fast.dispatch.base as module

staging = iter([module.stage_tokens])

def stage_once(x_TH, max_tokens, workspace):
    for stage in staging:
        return stage(x_TH, max_tokens, workspace)
    # Without the barrier the half that is read stays the one that was staged.
    return module.reserve_tokens(workspace, max_tokens, x_TH.shape[1] * x_TH.element_size())

module.stage_tokens = stage_once
"""


@pytest.mark.thorough
@pytest.mark.fast
def test_what_is_right_in_its_first_call_only_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that were staged once, for inputs that never change, would look right for ever."""
    (tmp_path / "staging_once.py").write_text(STALE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = run(*TORCHRUN, *PYTEST, "-p", "staging_once", "-k", "bench_receive and all_to_all")
    assert done.returncode != 0
    assert "received by all_to_all" in done.stdout


@pytest.mark.thorough
def test_without_an_interpreter_or_with_wrong_arguments_it_says_so() -> None:
    done = python_in_root(*PYTEST, "-k", "bench_plan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(words in done.stdout for words in ("no CUDA device", "TRITON_INTERPRET=1"))
    assert "passed" not in done.stdout
    done = run(*PYTEST, "--thek=1,2,3")
    assert done.returncode != 0
    assert "--thek: got '1,2,3', expected four whole numbers, T,H,E,K" in done.stdout + done.stderr


TOKENS, EXPERTS, TOP_K, ROW_BYTES = 6, 8, 2, 16 * torch.bfloat16.itemsize


def rows_by_hand() -> dict[str, dict[str, float]]:
    """Bytes in rows, of the smoke size on two ranks, the mean of both: over the link, and through memory."""
    # The rank of each choice, from ids drawn as the benches draw them.
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    drawn_RTE = torch.stack([torch.rand(TOKENS, EXPERTS, generator=generator) for generator in generators])
    owner_RTK = drawn_RTE.topk(TOP_K, dim=2, largest=False).indices // (EXPERTS // 2)
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
    return {"remote_bytes": link, "memory_bytes": memory}
