"""``bench/moe_ep.py`` and ``bench/sweep.py``: options, exit codes, tables and files."""

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
from harness.end_to_end import Setup
from limits import HANG_SECONDS

import sonic_ep.cli as cli_module
from sonic_ep import EPConfig
from sonic_ep.cli import run_command
from sonic_ep.cli.exit_codes import FAIL, PASS, WRONG_ARGUMENTS
from sonic_ep.cli.options import parse_thiek
from sonic_ep.config import ScoreOrder
from sonic_ep.testing.layer_problem import LayerOptions
from sonic_ep.testing.oracle import LayerCall

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
README_SHAPE = "131072,4096,1536,128,8"
SMALL = ["--thiek", "6,16,8,4,2", "--backend", "reference"]
TINY_SWEEP = ["--backend", "reference", "--hie", "16,8,4"]
without_gpus = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without GPUs")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *argv: str) -> int:
    """A script in this process, with few rounds."""
    few_rounds(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/script.py", *argv])
    return run_command(script.parser(), argv, [script.__file__])


def test_the_line_of_the_readme_on_a_machine_without_gpus(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "layer.json"
    command = f"bench/moe_ep.py --thiek {README_SHAPE} --skip_bench_bwd"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *TORCHRUN, *command.split(), "--commit", "a name", "--json", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=ROOT, env=environment)
    assert done.returncode == PASS, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"no GPU, and --thiek {README_SHAPE} takes 1.2e+14 operations, expected at most 2e+10")
    assert "the small default 64,64,32,8,2 instead, whose times mean nothing for GPUs" in lines[0]
    # Rank 0 alone speaks.
    assert done.stdout.count("no GPU") == 1
    for name in ("layer", "given routing", "grouped GEMMs", "same rows locally", "one GPU"):
        assert any(line.startswith(f"forward, training      {name} ") for line in lines), name
    document = json.loads(path.read_text())
    assert document["setup"]["thiek"] == [64, 64, 32, 8, 2]
    found = document["environment"]
    expected = {"world_size": 2, "process_group": "gloo", "gpu": None, "commit": "a name"}
    assert found.items() >= {**expected, "command": f"torchrun --nproc_per_node=2 {command}"}.items()
    assert str(tmp_path) not in path.read_text()


@without_gpus
def test_a_shape_that_a_cpu_does_in_seconds_is_run_and_on_gpus_any(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, readme = (parse_thiek(shape) for shape in (SMALL[1], README_SHAPE))
    assert moe_ep.chosen_shape(asked, 2) == (asked, "no GPU: on the CPU, whose times mean nothing for GPUs")
    # 12 rows of tokens and one of each of 4 experts, the router, and loops over the experts.
    assert moe_ep.operations(asked) == 18 * (12 + 4) * 16 * 8 + 6 * 6 * 4 * 16 + 4e7
    default, note = moe_ep.chosen_shape(None, 8)
    assert str(default) == "256,64,32,32,2"
    assert note == "no GPU: the small default 256,64,32,32,2 on the CPU, whose times mean nothing for GPUs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(moe_ep.chosen_shape(None, 8)[0]) == "131072,4096,1536,64,8"
    assert moe_ep.chosen_shape(readme, 8) == (readme, None)


CONFIG_WORDS = ["--dispatch_mode", "all_to_all", "--combine_mode", "rank_dedup", "--redispatch_x_in_backward"]
OPTION_WORDS = ["--add_bias", "--norm_topk_probs", "--topk_over_softmax", "--concat_layout", "--skip_bench_bwd"]
CHOICES = ["--activation", "relu_sq", "--routing", "one_rank", "--dtype", "float16"]
ALL_OPTIONS: dict[str, Any] = {"activation": "relu_sq", "gate_layout": "concat", "norm_topk_probs": True}
ALL_OPTIONS |= {"score_order": ScoreOrder.SOFTMAX_THEN_TOPK, "biased": True, "routing": "one_rank"}


def test_every_spelling_and_what_is_run_if_nothing_is_said() -> None:
    def setup_for(*argv: str) -> Setup:
        options = moe_ep.parser().parse_args(argv)
        return moe_ep.setup_of(options, options.thiek, 2, "reference")

    for exact in ("--CPU_sync_on_runtime", "--cpu_sync_on_runtime"):
        argv = [*SMALL, *CONFIG_WORDS, exact, *OPTION_WORDS, *CHOICES]
        # Options in dashes; what they are given stays.
        dashed = [f"--{word[2:].replace('_', '-')}" if word.startswith("--") else word for word in argv]
        for spelt in (argv, dashed):
            setup = setup_for(*spelt)
            assert setup.config == EPConfig("all_to_all", "rank_dedup", True, True)
            assert (setup.backward, vars(setup.options), setup.shape.dtype) == (False, ALL_OPTIONS, torch.float16)
            assert (setup.record.thiek, setup.shape.tokens) == ((6, 16, 8, 4, 2), 3)
    setup = setup_for(*SMALL)
    assert (setup.config, setup.options, setup.backward) == (EPConfig(), LayerOptions(), True)
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


@pytest.mark.parametrize(("script", "argv"), [(moe_ep, SMALL), (sweep, TINY_SWEEP)])
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
def test_what_does_not_fit_is_said_in_one_line(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "CUDA out of memory. Tried to allocate 7.85 GiB."

    def run_nothing(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(moe_ep, "run_end_to_end", run_nothing)
    monkeypatch.setattr(cli_module, "launched_by_torchrun", lambda: rank != "0")
    monkeypatch.setenv("RANK", rank)
    assert run(monkeypatch, moe_ep, *SMALL) == FAIL
    assert capsys.readouterr().err == f"moe_ep.py: rank {rank}: {said}; expected a shape that fits: fewer tokens\n"
