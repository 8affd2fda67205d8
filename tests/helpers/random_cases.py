"""Examples of property tests: a seed gives shapes, routing, options and modes, the same on any machine.

In exact ones inputs are small whole numbers, scores are powers of two, and the sums fit the dtype in any order. Nothing
is rounded, so that one bit of difference is an error. The others are compared with plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig
from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.config import AUTO, ScoreOrder
from sonic_ep.testing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Their values and derivatives are exact where their arguments are.
EXACT_ACTIVATIONS = ("relu", "reglu", "relu_sq")
# Widths and tokens of the group at which an error is a statistic of many elements.
WIDE, TOKENS_ENOUGH = (24, 31, 32, 40), 48
SPREADS = ("uniform", "skewed", "one rank", "one expert")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example. routed: whether the caller gives the routing. max_tokens: ``max_tokens_per_rank``.

    tight: whether ``max_rows`` is given, with no row to spare.
    """

    seed: int
    exact: bool
    routed: bool
    world_size: int
    case: Case
    config: EPConfig
    max_tokens: int | None
    tight: bool
    ids_dtype: torch.dtype
    scores_dtype: torch.dtype

    @property
    def modes(self) -> str:
        return "+".join(str(getattr(mode, "value", mode)) for mode in (self.config.dispatch, self.config.combine))


def example_of(seed: int) -> Example:
    random = Random(seed)
    kinds = [(True, True), (True, False), (False, True), (False, False)]
    exact, routed = random.choices(kinds, weights=[10, 4, 4, 2])[0]
    world_size = random.choices([1, 2, 3, 4], weights=[5, 8, 5, 2])[0]
    case = _case(random, exact, routed, world_size)
    config = EPConfig(
        dispatch=random.choice([*DispatchMode, AUTO]),
        combine=random.choice([*CombineMode, AUTO]),
        redispatch_x_in_backward=random.random() < 0.5,
        cpu_sync_on_runtime=random.random() < 0.5,
    )
    return Example(
        seed=seed,
        exact=exact,
        routed=routed,
        world_size=world_size,
        case=case,
        config=config,
        max_tokens=None if random.random() < 0.5 else max(1, max(case.tokens) + random.choice([0, 0, 1, 4])),
        tight=random.random() < 0.3,
        ids_dtype=random.choice([torch.int32, torch.int64]),
        scores_dtype=random.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    )


def _case(random: Random, exact: bool, routed: bool, world_size: int) -> Case:
    num_experts = world_size * random.choice([1, 1, 2, 2, 3, 4])
    top_k = random.choice([1, min(2, num_experts), random.randint(1, min(5, num_experts)), min(num_experts, 6)])
    tokens = _few_tokens(random, world_size) if exact else _many_tokens(random, world_size)
    hidden, intermediate = random.choice([1, 2, 3, 5, 8, 8, 16, 17, 24]), random.choice([1, 2, 3, 4, 4, 7, 8, 8])
    dropped = random.choices([0, 0.2, 0.5, 1], weights=[6, 3, 2, 1])[0]
    choose = partial(_choose, spread=random.choice(SPREADS), repeated=random.random() < 0.3, dropped=dropped)
    options = {
        "dtype": random.choice(DTYPES),
        "activation": random.choice(EXACT_ACTIVATIONS if exact else list(ACTIVATIONS)),
        "gate_layout": random.choice(list(GATE_LAYOUTS)),
        "bias": random.random() < 0.5,
        "score_order": random.choice(list(ScoreOrder)),
        "norm_topk_probs": random.random() < 0.5,
        "seed": random.randrange(10**9),
    }
    if not exact:
        hidden, intermediate = random.choice(WIDE), random.choice(WIDE)
    name = f"moe{'_routed' * routed}, {'bit for bit' if exact else 'as accurate as plain PyTorch'}"
    sizes = {"hidden": hidden, "intermediate": intermediate, "num_experts": num_experts, "top_k": top_k}
    return Case(name=name, tokens=tokens, choose=choose, **sizes, **options)


def _few_tokens(random: Random, world_size: int) -> tuple[int, ...]:
    """T of each rank; in one of twelve examples none."""
    if random.random() < 1 / 12:
        return (0,) * world_size
    return tuple(random.choice([0, 1, 1, 2, 3, 5, 7]) for _ in range(world_size))


def _many_tokens(random: Random, world_size: int) -> tuple[int, ...]:
    """T of each rank, none on some; enough on all together."""
    shares = [random.choice([0, 1, 2, 3]) for _ in range(world_size)]
    shares[random.randrange(world_size)] = 3
    return tuple(-(-TOKENS_ENOUGH * share // sum(shares)) for share in shares)


def _choose(
    generator: torch.Generator,
    tokens: int,
    case: Case,
    world_size: int,
    *,
    spread: str,
    repeated: bool,
    dropped: float,
) -> Tensor:
    """The experts of tokens, (N, K) int64.

    repeated: whether a token may have an expert twice; it must where fewer than K are likely. dropped: the share of
    slots, and of tokens, that are dropped.
    """
    held, experts = case.num_experts // world_size, torch.arange(case.num_experts)
    favourite = int(torch.randint(case.num_experts, (), generator=generator))
    weights_E = {
        "uniform": torch.ones(case.num_experts),
        "skewed": 1 / (1 + (experts - favourite) % case.num_experts),
        "one rank": (experts // held == favourite // held).float(),
        "one expert": (experts == favourite).float(),
    }[spread]
    if tokens == 0:
        return torch.zeros((0, case.top_k), dtype=torch.int64)
    repeated = repeated or int((weights_E > 0).sum()) < case.top_k
    idx_NK = torch.multinomial(weights_E.expand(tokens, -1), case.top_k, replacement=repeated, generator=generator)
    idx_NK[torch.rand(idx_NK.shape, generator=generator) < dropped] = -1
    idx_NK[torch.rand(tokens, generator=generator) < dropped] = -1
    return idx_NK
