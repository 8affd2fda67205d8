"""What commands that measure share: the options of their output, early checks, and failures that all ranks raise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sonic_ep.backend import choose_backend
from sonic_ep.cli.exit_codes import FAIL
from sonic_ep.cli.launch import Place, joined_group, ranks_of
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler import WrongResultError
from sonic_ep.profiler.machine import command_of
from sonic_ep.profiler.timing import AboveCeilingError


@dataclass(frozen=True, kw_only=True)
class Run:
    """One rank of a command that measures. command: how to run it again. say: prints on rank 0."""

    place: Place
    backend: str
    command: str
    say: Callable[[str], None]


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where results go, and the commit that they name."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results")
    parser.add_argument("--commit", metavar="NAME", help="the commit to name in them where git cannot tell")


def checked_ranks(options: argparse.Namespace) -> int:
    """The number of ranks. Raises here, before any is started, the ``ValueError`` that each of them would raise."""
    ranks = ranks_of(options.nproc)
    if options.json is not None:
        check_writable("--json", options.json)
    choose_backend(options.backend, EPGroup(rank=0, world_size=ranks))
    return ranks


def check_writable(option: str, path: Path) -> None:
    """Raise ``ValueError`` unless a file can be written at ``path``. Makes no folder."""
    wrong = f"{option}: got {str(path)!r}, expected the path of a file to write"
    if not path.parent.exists():
        raise ValueError(f"{wrong}: there is no folder {str(path.parent)!r}, make it first")
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:
        raise ValueError(f"{wrong}: {error}") from None


def run_measured(options: argparse.Namespace, program: str, measure: Callable[[Run], int]) -> int:
    """Collective. The exit code of ``measure``, or ``FAIL`` if a result is wrong or impossibly fast.

    program: how the command is started. ``measure`` raises these errors on every rank, so no rank waits.
    """
    with joined_group() as place:
        backend = choose_backend(options.backend, EPGroup(rank=place.rank, world_size=place.world_size)).name
        command = command_of(place.world_size, program, arguments_without_paths(sys.argv))
        try:
            return measure(Run(place=place, backend=backend, command=command, say=place.say))
        except (WrongResultError, AboveCeilingError) as error:
            place.say(f"FAIL: {error}")
            return FAIL


def arguments_without_paths(arguments: list[str]) -> list[str]:
    """The options of a command line, less paths and commits, which mean nothing to others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_output(parser)
    return [kept for kept in parser.parse_known_args(arguments[1:])[1] if kept != "profile"]
