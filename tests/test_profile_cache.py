"""Profiles kept on disk: found again, never mistaken for others, never torn, never in the way."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from profiles import Asked, profile

import sonic_ep.profiler.measuring as measuring
import sonic_ep.profiler.profiler as profiler_module
from sonic_ep import EPConfig, ExpertParallel, NetworkProfiler, ProfileReport
from sonic_ep.machine import Machine
from sonic_ep.profiler.cache import Cache
from sonic_ep.profiler.request import Offer, key_of
from sonic_ep.testing import Rank, RankPool

KEY = {"machines": ["here"], "tokens": [5]}
MACHINE = Machine(gpu="GPU", gpus=2, link="NVLink", torch="2", triton="3", cuda="13", nccl="2", driver="5", code="abc")
OFFER = Offer(alike={"hidden": 16, "rounds": None}, tokens=5, machine=MACHINE, gpu="host 0", ids="1f")
IDS = torch.tensor([[0, 1]] * 5)


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    return profile(Asked())


def poisoned(patched: pytest.MonkeyPatch) -> None:
    """Whoever measures now fails."""

    def measure(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("measured, although there is a profile")

    patched.setattr(measuring, "measure_in_turn", measure)
    patched.setattr(profiler_module, "measured_ceilings", measure)
    patched.setattr(ExpertParallel, "dispatch", measure)


def test_a_hit_measures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = Asked(cache=tmp_path / "new" / "folder")
    measured = profile(asked)
    assert not measured.from_cache
    poisoned(monkeypatch)
    found = profile(asked)
    assert found == replace(measured, from_cache=True)
    assert "nothing was measured now" in str(found)
    assert "nothing was measured now" not in str(measured)
    # Read by nobody else by accident, and nothing half written is left.
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".json"]


@pytest.mark.parametrize(
    "other",
    [
        Asked(tokens=(4,)),
        Asked(rounds=3),
        Asked(config=EPConfig(dispatch="rank_dedup")),
        Asked(config=EPConfig(cpu_sync_on_runtime=True)),
        Asked(config=EPConfig(redispatch_x_in_backward=True)),
        *(Asked(arguments={name: 1}) for name in ("hidden", "top_k")),
        Asked(arguments={"num_experts": 7}),
        Asked(arguments={"dtype": torch.float32}),
        Asked(arguments={"routing": "skewed"}),
        Asked(arguments={"routing": IDS}),
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
    other = replace(OFFER, machine=replace(MACHINE, **{name: 3 if name == "gpus" else "another"}))
    keys = [key_of(offers, EPConfig(), "nccl") for offers in ([OFFER, OFFER], [OFFER, other])]
    assert keys[0] != keys[1]


def test_ranks_and_how_they_are_placed_are_part_of_the_key() -> None:
    apart = replace(OFFER, gpu="host 1")
    groups = (
        [OFFER],
        [OFFER, OFFER],
        [OFFER, apart],
        [OFFER, replace(OFFER, tokens=4)],
        [OFFER, replace(OFFER, ids="2e")],
    )
    keys = [json.dumps(key_of(offers, EPConfig(), "nccl")) for offers in groups]
    keys += [json.dumps(key_of([OFFER], EPConfig(combine="all_to_all"), "nccl"))]
    keys += [json.dumps(key_of([OFFER], EPConfig(), "gloo"))]
    assert len(set(keys)) == len(keys)
    assert [json.loads(key)["ranks_per_gpu"] for key in keys[:3]] == [1, 2, 1]


def profile_twice(rank: Rank, folder: Path) -> tuple[ProfileReport, ProfileReport]:
    """Only rank 0 has the folder. The second time nobody may measure."""
    asked = Asked(cache=folder if rank.rank == 0 else Path("/dev/null/none"))
    first = profile(asked, rank.rank, rank.device)
    with pytest.MonkeyPatch.context() as patched:
        poisoned(patched)
        return first, profile(asked, rank.rank, rank.device)


def test_all_ranks_have_what_rank_0_finds(cpu_pool: RankPool, tmp_path: Path) -> None:
    answers = cpu_pool.run(profile_twice, tmp_path, world_size=2)
    assert answers[0] == answers[1]
    first, second = answers[0]
    assert second == replace(first, from_cache=True)


def spoilt_files(report: ProfileReport) -> dict[str, bytes]:
    key = {**KEY, "format": 1}
    whole = {"key": key, "profile": report.as_json()}
    text = json.dumps(whole).encode()
    return {
        "empty": b"",
        "binary": b"\xff\xfe\x00",
        "torn": text[: len(text) // 2],
        "no object": b"[1, 2]",
        "deep": b"[" * 100_000,
        "no profile": json.dumps({"key": key}).encode(),
        "foreign": json.dumps({**whole, "key": {**key, "tokens": [6]}}).encode(),
        "older": json.dumps({**whole, "key": {**key, "format": 0}}).encode(),
        "wrong field": json.dumps({**whole, "profile": {**whole["profile"], "pairs": []}}).encode(),
    }


@pytest.mark.parametrize(
    "kind", ["empty", "binary", "torn", "no object", "deep", "no profile", "foreign", "older", "wrong field"]
)
def test_a_file_that_cannot_be_used_is_overwritten(
    kind: str, report: ProfileReport, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(folder=tmp_path)
    cache.write(KEY, report)
    (path,) = tmp_path.iterdir()
    assert cache.read(KEY) == report
    assert not caplog.records
    path.write_bytes(spoilt_files(report)[kind])
    assert cache.read(KEY) is None
    (line,) = caplog.messages
    assert line.startswith(f"profile cache: measuring anew, for {tmp_path}: ")
    assert "\n" not in line
    cache.write(KEY, report)
    assert cache.read(KEY) == report
    assert list(tmp_path.iterdir()) == [path]


def test_a_profile_that_cannot_be_used_is_measured_anew(tmp_path: Path) -> None:
    asked = Asked(cache=tmp_path)
    profile(asked)
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    assert [profile(asked).from_cache for _ in range(2)] == [False, True]


def test_a_folder_that_cannot_be_made_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    measured = profile(Asked(cache=tmp_path / "file" / "folder"))
    assert not measured.from_cache
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert all("profile cache: " in line for line in caplog.messages)


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with ExpertParallel(backend="reference") as ep:
        measured = NetworkProfiler(ep).profile(tokens=3, hidden=4, top_k=1, num_experts=2, device=torch.device("cpu"))
    assert not measured.from_cache
    assert len(caplog.messages) == 2


def test_what_could_not_be_put_in_place_is_removed(
    report: ProfileReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    Cache(folder=tmp_path).write(KEY, report)
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == [f"profile cache: not kept, for {tmp_path}: read-only file system"]


def test_the_default_folder_is_in_the_home(
    report: ProfileReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with ExpertParallel(backend="reference") as ep:
        profiler = NetworkProfiler(ep)
        asked = {"tokens": 3, "hidden": 4, "top_k": 1, "num_experts": 2, "device": torch.device("cpu")}
        assert [profiler.profile(**asked).from_cache for _ in range(2)] == [False, True]
    assert len(list((tmp_path / ".cache" / "sonic_ep" / "profiles").glob("*.json"))) == 1


def test_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert [profile(Asked()).from_cache for _ in range(2)] == [False, False]
    assert list(tmp_path.iterdir()) == []
