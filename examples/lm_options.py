"""The command line of ``train_lm.py``: what it accepts, as one frozen value."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lm_batches import BATCH
from lm_course import LEAST_SAMPLES, Course, even_course, soak_course, soak_recipe
from lm_memory import PROCESS
from lm_model import Sizes
from lm_training import Recipe

from sonic_ep import BackendUnavailableError, CombineMode, DispatchMode, EPConfig
from sonic_ep.backend import BACKEND_PACKAGES, choose_backend
from sonic_ep.config import AUTO
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler.machine import command_of

RANKS = 4
STEPS = 200
SOAK_STEPS = 2000
# Every step's router logits are kept, 64 KiB a step and run at the default sizes.
MOST_STEPS = 100_000
MOST_EXPERTS = 1024
MOST_CONTEXT = 4096
MOST_SEED = 2**63 - 1
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The runs on ranks: their backends in order. left_out: why "auto" leaves out the fast one, or None."""

    backends: tuple[str, ...]
    left_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run and what to write.

    command: how to run it again. started: when it began, in seconds of ``time.time``.
    """

    ranks: int
    tested: Tested
    config: EPConfig
    sizes: Sizes
    recipe: Recipe
    course: Course
    output: Path
    json: Path | None
    command: str
    started: float


def parse_settings(arguments: Sequence[str], description: str | None) -> Settings:
    """The settings that ``arguments`` ask for; exits with code 2 and a message if they ask for what cannot be."""
    parser = _parser(description)
    asked = parser.parse_args(arguments)
    ranks = _ranks(parser, asked.nproc)
    _check_experts(parser, asked, ranks)
    recipe = _recipe(parser, asked, ranks)
    make_course = soak_course if asked.soak else even_course
    return Settings(
        ranks=ranks,
        tested=_tested(parser, asked.backend, ranks),
        config=EPConfig(
            dispatch=asked.dispatch,
            combine=asked.combine,
            redispatch_x_in_backward=asked.redispatch_x_in_backward,
            cpu_sync_on_runtime=asked.cpu_sync_on_runtime,
        ),
        sizes=Sizes(experts=asked.experts, top_k=asked.top_k, context=asked.context),
        recipe=recipe,
        course=make_course(recipe, asked.context, ranks),
        output=asked.output,
        json=asked.json,
        command=_command(arguments, asked, ranks),
        started=asked.started,
    )


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun has started."""
    return "RANK" in os.environ


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _add_training(parser)
    _add_layer(parser)
    _add_files(parser)
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc",
        type=_whole(1, BATCH),
        help=f"W, the ranks to start, at most {BATCH}, the sequences of a batch (default {RANKS})",
    )
    parser.add_argument(
        "--steps", type=_whole(1, MOST_STEPS), help=f"training steps (default {STEPS}, of a soak {SOAK_STEPS})"
    )
    _add_flag(parser, "soak", "T and routing change from step to step, and what the ranks hold between steps may not")
    parser.add_argument(
        "--context",
        type=_whole(1, MOST_CONTEXT),
        default=64,
        help="S, the bytes of a sequence (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_whole(0, MOST_SEED), default=0, help="of weights and batches (default %(default)s)"
    )


def _add_layer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experts", type=_whole(1, MOST_EXPERTS), default=8, help="E, a multiple of W (default %(default)s)"
    )
    parser.add_argument(
        "--top-k",
        "--top_k",
        type=_whole(1, MOST_EXPERTS),
        default=2,
        help="K, experts of each token (default %(default)s)",
    )
    _add_choice(
        parser,
        "backend",
        list(BACKEND_PACKAGES),
        "of the runs on ranks: reference is that one alone, fast is both, auto is both where the fast one can run",
    )
    _add_choice(parser, "dispatch", [mode.value for mode in DispatchMode], "how tokens travel to their experts")
    _add_choice(parser, "combine", [mode.value for mode in CombineMode], "how results travel back")
    _add_flag(parser, "redispatch-x-in-backward", "dispatch x again in backward instead of saving its rows")
    _add_flag(parser, "cpu-sync-on-runtime", "size the buffers of rows exactly, for one read on the host")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=_writable,
        default=Path("train_lm.png"),
        metavar="PNG",
        help="where the picture goes (default %(default)s)",
    )
    parser.add_argument("--json", type=_writable, metavar="PATH", help="where losses and bounds go as numbers")
    # The ranks are told when the launcher began.
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)


def _add_choice(parser: argparse.ArgumentParser, name: str, words: list[str], what: str) -> None:
    parser.add_argument(f"--{name}", choices=[AUTO, *words], default=AUTO, help=f"{what} (default %(default)s)")


def _add_flag(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", action="store_true", help=what)


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        expected = f"got {text!r}, expected a whole number from {least} to {most}"
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(expected) from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(expected)
        return number

    return parse


def _writable(text: str) -> Path:
    """A path that a file can be written to, checked before the training."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected the path of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, but there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text!r}, which may not be written")
    return path


def _ranks(parser: argparse.ArgumentParser, asked: int | None) -> int:
    """W: as torchrun has it if it started this process, else as asked for."""
    if not under_torchrun():
        return asked or RANKS
    ranks = int(os.environ["WORLD_SIZE"])
    if asked not in (None, ranks):
        parser.error(f"argument --nproc: got {asked}, but torchrun has started {ranks} ranks")
    if ranks > BATCH:
        parser.error(f"got {ranks} ranks of torchrun, expected at most {BATCH}")
    return ranks


def _recipe(parser: argparse.ArgumentParser, asked: argparse.Namespace, ranks: int) -> Recipe:
    """Steps and seed. A soak needs steps enough, and a system that tells what a process holds."""
    make = soak_recipe if asked.soak else Recipe
    recipe = make(steps=asked.steps or (SOAK_STEPS if asked.soak else STEPS), seed=asked.seed)
    least = ranks + LEAST_SAMPLES
    if asked.soak and recipe.steps < least:
        expected = (
            f"at least {least} with --soak, a step to warm up each of {ranks} ranks and {LEAST_SAMPLES} to compare"
        )
        parser.error(f"argument --steps: got {recipe.steps}, expected {expected}")
    if asked.soak and not PROCESS.is_dir():
        parser.error(f"argument --soak: got no {PROCESS}, expected Linux, where a process can see what it holds")
    return recipe


def _command(arguments: Sequence[str], asked: argparse.Namespace, ranks: int) -> str:
    """The command line that comes to the same, without what the launcher adds."""
    own = [word for word in arguments if not word.startswith("--started")]
    counted = [] if asked.nproc else [f"--nproc={ranks}"]
    return command_of(ranks, "examples/train_lm.py", [*own, *counted])


def _check_experts(parser: argparse.ArgumentParser, asked: argparse.Namespace, ranks: int) -> None:
    if asked.experts % ranks:
        parser.error(f"argument --experts: got {asked.experts}, expected a multiple of the {ranks} ranks")
    if asked.top_k > asked.experts:
        parser.error(f"argument --top-k: got {asked.top_k}, expected at most the {asked.experts} experts")


def _tested(parser: argparse.ArgumentParser, asked: str, ranks: int) -> Tested:
    """The reference alone, or both backends; every rank of a machine comes to the same."""
    try:
        choice = choose_backend(asked, resolve_group(None))
    except BackendUnavailableError as error:
        parser.error(f"argument --backend: {error}")
    if choice.name == REFERENCE:
        return Tested(backends=(REFERENCE,), left_out=choice.why if asked == AUTO else None)
    crowded = _crowded(choice.name, ranks)
    if crowded is None:
        return Tested(backends=(REFERENCE, choice.name))
    if asked != AUTO:
        parser.error(f"argument --backend: {crowded}")
    return Tested(backends=(REFERENCE,), left_out=crowded)


def _crowded(backend: str, ranks: int) -> str | None:
    """Why ``backend`` cannot run where ranks share GPUs; None where each has its own, or there are none to share."""
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else ranks
    gpus = torch.cuda.device_count()
    if not 0 < gpus < local_ranks:
        return None
    return f"backend {backend!r} cannot run here: got {gpus} GPUs for {local_ranks} ranks, expected one for each"
