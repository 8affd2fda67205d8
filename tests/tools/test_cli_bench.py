"""``bench/moe_ep.py`` and ``bench/sweep.py``: options, exit codes, tables and files."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import moe_ep
import pytest
import sweep
import torch
from end_to_end import TORCHRUN, few_rounds, python_in_root
from harness.end_to_end import Setup

import sonic_ep.cli as cli_module
from sonic_ep import EPConfig
from sonic_ep.cli import run_command
from sonic_ep.cli.exit_codes import FAIL, PASS, WRONG_ARGUMENTS
from sonic_ep.cli.options import parse_thiek
from sonic_ep.config import ScoreOrder
from sonic_ep.testing.layer_problem import LayerOptions
from sonic_ep.testing.oracle import LayerCall

README_SHAPE = "131072,4096,1536,128,8"
SMALL = ["--thiek", "6,16,8,4,2", "--backend", "reference"]
HIE = ["--hie", "16,8,4"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these sizes."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(threads)


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *argv: str) -> int:
    """A script in this process, with few rounds."""
    few_rounds(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/script.py", *argv])
    return run_command(script.parser(), argv, [script.__file__])


@pytest.mark.thorough
def test_the_line_of_the_readme_on_a_machine_without_gpus(tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    command = f"bench/moe_ep.py --thiek {README_SHAPE} --skip_bench_bwd"
    done = python_in_root(*TORCHRUN, *command.split(), "--commit", "a name", "--json", str(path))
    assert done.returncode == PASS, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"no GPU, and --thiek {README_SHAPE} takes 1.2e+14 operations, expected at most 2e+10")
    assert "the small default 64,64,32,8,2 instead, whose times mean nothing for GPUs" in first
    # Rank 0 alone speaks.
    assert done.stdout.count("no GPU") == 1
    for name in ("layer", "given routing", "grouped GEMMs", "same rows locally", "one GPU"):
        assert any(line.startswith(f"forward, training      {name} ") for line in lines), name
    document = json.loads(path.read_text())
    assert document["setup"]["thiek"] == [64, 64, 32, 8, 2]
    expected = {"world_size": 2, "process_group": "gloo", "gpu": None, "commit": "a name"}
    expected["command"] = f"torchrun --nproc_per_node=2 {command}"
    assert document["environment"].items() >= expected.items()
    assert str(tmp_path) not in path.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without GPUs")
def test_a_shape_that_a_cpu_does_in_seconds_is_run_and_on_gpus_any(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, readme = (parse_thiek(shape) for shape in (SMALL[1], README_SHAPE))
    # 12 rows of tokens and one of each of 4 experts, the router, and loops over the experts.
    assert moe_ep.operations(asked) == 18 * (12 + 4) * 16 * 8 + 6 * 6 * 4 * 16 + 4e7
    assert moe_ep.chosen_shape(asked, 2) == (asked, "no GPU: on the CPU, whose times mean nothing for GPUs")
    default, note = moe_ep.chosen_shape(None, 8)
    assert f"{default}; {note}".startswith(
        "256,64,32,32,2; no GPU: the small default 256,64,32,32,2 on the CPU, whose "
    )
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
        for spelt in (argv, [f"--{word[2:].replace('_', '-')}" if word.startswith("--") else word for word in argv]):
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
        ([sweep, *HIE, "--nproc", "3"], "--hie: got E=4, expected a multiple of the 3 ranks"),
        ([sweep, *HIE, "--point", "8,5,uniform"], "--point: got K=5, expected at most 4 for uniform"),
        ([sweep, *HIE, "--nproc=2", "--point=8,3,one_rank"], "--point: got K=3, expected at most 2 for one_rank"),
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
    assert sum(message in line for line in capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("script", "argv"), [(moe_ep, SMALL), (sweep, [*HIE, *SMALL[2:]])])
def test_a_wrong_layer_fails(
    script: Any, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = LayerCall.run

    def wrong(self: LayerCall, *arguments: Any, **options: Any) -> Any:
        found = honest(self, *arguments, **options)
        return {**found, "dw2": found["dw2"] * 1.1}

    monkeypatch.setattr(LayerCall, "run", wrong)
    assert run(monkeypatch, script, *argv, "--json", str(tmp_path / "found.json")) == FAIL
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("FAIL: rank 0 of 1: dw2: relative error ")
    assert [line.split()[0] for line in lines if line.endswith(" FAIL")] == (["dw2"] if script is moe_ep else [])
    assert not [*tmp_path.iterdir()]


def test_a_sweep_of_two_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    argv = ["--backend", "reference", *HIE, "--point", "4,2,skewed", "--point=3,1,one_rank", "--dtype", "float32"]
    assert run(monkeypatch, sweep, *argv, "--commit=a name", "--json", str(path)) == PASS
    note, *lines, last = capsys.readouterr().out.splitlines()
    assert note == "note: on the CPU: the times mean nothing for GPUs"
    assert last == f"wrote {path}"
    assert [line.split(";")[0].split() for line in lines] == [["T=4", "K=2", "skewed"], ["T=3", "K=1", "one_rank"]]
    document = json.loads(path.read_text())
    environment = document["environment"]
    assert (document["kind"], environment["commit"]) == ("sweep", "a name")
    assert environment["command"].endswith(f"python bench/sweep.py {' '.join(argv)}")
    assert str(tmp_path) not in path.read_text()
    shape = {"H": 16, "I": 8, "E": 4, "dtype": "float32"}
    shapes = [{"T": 4, "K": 2, **shape}, {"T": 3, "K": 1, **shape}]
    assert [point["shape"] for point in document["points"]] == shapes
    assert [len(point["pairs"]) for point in document["points"]] == [18, 18]


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = "CUDA out of memory. Tried to allocate 7.85 GiB."
    monkeypatch.setattr(moe_ep, "run_end_to_end", Mock(side_effect=torch.OutOfMemoryError(said)))
    for rank, launched in (("0", False), ("3", True)):
        monkeypatch.setattr(cli_module, "launched_by_torchrun", Mock(return_value=launched))
        monkeypatch.setenv("RANK", rank)
        assert run(monkeypatch, moe_ep, *SMALL) == FAIL
        assert capsys.readouterr().err == f"moe_ep.py: rank {rank}: {said}; expected a shape that fits: fewer tokens\n"
