"""What a measurement depends on: a digest of the code, the commit, the links, versions."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sonic_ep.profiler.machine as module
from sonic_ep.profiler.machine import code_digest, commit, link_types, output_of, package_version, this_machine

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_digest_is_that_of_names_and_content_of_the_code(tmp_path: Path) -> None:
    one, two, changed = "a = 1\n", "b = 2\n", "b = 3\n"
    codes = [{"one": one, "inside/two": two}, {"one": one, "inside/two": changed}, {"won": one, "inside/two": changed}]
    # The last has the same bytes in sequence, cut at another place.
    codes += [{"won": one, "two": changed}, {"won": one, "two": changed, "a": ""}, {"won": changed + one, "two": ""}]
    digests = []
    for number, texts in enumerate(codes):
        folder = tmp_path / str(number)
        (folder / "inside").mkdir(parents=True)
        for name, text in texts.items():
            (folder / f"{name}.py").write_text(text)
        digests.append(code_digest(folder))
        # Bytecode, data, prose and where it lies are no code.
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "one.cpython-311.pyc").write_bytes(b"bytes")
        (folder / "notes.md").write_text("notes")
        assert code_digest(folder.rename(tmp_path / f"moved {number}")) == digests[-1]
    assert len(set(digests)) == len(digests) == 6
    assert len(digests[0]) == 12


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_and_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
        command = ["git", *who, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "file.py").write_text("a = 1\n")
    assert commit(tmp_path) is None
    git("init", "--quiet")
    # One without a commit yet.
    assert commit(tmp_path) is None
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    name = git("rev-parse", "HEAD")
    assert len(name) == 40
    for file, text, changed in (("file.py", "a = 2\n", True), ("file.py", "a = 1\n", False), ("new.py", "", True)):
        (tmp_path / file).write_text(text)
        assert commit(tmp_path) == f"{name}{' with changes' * changed}"
    # A copy that happens to lie in the repository is not of its commit.
    copy = tmp_path / "environment" / "package"
    copy.mkdir(parents=True)
    (copy / "module.py").write_text("")
    assert commit(copy) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
    assert module.topology() == ""


def test_output_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_of(sys.executable, "-c", "print('text')") == "text\n"
    assert output_of("no_such_program_here") == ""
    # The output of a failing program is not to be trusted.
    assert output_of(sys.executable, "-c", "print('text'); raise SystemExit(3)") == ""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    assert output_of(sys.executable, "-c", "import time; print('text', flush=True); time.sleep(600)") == ""


def test_links_of_a_machine_with_and_without_nvlink() -> None:
    matrix = (
        "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\n"
        "GPU0\t X \tNV12\tSYS\tPIX\t0-31\n"
        "GPU1\tNV12\t X \tPHB\tPIX\t0-31\n"
        "GPU2\tSYS\tPHB\t X \tPIX\t32-63\n"
        "NIC0\tPIX\tPIX\tPIX\t X \n"
    )
    found = link_types(matrix)
    assert len(found) == 6
    assert found[0, 1] == found[1, 0] == "NVLink, 12 links (NV12)"
    assert (found[0, 2], found[1, 2], found[2, 0]) == ("SYS (no NVLink)", "PHB (no NVLink)", "SYS (no NVLink)")
    assert link_types("") == {}


def test_this_machine_without_a_gpu() -> None:
    found = this_machine(CPU)
    assert (found.gpu, found.gpus, found.link, found.nccl, found.driver) == (None, 0, None, None, None)
    assert found.torch == torch.__version__
    assert found.code == code_digest()
    assert package_version("pytest") == pytest.__version__
    assert package_version("no-such-package-here") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_machine_with_a_gpu() -> None:
    found = this_machine(GPU)
    assert found.gpu == torch.cuda.get_device_name(0)
    assert found.gpus == torch.cuda.device_count()
    assert found.driver
    assert (found.link is not None) == (found.gpus > 1)


def test_the_environment_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    here = this_machine(CPU)
    monkeypatch.setattr(module, "this_machine", lambda device: here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, world_size, note in (
        (CPU, 2, "on the CPU: the times mean nothing for GPUs"),
        (GPU, 3, "3 ranks took turns on 2 GPUs: the times mean nothing for a GPU each"),
        (GPU, 2, module.TWO_GPUS_NOTE),
        (GPU, 1, None),
    ):
        found = module.environment(device, world_size, "a name", "python program.py")
        assert (found["note"], found["commit"], found["command"]) == (note, "a name", "python program.py")
        assert (found["world_size"], found["process_group"], found["code"]) == (world_size, None, here.code)
        assert "cores" in found["processor"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = module.command_of(2, "program.py", ["--name", "two parts"])
    assert command == "TRITON_INTERPRET=1 python program.py --name 'two parts'"
