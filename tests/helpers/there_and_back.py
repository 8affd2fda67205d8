"""One call there and back on both backends, step by step, and what has to be the same."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from matrix import DIAGONAL
from near import assert_near
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Case, Inputs, Rank, assert_bitwise

MODES = DIAGONAL
by_modes = pytest.mark.parametrize("modes", MODES, ids=lambda pair: "+".join(mode.value for mode in pair))
Modes = tuple[DispatchMode, CombineMode]
Outcome = dict[str, Tensor]
CAPACITY = 5


def there_and_back(ep: ExpertParallel, inputs: Inputs, rank: int) -> Iterator[Outcome]:
    """Plan, dispatch, combine, backward, one step for each ``next``; yields everything there is to compare."""
    tokens = inputs.tokens_of(rank)
    x = inputs.x[tokens].clone().requires_grad_()
    scores = inputs.topk_scores[tokens].clone().requires_grad_()
    plan = ep.plan(inputs.topk_idx[tokens], inputs.case.num_experts)
    valid = plan.rows()
    yield {}
    rows = ep.dispatch(x, plan)
    yield {}
    # Squared, so that a row counts with its own value also in backward.
    y = ep.combine(rows * rows, scores, plan)
    yield {}
    y.backward(inputs.dy[tokens])
    assert x.grad is not None
    assert scores.grad is not None
    yield {"rows": rows[:valid].detach(), "y": y.detach(), "dx": x.grad, "dscores": scores.grad}


def outcome_of(ep: ExpertParallel, inputs: Inputs, rank: int) -> Outcome:
    return list(there_and_back(ep, inputs, rank))[-1]


def assert_same(found: Outcome, expected: Outcome, what: str) -> None:
    for name, tensor in expected.items():
        if name == "dscores":
            # A sum over H that each backend takes in its own order.
            assert_near(found[name], tensor, 100)
        else:
            assert_bitwise(found[name], tensor, f"{name} {what}")


@contextmanager
def both(modes: Modes, group: dist.ProcessGroup | None = None) -> Iterator[tuple[ExpertParallel, ExpertParallel]]:
    config = EPConfig(dispatch=modes[0], combine=modes[1])
    with (
        ExpertParallel(group, "fast", config, max_tokens_per_rank=CAPACITY) as fast,
        ExpertParallel(group, "reference", config, max_tokens_per_rank=CAPACITY) as reference,
    ):
        yield fast, reference


def changing(iteration: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Another routing, other tokens and another number of them each time; the shapes of shared memory stay."""
    names = ["uneven_tokens", "dropped_slots", "one_rank", "repeated_experts", "empty_experts", "zero_token_ranks"]
    base = CASES[names[iteration % len(names)]]
    tokens = [(5, 2, 3, 1), (0, 4), (4,)][iteration % 3]
    return replace(base, seed=100 + iteration, dtype=dtype, hidden=12, top_k=3, tokens=tokens)


def delay(rank: Rank) -> None:
    """Hold up the stream that sends, or on the CPU the process."""
    if rank.device.type == "cuda":
        torch.cuda._sleep(200_000_000)
    else:
        time.sleep(0.1)
