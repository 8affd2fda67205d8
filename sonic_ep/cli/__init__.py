"""The command line, ``python -m sonic_ep`` or ``sonic-ep``: doctor, verify, profile, memory, demo.

Exit codes: 0 if all passed, 1 if something failed or cannot run on this machine, 2 for wrong arguments, 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

import sonic_ep
from sonic_ep.cli.demo import add_demo
from sonic_ep.cli.doctor import add_doctor
from sonic_ep.cli.exit_codes import FAIL, INTERRUPTED, WRONG_ARGUMENTS
from sonic_ep.cli.launch import launch, launched_by_torchrun
from sonic_ep.cli.memory import add_memory
from sonic_ep.cli.profile import add_profile
from sonic_ep.cli.verify import add_verify
from sonic_ep.errors import BackendUnavailableError

# What adds a command's options, what it does, and arguments as an example.
COMMANDS: Mapping[str, tuple[Callable[[argparse.ArgumentParser], None], str, str]] = MappingProxyType(
    {
        "doctor": (add_doctor, "Versions, GPUs, links, and which backends can run here and why not.", ""),
        "verify": (
            add_verify,
            "Compare every mode and flag with a plain PyTorch layer in double precision, on this machine.",
            "--nproc 2 --thiek 64,32,16,8,2 --dtype bfloat16",
        ),
        "profile": (
            add_profile,
            "Time every mode at a shape, after checking its results, and name the fastest pair.",
            "--nproc 2 --thiek 4096,256,128,16,2 --picture profile.png",
        ),
        "memory": (
            add_memory,
            "Bytes that a layer saves, needs at most and shares: whether it fits. Needs no GPU.",
            "--thiek 131072,4096,1536,128,8 --ranks 8",
        ),
        "demo": (add_demo, "Follow a few tokens through four ranks, and verify the layer.", "--nproc 4"),
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = CommandParser(prog="sonic-ep", description="Expert parallelism for Mixture-of-Experts layers.")
    parser.add_argument("--version", action="version", version=f"sonic-ep {sonic_ep.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (add_options, text, example) in COMMANDS.items():
        epilog = f"example: sonic-ep {name} {example}".rstrip()
        add_options(commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=WithDefaults))
    return run_command(parser, sys.argv[1:] if arguments is None else arguments, ("--module", "sonic_ep"))


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str], program: Sequence[str]) -> int:
    """Run the command in ``arguments``; returns its exit code. program: how torchrun starts it on several ranks."""
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        if "check" in options:
            options.check(options)
        if getattr(options, "nproc", None) is not None and not launched_by_torchrun():
            without_nproc = CommandParser(add_help=False)
            without_nproc.add_argument("--nproc")
            return launch(options.nproc, [*program, *without_nproc.parse_known_args(list(arguments))[1]])
        code: int = options.command(options)
        return code
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAIL
    except torch.OutOfMemoryError as error:
        rank = os.environ["RANK"] if launched_by_torchrun() else "0"
        print(f"{parser.prog}: rank {rank}: {error}; expected a shape that fits: fewer tokens", file=sys.stderr)
        return FAIL
    except (ValueError, BackendUnavailableError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS if isinstance(error, ValueError) else FAIL


class CommandParser(argparse.ArgumentParser):
    """No abbreviations: torchrun would take --nproc for one of its own options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "allow_abbrev": False})


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends with the default, where there is one and the text does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)
