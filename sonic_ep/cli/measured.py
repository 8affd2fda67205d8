"""What the commands that measure share: their output's options, what is checked before, and how a red run ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sonic_ep.backend import choose_backend
from sonic_ep.cli.exit_codes import RED
from sonic_ep.cli.launch import Place, joined_group, ranks_of
from sonic_ep.cli.output import require_writable, teller, words_without_paths
from sonic_ep.group import EPGroup
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
    """Where results go, and what they are called."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was found, for sonic-ep report")
    parser.add_argument("--commit", metavar="NAME", help="the commit to name in it where git cannot tell")


def checked_ranks(options: argparse.Namespace) -> int:
    """How many ranks there will be. Raises ``ValueError`` for what fails alike on every rank, before any is started."""
    ranks = ranks_of(options.nproc)
    require_writable(options.json)
    choose_backend(options.backend, EPGroup(rank=0, world_size=ranks))
    return ranks


def run_measured(options: argparse.Namespace, words: str, measure: Callable[[Run], int]) -> int:
    """Collective: ``measure``, and its exit code; red if what it measures is wrong or impossible.

    words: how the command is started. Every rank raises what makes a run red, so nobody is left waiting.
    """
    with joined_group() as place:
        group = EPGroup(rank=place.rank, world_size=place.world_size)
        run = Run(
            place=place,
            backend=choose_backend(options.backend, group).name,
            command=command_of(place.world_size, words, words_without_paths(sys.argv)),
            say=teller(place),
        )
        try:
            return measure(run)
        except (WrongResultError, AboveCeilingError) as error:
            run.say(f"RED: {error}")
            return RED
