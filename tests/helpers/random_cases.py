"""Examples of property tests: a seed gives shapes, routing, options and modes.

Two of the four kinds are exact: inputs are small whole numbers, scores are powers of two, and the sums fit the dtype in
any order. Nothing is rounded, so that one bit of difference is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
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
NOWHERE = -1
# Widths and tokens of the group at which an error is a statistic of many elements.
WIDE, TOKENS_ENOUGH = (24, 31, 32, 40), 48


class Kind(str, Enum):
    """What an example calls, and how it is compared."""

    EXACT_ROUTED = "moe_routed, bit for bit"
    EXACT_MOE = "moe, bit for bit"
    ACCURATE_ROUTED = "moe_routed, as accurate as plain PyTorch"
    ACCURATE_MOE = "moe, as accurate as plain PyTorch"

    @property
    def exact(self) -> bool:
        return self in (Kind.EXACT_ROUTED, Kind.EXACT_MOE)

    @property
    def routed(self) -> bool:
        """Whether the caller gives the routing."""
        return self in (Kind.EXACT_ROUTED, Kind.ACCURATE_ROUTED)


class Spread(str, Enum):
    """How likely each expert is."""

    UNIFORM = "uniform"
    SKEWED = "skewed"
    ONE_RANK = "one rank"
    ONE_EXPERT = "one expert"

    def weights(self, num_experts: int, world_size: int, favourite: int) -> Tensor:
        """Chances of the experts, (E,), up to a factor. favourite: the expert, or one of the rank, that gets all."""
        experts = torch.arange(num_experts)
        held = num_experts // world_size
        return {
            Spread.UNIFORM: torch.ones(num_experts),
            Spread.SKEWED: 1 / (1 + (experts - favourite) % num_experts),
            Spread.ONE_RANK: (experts // held == favourite // held).float(),
            Spread.ONE_EXPERT: (experts == favourite).float(),
        }[self]


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Draws the experts of tokens; a ``Chooser`` of a case.

    repeated: whether a token may have an expert twice; it must where fewer than K are likely. dropped: the share of
    slots, and of tokens, that are dropped.
    """

    spread: Spread
    repeated: bool
    dropped: float

    def __call__(self, generator: torch.Generator, tokens: int, case: Case, world_size: int) -> Tensor:
        """(N, K) int64."""
        favourite = int(torch.randint(case.num_experts, (), generator=generator))
        weights_E = self.spread.weights(case.num_experts, world_size, favourite)
        if tokens == 0:
            return torch.zeros((0, case.top_k), dtype=torch.int64)
        repeated = self.repeated or int((weights_E > 0).sum()) < case.top_k
        idx_NK = torch.multinomial(weights_E.expand(tokens, -1), case.top_k, replacement=repeated, generator=generator)
        idx_NK[torch.rand(idx_NK.shape, generator=generator) < self.dropped] = NOWHERE
        idx_NK[torch.rand(tokens, generator=generator) < self.dropped] = NOWHERE
        return idx_NK


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example. max_tokens: ``max_tokens_per_rank``. tight: whether ``max_rows`` is given, with no row to spare."""

    seed: int
    kind: Kind
    world_size: int
    case: Case
    config: EPConfig
    max_tokens: int | None
    tight: bool
    ids_dtype: torch.dtype
    scores_dtype: torch.dtype

    @property
    def size(self) -> int:
        """How much there is to look at when it fails."""
        case, tokens = self.case, sum(self.case.tokens_of_rank(rank) for rank in range(self.world_size))
        return tokens * case.top_k * case.hidden * case.intermediate * self.world_size

    @property
    def modes(self) -> str:
        return "+".join(str(getattr(mode, "value", mode)) for mode in (self.config.dispatch, self.config.combine))


def example_of(seed: int) -> Example:
    """The example of a seed, the same on any machine."""
    random = Random(seed)
    kind = random.choices(list(Kind), weights=[10, 4, 4, 2])[0]
    world_size = random.choices([1, 2, 3, 4], weights=[5, 8, 5, 2])[0]
    case = _case(random, kind, world_size)
    config = EPConfig(
        dispatch=random.choice([*DispatchMode, AUTO]),
        combine=random.choice([*CombineMode, AUTO]),
        redispatch_x_in_backward=random.random() < 0.5,
        cpu_sync_on_runtime=random.random() < 0.5,
    )
    most = max(case.tokens)
    return Example(
        seed=seed,
        kind=kind,
        world_size=world_size,
        case=case,
        config=config,
        max_tokens=None if random.random() < 0.5 else max(1, most + random.choice([0, 0, 1, 4])),
        tight=random.random() < 0.3,
        ids_dtype=random.choice([torch.int32, torch.int64]),
        scores_dtype=random.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    )


def _case(random: Random, kind: Kind, world_size: int) -> Case:
    num_experts = world_size * random.choice([1, 1, 2, 2, 3, 4])
    top_k = random.choice([1, min(2, num_experts), random.randint(1, min(5, num_experts)), min(num_experts, 6)])
    case = Case(
        name=kind.value,
        tokens=_tokens(random, world_size) if kind.exact else _many_tokens(random, world_size),
        hidden=random.choice([1, 2, 3, 5, 8, 8, 16, 17, 24]),
        intermediate=random.choice([1, 2, 3, 4, 4, 7, 8, 8]),
        num_experts=num_experts,
        top_k=top_k,
        choose=_routed(random),
        dtype=random.choice(DTYPES),
        activation=random.choice(EXACT_ACTIVATIONS if kind.exact else list(ACTIVATIONS)),
        gate_layout=random.choice(list(GATE_LAYOUTS)),
        bias=random.random() < 0.5,
        score_order=random.choice(list(ScoreOrder)),
        norm_topk_probs=random.random() < 0.5,
        seed=random.randrange(10**9),
    )
    return case if kind.exact else replace(case, hidden=random.choice(WIDE), intermediate=random.choice(WIDE))


def _routed(random: Random) -> Routed:
    dropped = random.choices([0, 0.2, 0.5, 1], weights=[6, 3, 2, 1])[0]
    return Routed(spread=random.choice(list(Spread)), repeated=random.random() < 0.3, dropped=dropped)


def _tokens(random: Random, world_size: int) -> tuple[int, ...]:
    """T of each rank: few; in one of twelve examples none."""
    if random.random() < 1 / 12:
        return (0,) * world_size
    return tuple(random.choice([0, 1, 1, 2, 3, 5, 7]) for _ in range(world_size))


def _many_tokens(random: Random, world_size: int) -> tuple[int, ...]:
    """T of each rank, none on some; enough on all together."""
    shares = [random.choice([0, 1, 2, 3]) for _ in range(world_size)]
    shares[random.randrange(world_size)] = 3
    return tuple(-(-TOKENS_ENOUGH * share // sum(shares)) for share in shares)
