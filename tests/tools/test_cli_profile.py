"""``sonic-ep profile``: its arguments, its exit codes, the table and the file."""

import argparse
import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import sonic_ep.cli.profile as command
from sonic_ep import EPConfig, ProfileReport
from sonic_ep.cli.exit_codes import FAIL, PASS
from sonic_ep.cli.options import Thiek, config_of
from sonic_ep.profiler import WrongResultError
from sonic_ep.profiler.timing import AboveCeilingError

CPU = torch.device("cpu")
SMALL = ["--thiek", "6,16,1,4,2", "--backend", "reference", "--no-cache"]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_profile(parser)
    return parser.parse_args(arguments)


def run(*arguments: str) -> int:
    options = parsed(*arguments)
    options.check(options)
    code: int = options.command(options)
    return code


def test_a_table_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    kept = [*SMALL, "--combine-mode", "rank_dedup"]
    # Paths of this machine mean nothing to others, and a commit is named once.
    for commit in ([], ["--commit", "abc of mine"], ["--commit=abc of mine"]):
        arguments = [*SMALL, "--json", str(path), *commit, "--combine-mode", "rank_dedup"]
        monkeypatch.setattr(sys, "argv", ["sonic-ep", "profile", *arguments])
        assert run(*arguments) == PASS
        document = json.loads(path.read_text())
        report = ProfileReport.from_json(document)
        assert capsys.readouterr().out == f"{report}\nwrote {path}\n"
        assert report.config == EPConfig(dispatch=report.config.dispatch, combine="rank_dedup")
        assert report.shape.tokens == (6,)
        assert report.origin.command.endswith("python -m sonic_ep profile " + " ".join(kept))
        assert not commit or document["environment"]["commit"] == "abc of mine"
        assert str(tmp_path) not in path.read_text()


def test_both_spellings() -> None:
    dashed = ["--dispatch-mode=rank_dedup", "--combine-mode=all_to_all", "--redispatch-x-in-backward"]
    dashed += ["--cpu-sync-on-runtime", "--no-cache"]
    underscored = [option.replace("-", "_").replace("__", "--", 1) for option in dashed]
    config = EPConfig("rank_dedup", "all_to_all", redispatch_x_in_backward=True, cpu_sync_on_runtime=True)
    for arguments in (dashed, underscored, ["--CPU_sync_on_runtime", *dashed[:3], dashed[-1]]):
        options = parsed(*arguments)
        assert config_of(options) == config
        assert options.no_cache
    assert config_of(parsed()) == EPConfig()


def test_what_is_profiled_if_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert str(command.default_shape(torch.device("cuda"), 2)) == "32768,4096,1536,64,8"
    assert str(command.default_shape(CPU, 2)) == "64,32,16,8,2"
    assert command.default_shape(CPU, 3).num_experts == 9
    assert Thiek(tokens=5, hidden=1, intermediate=1, num_experts=3, top_k=1).tokens_of_ranks(3) == (2, 2, 1)
    if not torch.cuda.is_available():
        assert run("--backend", "reference", "--no-cache") == PASS
        assert capsys.readouterr().out.startswith("no --thiek was given: --thiek 64,32,16,8,2\n")


def test_what_is_wrong_is_told_before_a_rank_is_started(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--thiek", "6,16,1,4,2", "--nproc", "3"], "--thiek: got E=4, expected a multiple of the 3 ranks"),
        (["--thiek=6,16,1,4,3", "--nproc=2", "--routing=one_rank"], "--thiek: got K=3, expected at most the 2"),
        ([f"--json={tmp_path}/file/profile.json"], r"--json: got .*, expected the path of a file to write"),
        ([f"--json={tmp_path}/none/profile.json"], r"--json: .*there is no folder .*none', make it first"),
        ([f"--picture={tmp_path}/none/profile.png"], r"--picture: .*there is no folder .*none', make it first"),
        (["--picture=profile.gif"], r"--picture: got 'profile.gif', expected a path that ends in one of .png"),
    ):
        options = parsed(*arguments, "--backend", "reference")
        with pytest.raises(ValueError, match=message):
            options.check(options)


def test_a_profile_that_is_refused_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (WrongResultError("rows differ"), AboveCeilingError("too fast")):
        monkeypatch.setattr(command.NetworkProfiler, "profile", Mock(side_effect=error))
        assert run(*SMALL) == FAIL
        assert capsys.readouterr().out == f"FAIL: {error}\n"


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.svg"
    assert run(*SMALL, "--picture", str(path)) == PASS
    out = capsys.readouterr().out
    assert f"wrote {path}" in out
    picked = re.search(r"picked: dispatch (\w+), combine (\w+)", out)
    assert picked is not None
    # Text in an SVG is drawn, but named in comments.
    drawn = path.read_text()
    assert f"dispatch {picked[1]} and combine {picked[2]} are the fastest pair" in drawn
    assert all(f"{kind} {mode} " in drawn for kind in ("dispatch", "combine") for mode in ("rank_dedup",))
