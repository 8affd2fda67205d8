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
from sonic_ep.fast.capabilities import interpreted
from sonic_ep.testing import CASES, Accuracy, Case, verify_moe, verify_routed

SAID_EVERY_SECONDS, LONG_SECONDS, MINUTE, HOUR = 60.0, 120.0, 60, 3600
# Before that the first run, which starts much else, counts too much.
KNOWN_SECONDS = 10.0
# Of what a run does besides products; and the size of the product that is timed.
SECONDS_OF_A_RUN, SQUARE = 0.04, 512
CASE_HELP = f"only this case; may be repeated: {', '.join(CASES)}"
SOONER = "a smaller --thiek or one --case takes less"
Verifier = Callable[[Case, ExpertParallel, torch.device], list[Accuracy]]
ENTRIES: Mapping[str, Verifier] = {"moe_routed": verify_routed, "moe": verify_moe}
# Every mode pair with every setting of the flags.
CONFIGS = tuple(EPConfig(*settings) for settings in product(DispatchMode, CombineMode, (False, True), (False, True)))


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The options of ``sonic-ep verify``."""
    add_nproc(parser)
    parser.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="which one to verify")
    parser.add_argument("--case", action="append", choices=tuple(CASES), metavar="NAME", help=CASE_HELP)
    add_thiek(parser, "a shape instead of the named cases: ")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of --thiek (default: float32)")
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

    Raises ``ValueError`` if the ranks do not divide the experts of ``--thiek``, or for options that exclude each other.
    """
    shape: Thiek | None = options.thiek
    if shape is None and options.dtype is not None:
        raise ValueError("got --dtype without --thiek: named cases have dtypes of their own, choose them by --case")
    if shape is None:
        return [case for case in fitting_cases(world_size) if case.name in (options.case or CASES)]
    if options.case is not None:
        raise ValueError("got --case and --thiek, expected one or the other")
    shape.require_experts_divide(world_size)
    sizes = {name: getattr(shape, name) for name in ("hidden", "intermediate", "num_experts", "top_k")}
    name = "T{}-H{}-I{}-E{}-K{}".format(*astuple(shape))
    return [
        Case(name=name, tokens=shape.tokens_of_ranks(world_size), **sizes, dtype=DTYPES[options.dtype or "float32"])
    ]


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


class Progress:
    """Says on rank 0 how far the runs are: on a terminal at each run, elsewhere once a minute.

    slow: kernels are interpreted. The first estimate that is long says how to get results sooner.
    """

    def __init__(self, place: Place, *, runs: int, slow: bool) -> None:
        self.runs, self.slow = runs, slow
        self._place = place
        self._begun, self._said, self._warned = 0, time.monotonic(), False
        self._started = self._said

    def begins(self, run: str) -> None:
        """``run`` begins, after those before it have ended."""
        now, self._begun = time.monotonic(), self._begun + 1
        done = self._begun - 1
        seconds = (now - self._started) / done * (self.runs - done) if done else 0.0
        left = f", {duration(seconds)} left" if done else ""
        self._place.show_progress(f"[{self._begun}/{self.runs}] {run}{left} ...")
        if not self._warned and seconds > LONG_SECONDS and now - self._started > KNOWN_SECONDS:
            self._warned = True
            self._place.say(f"about {duration(seconds)} left; {'--backend reference or ' * self.slow}{SOONER}")
        if now - self._said > SAID_EVERY_SECONDS:
            self._said = now
            self._place.say_without_terminal(f"[{self._begun}/{self.runs}] {run}{left}")


def expected_seconds(groups: Sequence[tuple[Case, str]], place: Place) -> float:
    """Seconds that all runs may take: the products of the layer in double precision, at this device's rate, and more.

    A token of K experts takes 18·K·H·I operations forward and backward with three matrices an expert.
    """
    square = torch.ones((SQUARE, SQUARE), dtype=torch.float64, device=place.device)
    (square @ square).sum().item()
    began = time.perf_counter()
    (square @ square).sum().item()
    rate = 2 * SQUARE**3 / (time.perf_counter() - began)
    operations = [18 * sum(case.tokens) * case.top_k * case.hidden * case.intermediate for case, _ in groups]
    return len(CONFIGS) * (len(groups) * SECONDS_OF_A_RUN + sum(operations) / rate)


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader wants.

    >>> duration(12.3), duration(600), duration(36000)
    ('12 s', '10 min', '10 h')
    """
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.0f} h"


def verify_cases(cases: Sequence[Case], backend: str, place: Place) -> bool:
    """Collective. Run every case through every entry and configuration, print a table, and tell whether all pass.

    The errors are the same on every rank.
    """
    started, failures = time.monotonic(), 0
    groups = list(product(cases, ENTRIES))
    choice = choose_backend(backend, EPGroup(rank=place.rank, world_size=place.world_size))
    where = f"backend {choice.name} on {place.device.type}, {place.world_size} rank{'s' * (place.world_size > 1)}"
    progress = Progress(place, runs=len(groups) * len(CONFIGS), slow=choice.name == "fast" and interpreted())
    expected = (
        "interpreted kernels: seconds to minutes a case"
        if progress.slow
        else f"about {duration(expected_seconds(groups, place))}"
    )
    place.say(f"{where}: {progress.runs} runs, each compared with a layer in double precision; {expected}")
    place.say(f"{'case':<28} {'entry':<11} {'backend':<9} {'runs':>4}  {'error/bound':>11}  {'in':<13} result")
    for case, entry in groups:
        found: list[tuple[EPConfig, Accuracy]] = []
        for run, config in enumerate(CONFIGS, start=1):
            progress.begins(f"{case.name}, {entry}: run {run} of {len(CONFIGS)}")
            with ExpertParallel(backend=backend, config=config) as ep:
                found += [(config, accuracy) for accuracy in ENTRIES[entry](case, ep, place.device)]
        place.show_progress("")
        # The error closest to its bound, or farthest above.
        worst = max((finding for _, finding in found), key=lambda finding: finding.ratio)
        failed = [f"    {config}: {finding}" for config, finding in found if not finding.ok]
        result = f"{worst.ratio:>11.2f}  {worst.name:<13} {'FAIL' if failed else 'PASS'}"
        of_case = f"{case.name:<28} {entry:<11} {choice.name:<9} {len(CONFIGS):>4}"
        place.say("\n".join([f"{of_case}  {result}", *failed]))
        failures += len(failed)
    seconds = time.monotonic() - started
    place.say(f"{progress.runs} runs, {failures} failures, {seconds:.0f} s")
    return failures == 0
