"""The named cases: one table of shapes and routings for tests, benches and ``sonic-ep verify``.

A case is drawn whole, for all ranks, from its seed, on every rank alike: no rank needs another to know the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS, Activation, Swiglu
from sonic_ep.backend import ExpertWeights
from sonic_ep.config import CombineMode, DispatchMode, EPConfig, RouterOptions, ScoreOrder
from sonic_ep.profiler.routings import Chooser, one_rank, skewed, uniform


def first_experts(generator: torch.Generator, tokens: int, case: Case, world_size: int) -> Tensor:
    """Every token chooses experts 0..K-1, in an order of its own."""
    return torch.rand(tokens, case.top_k, generator=generator).argsort(dim=1)


def even_experts(generator: torch.Generator, tokens: int, case: Case, world_size: int) -> Tensor:
    """Experts of even number only; every other one stays empty."""
    half = torch.rand(tokens, case.num_experts // 2, generator=generator).argsort(dim=1)[:, : case.top_k]
    return 2 * half


def dropping(generator: torch.Generator, tokens: int, case: Case, world_size: int) -> Tensor:
    """Uniform, a third of the slots dropped, and every fifth token dropped altogether."""
    idx = uniform(generator, tokens, case, world_size)
    dropped = torch.rand(idx.shape, generator=generator) < 1 / 3
    dropped[::5] = True
    return idx.masked_fill(dropped, -1)


def repeating(generator: torch.Generator, tokens: int, case: Case, world_size: int) -> Tensor:
    """Drawn with repetition from few experts, and every third token has one expert K times."""
    idx = torch.randint(0, case.num_experts, (tokens, case.top_k), generator=generator) // 3 * 3
    idx[::3] = idx[::3, :1]
    return idx


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of the test space. ``tokens``: T of rank r is ``tokens[r % len(tokens)]``.

    bench: whether its routing and K are benched as well, at the sizes of the benches. form: how weights lie, one of
    ``WEIGHT_FORMS``.
    """

    name: str
    tokens: tuple[int, ...] = (13,)
    hidden: int = 32
    intermediate: int = 16
    num_experts: int = 24
    top_k: int = 3
    choose: Chooser = uniform
    dtype: torch.dtype = torch.float32
    activation: str | Activation = "swiglu"
    gate_layout: str = "interleaved"
    form: str = "whole"
    bias: bool = True
    score_order: ScoreOrder = ScoreOrder.TOPK_THEN_SOFTMAX
    norm_topk_probs: bool = False
    seed: int = 0
    bench: bool = False

    def tokens_of_rank(self, rank: int) -> int:
        """T of ``rank``."""
        return self.tokens[rank % len(self.tokens)]

    def router_options(self) -> RouterOptions:
        """The options of the case's router."""
        return RouterOptions(top_k=self.top_k, score_order=self.score_order, norm_topk_probs=self.norm_topk_probs)


# Of GPT-OSS, where few values are beyond the limit, and one where many are.
GPT_OSS = Swiglu(alpha=1.702, limit=7.0, up_offset=1.0)
TIGHT = Swiglu(alpha=1.702, limit=0.5, up_offset=1.0)

# E = 24 is a multiple of every W from 1 to 8 but 5 and 7.
_TABLE = (
    Case(name="uniform"),
    Case(name="uniform_bf16", dtype=torch.bfloat16, hidden=64),
    Case(name="uniform_fp16", dtype=torch.float16, hidden=64),
    Case(name="skewed", choose=skewed, tokens=(29,), seed=1, bench=True),
    Case(name="one_expert", choose=first_experts, top_k=1, seed=2),
    Case(name="one_rank", choose=one_rank, seed=3, bench=True),
    Case(name="empty_experts", choose=even_experts, top_k=4, seed=4, bench=True),
    Case(name="zero_token_ranks", tokens=(0, 11), seed=5),
    Case(name="no_tokens_at_all", tokens=(0,), seed=5),
    Case(name="uneven_tokens", tokens=(13, 2, 7, 1), top_k=6, seed=6),
    Case(name="dropped_slots", choose=dropping, top_k=4, tokens=(16, 9), seed=7),
    Case(name="dropped_slots_bf16", choose=dropping, top_k=4, tokens=(16, 9), dtype=torch.bfloat16, seed=7, bench=True),
    Case(name="repeated_experts", choose=repeating, top_k=5, seed=8),
    Case(name="top_1", top_k=1, tokens=(17,), seed=9, bench=True),
    Case(name="top_all", top_k=24, tokens=(5, 6), choose=uniform, seed=10),
    Case(name="odd_hidden", hidden=33, intermediate=7, seed=11),
    Case(name="prime_tokens", tokens=(37,), top_k=7, dtype=torch.bfloat16, seed=12),
    Case(name="transposed", activation=TIGHT, form="transposed", gate_layout="concat", hidden=30, seed=13),
    Case(name="transposed_bf16", activation=GPT_OSS, form="transposed", dtype=torch.bfloat16, hidden=64, seed=14),
    Case(name="split", activation=TIGHT, form="split", tokens=(9, 14), seed=15),
    Case(name="split_bf16", activation=GPT_OSS, form="split", dtype=torch.bfloat16, hidden=64, bias=False, seed=16),
)
CASES: Mapping[str, Case] = MappingProxyType({case.name: case for case in _TABLE})


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """A case drawn: tokens of all ranks one behind the other (N = sum of T), experts of all ranks.

    x, dy (N, H); topk_idx (N, K) int64; topk_scores (N, K) fp32; router_w (E, H); dlogits (N, E) fp32.
    """

    case: Case
    world_size: int
    x: Tensor
    dy: Tensor
    topk_idx: Tensor
    topk_scores: Tensor
    router_w: Tensor
    dlogits: Tensor
    experts: ExpertWeights

    def tokens_of(self, rank: int) -> slice:
        """Where the tokens of ``rank`` stand among the N."""
        first = sum(self.case.tokens_of_rank(other) for other in range(rank))
        return slice(first, first + self.case.tokens_of_rank(rank))

    def experts_of(self, rank: int) -> slice:
        """Where the experts of ``rank`` stand among the E."""
        held = self.case.num_experts // self.world_size
        return slice(rank * held, (rank + 1) * held)


def draw(case: Case, world_size: int, device: torch.device | str = "cpu") -> Inputs:
    """The inputs of ``case`` for a group of ``world_size`` ranks, drawn on the CPU, so the same on any device."""
    generator = torch.Generator().manual_seed(1_000 * case.seed + world_size)
    tokens = sum(case.tokens_of_rank(rank) for rank in range(world_size))

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    sizes = (case.num_experts, case.hidden, case.intermediate)
    return Inputs(
        case=case,
        world_size=world_size,
        x=normal(tokens, case.hidden),
        dy=normal(tokens, case.hidden),
        topk_idx=case.choose(generator, tokens, case, world_size).to(device),
        topk_scores=torch.rand(tokens, case.top_k, generator=generator).add(0.05).to(device),
        router_w=normal(case.num_experts, case.hidden, scale=case.hidden**-0.5),
        dlogits=normal(tokens, case.num_experts, scale=0.1, dtype=torch.float32),
        experts=random_experts(normal, *sizes, case.activation, case.gate_layout, bias=case.bias, form=case.form),
    )


def random_experts(
    normal: Callable[..., Tensor],
    count: int,
    hidden: int,
    inner: int,
    activation: str | Activation,
    layout: str,
    *,
    bias: bool,
    form: str = "whole",
) -> ExpertWeights:
    """Experts by ``normal(*shape, scale=)``, scaled to keep the size of what they multiply. inner: I."""
    kind = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    width = kind.up_width(inner)
    whole = ExpertWeights(
        w1=normal(count, width, hidden, scale=hidden**-0.5),
        w2=normal(count, hidden, inner, scale=inner**-0.5),
        b1=normal(count, width, scale=0.1) if bias else None,
        b2=normal(count, hidden, scale=0.1) if bias else None,
        activation=kind,
        layout=GATE_LAYOUTS[layout],
    )
    return WEIGHT_FORMS[form](whole)


def transposed(weight: Tensor) -> Tensor:
    """The same values, with columns contiguous in memory."""
    return weight.mT.contiguous().mT


def with_transposed_weights(experts: ExpertWeights) -> ExpertWeights:
    """Stored as (e, H, 2I) and (e, I, H), seen as (e, 2I, H) and (e, H, I)."""
    weights = {name: transposed(held) for name, held in experts.tensors.items() if name[0] == "w"}
    return experts.with_tensors({**experts.tensors, **weights})


def with_split_weights(experts: ExpertWeights) -> ExpertWeights:
    """Gate and up in tensors of their own, ups transposed."""
    given, split = dict(experts.tensors), experts.layout.split
    gate, up = (part.mT for part in split(given.pop("w1").mT))
    parts = {"w1[0]": gate.contiguous(), "w1[1]": transposed(up)}
    if "b1" in given:
        parts["b1[0]"], parts["b1[1]"] = (part.contiguous() for part in split(given.pop("b1")))
    return replace(experts.with_tensors({**given, **parts}), layout=GATE_LAYOUTS["concat"])


WEIGHT_FORMS: Mapping[str, Callable[[ExpertWeights], ExpertWeights]] = MappingProxyType(
    {"whole": lambda experts: experts, "transposed": with_transposed_weights, "split": with_split_weights}
)


BOOLEANS = (False, True)
OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"activation": tuple(ACTIVATIONS), "gate_layout": tuple(GATE_LAYOUTS), "bias": BOOLEANS[::-1]}
    | {"score_order": tuple(ScoreOrder), "norm_topk_probs": BOOLEANS}
    | {"dtype": (torch.float32, torch.bfloat16, torch.float16)}
)
CONFIG_OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"dispatch": tuple(DispatchMode), "combine": tuple(CombineMode)}
    | dict.fromkeys(("redispatch_x_in_backward", "cpu_sync_on_runtime"), BOOLEANS)
)


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A short list of settings that has every pair of values of every two options.

    Greedy: each setting starts from a missing pair, and takes for every other option the value that adds most missing
    pairs. The same list in every process, whatever its hashes.
    """
    order = [
        frozenset({(a, x), (b, y)}) for a, b in combinations(options, 2) for x, y in product(options[a], options[b])
    ]
    missing, chosen = set(order), []
    for pair in order:
        if pair in missing:
            setting: dict[str, Any] = dict(pair)
            for name in [name for name in options if name not in setting]:
                added = [
                    sum(frozenset({(name, value), other}) in missing for other in setting.items())
                    for value in options[name]
                ]
                setting[name] = options[name][added.index(max(added))]
            missing -= {frozenset(covered) for covered in combinations(setting.items(), 2)}
            chosen.append({name: setting[name] for name in options})
    return chosen


@dataclass(frozen=True, kw_only=True)
class OptionTrial:
    """One setting of all options."""

    case: Case
    config: EPConfig


def option_trials() -> list[OptionTrial]:
    """Trials that have every pair of values of ``OPTIONS`` and ``CONFIG_OPTIONS``, on one small shape."""
    base = Case(name="options", top_k=4, tokens=(12, 7), hidden=48, seed=20)
    trials = []
    for setting in pairwise({**OPTIONS, **CONFIG_OPTIONS}):
        name = "-".join(str(getattr(value, "value", value)).removeprefix("torch.") for value in setting.values())
        case, config = ({option: setting[option] for option in of} for of in (OPTIONS, CONFIG_OPTIONS))
        trials.append(OptionTrial(case=replace(base, name=name, **case), config=EPConfig(**config)))
    return trials
