"""The wheel and the sdist hold what they should, and the wheel is used in an empty environment from another folder."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from limits import HANG_SECONDS

from sonic_ep.version import __version__

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "site", "build", "dist", "*.egg-info", "__pycache__", "latest.json")
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"
USE = (
    "import torch, sonic_ep\n"
    "x, w = torch.ones(3, 8), torch.ones(4, 8)\n"
    "ep = sonic_ep.ExpertParallel(backend='reference')\n"
    "y = ep.moe(x, w, torch.ones(4, 8, 8), torch.ones(4, 8, 4), 2).y\n"
    "assert y.shape == x.shape and sonic_ep.__file__.startswith({place!r})\n"
    "ep.close()\n"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, built from a copy, so that the checkout stays as it is."""
    pytest.importorskip("setuptools", reason="needs setuptools: pip install setuptools")
    copy, made = tmp_path_factory.mktemp("copy") / "sonic_ep", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    for name in (".ci", ".github", ".gitignore", ".pre-commit-config.yaml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    for kind in ("wheel", "sdist"):
        program = BUILD.format(kind=kind, folder=str(made))
        done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return made


def test_the_wheel_holds_the_package_and_its_licence(built: Path) -> None:
    (wheel,) = built.glob(f"sonic_ep-{__version__}-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as held:
        names = held.namelist()
        metadata = held.read(f"sonic_ep-{__version__}.dist-info/METADATA").decode()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "sonic_ep").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == sources | {"sonic_ep/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    needed = set(re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", metadata, re.MULTILINE))
    assert needed == {"torch", "triton", "einops", "numpy"}


def test_the_sdist_holds_what_its_tests_need(built: Path) -> None:
    (sdist,) = built.glob(f"sonic_ep-{__version__}.tar.gz")
    with tarfile.open(sdist) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = set(listed.stdout.split()) if listed.returncode == 0 else {"README.md", "tests/conftest.py"}
    assert {name for name in tracked if (ROOT / name).exists()} - names == set()
    assert [name for name in names if "__pycache__" in name or name.endswith("latest.json")] == []


def test_the_wheel_is_used_from_an_empty_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=False)
    (place,) = (tmp_path / "empty" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as held:
        held.extractall(place)
    # What it depends on, from here: nothing is downloaded. Behind its own files in the order of imports.
    (place / "dependencies.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n"
    )
    python = str(tmp_path / "empty" / "bin" / "python")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for arguments, said in (
        (("-W", "error", "-c", USE.format(place=str(place))), ""),
        (("-m", "sonic_ep", "--version"), f"sonic-ep {__version__}\n"),
    ):
        command = [python, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=HANG_SECONDS)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
