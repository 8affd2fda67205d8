"""One plan, dispatch, combine and backward on both backends, step by step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from layer_inputs import plan_of
from matrix import DIAGONAL as MODES
from near import assert_near
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Case, Inputs, Rank, assert_bitwise

IDS = ["+".join(mode.value for mode in pair) for pair in MODES]
by_modes = pytest.mark.parametrize("modes", MODES, ids=IDS)
# Every day the first alone, where modes differ in nothing that the test is about.
LATER = [pytest.param(modes, marks=pytest.mark.thorough) for modes in MODES[1:]]
by_any_modes = pytest.mark.parametrize("modes", [MODES[0], *LATER], ids=IDS)
Modes = tuple[DispatchMode, CombineMode]
Outcome = dict[str, Tensor]


def there_and_back(ep: ExpertParallel, inputs: Inputs) -> Iterator[Outcome]:
    """Plan, dispatch, combine, backward, one step for each ``next``; the last yields all results."""
    tokens = inputs.tokens_of(ep.rank)
    x, scores = (t[tokens].clone().requires_grad_() for t in (inputs.x, inputs.topk_scores))
    plan = plan_of(ep, inputs)
    valid = plan.rows()
    yield {}
    rows = ep.dispatch(x, plan)
    yield {}
    # Squared, so that a row counts with its own value also in backward.
    y = ep.combine(rows * rows, scores, plan)
    yield {}
    y.backward(inputs.dy[tokens])
    yield {"rows": rows[:valid].detach(), "y": y.detach(), "dx": x.grad, "dscores": scores.grad}


def outcome_of(ep: ExpertParallel, inputs: Inputs) -> Outcome:
    return list(there_and_back(ep, inputs))[-1]


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
    fast, reference = (ExpertParallel(group, name, config, max_tokens_per_rank=5) for name in ("fast", "reference"))
    with fast, reference:
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
