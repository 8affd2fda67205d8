"""Profiles kept on disk: found again, never mistaken for others, never torn, never in the way."""

import json
import logging
from dataclasses import replace
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from on_ranks import on_ranks
from profiles import Asked, profile, profile_of_all

import sonic_ep.profiler.cache as cache_module
import sonic_ep.profiler.profiler as profiler_module
from sonic_ep import DispatchMode, EPConfig, ExpertParallel, NetworkProfiler, ProfileReport
from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler.cache import Cache
from sonic_ep.profiler.machine import Machine
from sonic_ep.profiler.request import GroupRequest, RequestSummary
from sonic_ep.profiler.timing import RoundTimer
from sonic_ep.testing import Rank

KEY = {"format": 1, "machines": ["here"], "tokens": [5]}
MACHINE = Machine(gpu="GPU", gpus=2, link="NVLink", torch="2", triton="3", cuda="13", nccl="2", driver="5", code="abc")
SUMMARY = RequestSummary(alike={"hidden": 16, "rounds": None}, tokens=5, machine=MACHINE, gpu="host 0", ids="1f")
IDS = torch.tensor([[0, 1]] * 5)
SMALL = {"tokens": 3, "hidden": 4, "top_k": 1, "num_experts": 2, "device": torch.device("cpu")}
ANEW, NOT_KEPT = "profile cache: measuring anew, for ", "profile cache: not kept, for "


def forbid_measuring(patched: pytest.MonkeyPatch) -> None:
    measure = Mock(side_effect=NotImplementedError("measured, although there is a profile"))
    for owner, name in ((RoundTimer, "time"), (profiler_module, "measured_bandwidth"), (ExpertParallel, "dispatch")):
        patched.setattr(owner, name, measure)


def test_a_hit_measures_nothing_and_with_rates_the_cache_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = Asked(cache=tmp_path / "new" / "folder")
    measured = profile(asked)
    assert not measured.from_cache
    # Nothing half written is left.
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.suffix == ".json"
    before = path.read_bytes()
    rates = LinkBandwidth(copy_engine_in=1e15, copy_engine_out=1e15, read=1e15, write=1e15)
    with_rates = profile(replace(asked, rates=rates))
    assert (with_rates.from_cache, with_rates.rates) == (False, rates)
    assert [kept.read_bytes() for kept in path.parent.iterdir()] == [before]
    forbid_measuring(monkeypatch)
    found = profile(asked)
    assert found == replace(measured, from_cache=True)
    assert ["nothing was measured now" in str(each) for each in (found, measured)] == [True, False]


def test_another_call_is_another_profile(tmp_path: Path) -> None:
    flags = ("cpu_sync_on_runtime", "redispatch_x_in_backward")
    sizes = {"hidden": 1, "top_k": 1, "num_experts": 7, "dtype": torch.float32}
    others = [
        Asked(),
        Asked(tokens=(4,)),
        Asked(rounds=3),
        *(Asked(config=EPConfig(**{name: True})) for name in flags),
        *(Asked(config=EPConfig(dispatch=mode)) for mode in ("rank_dedup", "all_gather")),
        *(Asked(arguments={name: value}) for name, value in sizes.items()),
        *(Asked(arguments={"routing": routing}) for routing in ("skewed", IDS, IDS + 1)),
    ]
    assert not any(profile(replace(other, cache=tmp_path)).from_cache for other in others)
    assert len(list(tmp_path.iterdir())) == len(others)
    assert profile(Asked(cache=tmp_path, arguments={"routing": IDS.int()})).from_cache


def test_all_ranks_their_machines_and_their_places_are_part_of_the_key() -> None:
    def key_of(*summaries: RequestSummary, by: str = "nccl") -> str:
        return json.dumps(GroupRequest(summaries=summaries).key(by))

    places = [replace(SUMMARY, **{name: value}) for name, value in (("gpu", "host 1"), ("tokens", 4), ("ids", "2e"))]
    changed = {name: 3 if name == "gpus" else "another" for name in Machine.__dataclass_fields__}
    machines = [replace(SUMMARY, machine=replace(MACHINE, **{name: value})) for name, value in changed.items()]
    keys = [key_of(SUMMARY), key_of(SUMMARY, SUMMARY), *(key_of(SUMMARY, other) for other in (*places, *machines))]
    keys.append(key_of(SUMMARY, by="gloo"))
    assert len(set(keys)) == len(keys)
    assert [json.loads(key)["ranks_per_gpu"] for key in keys[:3]] == [1, 2, 1]
    assert json.loads(keys[0])["format"] == 1


def test_a_file_that_cannot_be_used_is_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = profile(Asked())

    def document(**changes: Any) -> bytes:
        return json.dumps({"key": KEY, "profile": report.as_json(), **changes}).encode()

    cache = Cache(folder=tmp_path)
    read = partial(cache.read, KEY, lambda report: None)
    cache.write(KEY, report)
    (path,) = tmp_path.iterdir()
    # Numbers too large for a float, and longer than Python makes numbers of.
    huge, endless = (document().replace(b'"median_us": ', b'"median_us": 1' + b"0" * size, 1) for size in (400, 5000))
    foreign = [document(key={**KEY, **changed}) for changed in ({"tokens": [6]}, {"format": 0})]
    empty, binary, torn, deep, no_object = b"", b"\xff\xfe\x00", document()[:1000], b"[" * 100_000, b"[1, 2]"
    wrong_fields = [document(profile=other) for other in (None, {**report.as_json(), "pairs": []})]
    for content in (empty, binary, torn, deep, no_object, huge, endless, *foreign, *wrong_fields):
        assert read() == report
        assert not caplog.messages
        path.write_bytes(content)
        assert read() is None
        (line,) = caplog.messages
        assert line.startswith(f"{ANEW}{tmp_path}: ")
        assert "\n" not in line
        cache.write(KEY, report)
        caplog.clear()
    assert list(tmp_path.iterdir()) == [path]


def change_profile(folder: Path, path: tuple[str | int, ...], value: object) -> None:
    """Put ``value`` where ``path`` leads in the one profile of ``folder``, whose key stays."""
    (file,) = folder.iterdir()
    document = json.loads(file.read_text())
    reduce(getitem, path[:-1], document["profile"])[path[-1]] = value
    file.write_text(json.dumps(document))


def test_a_profile_of_something_else_is_measured_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = Asked(cache=tmp_path, config=EPConfig(dispatch="rank_dedup"))
    assert not profile(asked).from_cache
    for path, value, said in (
        (("pairs", 0, "median_us"), 10**400, "profile.pairs[0].median_us: got 1000000"),
        (("shape", "tokens"), [5, 4], "shape: got a profile of "),
        (("shape", "hidden"), 17, "shape: got a profile of "),
        (("backend",), "fast", "backend: got a profile of fast"),
        (("config", "cpu_sync_on_runtime"), True, "config: got a profile of "),
        (("config", "max_rows"), 9, "config: got a profile of "),
        (("config", "dispatch"), "all_gather", "config: got a profile of EPConfig(dispatch=<DispatchMode.ALL_GATHER"),
    ):
        change_profile(tmp_path, path, value)
        found = profile(asked)
        assert (found.from_cache, found.config.dispatch) == (False, DispatchMode.RANK_DEDUP)
        assert caplog.messages.pop().startswith(f"{ANEW}{tmp_path}: {said}")
        caplog.clear()
        assert profile(asked).from_cache
        assert not caplog.messages


@on_ranks(2, pool="cpu_pool")
def test_what_rank_0_finds_or_cannot_use_holds_for_all(rank: Rank, tmp_path: Path) -> None:
    """Only rank 0 has the folder."""
    asked, log = Asked(cache=tmp_path if rank.rank == 0 else Path("/dev/null/none")), Mock()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache_module, "logger", log)
        assert not profile_of_all(rank, asked).from_cache
        assert not log.warning.called
        if rank.rank == 0:
            change_profile(tmp_path, ("shape", "hidden"), 17)
        assert not profile_of_all(rank, asked).from_cache
        # Nor does an error that nobody foresaw leave a rank waiting.
        with pytest.MonkeyPatch.context() as failing:
            error = OverflowError("int too large\nto convert")
            failing.setattr(ProfileReport, "from_json", Mock(side_effect=error))
            measured = profile_of_all(rank, asked)
        said = ("shape: got a profile of ", "int too large to convert") if rank.rank == 0 else ()
        for call, start in zip(log.warning.call_args_list, said, strict=True):
            assert call.args[1].startswith(f"{ANEW}{tmp_path}: {start}")
        forbid_measuring(patched)
        assert profile_of_all(rank, asked) == replace(measured, from_cache=True)


def test_a_folder_that_cannot_be_used_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("a\0b", "a\ud800b", "file/folder"):
        assert not profile(Asked(cache=tmp_path / name)).from_cache
        assert all(line.encode() for line in caplog.messages)
        (first, second), levels = caplog.messages, {record.levelno for record in caplog.records}
        assert (first.startswith(ANEW), second.startswith(NOT_KEPT), levels) == (True, True, {logging.WARNING})
        caplog.clear()
    # What could not be put in place is removed.
    monkeypatch.setattr(Path, "replace", Mock(side_effect=PermissionError("read-only file system")))
    Cache(folder=tmp_path / "new").write(KEY, profile(Asked()))
    assert list((tmp_path / "new").iterdir()) == []
    assert caplog.messages == [f"{NOT_KEPT}{tmp_path / 'new'}: read-only file system"]


def test_the_default_folder_is_in_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with ExpertParallel(backend="reference") as ep:
        assert not NetworkProfiler(ep, cache=None).profile(**SMALL).from_cache
        assert list(tmp_path.iterdir()) == []
        assert [NetworkProfiler(ep).profile(**SMALL).from_cache for _ in range(2)] == [False, True]
        assert len(list((tmp_path / ".cache" / "sonic_ep" / "profiles").glob("*.json"))) == 1
        assert not caplog.messages
        monkeypatch.setattr(Path, "expanduser", Mock(side_effect=RuntimeError("Could not determine home directory.")))
        assert not NetworkProfiler(ep).profile(**SMALL).from_cache
    assert len(caplog.messages) == 2
