"""The benches at smoke size, on one rank and on two, and what they make of right, wrong and impossible results."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from limits import HANG_SECONDS

from sonic_ep.cost import LinkCeilings
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler.timing import AboveCeilingError, Ceiling, Timing
from sonic_ep.testing import Rank, RankPool

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
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
    """Every entry is whole, and on a CPU no share of a ceiling and no bar is claimed. Their names."""
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
    assert found["rates_gb_per_s"] == {}
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
    check_what_pytest_benchmark_was_told(json.loads(theirs.read_text()), found["entries"])


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


def check_what_pytest_benchmark_was_told(theirs: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Its rounds are ours: those of the slowest rank."""
    medians = sorted(bench["stats"]["median"] * 1e6 for bench in theirs["benchmarks"])
    assert medians == pytest.approx(sorted(entry["median_us"] for entry in entries), abs=0.1)


def test_without_a_gpu_and_without_the_interpreter_it_says_what_is_missing() -> None:
    done = run("-m", "pytest", "bench/bench_plan.py", "-p", "no:cacheprovider", interpreted=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout
    assert "passed" not in done.stdout


def test_wrong_words() -> None:
    done = run("-m", "pytest", "bench/bench_plan.py", "-p", "no:cacheprovider", "--thek=1,2,3")
    assert done.returncode != 0
    assert "--thek: got '1,2,3', expected four whole numbers, T,H,E,K" in done.stdout + done.stderr


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules that benches share; they are no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    from sonic_ep.benchmark import arena, workload
    from sonic_ep.benchmark import results as report

    yield SimpleNamespace(arena=arena, report=report, workload=workload)
    for name in ("report", "workload", "arena"):
        sys.modules.pop(name, None)


def entry_of(bench: SimpleNamespace, *, seconds: float) -> Any:
    """100 GB against a ceiling of 200 GB/s, in ``seconds``, with the bar of 80%."""
    ceiling = Ceiling(name="the read ceiling", bytes_per_second=200e9)
    traffic = bench.report.Traffic(nbytes=100e9, ceiling=ceiling)
    shape = bench.workload.Shape(tokens=4, hidden=8, num_experts=2, top_k=1)
    timing = Timing(rounds=(seconds,) * 3)
    bar = traffic.at_least(0.8)
    return bench.report.Entry(name="work", how="eager", shape=shape, timing=timing, traffic=traffic, bar=bar)


def test_bars_are_times(bench: SimpleNamespace) -> None:
    entry = entry_of(bench, seconds=0.6)
    assert entry.bar.seconds == pytest.approx(0.625)
    assert entry.traffic.at_most(1.25).seconds == pytest.approx(0.625)
    assert entry.met
    assert not entry_of(bench, seconds=0.7).met
    assert bench.report.Traffic(nbytes=1, ceiling=None).at_least(0.5) is None


def test_an_entry_as_json_and_in_the_table(bench: SimpleNamespace) -> None:
    entry = entry_of(bench, seconds=0.7)
    found = entry.as_json()
    assert found["shape"] == {"T": 4, "H": 8, "E": 2, "K": 1, "dtype": "bfloat16"}
    assert (found["gb_per_s"], found["percent"], found["met"]) == (142.86, 71.43, False)
    results = bench.report.Results(environment={}, ceilings=None, entries=[entry])
    assert "MISSED: at least 80% of the read ceiling" in results.table()[-1]
    assert "500000.0 link" in results.table()[-1]


def test_every_measured_rate_is_reported(bench: SimpleNamespace) -> None:
    ceilings = LinkCeilings(copy_engine_in=1e9, copy_engine_out=2e9, read=3e9, write=4e9)
    results = bench.report.Results(environment={}, ceilings=ceilings, memory_rate=5e9)
    expected = {"copy_engine_in": 1.0, "copy_engine_out": 2.0, "read": 3.0, "write": 4.0, "memory": 5.0}
    assert results.as_json()["rates_gb_per_s"] == expected
    assert "memory 5.0" in results.table()[0]
    alone = bench.report.Results(environment={}, ceilings=None, memory_rate=5e9)
    assert alone.table()[:2] == ["no ceilings: no link between GPUs was measured", "rates in GB/s: memory 5.0"]


@pytest.mark.parametrize(
    ("name", "gpus", "ranks", "expected"),
    [
        ("NVIDIA H200", 2, 2, True),
        ("NVIDIA H200", 4, 2, True),
        ("NVIDIA H200", 1, 2, False),
        ("NVIDIA H200", 8, 8, False),
        ("NVIDIA GH200 480GB", 2, 2, False),
        ("NVIDIA H100 80GB HBM3", 2, 2, False),
    ],
)
def test_bars_are_for_two_h200(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, ranks: int, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    place = SimpleNamespace(world_size=ranks, device=torch.device("cuda", 0))
    assert bench.workload.bars_hold(place.device, place.world_size) == expected


def floor_of(bench: SimpleNamespace, memory_bytes: float) -> Any:
    """Of 100 GB against a link of 200 GB/s, and what a memory of 1000 GB/s moves."""
    memory = bench.report.MemoryTraffic(nbytes=memory_bytes, bytes_per_second=1000e9)
    ceiling = Ceiling(name="the read ceiling", bytes_per_second=200e9)
    return bench.report.Traffic(nbytes=100e9, ceiling=ceiling, memory=memory).floor


def test_the_floor_is_that_of_the_slower(bench: SimpleNamespace) -> None:
    assert floor_of(bench, 400e9) == bench.report.Floor(seconds=0.5, by="link")
    assert floor_of(bench, 600e9) == bench.report.Floor(seconds=0.6, by="memory")
    assert entry_of(bench, seconds=0.7).as_json()["floor_us"] == 500_000
    assert bench.report.Traffic(nbytes=1, ceiling=None).floor is None


def test_no_entry_is_above_its_ceiling(bench: SimpleNamespace) -> None:
    with pytest.raises(AboveCeilingError, match="work, eager: got"):
        entry_of(bench, seconds=0.4).as_json()


@contextmanager
def arena_of(rank: Rank) -> Iterator[SimpleNamespace]:
    """An arena on this rank, and the modules of the benches."""
    sys.path.insert(0, str(BENCH))
    try:
        from sonic_ep.benchmark import arena, workload
        from sonic_ep.benchmark import results as report
    finally:
        sys.path.remove(str(BENCH))
    from sonic_ep.fast.workspace import Workspace

    group = resolve_group(None)
    workspace = Workspace(group, rank.device)
    results = report.Results(environment={}, ceilings=None)
    here = arena.SuiteArena(
        group=group,
        device=rank.device,
        barrier_before_write=workspace.barrier_before_write,
        workspace=workspace,
        sizes=workload.SMOKE,
        results=results,
    )
    yield SimpleNamespace(here=here, arena=arena, report=report, shape=workload.SMOKE.small)
    workspace.close()


def wrong_from_a_call_on(rank: Rank, first_wrong: int) -> tuple[str, int, int]:
    """Work that rank 1 gets wrong: what every rank says of it, its calls, and how many entries came of it."""
    calls = []

    def count() -> int:
        calls.append(rank.rank)
        return len(calls)

    def check(got: int) -> None:
        if rank.rank == 1 and got >= first_wrong:
            raise AssertionError(f"wrong in call {got}")

    with arena_of(rank) as bench:
        work = bench.arena.Work(name="work", shape=bench.shape, function=count, check=check)
        with pytest.raises(bench.arena.WrongError) as wrong:
            bench.here.run(work, bench.arena.How.EAGER)
        return str(wrong.value), len(calls), len(bench.here.results.entries)


# Two calls prove the work before it is timed, two rounds are timed, two calls prove it again.
@pytest.mark.fast
@pytest.mark.parametrize(("first_wrong", "calls"), [(1, 2), (3, 4), (5, 6)], ids=["before", "timed", "after"])
def test_what_is_wrong_on_one_rank_fails_on_all(cpu_pool: RankPool, first_wrong: int, calls: int) -> None:
    said = f"rank 1: wrong in call {calls}"
    assert cpu_pool.run(wrong_from_a_call_on, first_wrong, world_size=2) == [(said, calls, 0)] * 2


def too_fast(rank: Rank) -> tuple[str, int]:
    """Work that brings more than its ceiling admits."""
    with arena_of(rank) as bench:
        ceiling = Ceiling(name="a slow link", bytes_per_second=1.0)
        traffic = bench.report.Traffic(nbytes=1e9, ceiling=ceiling)
        work = bench.arena.Work(
            name="work", shape=bench.shape, function=lambda: None, check=lambda got: None, traffic=traffic
        )
        with pytest.raises(AboveCeilingError) as refused:
            bench.here.run(work, bench.arena.How.EAGER)
        return str(refused.value), len(bench.here.results.entries)


@pytest.mark.fast
def test_what_is_faster_than_the_link_is_no_result(cpu_pool: RankPool) -> None:
    for said, entries in cpu_pool.run(too_fast, world_size=2):
        assert "a slow link" in said
        assert entries == 0


def meetings_of_a_run(rank: Rank) -> tuple[int, int]:
    """How often ranks met before a round, and the rounds."""
    with arena_of(rank) as bench:
        met = []
        barrier_before_write = bench.here.barrier_before_write
        here = replace(bench.here, barrier_before_write=lambda: (met.append(1), barrier_before_write()))
        work = bench.arena.Work(name="work", shape=bench.shape, function=lambda: None, check=lambda got: None)
        entry = here.run(work, bench.arena.How.EAGER)
        return len(met), len(entry.timing.rounds)


@pytest.mark.fast
def test_ranks_meet_before_every_round(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(meetings_of_a_run, world_size=2) == [(2, 2)] * 2


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
        sum(int(((owners[rank] == rank) == home).any(dim=1).sum()) for rank in range(2)) / 2 for home in (True, False)
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
