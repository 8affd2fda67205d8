"""The differential cases on this very machine, as a table: what ``sonic-ep verify`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TextIO

import torch

from sonic_ep.api import ExpertParallel
from sonic_ep.cli.words import Thiek
from sonic_ep.config import CombineMode, DispatchMode, EPConfig
from sonic_ep.testing.cases import CASES, Case
from sonic_ep.testing.checks import Accuracy
from sonic_ep.testing.oracle import verify_moe, verify_routed

Verifier = Callable[[Case, ExpertParallel, torch.device], list[Accuracy]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One case through one entry of the API under one configuration."""

    case: Case
    entry: str
    verifier: Verifier
    config: EPConfig


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of all trials of one case and entry. ``worst``: the finding whose error is closest to its bound."""

    case: str
    entry: str
    trials: int
    worst: Accuracy
    reds: tuple[str, ...]


def case_of(shape: Thiek, world_size: int, dtype: torch.dtype) -> Case:
    """Uniform routing at this shape; the tokens are spread as evenly as they go."""
    share, rest = divmod(shape.tokens, world_size)
    return Case(
        name=f"T{shape.tokens}-H{shape.hidden}-I{shape.intermediate}-E{shape.num_experts}-K{shape.top_k}",
        tokens=tuple(share + (rank < rest) for rank in range(world_size)),
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        dtype=dtype,
    )


def chosen_cases(world_size: int, names: Sequence[str] | None, shape: Thiek | None, dtype: torch.dtype) -> list[Case]:
    """The case of ``shape`` if one is given, else the named cases, or those of them in ``names``.

    Raises ``ValueError`` if the ranks do not divide the experts of ``shape``, or if both kinds are asked for.
    """
    if shape is None:
        return [case for case in fitting_cases(world_size) if names is None or case.name in names]
    if names is not None:
        raise ValueError("got --case and --thiek, expected one or the other")
    shape.require_experts_divide(world_size)
    return [case_of(shape, world_size, dtype)]


def configurations() -> list[EPConfig]:
    """Every mode pair with every setting of the flags."""
    return [
        EPConfig(dispatch=dispatch, combine=combine, redispatch_x_in_backward=again, cpu_sync_on_runtime=exact)
        for dispatch, combine, again, exact in product(DispatchMode, CombineMode, (False, True), (False, True))
    ]


def fitting_cases(world_size: int) -> list[Case]:
    """The named cases for a group of this size: E becomes the multiple of W next above, if it is none."""
    fitted = []
    for case in CASES.values():
        experts = -(-case.num_experts // world_size) * world_size
        top_k = experts if case.top_k == case.num_experts else case.top_k
        if case.name == "one_rank":
            top_k = min(top_k, experts // world_size)
        fitted.append(replace(case, num_experts=experts, top_k=top_k))
    return fitted


def trials(cases: Sequence[Case]) -> Iterator[list[Trial]]:
    """The trials, one list for each case and entry."""
    entries: dict[str, Verifier] = {"moe_routed": verify_routed, "moe": verify_moe}
    for case, (entry, verifier) in product(cases, entries.items()):
        yield [Trial(case=case, entry=entry, verifier=verifier, config=config) for config in configurations()]


def run_trials(
    group_of_trials: Sequence[Trial], backend: str, device: torch.device, begin: Callable[[int], None]
) -> Verdict:
    """Collective: all trials of one case and entry. The same verdict on every rank.

    begin: told the number of each trial before it runs.
    """
    findings, reds = [], []
    for number, trial in enumerate(group_of_trials, start=1):
        begin(number)
        with ExpertParallel(backend=backend, config=trial.config) as ep:
            for finding in trial.verifier(trial.case, ep, device):
                findings.append(finding)
                if not finding.ok:
                    reds.append(f"{trial.config}: {finding}")
    first = group_of_trials[0]
    worst = max(findings, key=lambda finding: finding.ratio)
    return Verdict(case=first.case.name, entry=first.entry, trials=len(group_of_trials), worst=worst, reds=tuple(reds))


def verify_cases(cases: Sequence[Case], backend: str, device: torch.device, out: TextIO | None) -> bool:
    """Collective: run every trial of every case, print a table to ``out`` as it grows, and tell whether all is green.

    out: None on the ranks that print nothing.
    """
    groups = list(trials(cases))
    started, reds = time.monotonic(), 0
    _say(out, f"{'case':<28} {'entry':<11} {'runs':>4}  {'error/bound':>11}  {'in':<13} verdict")
    for number, group_of_trials in enumerate(groups, start=1):
        label = f"[{number}/{len(groups)}] {group_of_trials[0].case.name}"
        verdict = run_trials(group_of_trials, backend, device, partial(_begin, out, label))
        _progress(out, "")
        _say(out, _table_line(verdict))
        for red in verdict.reds:
            _say(out, f"    {red}")
        reds += len(verdict.reds)
    runs = sum(map(len, groups))
    _say(out, f"{runs} runs, {reds} red findings, {time.monotonic() - started:.0f} s")
    return reds == 0


def _begin(out: TextIO | None, label: str, run: int) -> None:
    _progress(out, f"{label}: run {run} ...")


def _table_line(verdict: Verdict) -> str:
    state = "RED" if verdict.reds else "green"
    worst = f"{verdict.worst.ratio:>11.2f}  {verdict.worst.name:<13}"
    return f"{verdict.case:<28} {verdict.entry:<11} {verdict.trials:>4}  {worst} {state}"


def _say(out: TextIO | None, line: str) -> None:
    if out is not None:
        print(line, file=out, flush=True)


def _progress(out: TextIO | None, line: str) -> None:
    """A line that the next one replaces, on a terminal only."""
    if out is not None and out.isatty():
        print(f"\r\x1b[K{line}", end="", file=out, flush=True)
