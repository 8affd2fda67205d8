"""The README's example runs as it stands, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANG_SECONDS

import sonic_ep

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


# The program, and a few lines that go on from there.
EXAMPLE, PROFILES, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_the_example_runs_on_one_rank_and_on_several(nproc: int, tmp_path: Path) -> None:
    script = tmp_path / "this_file.py"
    script.write_text(EXAMPLE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr


def test_the_lines_about_profiles_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with sonic_ep.ExpertParallel(backend="reference") as ep:
        names = {"sonic_ep": sonic_ep, "torch": torch, "ep": ep, "group": None, "T": 8, "H": 16, "K": 2, "E": 4}
        exec(PROFILES, names)
    assert names["ep"].config == names["profile"].config
    assert list((tmp_path / ".cache" / "sonic_ep" / "profiles").iterdir())


def test_every_make_target_named_here_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "test", "test-thorough"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_file_linked_here_exists() -> None:
    for target in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / target).exists(), target
