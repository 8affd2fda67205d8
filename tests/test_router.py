"""The router: choices, ties, scores, and their gradients against a formula of their own."""

import pytest
import torch
from near import assert_near

from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.group import resolve_group
from sonic_ep.reference.collectives import collectives_of
from sonic_ep.reference.router import choose_experts, route
from sonic_ep.testing import assert_bitwise


def routed(x: torch.Tensor, weight: torch.Tensor, **options: object):
    return route(x, weight, RouterOptions(**options), collectives_of(resolve_group(None)))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_choices_are_the_largest_logits_in_descending_order(top_k: int) -> None:
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    chosen = choose_experts(logits, top_k)
    assert_bitwise(logits.gather(1, chosen), logits.topk(top_k).values)


def test_ties_go_to_the_lower_expert() -> None:
    assert choose_experts(torch.zeros(1, 4), 4).tolist() == [[0, 1, 2, 3]]
    assert choose_experts(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]]), 3).tolist() == [[1, 3, 0]]


def test_ties_are_stable_among_many() -> None:
    assert choose_experts(torch.zeros(3, 300), 300).eq(torch.arange(300)).all()


def test_a_nan_logit_still_yields_experts_that_exist() -> None:
    chosen = choose_experts(torch.full((1, 4), float("nan")), 2)
    assert chosen.tolist() == [[0, 1]]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("order", ScoreOrder)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_fp32_softmax(dtype: torch.dtype, order: ScoreOrder, norm: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 16, generator=generator).to(dtype)
    weight = torch.randn(8, 16, generator=generator).to(dtype)
    routing = routed(x, weight, top_k=3, score_order=order, norm_topk_probs=norm)
    assert routing.logits.dtype == routing.topk_scores.dtype == torch.float32
    exp = (x.double() @ weight.double().T).exp()
    kept = exp.gather(1, routing.topk_idx)
    whole = exp if order is ScoreOrder.SOFTMAX_THEN_TOPK and not norm else kept
    expected = kept / whole.sum(dim=1, keepdim=True)
    assert_near(routing.topk_scores, expected, 100)


def test_norm_changes_nothing_after_a_softmax_over_the_chosen() -> None:
    x, weight = torch.randn(6, 16), torch.randn(8, 16)
    scores = [routed(x, weight, top_k=3, norm_topk_probs=norm).topk_scores for norm in (False, True)]
    assert_near(*scores, 4)


def test_logits_carry_gradients_to_x_and_weight() -> None:
    x = torch.randn(6, 16, requires_grad=True)
    weight = torch.randn(8, 16, requires_grad=True)
    routing = routed(x, weight, top_k=2)
    assert not routing.topk_idx.requires_grad
    routing.logits.sum().backward()
    assert_near(x.grad, weight.detach().sum(dim=0).expand(6, 16), 16)
    assert_near(weight.grad, x.detach().sum(dim=0).expand(8, 16), 16)
