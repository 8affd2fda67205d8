"""The results of ``train_lm.py --soak``: how T and routing changed, what the ranks held, and how the runs agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from lm_comparison import FACTOR, Agreement
from lm_memory import Held
from lm_options import Settings
from lm_report import Outcome
from lm_runs import Recorded, choices
from torch import Tensor

from sonic_ep.profiler.machine import environment

# Of each so many parts of a run, the document keeps the step that came closest to its bound.
KEPT_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The least, the middle and the most of many numbers."""

    least: float
    middle: float
    most: float

    def __str__(self) -> str:
        return f"{self.least:.3g} to {self.most:.3g}, {self.middle:.3g} in the middle"


def spread(numbers: Iterable[float]) -> Spread:
    """The spread of one number at least."""
    found = list(numbers)
    return Spread(least=min(found), middle=median(found), most=max(found))


@dataclass(frozen=True, kw_only=True)
class Skew:
    """How a run routed: over steps and layers, the share of all rows that went to the rank, or expert, with most."""

    busiest_rank: Spread
    busiest_expert: Spread


@dataclass(frozen=True, kw_only=True)
class Soak:
    """The results of a soak. skews: of the runs on ranks. apart: two such runs beside each other."""

    settings: Settings
    outcomes: tuple[Outcome, ...]
    skews: tuple[Skew, ...]
    apart: tuple[dict[str, Any], ...]
    environment: dict[str, Any]

    @property
    def tokens(self) -> tuple[Spread, ...]:
        """T of each rank, over the steps."""
        by_rank = zip(*(layout.tokens for layout in self.settings.course.layouts), strict=True)
        return tuple(map(spread, by_rank))

    def lines(self) -> Iterator[str]:
        """The results as lines of text."""
        for rank, tokens in enumerate(self.tokens):
            yield f"rank {rank}: T {tokens}"
        for outcome, skew in zip(self.outcomes, self.skews, strict=True):
            yield f"{outcome.backend}: rows at the busiest rank, of all: {skew.busiest_rank}"
            yield from _of_memory(outcome)
        for other in self.apart:
            runs = " and ".join(other["runs"])
            differ = f"{other['tokens_that_chose_otherwise']} of {other['tokens']} tokens chose otherwise"
            apart = f"losses at most {other['largest_loss_difference']:.2e} apart"
            rest = f"less what choices make of them {other['most_of_bound']:.2f} of both bounds at most"
            yield f"{runs}: {differ}, {apart}, {rest}"

    def as_json(self) -> dict[str, Any]:
        """A document of kind "soak"; memory in bytes."""
        settings = self.settings
        return {
            "kind": "soak",
            "environment": self.environment,
            "settings": {
                "ranks": settings.ranks,
                "steps": settings.recipe.steps,
                "seed": settings.recipe.seed,
                "learning_rate": settings.recipe.learning_rate,
                "capacity": settings.course.max_tokens,
                "warm_up": settings.course.warm_up,
                **asdict(settings.sizes),
                **asdict(settings.config),
            },
            "ok": all(outcome.ok for outcome in self.outcomes),
            "left_out": settings.tested.left_out,
            "tokens": [asdict(tokens) for tokens in self.tokens],
            "steps_without_tokens": [
                sum(layout.tokens[rank] == 0 for layout in settings.course.layouts) for rank in range(settings.ranks)
            ],
            "runs": {
                outcome.backend: _run_as_json(outcome, skew)
                for outcome, skew in zip(self.outcomes, self.skews, strict=True)
            },
            "apart": list(self.apart),
        }


def soaked(outcomes: Sequence[Outcome], runs: Sequence[Recorded], settings: Settings, device: torch.device) -> Soak:
    """The results of these runs, each with its outcome."""
    chosen = [list(choices(run.logits, settings.sizes.top_k)) for run in runs]
    return Soak(
        settings=settings,
        outcomes=tuple(outcomes),
        skews=tuple(skew_of(choices_of_run, settings) for choices_of_run in chosen),
        apart=tuple(
            _apart(pair_of_outcomes, pair_of_choices)
            for pair_of_outcomes, pair_of_choices in zip(pairwise(outcomes), pairwise(chosen), strict=True)
        ),
        environment={
            **environment(device, settings.ranks, None, settings.command),
            # The process group has ended: ``environment`` does not see it.
            "process_group": runs[0].process_group,
        },
    )


def skew_of(choices_of_run: Sequence[Tensor], settings: Settings) -> Skew:
    """The skew of choices (T, K), a tensor for each step and layer; T is of the whole batch."""
    experts = settings.sizes.experts
    counts = torch.stack([torch.bincount(chosen.flatten(), minlength=experts) for chosen in choices_of_run])
    shares = counts / counts.sum(dim=1, keepdim=True)
    of_ranks = shares.unflatten(1, (settings.ranks, -1)).sum(dim=2)
    return Skew(busiest_rank=spread(of_ranks.amax(dim=1).tolist()), busiest_expert=spread(shares.amax(dim=1).tolist()))


def _apart(outcomes: tuple[Outcome, Outcome], chosen: tuple[list[Tensor], list[Tensor]]) -> dict[str, Any]:
    """Two runs compared.

    Tokens with near ties may choose other experts, and then losses differ by more than rounding. The fp64 runs take
    the same choices, so they differ by what the choices cause; beyond that two runs may differ by the sum of their
    bounds. most_of_bound: the largest share of that sum.
    """
    one, other = outcomes
    differing = [int((a.sort(dim=1)[0] != b.sort(dim=1)[0]).any(dim=1).sum()) for a, b in zip(*chosen, strict=True)]
    return {
        "runs": [one.backend, other.backend],
        "tokens": sum(len(choices_TK) for choices_TK in chosen[0]),
        "tokens_that_chose_otherwise": sum(differing),
        "largest_loss_difference": _largest_difference(one.ranks, other.ranks),
        "of_dense_fp64": _largest_difference(one.truth, other.truth),
        "most_of_bound": max(_parts_of_bounds(one, other)),
    }


def _parts_of_bounds(one: Outcome, other: Outcome) -> Iterator[float]:
    """For each step, the part of both bounds together that the losses differ by, less what choices account for."""
    own = [[loss - truth for loss, truth in zip(run.ranks, run.truth, strict=True)] for run in (one, other)]
    for mine, others, bound, other_bound in zip(*own, one.losses.bounds, other.losses.bounds, strict=True):
        yield _part(abs(mine - others), bound + other_bound)


def _part(distance: float, bound: float) -> float:
    """``distance`` as a share of ``bound``; infinite for NaN."""
    return math.inf if math.isnan(distance) else distance / bound


def _largest_difference(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def _of_memory(outcome: Outcome) -> Iterator[str]:
    for rank in outcome.held:
        last = rank.samples[-1]
        gpu = "" if last.used is None else f", {last.allocated} bytes allocated, {last.used} of the device taken"
        files = f"{last.descriptors} open files, {last.threads} threads, {last.tensors} tensors"
        verdict = "flat" if rank.flat else "GROWS"
        yield f"{outcome.backend}: memory of rank {rank.rank} {verdict}: {last.resident} bytes resident{gpu}, {files}"
        yield from (f"{outcome.backend}: {fault}" for fault in rank.faults)


def _run_as_json(outcome: Outcome, skew: Skew) -> dict[str, Any]:
    return {
        "agree": outcome.agree,
        "flat": outcome.flat,
        "seconds": round(outcome.seconds, 1),
        "factor": FACTOR,
        "routing": asdict(skew),
        "losses": _losses(outcome),
        "loss_distance": _closest(outcome.losses),
        "router_logits_distance": _closest(outcome.logits),
        "memory": [_memory(rank) for rank in outcome.held],
    }


def _losses(outcome: Outcome) -> dict[str, Any]:
    """Every so many steps, the first and the last among them."""
    last = len(outcome.ranks) - 1
    kept = sorted({*range(0, last, max(1, last // KEPT_STEPS)), last})
    found = {"expert_parallel": outcome.ranks, "dense_fp32": outcome.plain, "dense_fp64": outcome.truth}
    return {"step": [step + 1 for step in kept], **{name: [of[step] for step in kept] for name, of in found.items()}}


def _closest(found: Agreement) -> dict[str, Any]:
    """Of each part of the steps the one that came closest to its bound, and how close the closest of all came."""
    parts = [_part(gap.tested, bound) for gap, bound in zip(found.gaps, found.bounds, strict=True)]
    every = -(-len(parts) // KEPT_STEPS)
    starts = range(0, len(parts), every)
    kept = [max(range(start, min(start + every, len(parts))), key=parts.__getitem__) for start in starts]
    return {
        "most_of_bound": max(parts),
        "step": [step + 1 for step in kept],
        "expert_parallel": [found.gaps[step].tested for step in kept],
        "dense_fp32": [found.gaps[step].plain for step in kept],
        "bound": [found.bounds[step] for step in kept],
    }


def _memory(rank: Held) -> dict[str, Any]:
    """The samples, a list for each thing that was looked at; and the verdict on each that may not grow."""
    rows = [asdict(sample) for sample in rank.samples]
    seen = {name: [row[name] for row in rows] for name in rows[0] if rows[0][name] is not None}
    levels = {
        level.name: {"flat": level.flat, "rise": level.rise, "most": 0 if level.most is None else level.most}
        for level in rank.levels
    }
    return {"rank": rank.rank, "samples": seen, "levels": levels}
