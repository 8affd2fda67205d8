"""What a measurement depends on: a digest of the code, the commit, the links, versions."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sonic_ep.profiler.machine as module
from sonic_ep.profiler.machine import (
    code_digest,
    commit,
    link_types,
    output_of,
    package_version,
    this_machine,
    topology,
)

GIT = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A small package."""
    folder = tmp_path / "package"
    (folder / "inside").mkdir(parents=True)
    (folder / "one.py").write_text("a = 1\n")
    (folder / "inside" / "two.py").write_text("b = 2\n")
    return folder


def test_the_digest_is_that_of_the_code(code: Path, tmp_path: Path) -> None:
    digest = code_digest(code)
    assert len(digest) == 12
    moved = tmp_path / "elsewhere" / "another_name"
    shutil.copytree(code, moved)
    # Bytecode, data and words about it are no code.
    (moved / "__pycache__").mkdir()
    (moved / "__pycache__" / "one.cpython-311.pyc").write_bytes(b"bytes")
    (moved / "words.md").write_text("words")
    assert code_digest(moved) == digest


def test_the_digest_changes_with_content_and_names(code: Path) -> None:
    digests = [code_digest(code)]
    (code / "inside" / "two.py").write_text("b = 3\n")
    digests.append(code_digest(code))
    (code / "one.py").rename(code / "won.py")
    digests.append(code_digest(code))
    (code / "inside" / "two.py").rename(code / "two.py")
    digests.append(code_digest(code))
    (code / "empty.py").write_text("")
    digests.append(code_digest(code))
    assert len(set(digests)) == len(digests)


def test_what_moves_from_one_file_to_the_next_changes_the_digest(tmp_path: Path) -> None:
    """The same bytes one behind the other, cut at another place."""
    for folder, first, second in (("a", "x = 1\ny = 2\n", ""), ("b", "x = 1\n", "y = 2\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.py").write_text(first)
        (tmp_path / folder / "q.py").write_text(second)
    assert code_digest(tmp_path / "a") != code_digest(tmp_path / "b")


def repository(folder: Path) -> str:
    """A repository with one commit; its name."""
    (folder / "file.py").write_text("a = 1\n")
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*GIT, "-C", str(folder), *words], check=True, capture_output=True)
    return subprocess.run(
        [*GIT, "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


@needs_git
def test_the_commit_and_whether_files_differ(tmp_path: Path) -> None:
    name = repository(tmp_path)
    assert len(name) == 40
    assert commit(tmp_path) == name
    (tmp_path / "file.py").write_text("a = 2\n")
    assert commit(tmp_path) == f"{name} with changes"
    (tmp_path / "file.py").write_text("a = 1\n")
    assert commit(tmp_path) == name
    (tmp_path / "new.py").write_text("")
    assert commit(tmp_path) == f"{name} with changes"


@needs_git
def test_no_commit_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) is None
    subprocess.run([*GIT, "-C", str(tmp_path), "init", "--quiet"], check=True, capture_output=True)
    # One without a commit yet.
    assert commit(tmp_path) is None


@needs_git
def test_no_commit_of_the_repository_that_a_copy_happens_to_lie_in(tmp_path: Path) -> None:
    repository(tmp_path)
    copy = tmp_path / "environment" / "package"
    copy.mkdir(parents=True)
    (copy / "module.py").write_text("")
    assert commit(copy) is None


def test_no_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
    assert topology() == ""


def test_output_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_of(sys.executable, "-c", "print('words')") == "words\n"
    assert output_of("no_such_program_here") == ""
    # What a failing program has printed is not to be trusted.
    assert output_of(sys.executable, "-c", "print('words'); raise SystemExit(3)") == ""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    started = time.monotonic()
    assert output_of(sys.executable, "-c", "import time; print('words', flush=True); time.sleep(60)") == ""
    assert time.monotonic() - started < 20


def test_links_of_a_machine_without_nvlink() -> None:
    matrix = "\tGPU0\tGPU1\tNIC0\nGPU0\t X \tSYS\tPIX\nGPU1\tSYS\t X \tPIX\nNIC0\tPIX\tPIX\t X \n"
    assert link_types(matrix) == {(0, 1): "SYS (no NVLink)", (1, 0): "SYS (no NVLink)"}
    assert link_types("") == {}


def test_links_of_a_machine_with_both() -> None:
    matrix = (
        "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\n"
        "GPU0\t X \tNV12\tSYS\tPIX\t0-31\n"
        "GPU1\tNV12\t X \tPHB\tPIX\t0-31\n"
        "GPU2\tSYS\tPHB\t X \tPIX\t32-63\n"
    )
    found = link_types(matrix)
    assert len(found) == 6
    assert found[0, 1] == found[1, 0] == "NVLink, 12 links (NV12)"
    assert (found[0, 2], found[1, 2], found[2, 0]) == ("SYS (no NVLink)", "PHB (no NVLink)", "SYS (no NVLink)")


def test_this_machine_without_a_gpu() -> None:
    found = this_machine(torch.device("cpu"))
    assert (found.gpu, found.gpus, found.link, found.nccl, found.driver) == (None, 0, None, None, None)
    assert found.torch == torch.__version__
    assert found.code == code_digest()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_machine_with_a_gpu() -> None:
    found = this_machine(torch.device("cuda", 0))
    assert found.gpu == torch.cuda.get_device_name(0)
    assert found.gpus == torch.cuda.device_count()
    assert found.driver
    assert (found.link is not None) == (found.gpus > 1)


def test_versions_of_packages() -> None:
    assert package_version("pytest") == pytest.__version__
    assert package_version("no-such-package-here") is None
