"""``sonic-ep verify``: the differential cases on this machine, as a table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from itertools import product

import torch

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import BACKEND_PACKAGES, choose_backend
from sonic_ep.cli.exit_codes import FAIL, PASS
from sonic_ep.cli.launch import Place, joined_group, ranks_of
from sonic_ep.cli.options import DTYPES, Thiek, add_nproc, add_thiek
from sonic_ep.config import AUTO, CombineMode, DispatchMode, EPConfig
from sonic_ep.distributed.group import EPGroup
from sonic_ep.testing import CASES, Accuracy, Case, verify_moe, verify_routed

Verifier = Callable[[Case, ExpertParallel, torch.device], list[Accuracy]]
ENTRIES: Mapping[str, Verifier] = {"moe_routed": verify_routed, "moe": verify_moe}
# Every mode pair with every setting of the flags.
CONFIGS = tuple(EPConfig(*settings) for settings in product(DispatchMode, CombineMode, (False, True), (False, True)))


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The options of ``sonic-ep verify``."""
    add_nproc(parser)
    parser.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="which one to verify")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="only this case; may be repeated")
    add_thiek(parser, "a shape instead of the named cases: ")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of --thiek")
    parser.set_defaults(command=_verify, check=_check)


def _check(options: argparse.Namespace) -> None:
    """Raise once, before any rank is started, the errors that each of them would raise."""
    ranks = ranks_of(options.nproc)
    choose_backend(options.backend, EPGroup(rank=0, world_size=ranks))
    chosen_cases(options, ranks)


def _verify(options: argparse.Namespace) -> int:
    with joined_group() as place:
        return PASS if verify_cases(chosen_cases(options, place.world_size), options.backend, place) else FAIL


def chosen_cases(options: argparse.Namespace, world_size: int) -> list[Case]:
    """The case of ``--thiek`` if that is given, else the named cases, or those of ``--case``.

    Raises ``ValueError`` if the ranks do not divide the experts of ``--thiek``, or if both are given.
    """
    shape: Thiek | None = options.thiek
    if shape is None:
        return [case for case in fitting_cases(world_size) if case.name in (options.case or CASES)]
    if options.case is not None:
        raise ValueError("got --case and --thiek, expected one or the other")
    shape.require_experts_divide(world_size)
    sizes = {name: getattr(shape, name) for name in ("hidden", "intermediate", "num_experts", "top_k")}
    name = "T{}-H{}-I{}-E{}-K{}".format(*astuple(shape))
    return [Case(name=name, tokens=shape.tokens_of_ranks(world_size), **sizes, dtype=DTYPES[options.dtype])]


def fitting_cases(world_size: int) -> list[Case]:
    """The named cases for a group of this size: E is rounded up to a multiple of W."""
    fitted = []
    for case in CASES.values():
        experts = -(-case.num_experts // world_size) * world_size
        top_k = experts if case.top_k == case.num_experts else case.top_k
        if case.name == "one_rank":
            top_k = min(top_k, experts // world_size)
        fitted.append(replace(case, num_experts=experts, top_k=top_k))
    return fitted


def verify_cases(cases: Sequence[Case], backend: str, place: Place) -> bool:
    """Collective. Run every case through every entry and configuration, print a table, and tell whether all pass.

    The errors are the same on every rank.
    """
    started, failures = time.monotonic(), 0
    place.say(f"{'case':<28} {'entry':<11} {'runs':>4}  {'error/bound':>11}  {'in':<13} result")
    groups = list(product(cases, ENTRIES))
    for number, (case, entry) in enumerate(groups, start=1):
        found: list[tuple[EPConfig, Accuracy]] = []
        for run, config in enumerate(CONFIGS, start=1):
            place.show_progress(f"[{number}/{len(groups)}] {case.name}: run {run} ...")
            with ExpertParallel(backend=backend, config=config) as ep:
                found += [(config, accuracy) for accuracy in ENTRIES[entry](case, ep, place.device)]
        place.show_progress("")
        # The error closest to its bound, or farthest above.
        worst = max((finding for _, finding in found), key=lambda finding: finding.ratio)
        failed = [f"    {config}: {finding}" for config, finding in found if not finding.ok]
        result = f"{worst.ratio:>11.2f}  {worst.name:<13} {'FAIL' if failed else 'PASS'}"
        place.say("\n".join([f"{case.name:<28} {entry:<11} {len(CONFIGS):>4}  {result}", *failed]))
        failures += len(failed)
    seconds = time.monotonic() - started
    place.say(f"{len(groups) * len(CONFIGS)} runs, {failures} failures, {seconds:.0f} s")
    return failures == 0
