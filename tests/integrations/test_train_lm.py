"""The language model example: each backend agrees with dense runs, wrong words are refused, Ctrl-C leaves nothing."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STEPS = 10
NO_GPU = "no CUDA device: torch.cuda.is_available() is False"
SLOW = "Triton's interpreter runs its kernels"
PNG_SIGNATURE = b"\x89PNG\r\n"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A call of the example that ended well. runs: what it says of each backend's run."""

    stdout: str
    numbers: dict[str, Any]
    picture: Path

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        return self.numbers["runs"]


def command(*options: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / "train_lm.py"), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def without_gpus() -> dict[str, str]:
    """Nor an interpreter, though the fast backend may be asked for."""
    others = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    return {**others, "CUDA_VISIBLE_DEVICES": ""}


def finish(folder: Path, *options: str, env: dict[str, str]) -> Finished:
    done = subprocess.run(
        command("--nproc=2", "--output=picture.png", "--json=numbers.json", *options),
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((folder / "numbers.json").read_text())
    return Finished(stdout=done.stdout, numbers=numbers, picture=folder / "picture.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    flags = ["--redispatch_x_in_backward", "--cpu-sync-on-runtime", "--dispatch=rank_dedup"]
    return finish(tmp_path_factory.mktemp("train_lm"), f"--steps={STEPS}", *flags, env=environment())


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Modules of the example by name, in a process that no launcher has started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delenv("RANK", raising=False)
        yield importlib.import_module


@pytest.fixture(scope="module")
def comparison(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("lm_comparison")


@pytest.fixture(scope="module")
def options(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("lm_options")


def assert_agrees(run: dict[str, Any]) -> None:
    assert run["agree"] is True
    for compared in ("loss_distance", "router_logits_distance"):
        distances = run[compared]
        for tested, bound in zip(distances["expert_parallel"], distances["bound"], strict=True):
            assert tested <= bound < 1e-4


def test_losses_of_all_runs_fall_and_agree(finished: Finished) -> None:
    assert finished.numbers["agree"] is True
    for run in finished.runs.values():
        assert_agrees(run)
        for losses in run["losses"].values():
            assert len(losses) == STEPS
            assert losses[-1] < losses[0] - 1


def test_summary_names_losses_bound_and_seconds(finished: Finished) -> None:
    for backend, run in finished.runs.items():
        first, last = (run["losses"]["expert_parallel"][place] for place in (0, -1))
        assert f"{backend}: loss {first:.3f} -> {last:.3f} in {STEPS} steps" in finished.stdout
        assert f"{backend}: losses agree: largest distance" in finished.stdout
    assert " s in all" in finished.stdout


def test_every_backend_runs_or_one_line_says_why_not(finished: Finished) -> None:
    started = [line for line in finished.stdout.splitlines() if line.startswith("backend ")]
    assert [line.split(",")[0] for line in started] == [f"backend {backend}" for backend in finished.runs]
    explained = [line for line in finished.stdout.splitlines() if line.startswith("no fast run: ")]
    if "fast" in finished.runs:
        assert list(finished.runs) == ["reference", "fast"]
        assert not explained
    else:
        assert list(finished.runs) == ["reference"]
        assert explained == [f"no fast run: {finished.numbers['left_out']}"]


def test_picture_is_written(finished: Finished) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'sonic-ep[viz]'")
    assert finished.picture.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.fast
def test_the_fast_backend_trains_as_the_reference_does(tmp_path: Path) -> None:
    """On the CPU, where its kernels are interpreted: at sizes that leave them next to nothing to do."""
    env = {**without_gpus(), "TRITON_INTERPRET": "1"}
    done = finish(tmp_path, "--backend=fast", "--steps=2", "--context=2", env=env)
    assert list(done.runs) == ["reference", "fast"]
    for backend, run in done.runs.items():
        assert f"backend {backend}, 2 ranks on cpu" in done.stdout
        assert_agrees(run)
    assert done.numbers["agree"] is True


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the example says of recorded runs."""

    code: int
    numbers: dict[str, Any]
    stdout: str


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy processor two threads that wait for each other are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def judge(
    example: Callable[[str], ModuleType], one_thread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[dict[str, float]], Judged]:
    """Train on one rank, and have a second run judged beside it: the same but for what is added to its numbers."""
    runs, model, training = (example(f"lm_{name}") for name in ("runs", "model", "training"))
    device = torch.device("cpu")
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    written = ["--steps=3", "--context=4", f"--json={numbers}", f"--output={picture}"]
    settings = example("lm_options").parse_settings(["--nproc=1", "--backend=reference", *written], None)

    def judged(added: dict[str, float]) -> Judged:
        ep = runs.ExpertParallel(backend="reference")
        lone = runs.build(settings, ep, model.ExpertParallelFeedForward, device)
        steps = list(runs.steps_of(lone, settings, training.OneProcess(), device))
        given = {name: torch.stack([getattr(step, name) for step in steps]) for name in ("loss", "logits")}
        changed = {name: numbers + added.get(name, 0.0) for name, numbers in given.items()}
        recorded = [
            runs.Recorded(backend=backend, losses=run["loss"], logits=run["logits"])
            for backend, run in (("reference", given), ("fast", changed))
        ]
        outcomes = [runs.train_densely(settings, run, device) for run in recorded]
        code = example("train_lm").judge(outcomes, recorded, settings, device)
        return Judged(code=code, numbers=json.loads(numbers.read_text()), stdout=capsys.readouterr().out)

    return judged


def test_two_runs_that_agree_are_green(judge: Callable[[dict[str, float]], Judged]) -> None:
    found = judge({})
    assert found.code == 0
    assert found.numbers["agree"] is True
    assert found.numbers["runs"]["fast"] == found.numbers["runs"]["reference"]


# A shift of all logits of a token leaves its choices as they are, and with them the dense losses.
@pytest.mark.parametrize(
    ("compared", "shift", "words"),
    [
        ("loss", 1e-4, "fast: losses DIFFER"),
        ("loss", math.nan, "fast: losses DIFFER"),
        ("logits", 1e-4, "fast: router logits DIFFER"),
    ],
)
def test_a_second_run_that_deviates_is_red(
    judge: Callable[[dict[str, float]], Judged], compared: str, shift: float, words: str
) -> None:
    found = judge({compared: shift})
    assert found.code == 1
    assert found.numbers["agree"] is False
    assert {backend: run["agree"] for backend, run in found.numbers["runs"].items()} == {
        "reference": True,
        "fast": False,
    }
    assert found.stdout.count("DIFFER") == 1
    assert words in found.stdout


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the fast backend may find. gpus: without one there is no CUDA either."""

    gpus: int
    interpreted: bool = False


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """Have the example take this machine for another."""

    def become(machine: Machine) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (9, 0))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _a, _b: True)
        for name in ("sonic_ep.fast", "sonic_ep.fast.capabilities"):
            monkeypatch.setattr(f"{name}.interpreted", lambda: machine.interpreted)

    return become


@pytest.mark.fast
@pytest.mark.parametrize(
    ("machine", "asked", "backends", "left_out"),
    [
        (Machine(gpus=0), "auto", ["reference"], NO_GPU),
        (Machine(gpus=0), "reference", ["reference"], None),
        (Machine(gpus=0, interpreted=True), "auto", ["reference"], SLOW),
        (Machine(gpus=0, interpreted=True), "fast", ["reference", "fast"], None),
        (Machine(gpus=2), "auto", ["reference", "fast"], None),
        (Machine(gpus=2), "fast", ["reference", "fast"], None),
        (Machine(gpus=2), "reference", ["reference"], None),
        (Machine(gpus=1), "auto", ["reference"], "got 1 GPUs for 2 ranks, expected one for each"),
    ],
    ids=str,
)
def test_runs_that_are_asked_for(
    options: ModuleType,
    pretend: Callable[[Machine], None],
    machine: Machine,
    asked: str,
    backends: list[str],
    left_out: str | None,
) -> None:
    pretend(machine)
    tested = options.parse_settings(["--nproc=2", f"--backend={asked}"], None).tested
    assert list(tested.backends) == backends
    assert (tested.left_out is None) == (left_out is None)
    assert left_out is None or left_out in tested.left_out


@pytest.mark.fast
@pytest.mark.parametrize(
    ("machine", "reason"), [(Machine(gpus=0), NO_GPU), (Machine(gpus=1), "got 1 GPUs for 2 ranks")], ids=str
)
def test_fast_by_name_where_it_cannot_run_is_an_error(
    options: ModuleType,
    pretend: Callable[[Machine], None],
    capsys: pytest.CaptureFixture[str],
    machine: Machine,
    reason: str,
) -> None:
    pretend(machine)
    with pytest.raises(SystemExit) as stop:
        options.parse_settings(["--nproc=2", "--backend=fast"], None)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def agreement_of(comparison: ModuleType, run: dict[str, Any], shift: float) -> Any:
    distances = run["loss_distance"]
    gaps = [
        comparison.Gap(tested=tested + shift, plain=plain, size=loss)
        for tested, plain, loss in zip(
            distances["expert_parallel"], distances["dense_fp32"], run["losses"]["dense_fp64"], strict=True
        )
    ]
    return comparison.agreement("losses", gaps)


def test_bounds_follow_from_the_dense_runs(finished: Finished, comparison: ModuleType) -> None:
    for run in finished.runs.values():
        found = agreement_of(comparison, run, 0.0)
        assert found.ok
        assert list(found.bounds) == run["loss_distance"]["bound"]


@pytest.mark.parametrize("shift", [1e-3, 1e-5, math.inf, math.nan])
def test_losses_that_are_off_are_red(finished: Finished, comparison: ModuleType, shift: float) -> None:
    for run in finished.runs.values():
        assert not agreement_of(comparison, run, shift).ok


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "0"], "--steps: got '0', expected a whole number from 1 to"),
        (["--steps", "many"], "--steps: got 'many', expected a whole number"),
        (["--nproc", "-1"], "--nproc: got '-1', expected a whole number from 1 to 16"),
        (["--nproc", "3"], "--experts: got 8, expected a multiple of the 3 ranks"),
        (["--experts", "8", "--top_k", "9"], "--top-k: got 9, expected at most the 8 experts"),
        (["--context", "0"], "--context: got '0'"),
        (["--seed", "-1"], "--seed: got '-1'"),
        (["--backend", "magic"], "invalid choice: 'magic'"),
        (["--dispatch", "pigeon"], "invalid choice: 'pigeon'"),
        (["--combine", "glue"], "invalid choice: 'glue'"),
        (["--output", "missing/picture.png"], "there is no folder missing"),
        (["--json", "."], "expected the path of a file"),
        (["--soak", "--nproc", "2", "--steps", "3"], "--steps: got 3, expected at least 4 with --soak"),
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


@pytest.mark.parametrize(("wrong", "message"), [("--nproc=0", "--nproc: got '0'"), ("--backend=fast", NO_GPU)])
def test_wrong_arguments_start_no_ranks(tmp_path: Path, wrong: str, message: str) -> None:
    done = subprocess.run(
        command(wrong), cwd=tmp_path, env=without_gpus(), capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the ranks are found in /proc")
def test_ctrl_c_ends_every_rank(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        command("--nproc=2", "--steps=10000", "--context=2"),
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
