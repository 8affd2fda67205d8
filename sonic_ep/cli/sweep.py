"""``sonic-ep sweep``: profile and layer over sizes, top-k and routings, for reports and the rule behind "auto"."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from sonic_ep.backend import BACKEND_PACKAGES
from sonic_ep.benchmark.layer_problem import LayerOptions, RoutingKind
from sonic_ep.benchmark.place import arena_at
from sonic_ep.benchmark.setup import Setup
from sonic_ep.benchmark.sweep import run_sweep
from sonic_ep.benchmark.workload import Shape
from sonic_ep.cli.exit_codes import GREEN, RED
from sonic_ep.cli.measured import Run, add_output, checked_ranks, run_measured, write_json
from sonic_ep.cli.options import DTYPES, add_nproc
from sonic_ep.cli.output import say_note
from sonic_ep.cli.words import count_word
from sonic_ep.config import AUTO, EPConfig


@dataclass(frozen=True, kw_only=True)
class Point:
    """T of each rank, K, and where tokens go."""

    tokens: int
    top_k: int
    routing: RoutingKind


def _points(*words: str) -> tuple[Point, ...]:
    return tuple(point_word(word) for word in words)


def point_word(text: str) -> Point:
    """T,K,routing."""
    parts = text.split(",")
    if len(parts) != 3 or parts[2] not in {kind.value for kind in RoutingKind}:
        kinds = "|".join(kind.value for kind in RoutingKind)
        raise argparse.ArgumentTypeError(f"got {text!r}, expected T,K,{kinds}")
    return Point(tokens=count_word(parts[0]), top_k=count_word(parts[1]), routing=RoutingKind(parts[2]))


# Over T, over K, over routings.
POINTS_ON_GPUS = _points(
    *(f"{tokens},8,uniform" for tokens in (64, 256, 1024, 4096, 16384, 65536)),
    *(f"{tokens},{top_k},uniform" for tokens in (1024, 16384) for top_k in (1, 2, 4)),
    *(f"{tokens},8,skewed" for tokens in (1024, 16384)),
    "4096,8,one_rank",
)
POINTS_ON_CPU = _points("8,2,uniform", "8,1,uniform", "8,2,skewed", "8,2,one_rank")
HIE_ON_GPUS, HIE_ON_CPU = (4096, 1536, 64), (32, 16, 8)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_nproc(parser)
    text = "tokens of each rank, top-k, routing; may be repeated (default: a grid)"
    parser.add_argument("--point", action="append", type=point_word, metavar="T,K,ROUTING", help=text)
    parser.add_argument("--hie", type=_hie, metavar="H,I,E", help="hidden, intermediate, experts")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of tokens and weights")
    parser.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="which one is run")
    add_output(parser)
    parser.set_defaults(command=run, check=check)


def check(options: argparse.Namespace) -> None:
    """What would fail alike on every rank fails here, once, before any is started."""
    setups_of(options, checked_ranks(options), options.backend)


def run(options: argparse.Namespace) -> int:
    """Collective: sweep, tell, and write after every point, so that a run that is cut short leaves what it found."""

    def measure(run: Run) -> int:
        setups = setups_of(options, run.place.world_size, run.backend)
        with arena_at(run.place.device, run.backend, options.commit, run.command) as arena:
            say_note(arena.results, run.say)
            for report in run_sweep(setups, arena, run.say):
                if options.json is not None and run.place.rank == 0 and write_json(options.json, report.as_json()):
                    # torchrun ends the others.
                    return RED
        return GREEN

    return run_measured(options, "-m sonic_ep sweep", measure)


def setups_of(options: argparse.Namespace, world_size: int, backend: str) -> list[Setup]:
    """One for each point. Raises ``ValueError`` for a point that the ranks cannot run."""
    on_gpu = torch.cuda.is_available()
    hidden, intermediate, experts = options.hie or (HIE_ON_GPUS if on_gpu else HIE_ON_CPU)
    if experts % world_size:
        raise ValueError(f"--hie: got E={experts}, expected a multiple of the {world_size} ranks")
    points = options.point or (POINTS_ON_GPUS if on_gpu else POINTS_ON_CPU)
    for point in points:
        held = experts // world_size if point.routing is RoutingKind.ONE_RANK else experts
        if point.top_k > held:
            raise ValueError(f"--point: got K={point.top_k}, expected at most {held} for {point.routing.value}")
    return [
        Setup(
            shape=Shape(
                tokens=point.tokens,
                hidden=hidden,
                intermediate=intermediate,
                num_experts=experts,
                top_k=point.top_k,
                dtype=DTYPES[options.dtype],
            ),
            world_size=world_size,
            options=LayerOptions(routing=point.routing),
            backend=backend,
            config=EPConfig(),
        )
        for point in points
    ]


def _hie(text: str) -> tuple[int, int, int]:
    parts = [count_word(part) for part in text.split(",")]
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"got {len(parts)} numbers in {text!r}, expected three: H,I,E")
    return parts[0], parts[1], parts[2]
