"""The language model example: each backend agrees with dense runs, wrong arguments are refused, Ctrl-C ends all."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import HANG_SECONDS
from training_example import EXAMPLES, module_of_example, no_launcher

STEPS = 10
NO_GPU = "no CUDA device: torch.cuda.is_available() is False"
SLOW = "Triton's interpreter runs its kernels"
PNG_SIGNATURE = b"\x89PNG\r\n"


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with no_launcher():
        yield


def command(*options: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / "train_lm.py"), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])}


def without_gpus() -> dict[str, str]:
    others = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    return {**others, "CUDA_VISIBLE_DEVICES": ""}


def finish(folder: Path, *options: str, env: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """What the example says, and its JSON."""
    line = command("--nproc=2", "--output=picture.png", "--json=numbers.json", *options)
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "numbers.json").read_text())


def assert_agrees(run: dict[str, Any]) -> None:
    assert run["agree"] is True
    for compared in ("loss_distance", "router_logits_distance"):
        distances = run[compared]
        for tested, bound in zip(distances["expert_parallel"], distances["bound"], strict=True):
            assert tested <= bound < 1e-4


def agreement_of(run: dict[str, Any], shift: float) -> Any:
    comparison, distances = module_of_example("lm_comparison"), run["loss_distance"]
    columns = (distances["expert_parallel"], distances["dense_fp32"], run["losses"]["dense_fp64"])
    gaps = [comparison.Gap(tested=t + shift, plain=plain, size=loss) for t, plain, loss in zip(*columns, strict=True)]
    return comparison.agreement("losses", gaps)


def test_losses_of_all_runs_fall_and_agree(tmp_path: Path) -> None:
    """Every backend runs, or one line says why not; a bound follows from the dense runs."""
    flags = ["--redispatch_x_in_backward", "--cpu-sync-on-runtime", "--dispatch=rank_dedup"]
    said, numbers = finish(tmp_path, f"--steps={STEPS}", *flags, env=environment())
    runs = numbers["runs"]
    assert numbers["agree"] is True
    for run in runs.values():
        assert_agrees(run)
        for losses in run["losses"].values():
            assert len(losses) == STEPS
            assert losses[-1] < losses[0] - 1
        found = agreement_of(run, 0.0)
        assert found.ok
        assert list(found.bounds) == run["loss_distance"]["bound"]
        assert not any(agreement_of(run, shift).ok for shift in (1e-3, 1e-5, math.inf, math.nan))
    left_out = [] if "fast" in runs else [f"no fast run: {numbers['left_out']}"]
    assert list(runs) == ["reference", "fast"][: 2 - len(left_out)]
    assert [line for line in said.splitlines() if line.startswith("no fast run: ")] == left_out
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install matplotlib")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.thorough
@pytest.mark.fast
def test_the_fast_backend_trains_as_the_reference_does(tmp_path: Path) -> None:
    """On the CPU, where its kernels are interpreted, at the smallest sizes."""
    env = {**without_gpus(), "TRITON_INTERPRET": "1"}
    said, numbers = finish(tmp_path, "--backend=fast", "--steps=2", "--context=2", env=env)
    assert list(numbers["runs"]) == ["reference", "fast"]
    for backend, run in numbers["runs"].items():
        assert f"backend {backend}, 2 ranks on cpu" in said
        assert_agrees(run)
    assert numbers["agree"] is True


# GPUs, whether kernels are interpreted, the backend asked for, those that run, and what is said.
MACHINES = [
    (0, False, "auto", ["reference"], NO_GPU),
    (0, True, "auto", ["reference"], SLOW),
    (0, True, "fast", ["reference", "fast"], ""),
    (2, False, "auto", ["reference", "fast"], ""),
    (2, False, "fast", ["reference", "fast"], ""),
    (2, False, "reference", ["reference"], ""),
    (1, False, "auto", ["reference"], "got 1 GPUs for 2 ranks, expected one for each"),
    (1, False, "fast", None, "got 1 GPUs for 2 ranks"),
]


@pytest.mark.fast
@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_backends_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], machine: Any) -> None:
    """No backends where the call is refused."""
    gpus, interpreted, asked, backends, said = machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (9, 0))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _a, _b: True)
    for name in ("sonic_ep.fast", "sonic_ep.fast.capabilities"):
        monkeypatch.setattr(f"{name}.interpreted", lambda: interpreted)
    with nullcontext() if backends else pytest.raises(SystemExit, match="2"):
        tested = module_of_example("lm_options").parse_settings(["--nproc=2", f"--backend={asked}"], None).tested
        assert list(tested.backends) == backends
        assert (tested.left_out is None) == (not said)
        assert said in (tested.left_out or "")
    assert backends is not None or said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--steps 0", "--steps: got '0', expected a whole number from 1 to"),
        ("--steps many", "--steps: got 'many', expected a whole number"),
        ("--nproc -1", "--nproc: got '-1', expected a whole number from 1 to 16"),
        ("--nproc 3", "--experts: got 8, expected a multiple of the 3 ranks"),
        ("--experts 8 --top_k 9", "--top-k: got 9, expected at most the 8 experts"),
        ("--seed -1", "--seed: got '-1'"),
        ("--output missing/picture.png", "there is no folder missing"),
        ("--json .", "expected the path of a file"),
        ("--soak --nproc 2 --steps 3", "--steps: got 3, expected at least 4 with --soak"),
    ],
)
def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], wrong: str, message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        module_of_example("lm_options").parse_settings(wrong.split(), None)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_arguments_start_no_ranks(tmp_path: Path) -> None:
    options = {"cwd": tmp_path, "env": without_gpus(), "capture_output": True, "text": True, "timeout": HANG_SECONDS}
    done = subprocess.run(command("--backend=fast"), **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert NO_GPU in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the ranks are found in /proc")
def test_ctrl_c_ends_every_rank(tmp_path: Path) -> None:
    options = {"cwd": tmp_path, "env": environment(), "stderr": subprocess.DEVNULL, "text": True}
    line = command("--nproc=2", "--steps=10000", "--context=2")
    launcher = subprocess.Popen(line, stdout=subprocess.PIPE, **options)
    try:
        while "step    1/" not in launcher.stdout.readline():
            assert launcher.poll() is None
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=HANG_SECONDS) == 128 + signal.SIGINT
    finally:
        launcher.kill()
    assert len(ranks) == 2
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
