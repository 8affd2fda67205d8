"""The command line: ``python -m sonic_ep`` or ``sonic-ep``: see it, verify it, time it, show what was found.

Exit codes: 0 for green, 1 for red or for a machine that cannot run what was asked, 2 for wrong arguments, 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from sonic_ep.backend import BACKEND_PACKAGES, choose_backend
from sonic_ep.cli.demo import show_demo
from sonic_ep.cli.doctor import Health, examine
from sonic_ep.cli.exit_codes import GREEN, INTERRUPTED, RED, WRONG_ARGUMENTS
from sonic_ep.cli.launch import joined_group, launch, launched_by_torchrun, ranks_of
from sonic_ep.cli.profile import add_profile
from sonic_ep.cli.verify import chosen_cases, verify_cases
from sonic_ep.cli.words import DTYPES, add_nproc, thiek_word
from sonic_ep.config import AUTO, BackendUnavailableError
from sonic_ep.group import EPGroup
from sonic_ep.testing.cases import CASES

DEMO_RANKS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    return run_command(_parser(), sys.argv[1:] if arguments is None else arguments, ("--module", "sonic_ep"))


def run_command(parser: argparse.ArgumentParser, words: Sequence[str], program: Sequence[str]) -> int:
    """Run the command that ``words`` name; returns its exit code. program: how torchrun starts it on several ranks."""
    options = parser.parse_args(words)
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        options.check(options)
        if getattr(options, "nproc", None) is not None and not launched_by_torchrun():
            return launch(options.nproc, [*program, *_without_nproc(words)])
        code: int = options.command(options)
        return code
    except (ValueError, BackendUnavailableError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS if isinstance(error, ValueError) else RED
    except torch.OutOfMemoryError as error:
        rank = os.environ["RANK"] if launched_by_torchrun() else "0"
        print(f"{parser.prog}: rank {rank}: {error}; expected a shape that fits: fewer tokens", file=sys.stderr)
        return RED
    except BrokenPipeError:
        # Whoever read the table has seen enough; nothing may be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RED
    except OSError as error:
        # A full disk behind stdout, for one.
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return RED
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="sonic-ep", description="Expert parallelism for Mixture-of-Experts layers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_doctor(commands.add_parser("doctor", help="versions, GPUs, links, and which backends can run here"))
    _add_verify(commands.add_parser("verify", help="run the differential cases on this machine"))
    add_profile(commands.add_parser("profile", help="time every mode at a shape and name the fastest pair"))
    _add_demo(commands.add_parser("demo", help="route a handful of tokens over four ranks and show every step"))
    return parser


class CommandParser(argparse.ArgumentParser):
    """No abbreviations: what one rank understands, torchrun's own options must not take for theirs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "allow_abbrev": False})


def _without_nproc(words: Sequence[str]) -> list[str]:
    """The words for the ranks themselves: torchrun would take --nproc for an abbreviation of its own options."""
    parser = CommandParser(add_help=False)
    parser.add_argument("--nproc")
    return parser.parse_known_args(list(words))[1]


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=tuple(BACKEND_PACKAGES), help="exit 1 unless this one can run here")
    parser.set_defaults(command=_doctor, check=_nothing_to_check)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add_nproc(parser)
    parser.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="which one to verify")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="only this case; may be repeated")
    parser.add_argument(
        "--thiek",
        type=thiek_word,
        metavar="T,H,I,E,K",
        help="a shape instead of the named cases: tokens of the whole group, hidden, intermediate, experts, top-k",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of --thiek")
    parser.set_defaults(command=_verify, check=_check_verify)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add_nproc(parser, default=DEMO_RANKS)
    parser.set_defaults(command=_demo, check=_nothing_to_check)


def _doctor(options: argparse.Namespace) -> int:
    health = examine()
    _print_health(health)
    return GREEN if health.can_run(options.backend) else RED


def _print_health(health: Health) -> None:
    for subject, finding in health.lines:
        print(f"{subject:<17} {finding}")
    for backend in health.backends:
        print(f"backend {backend.name:<9} {'cannot run here:' if backend.reasons else 'can run here'}")
        for reason in backend.reasons:
            print(f"    - {reason}")


def _nothing_to_check(options: argparse.Namespace) -> None:
    """The parser has seen to everything."""


def _check_verify(options: argparse.Namespace) -> None:
    """What would fail alike on every rank fails here, once, before any is started."""
    ranks = ranks_of(options.nproc)
    choose_backend(options.backend, EPGroup(rank=0, world_size=ranks))
    chosen_cases(ranks, options.case, options.thiek, DTYPES[options.dtype])


def _verify(options: argparse.Namespace) -> int:
    with joined_group() as place:
        cases = chosen_cases(place.world_size, options.case, options.thiek, DTYPES[options.dtype])
        out = sys.stdout if place.rank == 0 else None
        return GREEN if verify_cases(cases, options.backend, place.device, out) else RED


def _demo(options: argparse.Namespace) -> int:
    with joined_group() as place:
        return GREEN if show_demo(place.device, sys.stdout if place.rank == 0 else None) else RED
