"""A handful of tokens through the whole layer, every step shown: what ``sonic-ep demo`` prints."""

from __future__ import annotations

from dataclasses import replace
from typing import TextIO

import torch

from sonic_ep.api import ExpertParallel
from sonic_ep.cli.verify import verify_cases
from sonic_ep.plan import RoutingPlan
from sonic_ep.profiler.routings import uniform
from sonic_ep.testing.cases import CASES, Case, draw

TOKENS = 4
EXPERTS_PER_RANK = 2


def show_demo(device: torch.device, out: TextIO | None) -> bool:
    """Collective: show a plan, follow the rows through dispatch and combine, and verify two cases.

    out: None on the ranks that print nothing. Returns whether everything is as it should be.
    """
    with ExpertParallel() as ep:
        _say(out, f"{ep.world_size} ranks on {device.type}, backend {ep.backend} ({ep.why})\n")
        right = _follow_rows(ep, device, out)
        few = [replace(CASES[name], num_experts=6 * ep.world_size) for name in ("uniform", "dropped_slots")]
        _say(out, "\nThe layer against the dense oracle, every mode pair and flag, forward and every gradient:")
        return verify_cases(few, ep.backend, device, out) and right


def _follow_rows(ep: ExpertParallel, device: torch.device, out: TextIO | None) -> bool:
    """Dispatch tokens that hold their own number, combine them again with scores that sum to one."""
    case = Case(name="demo", tokens=(TOKENS,), num_experts=EXPERTS_PER_RANK * ep.world_size, top_k=2, choose=uniform)
    inputs = draw(case, ep.world_size, device)
    mine = inputs.tokens_of(ep.rank)
    numbers = torch.arange(mine.start, mine.stop, dtype=torch.float32, device=device)
    x = numbers[:, None].expand(TOKENS, case.hidden)
    plan = ep.plan(inputs.topk_idx[mine], case.num_experts)
    rows = ep.dispatch(x, plan)
    _show_plan(plan, rows[: plan.rows(), 0], out)
    scores = torch.full((TOKENS, case.top_k), 1 / case.top_k, device=device)
    home = ep.combine(rows, scores, plan)
    back = torch.equal(home, x)
    _say(out, f"combine with scores of 1/{case.top_k}: tokens of rank 0 come home as {home[:, 0].tolist()}")
    return back


def _show_plan(plan: RoutingPlan, token_of_row: torch.Tensor, out: TextIO | None) -> None:
    _say(
        out,
        f"each of the {plan.capacity} tokens of a rank chooses {plan.top_k} of {plan.num_experts} experts:",
    )
    for rank in range(plan.world_size):
        _say(out, f"  rank {rank} chooses {plan.expert_ids[rank].tolist()}")
    _say(out, f"slots of each expert: {plan.counts.tolist()}")
    _say(out, f"rank 0 holds experts 0..{plan.experts_per_rank - 1} and receives {plan.rows()} rows,")
    _say(
        out,
        f"  of tokens {[int(token) for token in token_of_row.tolist()]}, experts end at {plan.group_ends.tolist()}",
    )


def _say(out: TextIO | None, line: str) -> None:
    if out is not None:
        print(line, file=out, flush=True)
