"""Every router of ``RouterConfig`` on both backends, against one of plain PyTorch, gradients included."""

from dataclasses import dataclass, field, replace
from math import log
from typing import Any

import pytest
import torch
from backends import both_backends
from near import assert_near
from on_ranks import on_ranks
from routers import PlainRouting, base_of, chosen_by_hand, plain_router, randn
from same import assert_same_bits
from torch import Tensor
from workspaces import new_workspace

from sonic_ep import RouterConfig
from sonic_ep.backend import RouterWeights, Routing
from sonic_ep.config import RouterOptions, settings_of
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.reference.router import route, route_logits
from sonic_ep.testing import Rank, assert_as_accurate, assert_bitwise

NAN, INF = float("nan"), float("inf")
# So many that no error of plain PyTorch, of which twice is the bound, is small by luck.
TOKENS, HIDDEN = 300, 48
TOP_2 = RouterOptions(top_k=2)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A router, and its sizes: E is no power of two."""

    config: RouterConfig
    corrected: bool = False
    biased: bool = False
    num_experts: int = 24
    top_k: int = 4

    @property
    def options(self) -> RouterOptions:
        return RouterOptions(**settings_of(self.config), top_k=self.top_k)


def kind(*, corrected: bool = False, biased: bool = False, sizes: tuple[int, int] = (24, 4), **settings: Any) -> Kind:
    config = RouterConfig(**settings)
    return Kind(config=config, corrected=corrected, biased=biased, num_experts=sizes[0], top_k=sizes[1])


OVER_ALL, SIGMOID = {"score_order": "softmax_then_topk"}, {"score_function": "sigmoid"}
NORM = {"norm_topk_probs": True}


def groups(num: int, top: int, of_group: int) -> dict[str, int]:
    return {"num_groups": num, "top_groups": top, "group_top": of_group}


# What models have: GPT-OSS, Mixtral, Qwen3; GLM-4.5 and DeepSeek-V3, DeepSeek-V2, Ernie-4.5; and what else there is.
KINDS: dict[str, Kind] = {
    "softmax of the chosen, with a bias": kind(biased=True),
    "softmax over all": kind(**OVER_ALL),
    "softmax over all, divided": kind(**OVER_ALL, **NORM, biased=True),
    "sigmoid": kind(**SIGMOID, biased=True),
    "sigmoid, divided and scaled": kind(**SIGMOID, **NORM, scale=2.5),
    "sigmoid, corrected, in groups": kind(**SIGMOID, **NORM, scale=2.5, corrected=True, **groups(4, 2, 2), biased=True),
    "softmax over all, scaled, in groups": kind(**OVER_ALL, scale=16, **groups(4, 2, 1)),
    "softmax over all, corrected": kind(**OVER_ALL, corrected=True, biased=True),
    "softmax over all, divided, corrected": kind(**OVER_ALL, **NORM, corrected=True),
    "softmax of the chosen, corrected, scaled": kind(scale=0.5, corrected=True),
    "sigmoid, one group of four": kind(**SIGMOID, **groups(4, 1, 1), biased=True),
    "two groups of three": kind(**groups(3, 2, 2), sizes=(12, 3)),
    "nodes: K / top_groups of each count": kind(**SIGMOID, corrected=True, **groups(8, 2, 3), sizes=(40, 6)),
    "groups that all stay": kind(**SIGMOID, **groups(2, 2, 2)),
    "one choice": kind(**SIGMOID, **NORM, corrected=True, sizes=(5, 1)),
    "all experts": kind(**OVER_ALL, corrected=True, scale=3.0, sizes=(7, 7)),
}
FLOAT32 = "float32 float32 float32"
MORE_DTYPES = ["bfloat16 float32 float32", "float16 float16 float32"]
DTYPES = [FLOAT32, "bfloat16 bfloat16 bfloat16", *(pytest.param(d, marks=pytest.mark.thorough) for d in MORE_DTYPES)]


@dataclass(frozen=True, kw_only=True)
class Router:
    """Leaves of one call: bias and correction where the kind has them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", [t for t in (self.x, self.weight, self.bias) if t is not None])

    @property
    def weights(self) -> RouterWeights:
        return RouterWeights(weight=self.weight, bias=self.bias, correction=self.correction)

    def plain(self, of: Kind, dtype: torch.dtype) -> tuple[PlainRouting, list[Tensor]]:
        """By plain PyTorch in ``dtype``, and the leaves that it is a function of."""
        leaves = [t.detach().to(torch.promote_types(t.dtype, dtype)).requires_grad_() for t in self.leaves]
        if dtype == torch.float32:
            # Gradients in the dtypes of the leaves.
            leaves = [t.detach().requires_grad_() for t in self.leaves]
        x, weight, *bias = (t.to(dtype) for t in leaves)
        correction = None if self.correction is None else self.correction.to(dtype)
        return plain_router(x, weight, bias[0] if bias else None, correction, of.config, of.top_k), leaves


def drawn(rank: Rank, of: Kind, dtypes: str = FLOAT32, tokens: int = TOKENS) -> Router:
    x_dtype, weight_dtype, bias_dtype = (getattr(torch, name) for name in dtypes.split())
    correction = randn(rank, of.num_experts, seed=4) * 0.3
    return Router(
        x=randn(rank, tokens, HIDDEN, seed=1).div(HIDDEN**0.5).to(x_dtype).requires_grad_(),
        weight=randn(rank, of.num_experts, HIDDEN, seed=2).to(weight_dtype).requires_grad_(),
        bias=randn(rank, of.num_experts, seed=3).to(bias_dtype).requires_grad_() if of.biased else None,
        correction=correction if of.corrected else None,
    )


def routed(rank: Rank, backend: str, router: Router, options: RouterOptions) -> Routing:
    """Collective, over the world."""
    group = resolve_group(None)
    if backend == "reference":
        return route(router.x, router.weights, options, BoundedCollectives(group))
    from sonic_ep.fast.router import route as fast_route

    return fast_route(router.x, router.weights, options, new_workspace(rank))


def chosen(backend: str, logits: Tensor, correction: Tensor | None, options: RouterOptions) -> Tensor:
    if backend == "reference":
        return route_logits(logits, correction, options)
    from sonic_ep.fast.choice import choose_experts

    return choose_experts(logits, options, correction).topk_idx


def gradients(routing: Routing | PlainRouting, leaves: list[Tensor], through: list[str]) -> tuple[Tensor, ...]:
    outputs = [getattr(routing, name) for name in through]
    given = [torch.randn(got.shape, generator=torch.Generator().manual_seed(5)).to(got) for got in outputs]
    return torch.autograd.grad(outputs, leaves, given, retain_graph=True)


def with_bias(grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of x, and of the weight, with that of the bias as one more column: that of a constant 1 in x.

    Of E numbers alone, the error that plain PyTorch happens to make may be too small by luck to bound another.
    """
    x, weight, *bias = grads
    return [x, torch.cat([weight, *(one[:, None].to(weight.dtype) for one in bias)], dim=1)]


@on_ranks(1)
@both_backends
@pytest.mark.parametrize("dtypes", DTYPES)
def test_choices_scores_and_gradients_are_those_of_a_plain_router(rank: Rank, backend: str, dtypes: str) -> None:
    """Gradients through the scores, and through these and the logits. dtypes: of x, the weight and the bias."""
    for name, of in KINDS.items():
        router = drawn(rank, of, dtypes)
        found = routed(rank, backend, router, of.options)
        (truth, of_truth), (plain, of_plain) = (router.plain(of, dtype) for dtype in (torch.float64, torch.float32))
        assert torch.equal(found.topk_idx, truth.topk_idx), name
        assert found.topk_idx.dtype == torch.int64
        assert found.logits.dtype == found.topk_scores.dtype == torch.float32
        assert_as_accurate(found.logits, truth.logits, plain.logits, f"logits, {name}")
        assert_as_accurate(found.topk_scores, truth.topk_scores, plain.topk_scores, f"scores, {name}")
        for through in (["topk_scores"], ["logits", "topk_scores"]):
            got = gradients(found, router.leaves, through)
            exact, usual = gradients(truth, of_truth, through), gradients(plain, of_plain, through)
            assert [grad.dtype for grad in got] == [leaf.dtype for leaf in router.leaves]
            for grad, of_exact, of_usual in zip(*map(with_bias, (got, exact, usual)), strict=True):
                assert_as_accurate(grad, of_exact, of_usual, f"{tuple(grad.shape)} through {through}, {name}")


@on_ranks(1)
@both_backends
def test_ties_nan_and_infinity_are_chosen_by_the_rule(rank: Rank, backend: str) -> None:
    """Logits on a coarse grid, corrections too far apart for rounding to decide."""
    for name, of in KINDS.items():
        generator = torch.Generator().manual_seed(7)
        logits = torch.randint(-2, 3, (64, of.num_experts), generator=generator).float()
        special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 200.0, -200.0])
        kinds = torch.randint(0, len(special), (32, of.num_experts), generator=generator)
        some = torch.rand(32, of.num_experts, generator=generator) < torch.linspace(0, 1, 32)[:, None]
        logits[32:] = torch.where(some, special[kinds], logits[32:])
        logits = logits.to(rank.device)
        correction = None
        if of.corrected:
            correction = (torch.arange(of.num_experts) % 3 * 8.0).to(rank.device)
        by_value = of.corrected or of.config.limits_groups
        values = base_of(logits, of.config) if by_value else logits
        values = values if correction is None else values + correction
        expected = [chosen_by_hand(row, of.config, of.top_k) for row in values.cpu()]
        assert chosen(backend, logits, correction, of.options).tolist() == expected, name


@on_ranks(1)
@both_backends
def test_sigmoids_that_are_all_one_are_chosen_by_their_logits(rank: Rank, backend: str) -> None:
    logits = torch.tensor([[30.0, 50.0, 40.0, 90.0]], device=rank.device)
    options = RouterOptions(top_k=3, score_function="sigmoid")
    assert chosen(backend, logits, None, options).tolist() == [[3, 1, 2]]
    # A correction of nothing makes them equal.
    assert chosen(backend, logits, torch.zeros(4, device=rank.device), options).tolist() == [[0, 1, 2]]


@on_ranks(1)
@both_backends
def test_scores_of_sigmoids_that_underflow_are_no_nan(rank: Rank, backend: str) -> None:
    router = Router(
        x=torch.full((1, 1), -200.0, device=rank.device).requires_grad_(),
        weight=torch.ones(3, 1, device=rank.device).requires_grad_(),
        bias=None,
        correction=None,
    )
    found = routed(rank, backend, router, RouterOptions(top_k=2, score_function="sigmoid", norm_topk_probs=True))
    assert found.topk_scores.tolist() == [[0.0, 0.0]]
    found.topk_scores.sum().backward()
    assert router.x.grad.tolist() == [[0.0]]


@on_ranks(1)
@both_backends
def test_experts_far_below_the_best_may_be_chosen(rank: Rank, backend: str) -> None:
    """The largest logit is not among the chosen: differences to another would overflow."""
    for settings, expected in ((OVER_ALL, [0.0, 0.0]), ({}, [2 / 3, 1 / 3])):
        router = Router(
            x=torch.tensor([[200.0, 0.0, log(2)]], device=rank.device).requires_grad_(),
            weight=torch.eye(3, device=rank.device).requires_grad_(),
            bias=None,
            correction=torch.tensor([-1000.0, 0.0, 0.5], device=rank.device),
        )
        found = routed(rank, backend, router, replace(TOP_2, **settings))
        assert found.topk_idx.tolist() == [[2, 1]]
        assert_near(found.topk_scores, torch.tensor([expected], device=rank.device), 8)
        found.topk_scores[0, 0].backward()
        one, other = expected
        assert_near(router.x.grad, torch.tensor([[0.0, -one * other, one * other]], device=rank.device), 8)


@on_ranks(1)
@both_backends
def test_no_tokens(rank: Rank, backend: str) -> None:
    for name, of in KINDS.items():
        router = drawn(rank, of, tokens=0)
        found = routed(rank, backend, router, of.options)
        assert found.logits.shape == (0, of.num_experts), name
        assert found.topk_idx.shape == found.topk_scores.shape == (0, of.top_k), name
        (found.logits.sum() + found.topk_scores.sum()).backward()
        for leaf in router.leaves:
            assert_bitwise(leaf.grad, torch.zeros_like(leaf), name)


@on_ranks(2)
@both_backends
def test_gradients_of_weight_and_bias_are_summed_over_ranks_each_if_required(rank: Rank, backend: str) -> None:
    """In fp32, rounded once: the same bits on every rank, whichever of the two is trained."""
    of = KINDS["sigmoid, corrected, in groups"]
    weight, bias = drawn(rank, of).weight.detach(), randn(rank, of.num_experts, seed=3).bfloat16()

    def gradients(*, weighs: bool = True, biases: bool = True, **changes: Any) -> list[Tensor | None]:
        """changes: of the options, or the dtype of the bias."""
        of_bias = bias.clone().to(changes.pop("dtype", torch.float32))
        router = Router(
            x=randn(rank, 3 + rank.rank, HIDDEN, seed=rank.rank).bfloat16(),
            weight=weight.clone().requires_grad_(weighs),
            bias=of_bias.requires_grad_(biases),
            correction=randn(rank, of.num_experts, seed=4),
        )
        found = routed(rank, backend, router, replace(of.options, **changes))
        (found.topk_scores.square().sum() + found.logits.square().sum()).backward()
        return [router.weight.grad, router.bias.grad]

    parts = gradients(reduce_router_grad=False)
    total = gradients()
    for got, part in zip(total, parts, strict=True):
        first, second = BoundedCollectives(resolve_group(None)).all_gather(part)
        assert_bitwise(got, first + second)
        assert not torch.equal(got, part)
    assert_bitwise(gradients(dtype=torch.bfloat16)[1], total[1].bfloat16())
    assert_same_bits(gradients(biases=False), [total[0], None])
    assert_same_bits(gradients(weighs=False), [None, total[1]])


@pytest.mark.fast
@on_ranks(1)
def test_examples_of_the_docstrings(rank: Rank) -> None:
    from sonic_ep.fast.choice import choose_experts
    from sonic_ep.fast.choice_gradient import logits_gradient

    def of(*numbers: float) -> Tensor:
        return torch.tensor([numbers], device=rank.device)

    logits = of(0.0, 1.0, 0.0).log1p()
    for settings in ({}, OVER_ALL, SIGMOID):
        assert choose_experts(logits, replace(TOP_2, **settings), of(0.0, 0.0, 1.0)[0]).topk_idx.tolist() == [[2, 1]]
    for settings, scores, grads in (
        (SIGMOID, of(2 / 3, 1 / 2), of(0, 2 / 9, 0)),
        ({**SIGMOID, **NORM}, of(4 / 7, 3 / 7), of(-6 / 49, 4 / 49, 0)),
    ):
        found = choose_experts(logits, replace(TOP_2, **settings))
        assert found.topk_idx.tolist() == [[1, 0]]
        assert_near(found.topk_scores, scores, 8)
        assert_near(logits_gradient(found, of(1.0, 0.0), replace(TOP_2, **settings)), grads, 8)
    bases, correction = of(4.0, 3.0, 2.0, 1.0), of(0.0, 0.0, 0.0, 5.0)[0]
    assert choose_experts(bases, TOP_2, correction).topk_idx.tolist() == [[3, 0]]
    assert choose_experts(bases, replace(TOP_2, **groups(2, 1, 1)), correction).topk_idx.tolist() == [[3, 2]]
    for group_top in (1, 2):
        found = choose_experts(of(4.0, 3.0, 2.0, 6.0), replace(TOP_2, **groups(2, 1, group_top)))
        assert found.topk_idx.tolist() == [[3, 2]]
