"""The router: choices, ties, scores, and their gradients against formulas of their own, on both backends."""

from dataclasses import replace
from math import log

import pytest
import torch
from backends import both_backends
from near import assert_near
from routers import randn, routed
from torch import Tensor

from sonic_ep.backend import Routing
from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing import Rank, RankPool, assert_as_accurate, assert_bitwise

NAN, INF = float("nan"), float("inf")
ALL_SCORES = [(order, norm) for order in ScoreOrder for norm in (False, True)]


def chosen(backend: str, logits_TE: Tensor, top_k: int) -> Tensor:
    """The choices that ``backend`` makes of logits, which may be anything."""
    if backend == "reference":
        return choose_experts(logits_TE, top_k)
    from sonic_ep.fast.router import choose_experts as fast_choices

    return fast_choices(logits_TE, RouterOptions(top_k=top_k)).topk_idx


def choices(rank: Rank, backend: str) -> None:
    for num_experts, top_k in ((5, 1), (5, 2), (5, 5), (64, 8), (7, 7), (24, 3), (300, 6)):
        logits = randn(rank, 50, num_experts)
        idx = chosen(backend, logits, top_k)
        assert idx.dtype == torch.int64
        assert_bitwise(logits.gather(1, idx), logits.topk(top_k).values)


@both_backends
def test_choices_are_the_largest_logits_in_descending_order(pool: RankPool, backend: str) -> None:
    pool.run(choices, backend, world_size=1)


def unusual_choices(rank: Rank, backend: str) -> None:
    cases = [
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]),
        ([1.0, 3.0, 1.0, 3.0, 1.0], [1, 3, 0]),
        ([0.5, -0.0, 0.0, -0.0], [0, 1, 2, 3]),
        ([-1e-40, 0.0, 1e-40, -0.0], [2, 1, 3, 0]),
        ([NAN, NAN, NAN, NAN], [0, 1]),
        ([INF, 1.0, NAN, -INF, NAN], [2, 4, 0, 1, 3]),
        ([-INF, -INF, -INF], [0, 1, 2]),
        ([-INF, -3e38, -INF, 3e38], [3, 1, 0, 2]),
        # A NaN is one, whatever its sign.
        ([1.0, -NAN, INF, NAN], [1, 3, 2]),
    ]
    for logits, expected in cases:
        idx = chosen(backend, torch.tensor([logits], device=rank.device), len(expected))
        assert idx.tolist() == [expected], logits


@both_backends
def test_ties_nan_and_infinities_still_yield_distinct_experts(pool: RankPool, backend: str) -> None:
    pool.run(unusual_choices, backend, world_size=1)


def ties_among_many(rank: Rank, backend: str) -> None:
    many = torch.zeros(3, 300, device=rank.device)
    assert_bitwise(chosen(backend, many, 300), torch.arange(300, device=rank.device).expand(3, -1).contiguous())


@both_backends
def test_ties_are_stable_among_many(pool: RankPool, backend: str) -> None:
    pool.run(ties_among_many, backend, world_size=1)


def expected_scores(logits_TE: Tensor, idx_TK: Tensor, order: ScoreOrder, norm: bool) -> Tensor:
    """Scores from fp64 logits, differentiable: shares of all experts, or of the chosen."""
    exp = logits_TE.exp()
    kept = exp.gather(1, idx_TK)
    whole = exp if order is ScoreOrder.SOFTMAX_THEN_TOPK and not norm else kept
    return kept / whole.sum(dim=1, keepdim=True)


def scores(rank: Rank, backend: str, dtype: torch.dtype) -> None:
    x, weight = randn(rank, 6, 16, seed=1).to(dtype), randn(rank, 8, 16, seed=2).to(dtype)
    for order, norm in ALL_SCORES:
        options = RouterOptions(top_k=3, score_order=order, norm_topk_probs=norm)
        routing = routed(rank, backend, x, weight, options)
        assert routing.logits.dtype == routing.topk_scores.dtype == torch.float32
        logits = x.double() @ weight.double().T
        assert_near(routing.logits, logits, 4)
        assert_near(routing.topk_scores, expected_scores(logits, routing.topk_idx, order, norm), 100)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_fp32_softmax(pool: RankPool, backend: str, dtype: torch.dtype) -> None:
    pool.run(scores, backend, dtype, world_size=1)


def scores_at_the_ends_of_the_range(rank: Rank) -> None:
    from sonic_ep.fast.router import choose_experts as fast_choices

    rows = [[1e30, -1e30, 0.0], [200.0, 100.0, 99.0], [-INF, 1.0, -INF], [NAN, 0.0, 1.0], [INF, 0.0, 1.0], [-INF] * 3]
    logits = torch.tensor(rows, device=rank.device)
    for order, norm in ALL_SCORES:
        options = RouterOptions(top_k=2, score_order=order, norm_topk_probs=norm)
        found = fast_choices(logits, options)
        over_all = order is ScoreOrder.SOFTMAX_THEN_TOPK and not norm
        whole = logits.softmax(dim=1).gather(1, found.topk_idx)
        expected = whole if over_all else logits.gather(1, found.topk_idx).softmax(dim=1)
        assert torch.equal(found.scores.isnan(), expected.isnan())
        assert_near(found.scores.nan_to_num(7.0), expected.nan_to_num(7.0), 16)


@pytest.mark.fast
def test_scores_at_the_ends_of_the_range(pool: RankPool) -> None:
    pool.run(scores_at_the_ends_of_the_range, world_size=1)


def norm_after_softmax_of_the_chosen(rank: Rank, backend: str) -> None:
    x, weight, options = randn(rank, 6, 16, seed=1), randn(rank, 8, 16, seed=2), RouterOptions(top_k=3)
    plain, normed = (
        routed(rank, backend, x, weight, replace(options, norm_topk_probs=norm)).topk_scores for norm in (False, True)
    )
    assert_near(plain, normed, 4)


@both_backends
def test_norm_changes_nothing_after_a_softmax_over_the_chosen(pool: RankPool, backend: str) -> None:
    pool.run(norm_after_softmax_of_the_chosen, backend, world_size=1)


def logits_carry_gradients(rank: Rank, backend: str) -> None:
    x, weight = randn(rank, 6, 16, seed=1).requires_grad_(), randn(rank, 8, 16, seed=2).requires_grad_()
    routing = routed(rank, backend, x, weight, RouterOptions(top_k=2))
    assert not routing.topk_idx.requires_grad
    routing.logits.sum().backward()
    assert_near(x.grad, weight.detach().sum(dim=0).expand(6, 16), 16)
    assert_near(weight.grad, x.detach().sum(dim=0).expand(8, 16), 16)


@both_backends
def test_logits_carry_gradients_to_x_and_weight(pool: RankPool, backend: str) -> None:
    pool.run(logits_carry_gradients, backend, world_size=1)


def gradients(rank: Rank, backend: str, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Through logits, through scores, and through both, against fp64."""
    num_tokens, hidden, num_experts, top_k = 37, 48, 24, 4
    x = randn(rank, num_tokens, hidden, seed=1).div(hidden**0.5).to(x_dtype).requires_grad_()
    weight = randn(rank, num_experts, hidden, seed=2).to(weight_dtype).requires_grad_()
    through_logits = randn(rank, num_tokens, num_experts, seed=3)
    through_scores = randn(rank, num_tokens, top_k, seed=4)

    def of_loss(logits_TE: Tensor, scores_TK: Tensor, by: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        parts = {"logits": (through_logits.to(logits_TE) * logits_TE).sum()}
        parts["scores"] = (through_scores.to(scores_TK) * scores_TK).sum()
        return torch.autograd.grad(sum(parts[name] for name in by.split("+")), inputs)

    for order, norm in ALL_SCORES:
        options = RouterOptions(top_k=top_k, score_order=order, norm_topk_probs=norm)
        for by in ("logits", "scores", "logits+scores"):
            exact = tuple(tensor.detach().double().requires_grad_() for tensor in (x, weight))
            idx = routed(rank, backend, x.detach(), weight.detach(), options).topk_idx
            logits = exact[0] @ exact[1].T
            truths = of_loss(logits, expected_scores(logits, idx, order, norm), by, exact)
            found, plain = (
                of_loss(routing.logits, routing.topk_scores, by, (x, weight))
                for routing in (routed(rank, name, x, weight, options) for name in (backend, "reference"))
            )
            for got, truth, comparison, like in zip(found, truths, plain, (x, weight), strict=True):
                assert got.dtype == like.dtype
                if got.dtype == torch.float32:
                    assert_near(got, truth, 16)
                else:
                    assert_as_accurate(got, truth, comparison, f"{order} {norm} {by}")


DTYPES_OF_X_AND_WEIGHT = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]


@both_backends
@pytest.mark.parametrize(("x_dtype", "weight_dtype"), DTYPES_OF_X_AND_WEIGHT, ids=str)
def test_gradients_of_logits_and_scores(
    pool: RankPool, backend: str, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    pool.run(gradients, backend, x_dtype, weight_dtype, world_size=1)


def parts_of_a_gradient(rank: Rank) -> None:
    from sonic_ep.fast.router import bf16_parts

    given = randn(rank, 70, 300, seed=1) * torch.logspace(-20, 20, 300, device=rank.device)
    given[0, :4] = torch.tensor([INF, -INF, NAN, -0.0])
    parts = bf16_parts(given)
    assert parts.shape == (70, 3, 300)
    high, middle, low = parts.float().unbind(dim=1)
    sums = high + (middle + low)
    assert bool(sums[0, 2].isnan())
    assert torch.equal(sums.nan_to_num(7.0, INF, -INF), given.nan_to_num(7.0, INF, -INF))
    assert bf16_parts(given[:0]).shape == (0, 3, 300)


@pytest.mark.fast
def test_bf16_parts_of_a_gradient_hold_all_its_bits(pool: RankPool) -> None:
    pool.run(parts_of_a_gradient, world_size=1)


def examples_of_the_docstrings(rank: Rank) -> None:
    from sonic_ep.fast.router import bf16_parts, logits_gradient
    from sonic_ep.fast.router import choose_experts as fast_choices

    logits = torch.tensor([[0.0, log(2.0), 0.0]], device=rank.device)
    over_all = RouterOptions(top_k=2, score_order=ScoreOrder.SOFTMAX_THEN_TOPK)
    for options, expected in ((over_all, [2 / 4, 1 / 4]), (RouterOptions(top_k=2), [2 / 3, 1 / 3])):
        found = fast_choices(logits, options)
        assert found.topk_idx.tolist() == [[1, 0]]
        assert_near(found.scores, torch.tensor([expected], device=rank.device), 8)
    found = fast_choices(logits, over_all)
    routing = Routing(logits=logits, topk_idx=found.topk_idx, topk_scores=found.scores)
    given = torch.tensor([[1.0, 0.0]], device=rank.device)
    grad = logits_gradient(routing, given, over_all)
    assert_near(grad, torch.tensor([[-1 / 8, 1 / 4, -1 / 8]], device=rank.device), 8)
    parts = bf16_parts(torch.tensor([[1 + 2**-9 + 2**-20]], device=rank.device))
    assert parts.flatten().tolist() == [1, 2**-9, 2**-20]


@pytest.mark.fast
def test_examples_of_the_docstrings(pool: RankPool) -> None:
    pool.run(examples_of_the_docstrings, world_size=1)


def frozen_inputs(rank: Rank, backend: str) -> None:
    x, weight = randn(rank, 6, 16, seed=1).bfloat16(), randn(rank, 8, 16, seed=2).bfloat16()
    options = RouterOptions(top_k=2)
    free = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    routed(rank, backend, *free, options).topk_scores.square().sum().backward()
    for trained in (0, 1):
        inputs = [x.clone(), weight.clone()]
        inputs[trained].requires_grad_()
        routed(rank, backend, *inputs, options).topk_scores.square().sum().backward()
        assert inputs[1 - trained].grad is None
        assert_bitwise(inputs[trained].grad, free[trained].grad)
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            assert not routed(rank, backend, *free, options).logits.requires_grad
    with torch.inference_mode():
        made_in_inference = x.clone()
    weight.requires_grad_()
    routed(rank, backend, made_in_inference, weight, options).topk_scores.square().sum().backward()
    assert_bitwise(weight.grad, free[1].grad)


@both_backends
def test_only_gradients_that_are_required_are_made(pool: RankPool, backend: str) -> None:
    pool.run(frozen_inputs, backend, world_size=1)


def what_is_saved(rank: Rank) -> None:
    x, weight = randn(rank, 6, 16).requires_grad_(), randn(rank, 8, 16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda _: None):
        routed(rank, "fast", x, weight, RouterOptions(top_k=2))
    places = [tensor.data_ptr() for tensor in saved]
    assert weight.data_ptr() in places
    assert x.data_ptr() not in places, "tokens are not kept for a weight that is frozen"


@pytest.mark.fast
def test_a_frozen_router_keeps_no_tokens(pool: RankPool) -> None:
    pool.run(what_is_saved, world_size=1)


def no_tokens(rank: Rank, backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(0, 16, device=rank.device, dtype=dtype, requires_grad=True)
        weight = randn(rank, 8, 16).to(dtype).requires_grad_()
        routing = routed(rank, backend, x, weight, RouterOptions(top_k=2))
        assert routing.logits.shape == (0, 8)
        assert routing.topk_idx.shape == routing.topk_scores.shape == (0, 2)
        (routing.logits.sum() + routing.topk_scores.sum()).backward()
        assert x.grad.shape == (0, 16)
        assert_bitwise(weight.grad, torch.zeros_like(weight))


@both_backends
def test_no_tokens(pool: RankPool, backend: str) -> None:
    pool.run(no_tokens, backend, world_size=1)


def autocast(rank: Rank, backend: str) -> None:
    """Autocast changes no bit, forward or backward, of a router that is called by itself."""
    bits = []
    for enabled in (False, True):
        x, weight = randn(rank, 6, 16, seed=1).requires_grad_(), randn(rank, 8, 16, seed=2).requires_grad_()
        with torch.autocast(rank.device.type, torch.bfloat16, enabled=enabled):
            routing = routed(rank, backend, x, weight, RouterOptions(top_k=2))
            routing.topk_scores.square().sum().backward()
        bits.append((routing.logits, routing.topk_scores, x.grad, weight.grad))
    for plain, under_autocast in zip(*bits, strict=True):
        assert_bitwise(under_autocast, plain)


@pytest.mark.fast
def test_autocast_leaves_the_bits_alone(pool: RankPool) -> None:
    pool.run(autocast, "fast", world_size=1)
