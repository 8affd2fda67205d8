"""Examples of property tests: a seed gives shapes, routing, options and modes, the same on any machine.

In exact ones inputs are whole numbers and scores powers of two, so every product and sum is a multiple of a known unit.
Where the sum of all absolute values, in that unit, fits the significand of the dtype, no order of summation rounds, and
one bit of difference is an error. The others are compared with plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from types import MappingProxyType

import torch
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig
from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.config import AUTO, ScoreOrder
from sonic_ep.reference.dense import dense_scores
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing import Case, Inputs
from sonic_ep.testing.cases import random_experts
from sonic_ep.testing.oracle import routed_oracle, weights_of, with_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Their values and derivatives are exact where their arguments are.
EXACT_ACTIVATIONS = ("relu", "reglu", "relu_sq")
# Widths and tokens of the group at which an error is a statistic of many elements.
WIDE, TOKENS_ENOUGH = (24, 31, 32, 40), 48
SPREADS = ("uniform", "skewed", "one rank", "one expert")
SCORES = (0.5, 1.0, 2.0)
# Of both kinds of scores: a half, and a quarter squared and squared again, as it stands in the gradient of a softmax.
UNIT_OF_ROUTED, UNIT_OF_ROUTER = 2.0**-1, 2.0**-8
# exp(-APART) is nothing beside 1 in fp64, and nothing at all in fp32.
APART = 128
MOST_TIED = 4
# Candidates drawn for each token of a router.
CANDIDATES = 24
# Largest input by dtype: the fewer bits in its significand, the smaller.
LARGEST = MappingProxyType({torch.float32: 3, torch.float16: 2, torch.bfloat16: 1})
# Shares of entries that are not zero, tried in this order until the certificate holds.
SHARES = tuple(0.75**step for step in range(24))


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
    tokens = _tokens(random, exact, world_size)
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


def _tokens(random: Random, exact: bool, world_size: int) -> tuple[int, ...]:
    """T of each rank: few, in one of twelve examples none; or enough on all together, none on some."""
    if exact:
        none = random.random() < 1 / 12
        return (0,) * world_size if none else tuple(random.choice([0, 1, 1, 2, 3, 5, 7]) for _ in range(world_size))
    shares = [random.choice([0, 1, 2, 3]) for _ in range(world_size)]
    shares[random.randrange(world_size)] = 3
    return tuple(-(-TOKENS_ENOUGH * share // sum(shares)) for share in shares)


def _choose(
    generator: torch.Generator, tokens: int, case: Case, world_size: int, *, spread: str, repeated: bool, dropped: float
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


def exact_inputs(example: Example) -> Inputs:
    """The inputs of an exact example, on the CPU; the densest of which the certificate holds."""
    for place, share in enumerate(SHARES):
        inputs = _drawn(example, torch.Generator().manual_seed(example.case.seed * len(SHARES) + place), share)
        if _fits(inputs, example.routed):
            return inputs
    raise AssertionError(f"seed {example.seed}: no share of entries makes its sums fit {example.case.dtype}")


def _drawn(example: Example, generator: torch.Generator, share: float) -> Inputs:
    case, world_size, most = example.case, example.world_size, LARGEST[example.case.dtype]

    def whole(*shape: int) -> Tensor:
        """Whole numbers from ``-most`` to ``most``, of which about a ``share`` are not zero."""
        values = torch.randint(-most, most + 1, shape, generator=generator)
        return (values * (torch.rand(shape, generator=generator) < share)).to(case.dtype)

    tokens = sum(case.tokens_of_rank(rank) for rank in range(world_size))
    if example.routed:
        x, router_w = whole(tokens, case.hidden), whole(case.num_experts, case.hidden)
        idx = case.choose(generator, tokens, case, world_size).to(example.ids_dtype)
        choices = torch.randint(len(SCORES), idx.shape, generator=generator)
        scores = torch.tensor(SCORES)[choices].to(example.scores_dtype)
    else:
        case, x, router_w = _router(case, tokens, whole, generator)
        # Logits are whole numbers that fp32 holds: their order, and so the choice, has one right answer.
        logits = x.double() @ router_w.double().T
        idx = choose_experts(logits, case.top_k)
        scores = dense_scores(logits, idx, case.router_options()).float()
    sizes = (case.num_experts, case.hidden, case.intermediate)
    kinds = (case.activation, case.gate_layout)
    experts = random_experts(lambda *shape, scale: whole(*shape), *sizes, *kinds, bias=case.bias)
    dy, dlogits = whole(tokens, case.hidden), whole(tokens, case.num_experts).float()
    routing = {"topk_idx": idx, "topk_scores": scores, "router_w": router_w, "dlogits": dlogits}
    return Inputs(case=case, world_size=world_size, x=x, dy=dy, experts=experts, **routing)


def _router(
    case: Case, tokens: int, whole: Callable[..., Tensor], generator: torch.Generator
) -> tuple[Case, Tensor, Tensor]:
    """The case, x and router_w: logits tie, or are so far apart that the smaller counts for nothing.

    A softmax of 1, 2 or 4 equal logits is exact. In half precision a token has one expert, with the score 1: 128 times
    a gradient would not fit.
    """
    # Experts share their row with one or three others, or have it alone.
    classes = max(1, case.num_experts // 2 ** int(torch.randint(3, (), generator=generator)))
    rows_CH = torch.randint(-1, 2, (classes, case.hidden), generator=generator).to(case.dtype) * APART
    router_w_EH = rows_CH[torch.randperm(case.num_experts, generator=generator) % classes]
    candidates_MH = whole(CANDIDATES * tokens, case.hidden)
    logits_ME = candidates_MH.double() @ router_w_EH.double().T
    tied_M, powers = (logits_ME == logits_ME.amax(dim=1, keepdim=True)).sum(dim=1), torch.tensor([1, 2, MOST_TIED])
    good_M = torch.isin(tied_M.clamp(max=case.top_k), powers)
    if case.score_order is ScoreOrder.SOFTMAX_THEN_TOPK:
        good_M &= torch.isin(tied_M, powers)
    if case.dtype == torch.float32 and int(good_M.sum()) >= tokens:
        return case, candidates_MH[good_M][:tokens], router_w_EH
    case = replace(case, top_k=1, score_order=ScoreOrder.TOPK_THEN_SOFTMAX)
    return case, candidates_MH[:tokens], whole(case.num_experts, case.hidden)


def _fits(inputs: Inputs, routed: bool) -> bool:
    """Whether every intermediate of forward and backward, in its unit, fits the significand of the dtype.

    No partial sum, in any order, is larger than the sum of the absolute values: what the oracle finds of those, with
    biases, and with scores of at least 1 since rows are weighted before or after a product.
    """
    x, dy, router_w, dlogits = (t.double().abs() for t in (inputs.x, inputs.dy, inputs.router_w, inputs.dlogits))
    weights = {name: weight.double().abs() for name, weight in weights_of(inputs.experts).items()}
    for bias, weight in (("b1", "w1"), ("b2", "w2")):
        weights.setdefault(bias, torch.zeros_like(weights[weight][..., 0]))
    experts = with_weights(inputs.experts, weights)
    hidden_ENF = x @ weights["w1"].mT + weights["b1"][:, None]
    rows = _largest(hidden_ENF, 2 * experts.activation(hidden_ENF, experts.layout))
    room, room_fp32 = (2 / torch.finfo(dtype).eps for dtype in (inputs.case.dtype, torch.float32))
    if rows > room:
        return False
    positive = replace(inputs, x=x, dy=dy, experts=experts, topk_scores=inputs.topk_scores.double().clamp(min=1))
    found = dict(routed_oracle(positive).truth)
    scores_N = found.pop("dscores").sum(dim=1)
    layer = max(rows, _largest(*found.values()))
    if routed:
        return layer <= UNIT_OF_ROUTED * room and _largest(scores_N) <= UNIT_OF_ROUTED * room_fp32
    if inputs.case.top_k == 1 and inputs.case.dtype != torch.float32:
        # The score is 1, and its gradient is multiplied with a zero of the softmax.
        return layer + _largest(dlogits.T @ x, dlogits @ router_w) <= room and _largest(scores_N) <= room_fp32
    # d(logit) = s (g - sum of s g); divided by the sum of the chosen, each g is up to MOST_TIED times as large, twice.
    every_NE = dlogits + scores_N[:, None] * (4 * MOST_TIED if inputs.case.norm_topk_probs else 2)
    return (
        layer <= room / MOST_TIED / 2
        and _largest(every_NE, every_NE.T @ x) <= UNIT_OF_ROUTER * room_fp32
        # What stands beside APART has a unit as many times as large.
        and (_largest(every_NE @ router_w) + layer) / APART <= UNIT_OF_ROUTER * room_fp32 / 2
    )


def _largest(*tensors: Tensor) -> float:
    return max((float(tensor.max()) for tensor in tensors if tensor.numel()), default=0.0)
