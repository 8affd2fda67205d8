"""``sonic-ep demo``: a handful of tokens through the whole layer, every step shown."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch

from sonic_ep.api import ExpertParallel
from sonic_ep.cli.exit_codes import FAIL, PASS
from sonic_ep.cli.launch import Place, joined_group
from sonic_ep.cli.options import add_nproc
from sonic_ep.cli.verify import verify_cases
from sonic_ep.plan import RoutingPlan
from sonic_ep.testing.cases import CASES, Case, draw

RANKS, TOKENS, EXPERTS_PER_RANK, BAR = 4, 4, 2, 12


def add_demo(parser: argparse.ArgumentParser) -> None:
    """The options of ``sonic-ep demo``."""
    add_nproc(parser, default=RANKS)
    parser.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    with joined_group() as place, ExpertParallel() as ep:
        place.say(f"{ep.world_size} ranks on {place.device.type}, backend {ep.backend} ({ep.why})\n")
        followed = _follow_rows(ep, place)
        few = [replace(CASES[name], num_experts=6 * ep.world_size) for name in ("uniform", "dropped_slots")]
        place.say("\nThe layer against the dense oracle, every mode pair and flag, forward and every gradient:")
        return PASS if verify_cases(few, ep.backend, place) and followed else FAIL


def _follow_rows(ep: ExpertParallel, place: Place) -> bool:
    """Dispatch tokens that hold their own number, and combine them with scores that sum to one."""
    case = Case(name="demo", tokens=(TOKENS,), num_experts=EXPERTS_PER_RANK * ep.world_size, top_k=2)
    inputs = draw(case, ep.world_size, place.device)
    own = inputs.tokens_of(ep.rank)
    numbers = torch.arange(own.start, own.stop, dtype=torch.float32, device=place.device)
    x_TH = numbers[:, None].expand(TOKENS, case.hidden)
    plan = ep.plan(inputs.topk_idx[own], case.num_experts)
    rows_RH = ep.dispatch(x_TH, plan)
    place.say(f"each of the {TOKENS} tokens of a rank chooses {plan.top_k} of {plan.num_experts} experts:")
    for rank, chosen_CK in enumerate(plan.expert_ids.tolist()):
        chosen = "   ".join(f"{rank}.{token} -> {chosen_K}" for token, chosen_K in enumerate(chosen_CK))
        place.say(f"  rank {rank}: {chosen}")
    place.say("\ntokens of each expert, as rank.token, in the order of its rows:")
    for line in _experts(plan):
        place.say(line)
    place.say(f"\nrank 0 holds experts 0..{plan.experts_per_rank - 1} and receives {plan.rows()} rows,")
    received = rows_RH[: plan.rows(), 0].int().tolist()
    place.say(f"  of tokens {received} (numbered over all ranks), experts end at {plan.group_ends.tolist()}")
    y_TH = ep.combine(rows_RH, torch.full((TOKENS, case.top_k), 1 / case.top_k, device=place.device), plan)
    place.say(f"combine with scores of 1/{case.top_k}: tokens of rank 0 return as {y_TH[:, 0].tolist()}")
    return torch.equal(y_TH, x_TH)


def _experts(plan: RoutingPlan) -> Iterator[str]:
    """A line for each expert: its rank, how many slots it has, as a bar, and whose they are."""
    most = max(1, int(plan.counts.max()))
    yield f"  {'rank':>4} {'expert':>6}  {'slots':<{BAR + 3}} tokens"
    for expert, count in enumerate(plan.counts.tolist()):
        # By source rank, then token.
        found = [f"{rank}.{token}" for rank, token, _ in (plan.expert_ids == expert).nonzero().tolist()]
        bar = "#" * (BAR * count // most)
        yield f"  {expert // plan.experts_per_rank:>4} {expert:>6}  {bar:<{BAR}} {count:>2} {' '.join(found)}"
