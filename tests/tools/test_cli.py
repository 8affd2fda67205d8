"""The command line: output, exit codes, several ranks, wrong arguments, Ctrl-C."""

import argparse
import re
import signal
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from limits import HANG_SECONDS
from on_ranks import on_ranks

import sonic_ep.cli as cli_module
import sonic_ep.cli.demo as demo_module
import sonic_ep.cli.doctor as doctor_module
import sonic_ep.cli.verify as verify_module
from sonic_ep import ExpertParallel
from sonic_ep.backend import unavailable_reasons
from sonic_ep.cli import main
from sonic_ep.cli.exit_codes import FAIL, INTERRUPTED, PASS, WRONG_ARGUMENTS
from sonic_ep.cli.launch import Place, joined_group, launched_by_torchrun
from sonic_ep.cli.verify import CONFIGS, chosen_cases, fitting_cases
from sonic_ep.distributed.group import EPGroup
from sonic_ep.testing import CASES, Accuracy, Case, Errors, Rank

COMMAND = [sys.executable, "-m", "sonic_ep"]
ALONE = EPGroup(rank=0, world_size=1)


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == PASS
    out = capsys.readouterr().out
    assert f"torch             {version('torch')}" in out
    assert "backend reference can run here" in out
    reasons = unavailable_reasons("fast", ALONE)
    assert f"backend fast      {'cannot run here:' if reasons else 'can run here'}" in out
    assert all(f"    - {reason}" in out for reason in reasons)
    # Healthy if what was asked for can run, or anything where nothing was.
    for unavailable, healthy in ((("fast",), ("reference",)), (("fast", "reference"), ())):
        found = {name: ("no GPU",) if name in unavailable else () for name in ("fast", "reference")}
        monkeypatch.setattr(doctor_module, "unavailable_reasons", lambda name, group, found=found: found[name])
        for name in found:
            assert main(["doctor", "--backend", name]) == (PASS if name in healthy else FAIL)
        assert main(["doctor"]) == (PASS if healthy else FAIL)


@pytest.mark.thorough
def test_verify_on_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--case", "top_1", "--case", "uniform_bf16"]) == PASS
    lines = capsys.readouterr().out.splitlines()
    assert " on cpu, 1 rank: 144 runs" in lines[0] or torch.cuda.is_available()
    name = lines[0].split()[1]
    cases = [[case, entry, name, "36"] for case in ("uniform_bf16", "top_1") for entry in ("moe_routed", "moe")]
    assert [line.split()[:4] for line in lines[2:6]] == cases
    assert all(line.endswith("PASS") for line in lines[2:6])
    assert lines[6].startswith("144 runs, 0 failures")


@pytest.mark.thorough
def test_verify_on_several_ranks_and_a_given_shape() -> None:
    arguments = [*COMMAND, "verify", "--nproc", "3", "--thiek", "25,32,16,12,4", "--dtype", "bfloat16"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == PASS, done.stderr
    assert done.stdout.count("T25-H32-I16-E12-K4") == 2
    assert "72 runs, 0 failures" in done.stdout


def out_of_bounds(case: Case, ep: ExpertParallel, device: torch.device) -> list[Accuracy]:
    bad, bound = Errors(norm=1.0, worst_row=1.0), Errors(norm=0.5, worst_row=0.5)
    return [Accuracy(name="y", got=bad, bound=bound), Accuracy(name="dx", got=bound, bound=bound)]


def test_verify_fails_if_one_finding_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify_module, "ENTRIES", {"moe": out_of_bounds})
    assert main(["verify", "--case", "uniform", "--backend", "reference"]) == FAIL
    head, _, line, first, *_, last = capsys.readouterr().out.splitlines()
    assert head.startswith("backend reference on c")
    assert re.search(r"36 runs, each compared with a layer in double precision; about \d+ s$", head)
    assert line.split() == ["uniform", "moe", "reference", "36", "2.00", "y", "FAIL"]
    assert first.startswith("    EPConfig(dispatch=")
    assert "y: relative error 1 (at most 0.5)" in first
    assert last.startswith("36 runs, 36 failures, ")


def test_a_rank_set_by_somebody_else_is_not_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched_by_torchrun()
    with joined_group() as place:
        assert (place.rank, place.world_size) == (0, 1)


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    arguments = [*COMMAND, "verify", "--case", "top_1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == ""
        assert writer.wait(timeout=HANG_SECONDS) == FAIL


@pytest.mark.parametrize("world_size", [1, 2, 5, 7, 8, 16])
def test_cases_are_made_to_fit_any_number_of_ranks(world_size: int) -> None:
    fitted = fitting_cases(world_size)
    assert [case.name for case in fitted] == list(CASES)
    for case in fitted:
        assert case.num_experts % world_size == 0
        assert 1 <= case.top_k <= case.num_experts
    assert len(set(CONFIGS)) == 3 * 3 * 2 * 2
    chosen = chosen_cases(argparse.Namespace(case=["top_1"], thiek=None, dtype=None), world_size)
    assert [case.name for case in chosen] == ["top_1"]


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "the following arguments are required: command"),
        (["tidy"], "invalid choice: 'tidy'"),
        (["bench"], "invalid choice: 'bench'"),
        (["verify", "--nproc", "0"], "got '0', expected a whole number of at least 1"),
        (["verify", "--nproc", "two"], "got 'two', expected a whole number of at least 1"),
        (["verify", "--thiek", "1,2,3"], "got 3 numbers in '1,2,3', expected five: T,H,I,E,K"),
        (["verify", "--thiek", "8,8,8,4,5"], "got K=5, expected at most E=4"),
        (["verify", "--case", "nothing"], "invalid choice: 'nothing'"),
        (["verify", "--backend", "turbo"], "invalid choice: 'turbo'"),
        (["verify", "--d", "bfloat16"], "unrecognized arguments: --d bfloat16"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == WRONG_ARGUMENTS
        assert message in capsys.readouterr().err


def test_what_cannot_be_verified_is_said_once_and_no_rank_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_module, "launch", Mock(side_effect=NotImplementedError("ranks were started")))
    cases = [
        (["--thiek=8,8,8,4,2", "--nproc=3"], WRONG_ARGUMENTS, "got E=4, expected a multiple of the 3 ranks"),
        (["--dtype=bfloat16"], WRONG_ARGUMENTS, "got --dtype without --thiek: named cases have dtypes of their own"),
        (["--thiek=8,8,8,4,2", "--case=top_1"], WRONG_ARGUMENTS, "got --case and --thiek, expected one or the other"),
    ]
    if unavailable_reasons("fast", ALONE):
        cases.append((["--backend", "fast", "--nproc", "4"], FAIL, "backend 'fast' cannot run here: "))
    for arguments, code, message in cases:
        assert main(["verify", *arguments]) == code
        assert capsys.readouterr().err.count(message) == 1


@on_ranks(2, pool="cpu_pool")
def test_demo_shows_the_rows_and_verifies(rank: Rank) -> None:
    place = Place(rank=rank.rank, world_size=rank.world_size, device=rank.device)
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(StringIO()) as out:
        patched.setattr(demo_module, "joined_group", lambda: nullcontext(place))
        # Which runs on the CPU, on machines with GPUs as well.
        patched.setattr(demo_module, "ExpertParallel", partial(ExpertParallel, backend="reference"))
        patched.setattr(verify_module, "CONFIGS", CONFIGS[::7])
        # As a rank that was started does.
        patched.setattr(cli_module, "launched_by_torchrun", lambda: True)
        assert main(["demo"]) == PASS
    expected = ["2 ranks on cpu", "tokens of rank 0 return as [0.0, 1.0, 2.0, 3.0]", "24 runs, 0 failures"]
    assert [line in out.getvalue() for line in expected] == [rank.rank == 0] * 3
    # Every token twice among the tokens of the experts, and as many bars as experts.
    lines = [line.split() for line in out.getvalue().splitlines() if "#" in line]
    shown = sorted(token for line in lines for token in line[4:])
    assert shown == sorted(2 * [f"{r}.{t}" for r in range(2) for t in range(4)] if rank.rank == 0 else [])


def test_the_version_and_an_example_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == PASS
    assert capsys.readouterr().out == f"sonic-ep {version('sonic-ep')}\n"
    for name, (add_options, _, example) in cli_module.COMMANDS.items():
        parser = cli_module.CommandParser()
        add_options(parser)
        options = parser.parse_args(example.split())
        if "check" in options and "picture" not in options:
            options.check(options)
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"example: sonic-ep {name} {example}".strip() in shown
        assert "default: None" not in shown


def test_auto_is_what_doctor_and_verify_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "ENTRIES", {"moe": out_of_bounds})
    main(["doctor"])
    (taken,) = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line.startswith("backend auto")]
    main(["verify", "--case", "uniform"])
    assert capsys.readouterr().out.startswith(f"backend {taken} on ")


def test_how_far_a_long_verify_is_and_what_takes_less(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.0, 20.0, 40.0, 90.0])
    monkeypatch.setattr(verify_module.time, "monotonic", lambda: next(now))
    progress = verify_module.Progress(Place(rank=0, world_size=1, device=torch.device("cpu")), runs=40, slow=True)
    for run in range(1, 5):
        progress.begins(f"run {run}")
    assert capsys.readouterr().out.splitlines() == [
        "about 13 min left; --backend reference or a smaller --thiek or one --case takes less",
        "[4/40] run 4, 18 min left",
    ]


def test_memory_of_the_worked_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--thiek", "6,8,4,4,2", "--ranks", "2"]) == PASS
    lines = {line.split("  ")[0]: line.split()[-5:] for line in capsys.readouterr().out.splitlines()}
    # Bytes of the docstring of sonic_ep.testing.memory_model: 12 or 6 rows, saved and shared.
    for flags, rows, saved in (("none", "12", 192 + 192 + 48 + 208), ("cpu_sync_on_runtime", "6", 96 + 96 + 48 + 184)):
        found = lines[flags]
        assert (found[0], found[1]) == (rows, f"{saved / 2**30:#.3g}")
    assert lines["none"][4] == f"{5120 / 2**30:#.3g}"
    assert main(["memory", "--thiek", "6,8,4,4,2", "--ranks", "4"]) == WRONG_ARGUMENTS
    assert "T=6, expected a multiple of the 4 ranks" in capsys.readouterr().err


def test_ctrl_c_ends_every_rank() -> None:
    with subprocess.Popen([*COMMAND, "verify", "--nproc", "2"], stdout=subprocess.PIPE, text=True) as launched:
        assert launched.stdout is not None
        assert "2 ranks" in launched.stdout.readline()
        listed = Path(f"/proc/{launched.pid}/task").glob("*/children")
        ranks = [int(child) for of_thread in listed for child in of_thread.read_text().split()]
        assert len(ranks) == 2
        launched.send_signal(signal.SIGINT)
        assert launched.wait(timeout=HANG_SECONDS) == INTERRUPTED
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def test_without_triton_the_commands_of_the_reference_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has no wheels for some systems; "doctor" is what says so."""
    program = (
        "import importlib.metadata as metadata, sys\n"
        "def version(name, found=metadata.version):\n"
        "    if name == 'triton': raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version, sys.modules['triton'] = version, None\n"
        "from sonic_ep.cli import main\n"
        "sys.exit(main(['doctor', '--backend=reference']) or main(['profile', '--no-cache']))"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout
    assert "backend reference" in done.stdout
