"""Profiles kept on disk: found again, never mistaken for others, never torn, never in the way."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from on_ranks import on_ranks
from profiles import Asked, profile

import sonic_ep.profiler.cache as cache_module
import sonic_ep.profiler.profiler as profiler_module
from sonic_ep import DispatchMode, EPConfig, ExpertParallel, NetworkProfiler, ProfileReport
from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler.agreement import gathered
from sonic_ep.profiler.cache import Cache
from sonic_ep.profiler.machine import Machine
from sonic_ep.profiler.request import GroupRequest, RequestSummary
from sonic_ep.profiler.timing import RoundTimer
from sonic_ep.testing import Rank, RankPool

KEY = {"format": 1, "machines": ["here"], "tokens": [5]}
MACHINE = Machine(gpu="GPU", gpus=2, link="NVLink", torch="2", triton="3", cuda="13", nccl="2", driver="5", code="abc")
SUMMARY = RequestSummary(alike={"hidden": 16, "rounds": None}, tokens=5, machine=MACHINE, gpu="host 0", ids="1f")
IDS = torch.tensor([[0, 1]] * 5)
SMALL = {"tokens": 3, "hidden": 4, "top_k": 1, "num_experts": 2, "device": torch.device("cpu")}


def key_of(*summaries: RequestSummary, config: EPConfig | None = None, by: str = "nccl") -> str:
    return json.dumps(GroupRequest(summaries=summaries).key(config or EPConfig(), by))


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    return profile(Asked())


def forbid_measuring(patched: pytest.MonkeyPatch) -> None:
    measure = Mock(side_effect=NotImplementedError("measured, although there is a profile"))
    for owner, name in ((RoundTimer, "time"), (profiler_module, "measured_bandwidth"), (ExpertParallel, "dispatch")):
        patched.setattr(owner, name, measure)


def test_a_hit_measures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = Asked(cache=tmp_path / "new" / "folder")
    measured = profile(asked)
    assert not measured.from_cache
    forbid_measuring(monkeypatch)
    found = profile(asked)
    assert found == replace(measured, from_cache=True)
    assert ["nothing was measured now" in str(each) for each in (found, measured)] == [True, False]
    # Nothing half written is left.
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".json"]


@pytest.mark.parametrize(
    "other",
    [
        Asked(tokens=(4,)),
        Asked(rounds=3),
        *(Asked(config=EPConfig(**{name: True})) for name in ("cpu_sync_on_runtime", "redispatch_x_in_backward")),
        Asked(config=EPConfig(dispatch="rank_dedup")),
        *(Asked(arguments={name: value}) for name, value in (("hidden", 1), ("top_k", 1), ("num_experts", 7))),
        *(Asked(arguments={"routing": value}) for value in ("skewed", IDS)),
        Asked(arguments={"dtype": torch.float32}),
    ],
    ids=str,
)
def test_another_call_is_another_profile(other: Asked, tmp_path: Path) -> None:
    profile(Asked(cache=tmp_path))
    assert not profile(replace(other, cache=tmp_path)).from_cache
    assert len(list(tmp_path.iterdir())) == 2


def test_given_ids_are_part_of_the_key(tmp_path: Path) -> None:
    asked = [Asked(cache=tmp_path, arguments={"routing": ids}) for ids in (IDS, IDS + 1, IDS.int())]
    assert [profile(each).from_cache for each in asked] == [False, False, True]


@pytest.mark.parametrize("name", Machine.__dataclass_fields__)
def test_every_property_of_any_ranks_machine_is_part_of_the_key(name: str) -> None:
    other = replace(SUMMARY, machine=replace(MACHINE, **{name: 3 if name == "gpus" else "another"}))
    assert key_of(SUMMARY, SUMMARY) != key_of(SUMMARY, other)


def test_ranks_and_how_they_are_placed_are_part_of_the_key() -> None:
    changed = [replace(SUMMARY, **{name: value}) for name, value in (("gpu", "host 1"), ("tokens", 4), ("ids", "2e"))]
    keys = [key_of(SUMMARY), key_of(SUMMARY, SUMMARY), *(key_of(SUMMARY, other) for other in changed)]
    keys += [key_of(SUMMARY, config=EPConfig(combine="all_to_all")), key_of(SUMMARY, by="gloo")]
    assert len(set(keys)) == len(keys)
    assert [json.loads(key)["ranks_per_gpu"] for key in keys[:3]] == [1, 2, 1]
    assert json.loads(keys[0])["format"] == 1


@on_ranks(2, pool="cpu_pool")
def test_all_ranks_have_what_rank_0_finds(rank: Rank, tmp_path: Path) -> None:
    """Only rank 0 has the folder; measuring is forbidden the second time."""
    asked = Asked(cache=tmp_path if rank.rank == 0 else Path("/dev/null/none"))
    first = profile(asked, rank.rank, rank.device)
    with pytest.MonkeyPatch.context() as patched:
        forbid_measuring(patched)
        second = profile(asked, rank.rank, rank.device)
    assert second == replace(first, from_cache=True)
    assert gathered(resolve_group(None), first) == [first, first]


def document_of(report: ProfileReport, **changes: Any) -> bytes:
    return json.dumps({"key": KEY, "profile": report.as_json(), **changes}).encode()


UNUSABLE: dict[str, Callable[[ProfileReport], bytes]] = {
    "empty": lambda report: b"",
    "binary": lambda report: b"\xff\xfe\x00",
    "torn": lambda report: document_of(report)[:1000],
    "no object": lambda report: b"[1, 2]",
    "deep": lambda report: b"[" * 100_000,
    "no profile": lambda report: json.dumps({"key": KEY}).encode(),
    "foreign": lambda report: document_of(report, key={**KEY, "tokens": [6]}),
    "older": lambda report: document_of(report, key={**KEY, "format": 0}),
    # Too large for a float, and longer than Python makes numbers of.
    "huge": lambda report: document_of(report).replace(b'"median_us": ', b'"median_us": 1' + b"0" * 400, 1),
    "endless": lambda report: document_of(report).replace(b'"median_us": ', b'"median_us": 1' + b"0" * 5000, 1),
    "wrong field": lambda report: document_of(report, profile={**report.as_json(), "pairs": []}),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_that_cannot_be_used_is_overwritten(
    kind: str, report: ProfileReport, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(folder=tmp_path)
    read = partial(cache.read, KEY, lambda report: None)
    cache.write(KEY, report)
    (path,) = tmp_path.iterdir()
    assert read() == report
    assert not caplog.records
    path.write_bytes(UNUSABLE[kind](report))
    assert read() is None
    (line,) = caplog.messages
    assert line.startswith(f"profile cache: measuring anew, for {tmp_path}: ")
    assert "\n" not in line
    cache.write(KEY, report)
    assert read() == report
    assert list(tmp_path.iterdir()) == [path]


def profile_of_kept(rank: Rank, folder: Path, error: Exception | None = None) -> tuple[bool, list[str]]:
    """Whether the cache served, and what was logged. error: of reading it."""
    with pytest.MonkeyPatch.context() as patched:
        log = Mock()
        patched.setattr(cache_module, "logger", log)
        if error is not None:
            patched.setattr(cache_module, "_report_in", Mock(side_effect=error))
        served = profile(Asked(cache=folder), rank.rank, rank.device).from_cache
    return served, [call.args[1] for call in log.warning.call_args_list]


def change_profile(folder: Path, path: tuple[str | int, ...], value: object) -> None:
    """Put ``value`` where ``path`` leads in the one profile of ``folder``, whose key stays."""
    (file,) = folder.iterdir()
    document = json.loads(file.read_text())
    target = document["profile"]
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("pairs", 0, "median_us"), 10**400, id="huge"),
        (("shape", "tokens"), [5, 4]),
        (("shape", "hidden"), 17),
        (("backend",), "fast"),
        (("config", "cpu_sync_on_runtime"), True),
        (("config", "max_rows"), 9),
    ],
)
def test_a_profile_of_something_else_is_measured_anew_by_all(
    cpu_pool: RankPool, tmp_path: Path, path: tuple[str | int, ...], value: object
) -> None:
    assert cpu_pool.run(profile_of_kept, tmp_path, world_size=2) == [(False, [])] * 2
    change_profile(tmp_path, path, value)
    (first, lines), (second, silence) = cpu_pool.run(profile_of_kept, tmp_path, world_size=2)
    assert (first, second, silence) == (False, False, [])
    assert [line.startswith("profile cache: measuring anew, for ") for line in lines] == [True]
    assert cpu_pool.run(profile_of_kept, tmp_path, world_size=2) == [(True, [])] * 2


def test_a_kept_profile_has_the_modes_that_are_fixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = Asked(cache=tmp_path, config=EPConfig(dispatch="rank_dedup"))
    profile(asked)
    change_profile(tmp_path, ("config", "dispatch"), "all_gather")
    found = profile(asked)
    assert not found.from_cache
    assert found.config.dispatch is DispatchMode.RANK_DEDUP
    (line,) = caplog.messages
    assert "config: got a profile of EPConfig(dispatch=<DispatchMode.ALL_GATHER" in line


def test_unforeseen_errors_of_reading_leave_no_rank_waiting(cpu_pool: RankPool, tmp_path: Path) -> None:
    cpu_pool.run(profile_of_kept, tmp_path, world_size=2)
    error = OverflowError("int too large\nto convert")
    answers = cpu_pool.run(profile_of_kept, tmp_path, error, world_size=2)
    line = f"profile cache: measuring anew, for {tmp_path}: int too large to convert"
    assert answers == [(False, [line]), (False, [])]


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "file/folder"])
def test_a_folder_that_cannot_be_made_is_a_line_in_the_log(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert not profile(Asked(cache=tmp_path / name)).from_cache
    what = [line.split(", for ")[0] for line in caplog.messages]
    assert what == ["profile cache: measuring anew", "profile cache: not kept"]
    assert all(line.encode() for line in caplog.messages)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_with_rates_the_cache_is_left_alone(tmp_path: Path) -> None:
    profile(Asked(cache=tmp_path))
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    rates = LinkBandwidth(copy_engine_in=1e15, copy_engine_out=1e15, read=1e15, write=1e15)
    found = profile(Asked(cache=tmp_path, rates=rates))
    assert (found.from_cache, found.rates) == (False, rates)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_what_could_not_be_put_in_place_is_removed(
    report: ProfileReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "replace", Mock(side_effect=PermissionError("read-only file system")))
    Cache(folder=tmp_path).write(KEY, report)
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == [f"profile cache: not kept, for {tmp_path}: read-only file system"]


def test_the_default_folder_is_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert [profile(Asked()).from_cache for _ in range(2)] == [False, False]
    assert list(tmp_path.iterdir()) == []
    with ExpertParallel(backend="reference") as ep:
        profiler = NetworkProfiler(ep)
        assert [profiler.profile(**SMALL).from_cache for _ in range(2)] == [False, True]
    assert len(list((tmp_path / ".cache" / "sonic_ep" / "profiles").glob("*.json"))) == 1


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with ExpertParallel(backend="reference") as ep:
        assert not NetworkProfiler(ep).profile(**SMALL).from_cache
    assert len(caplog.messages) == 2
