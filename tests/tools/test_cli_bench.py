"""``bench/moe_ep.py`` and ``bench/sweep.py``: options, exit codes, tables and files."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moe_ep
import pytest
import sweep
import torch
from end_to_end import few_rounds
from harness.layer_report import Setup
from limits import HANG_SECONDS

import sonic_ep.cli as cli_module
from sonic_ep import EPConfig
from sonic_ep.cli import run_command
from sonic_ep.cli.exit_codes import FAIL, PASS, WRONG_ARGUMENTS
from sonic_ep.config import ScoreOrder
from sonic_ep.profiler.agreement import WrongResultError
from sonic_ep.profiler.timing import AboveCeilingError
from sonic_ep.testing.oracle import LayerCall

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
README_SHAPE = "131072,4096,1536,128,8"
SMALL = ["--thiek", "6,16,8,4,2", "--backend", "reference"]
TINY_SWEEP = ["--backend", "reference", "--hie", "16,8,4"]
EACH_SCRIPT = pytest.mark.parametrize(("script", "argv"), [(moe_ep, SMALL), (sweep, TINY_SWEEP)])
without_gpus = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without GPUs")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(*argv: str) -> subprocess.CompletedProcess[str]:
    """Two ranks on the CPU, from the root of the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=ROOT, env=environment)


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *argv: str) -> int:
    """A script in this process, with few rounds."""
    few_rounds(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/script.py", *argv])
    return run_command(script.parser(), argv, [script.__file__])


def test_the_line_of_the_readme_on_a_machine_without_gpus(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "layer.json"
    asked = ["--thiek", README_SHAPE, "--skip_bench_bwd", "--commit", "a name"]
    done = torchrun("bench/moe_ep.py", *asked, "--json", str(path))
    assert done.returncode == PASS, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"no GPU, and --thiek {README_SHAPE} takes 1.2e+14 operations, expected at most 2e+10")
    assert "the small default 64,64,32,8,2 instead, whose times mean nothing for GPUs" in lines[0]
    # Rank 0 alone speaks.
    assert done.stdout.count("no GPU") == 1
    check_table(lines, ["layer", "given routing", "grouped GEMMs", "same rows locally", "one GPU"])
    document = json.loads(path.read_text())
    assert document["setup"]["thiek"] == [64, 64, 32, 8, 2]
    environment = document["environment"]
    assert (environment["world_size"], environment["process_group"], environment["gpu"]) == (2, "gloo", None)
    assert environment["commit"] == "a name"
    command = f"torchrun --nproc_per_node=2 bench/moe_ep.py --thiek {README_SHAPE} --skip_bench_bwd"
    assert environment["command"] == command
    assert str(tmp_path) not in path.read_text()


def check_table(lines: list[str], names: list[str]) -> None:
    for part in ("T,H,I,E,K = ", "verifying ", "picked: ", "memory, MiB", "pass  ", "    over the GEMMs alone"):
        assert any(line.startswith(part) for line in lines), part
    assert not any("FAIL" in line for line in lines)
    for name in names:
        assert any(line.startswith(f"forward, training      {name} ") for line in lines), name


@without_gpus
def test_a_small_default_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layer.json"
    assert run(monkeypatch, moe_ep, f"--json={path}", "--backend=reference", "--add-bias") == PASS
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no GPU: the small default 32,64,32,4,2 on the CPU, whose times mean nothing for GPUs"
    check_table(lines, ["layer", "given routing", "grouped GEMMs"])
    document = json.loads(path.read_text())
    assert [each["name"] for each in document["accuracy"]] == ["o", "dx", "drouter_w", "dw1", "dw2", "db1", "db2"]
    assert document["environment"]["command"].endswith("python bench/moe_ep.py --backend=reference --add-bias")


@without_gpus
def test_a_shape_that_a_cpu_does_in_seconds_is_run() -> None:
    asked = parsed(*SMALL).thiek
    shape, note = moe_ep.chosen_shape(asked, 2)
    assert (shape, note) == (asked, "no GPU: on the CPU, whose times mean nothing for GPUs")
    # 12 rows of tokens and one of each of 4 experts, the router, and loops over the experts.
    assert moe_ep.operations(asked) == 18 * (12 + 4) * 16 * 8 + 6 * 6 * 4 * 16 + 4e7
    assert str(moe_ep.chosen_shape(None, 8)[0]) == "256,64,32,32,2"


def test_what_is_run_on_gpus_if_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(moe_ep.chosen_shape(None, 8)[0]) == "131072,4096,1536,64,8"
    asked = parsed("--thiek", README_SHAPE).thiek
    assert moe_ep.chosen_shape(asked, 8) == (asked, None)


def parsed(*argv: str) -> argparse.Namespace:
    return moe_ep.parser().parse_args(argv)


def setup_for(*argv: str) -> Setup:
    options = parsed(*argv)
    return moe_ep.setup_of(options, moe_ep.chosen_shape(options.thiek, 2)[0], 2, "reference")


def dashed(argv: list[str]) -> list[str]:
    """Options in dashes; what they are given stays."""
    return [word.replace("_", "-").replace("---", "--") if word.startswith("--") else word for word in argv]


CONFIG_WORDS = ["--dispatch_mode", "all_to_all", "--combine_mode", "rank_dedup", "--redispatch_x_in_backward"]
OPTION_WORDS = ["--add_bias", "--norm_topk_probs", "--topk_over_softmax", "--concat_layout", "--skip_bench_bwd"]


@pytest.mark.parametrize("exact", ["--CPU_sync_on_runtime", "--cpu_sync_on_runtime"])
def test_every_spelling(exact: str) -> None:
    argv = [*SMALL, *CONFIG_WORDS, exact, *OPTION_WORDS, "--activation", "relu_sq", "--routing", "one_rank"]
    argv += ["--dtype", "float16"]
    assert dashed([exact, "--add_bias"]) == [exact.replace("_", "-"), "--add-bias"]
    for spelt in (argv, dashed(argv)):
        setup = setup_for(*spelt)
        flags = {"redispatch_x_in_backward": True, "cpu_sync_on_runtime": True}
        assert setup.config == EPConfig(dispatch="all_to_all", combine="rank_dedup", **flags)
        assert not setup.backward
        options = setup.options
        assert (options.biased, options.norm_topk_probs, options.gate_layout) == (True, True, "concat")
        assert (options.score_order, options.routing) == (ScoreOrder.SOFTMAX_THEN_TOPK, "one_rank")
        assert (options.activation, setup.shape.dtype) == ("relu_sq", torch.float16)
        assert (setup.record.thiek, setup.shape.tokens) == ((6, 16, 8, 4, 2), 3)


def test_what_is_run_if_nothing_is_said() -> None:
    setup = setup_for(*SMALL)
    assert setup.config == EPConfig()
    assert setup.backward
    options = setup.options
    assert (options.biased, options.norm_topk_probs, options.gate_layout) == (False, False, "interleaved")
    assert (options.score_order, options.routing) == (ScoreOrder.TOPK_THEN_SOFTMAX, "uniform")
    assert setup.shape.dtype is torch.bfloat16


ONE_RANK = ["--routing", "one_rank", "--nproc", "2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([moe_ep, "--thiek", "6,8,8,4,2", "--nproc", "3"], "--thiek: got E=4, expected a multiple of the 3 ranks"),
        ([moe_ep, "--thiek", "7,8,8,4,2", "--nproc", "2"], "--thiek: got T=7, expected a multiple of the 2 ranks"),
        ([moe_ep, "--thiek", "6,8,8,4,3", *ONE_RANK], "--thiek: got K=3, expected at most the 2 experts of a rank"),
        ([moe_ep, "--thiek", "6,8,8,4,5"], "got K=5, expected at most E=4"),
        ([moe_ep, "--thiek", "6,8,8,4"], "got 4 numbers in '6,8,8,4', expected five"),
        ([moe_ep, "--dispatch_mode", "broadcast"], "invalid choice: 'broadcast'"),
        ([moe_ep, "--combine-mode", "all_gather"], "invalid choice: 'all_gather'"),
        ([moe_ep, "--redispatch"], "unrecognized arguments: --redispatch"),
        ([sweep, "--point", "8,2"], "got '8,2', expected T,K,uniform|skewed|one_rank"),
        ([sweep, "--point", "8,2,even"], "got '8,2,even', expected T,K,uniform|skewed|one_rank"),
        ([sweep, "--point", "0,2,uniform"], "got '0', expected a whole number of at least 1"),
        ([sweep, "--hie", "16,8"], "got 2 numbers in '16,8', expected three: H,I,E"),
        ([sweep, "--hie", "16,8,4", "--nproc", "3"], "--hie: got E=4, expected a multiple of the 3 ranks"),
        ([sweep, "--hie", "16,8,4", "--point", "8,5,uniform"], "--point: got K=5, expected at most 4 for uniform"),
        (
            [sweep, "--hie", "16,8,4", "--nproc", "2", "--point", "8,3,one_rank"],
            "--point: got K=3, expected at most 2 for one_rank",
        ),
    ],
)
def test_wrong_arguments_are_reported_once(
    argv: list[Any], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = run(monkeypatch, *argv, "--backend", "reference")
    except SystemExit as left:
        code = left.code
    assert code == WRONG_ARGUMENTS
    told = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert len(told) == 1


@EACH_SCRIPT
def test_a_wrong_layer_fails(
    script: Any, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = LayerCall.run

    def wrong(self: LayerCall, *arguments: Any, **options: Any) -> Any:
        found = honest(self, *arguments, **options)
        return {**found, "dw2": found["dw2"] * 1.1}

    monkeypatch.setattr(LayerCall, "run", wrong)
    path = tmp_path / "found.json"
    assert run(monkeypatch, script, *argv, "--json", str(path)) == FAIL
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("FAIL: rank 0 of 1: dw2: relative error ")
    assert [line.split()[0] for line in lines if line.endswith(" FAIL")] == (["dw2"] if script is moe_ep else [])
    assert not path.exists()


def refuse(monkeypatch: pytest.MonkeyPatch, script: Any, error: Exception) -> None:
    """Let what the script runs raise ``error``."""

    def run_nothing(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(script, "run_end_to_end" if script is moe_ep else "run_sweep", run_nothing)


@pytest.mark.parametrize("error", [WrongResultError("rows"), AboveCeilingError("too fast")])
@EACH_SCRIPT
def test_a_refused_result_fails(
    script: Any, argv: list[str], error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch, script, error)
    assert run(monkeypatch, script, *argv) == FAIL
    assert capsys.readouterr().out.splitlines()[-1] == f"FAIL: {error}"


def test_a_sweep_of_two_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "folder" / "sweep.json"
    argv = [*TINY_SWEEP, "--point", "4,2,skewed", "--point=3,1,one_rank", "--dtype", "float32"]
    assert run(monkeypatch, sweep, *argv, "--commit=a name", "--json", str(path)) == PASS
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "note: on the CPU: the times mean nothing for GPUs"
    assert [line.split(";")[0].split() for line in lines[1:]] == [["T=4", "K=2", "skewed"], ["T=3", "K=1", "one_rank"]]
    document = json.loads(path.read_text())
    assert document["kind"] == "sweep"
    assert document["environment"]["commit"] == "a name"
    command = "python bench/sweep.py --backend reference --hie 16,8,4 --point 4,2,skewed --point=3,1,one_rank"
    assert document["environment"]["command"].endswith(f"{command} --dtype float32")
    assert str(tmp_path) not in path.read_text()
    assert [point["shape"] for point in document["points"]] == [
        {"T": 4, "H": 16, "I": 8, "E": 4, "K": 2, "dtype": "float32"},
        {"T": 3, "H": 16, "I": 8, "E": 4, "K": 1, "dtype": "float32"},
    ]
    assert all(len(point["pairs"]) == 18 for point in document["points"])


@pytest.mark.parametrize("rank", ["0", "3"])
@EACH_SCRIPT
def test_what_does_not_fit_is_said_in_one_line(
    script: Any, argv: list[str], rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "CUDA out of memory. Tried to allocate 7.85 GiB."
    refuse(monkeypatch, script, torch.OutOfMemoryError(said))
    monkeypatch.setattr(cli_module, "launched_by_torchrun", lambda: rank != "0")
    monkeypatch.setenv("RANK", rank)
    assert run(monkeypatch, script, *argv) == FAIL
    name = Path(script.__file__).name
    assert capsys.readouterr().err == f"{name}: rank {rank}: {said}; expected a shape that fits: fewer tokens\n"
