"""The wheel and the sdist hold what they should, and the wheel is used in an empty environment from another folder."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from limits import HANG_SECONDS

from sonic_ep.version import __version__

ROOT = Path(__file__).parents[2]
MADE = re.compile(r"(^|/)(__pycache__|\.[a-z]+_cache|\.venv|site|build|[^/]+\.egg-info|PKG-INFO|setup\.cfg)(/|$)")
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"
USE = (
    "import torch, sonic_ep\n"
    "x, w = torch.ones(3, 8), torch.ones(4, 8)\n"
    "ep = sonic_ep.ExpertParallel(backend='reference')\n"
    "y = ep.moe(x, w, torch.ones(4, 8, 8), torch.ones(4, 8, 4), 2).y\n"
    "assert y.shape == x.shape and sonic_ep.__file__.startswith({place!r})\n"
    "ep.close()\n"
)


def files_of_the_project() -> set[str]:
    """What git has and does not ignore. An unpacked sdist has no git: there, all but what was made since."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = listed.stdout.strip("\0").split("\0")
    else:
        found = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*"))
        names = [name for name in found if not MADE.search(name)]
    return {name for name in names if (ROOT / name).is_file()}


def ran(command: Sequence[object], folder: Path) -> tuple[int, str, str]:
    """Exit status, output and errors, without the settings of Python that this process has."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, timeout=HANG_SECONDS)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, built from a copy, so that the checkout stays as it is."""
    pytest.importorskip("setuptools", reason="needs setuptools: pip install setuptools")
    copy, made = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in files_of_the_project():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for kind in ("wheel", "sdist"):
        status, _, errors = ran([sys.executable, "-c", BUILD.format(kind=kind, folder=str(made))], copy)
        assert status == 0, errors
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


def test_the_sdist_holds_what_its_tests_need_and_nothing_that_was_built(built: Path) -> None:
    (sdist,) = built.glob(f"sonic_ep-{__version__}.tar.gz")
    with tarfile.open(sdist) as held:
        names = {entry.name.partition("/")[2] for entry in held.getmembers() if entry.isfile()}
    of_setuptools = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("sonic_ep.egg-info/")}
    assert names - of_setuptools == files_of_the_project()


def test_the_wheel_is_used_from_an_empty_environment(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip", reason="needs pip")
    (wheel,) = built.glob("*.whl")
    empty = tmp_path / "empty"
    venv.create(empty, with_pip=False)
    python, command = empty / "bin" / "python", empty / "bin" / "sonic-ep"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    assert ran(install, tmp_path)[0] == 0
    (place,) = (empty / "lib").glob("python*/site-packages")
    # What it depends on, from here: nothing is downloaded. Behind its own files in the order of imports.
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (place / "dependencies.pth").write_text("\n".join(here) + "\n")
    assert ran([python, "-W", "error", "-c", USE.format(place=str(place))], tmp_path) == (0, "", "")
    assert ran([command, "--version"], tmp_path) == (0, f"sonic-ep {__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("CHANGELOG.md", r"^## (\S+) \((\S+)\)$"), ("CITATION.cff", r"^version: (\S+)\ndate-released: (\S+)$")],
)
def test_documents_name_this_version_and_its_date(name: str, pattern: str) -> None:
    version, date = re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE)[0]
    assert version == __version__
    assert f"## {version} ({date})" in (ROOT / "CHANGELOG.md").read_text()
