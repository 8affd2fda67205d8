"""``sonic-ep profile``: every mode timed at a shape on this machine, and the fastest pair."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import torch

from sonic_ep.api import ExpertParallel
from sonic_ep.cli.exit_codes import PASS
from sonic_ep.cli.measured import Run, add_output, check_writable, checked_ranks, run_measured
from sonic_ep.cli.options import DTYPES, Thiek, add_call, add_config, add_nproc, config_of, spellings
from sonic_ep.profiler import NetworkProfiler, default_device
from sonic_ep.profiler.cache import DEFAULT_FOLDER
from sonic_ep.profiler.picture import MATPLOTLIB_MISSING, write_picture
from sonic_ep.profiler.routings import ROUTINGS

SUFFIXES = (".png", ".svg", ".pdf")
SHAPE_ON_GPUS = Thiek(tokens=32768, hidden=4096, intermediate=1536, num_experts=64, top_k=8)
SHAPE_ON_CPU = Thiek(tokens=64, hidden=32, intermediate=16, num_experts=8, top_k=2)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """The options of ``sonic-ep profile``."""
    add_nproc(parser)
    add_call(parser, tuple(ROUTINGS))
    add_config(parser)
    parser.add_argument(*spellings("no_cache"), action="store_true", help="measure, whatever was measured before")
    add_output(parser)
    parser.add_argument("--picture", type=Path, metavar="PATH", help="draw the times, as PNG, SVG or PDF by the suffix")
    parser.set_defaults(command=_profile, check=_check)


def default_shape(device: torch.device, world_size: int) -> Thiek:
    """The shape that is profiled if none is given; E is rounded up to a multiple of W, at least K a rank."""
    chosen = SHAPE_ON_GPUS if device.type == "cuda" else SHAPE_ON_CPU
    held = max(-(-chosen.num_experts // world_size), chosen.top_k)
    return replace(chosen, num_experts=held * world_size)


def _check(options: argparse.Namespace) -> None:
    """Raise once, before any rank is started, the errors that each of them would raise."""
    ranks = checked_ranks(options)
    if options.picture is not None:
        _check_picture(options.picture)
    if options.thiek is not None:
        options.thiek.require_experts_divide(ranks)
        options.thiek.require_fits_one_rank(ranks, options.routing)


def _check_picture(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--picture: got {str(path)!r}, expected a path that ends in one of {', '.join(SUFFIXES)}")
    check_writable("--picture", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--picture: {MATPLOTLIB_MISSING}")


def _profile(options: argparse.Namespace) -> int:
    def measure(run: Run) -> int:
        ranks, cache = run.place.world_size, None if options.no_cache else DEFAULT_FOLDER
        with ExpertParallel(backend=options.backend, config=config_of(options)) as ep:
            chosen = options.thiek
            if chosen is None:
                chosen = default_shape(default_device(ep), ranks)
                run.say(f"no --thiek was given: --thiek {chosen}")
            report = NetworkProfiler(ep, cache=cache).profile(
                tokens=chosen.tokens_of_ranks(ranks)[run.place.rank],
                **{name: getattr(chosen, name) for name in ("hidden", "top_k", "num_experts")},
                dtype=DTYPES[options.dtype],
                routing=options.routing,
            )
        run.say(str(report))
        if run.place.rank == 0 and options.json is not None:
            document = report.as_json()
            named = options.commit or report.origin.commit
            document["environment"] |= {"command": run.command, "commit": named}
            options.json.write_text(json.dumps(document, indent=2) + "\n")
            run.say(f"wrote {options.json}")
        if run.place.rank == 0 and options.picture is not None:
            write_picture(report, options.picture)
            run.say(f"wrote {options.picture}")
        return PASS

    return run_measured(options, "-m sonic_ep profile", measure)
