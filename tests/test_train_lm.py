"""The language model example: ranks and the dense runs agree, wrong arguments are refused, Ctrl-C leaves nothing."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
STEPS = 10
PNG_SIGNATURE = b"\x89PNG\r\n"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run of the example that ended well."""

    stdout: str
    numbers: dict[str, Any]
    picture: Path


def command(*options: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / "train_lm.py"), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("train_lm")
    options = ["--nproc=2", f"--steps={STEPS}", "--output=picture.png", "--json=numbers.json"]
    flags = ["--redispatch_x_in_backward", "--cpu-sync-on-runtime", "--dispatch=rank_dedup"]
    done = subprocess.run(
        command(*options, *flags),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((folder / "numbers.json").read_text())
    return Finished(stdout=done.stdout, numbers=numbers, picture=folder / "picture.png")


@pytest.fixture(scope="module")
def comparison() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("lm_comparison")


@pytest.fixture(scope="module")
def options() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delenv("RANK", raising=False)
        yield importlib.import_module("lm_options")


def test_losses_of_all_runs_fall_and_agree(finished: Finished) -> None:
    assert finished.numbers["agree"] is True
    for losses in finished.numbers["losses"].values():
        assert len(losses) == STEPS
        assert losses[-1] < losses[0] - 1
    for compared in ("loss_distance", "router_logits_distance"):
        distances = finished.numbers[compared]
        for tested, bound in zip(distances["expert_parallel"], distances["bound"], strict=True):
            assert tested <= bound < 1e-4


def test_summary_names_losses_bound_and_seconds(finished: Finished) -> None:
    first, last = (finished.numbers["losses"]["expert_parallel"][place] for place in (0, -1))
    assert f"loss {first:.3f} -> {last:.3f} in {STEPS} steps" in finished.stdout
    assert "losses agree: largest distance" in finished.stdout
    assert " s in all" in finished.stdout


def test_picture_is_written(finished: Finished) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'sonic-ep[viz]'")
    assert finished.picture.read_bytes().startswith(PNG_SIGNATURE)


def agreement_of(comparison: ModuleType, numbers: dict[str, Any], shift: float) -> Any:
    distances = numbers["loss_distance"]
    gaps = [
        comparison.Gap(tested=tested + shift, plain=plain, size=loss)
        for tested, plain, loss in zip(
            distances["expert_parallel"],
            distances["dense_fp32"],
            numbers["losses"]["dense_fp64"],
            strict=True,
        )
    ]
    return comparison.agreement("losses", gaps)


def test_bounds_follow_from_the_dense_runs(finished: Finished, comparison: ModuleType) -> None:
    found = agreement_of(comparison, finished.numbers, 0.0)
    assert found.ok
    assert list(found.bounds) == finished.numbers["loss_distance"]["bound"]


@pytest.mark.parametrize("shift", [1e-3, 1e-5, math.inf, math.nan])
def test_losses_that_are_off_are_red(finished: Finished, comparison: ModuleType, shift: float) -> None:
    assert not agreement_of(comparison, finished.numbers, shift).ok


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "0"], "--steps: got '0', expected a whole number from 1 to"),
        (["--steps", "many"], "--steps: got 'many', expected a whole number"),
        (["--nproc", "-1"], "--nproc: got '-1', expected a whole number from 1 to 16"),
        (["--nproc", "3"], "--experts: got 8, expected a multiple of the 3 ranks"),
        (["--experts", "8", "--top_k", "9"], "--top-k: got 9, expected at most the 8 experts"),
        (["--seed", "-1"], "--seed: got '-1'"),
        (["--backend", "magic"], "invalid choice: 'magic'"),
        (["--dispatch", "pigeon"], "invalid choice: 'pigeon'"),
        (["--combine", "glue"], "invalid choice: 'glue'"),
        (["--output", "missing/picture.png"], "there is no folder missing"),
        (["--json", "."], "expected the path of a file"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=lambda wrong: " ".join(wrong) if isinstance(wrong, list) else "",
)
def test_wrong_arguments_are_named(
    options: ModuleType, capsys: pytest.CaptureFixture[str], wrong: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        options.parse_settings(wrong, None)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_arguments_start_no_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--nproc=0"), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--nproc: got '0'" in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the ranks are found in /proc")
def test_ctrl_c_ends_every_rank(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        command("--nproc=2", "--steps=100000"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert launcher.stdout is not None
        while "step    1/" not in launcher.stdout.readline():
            assert launcher.poll() is None
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=30) == 128 + signal.SIGINT
    finally:
        launcher.kill()
    assert len(ranks) == 2
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
