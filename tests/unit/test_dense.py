"""The oracle itself, against loops over tokens that share nothing with it, and by finite differences."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.backend import ExpertWeights
from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.reference.dense import dense_moe, dense_scores
from sonic_ep.testing import CASES, Inputs, draw
from sonic_ep.testing.oracle import leaf_experts

WIDE = torch.float64


def token_by_token(inputs: Inputs, experts: ExpertWeights) -> torch.Tensor:
    """SwiGLU experts, written out, interleaved gates."""
    y = torch.zeros(inputs.x.shape, dtype=WIDE)
    for token, chosen in enumerate(inputs.topk_idx.tolist()):
        for k, expert in enumerate(chosen):
            if expert >= 0:
                hidden = experts.w1[expert] @ inputs.x[token].to(WIDE) + experts.b1[expert]
                gate, up = hidden[::2], hidden[1::2]
                out = experts.w2[expert] @ (gate * torch.sigmoid(gate) * up) + experts.b2[expert]
                y[token] += inputs.topk_scores[token, k].to(WIDE) * out
    return y


@pytest.mark.parametrize("case", ["uniform", "dropped_slots", "repeated_experts", "top_all", "no_tokens_at_all"])
def test_against_a_loop_over_tokens(case: str) -> None:
    inputs = draw(CASES[case], 2)
    experts = leaf_experts(inputs.experts, dtype=WIDE)
    y = dense_moe(inputs.x.to(WIDE), inputs.topk_idx, inputs.topk_scores.to(WIDE), experts)
    expected = token_by_token(inputs, experts)
    assert (y - expected).norm() <= 100 * torch.finfo(WIDE).eps * expected.norm()


def test_gradients_by_finite_differences() -> None:
    case = replace(CASES["repeated_experts"], tokens=(3,), hidden=4, intermediate=3, num_experts=4, top_k=2)
    inputs = draw(case, 1)

    def layer(x: torch.Tensor, scores: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        w1, w2, b1, b2 = weights
        experts = ExpertWeights(
            w1=w1, w2=w2, b1=b1, b2=b2, activation=ACTIVATIONS["geglu"], layout=GATE_LAYOUTS["concat"]
        )
        return dense_moe(x, inputs.topk_idx, scores, experts)

    held = leaf_experts(inputs.experts, dtype=WIDE)
    x, scores = (tensor.to(WIDE).requires_grad_() for tensor in (inputs.x, inputs.topk_scores))
    assert torch.autograd.gradcheck(layer, (x, scores, held.w1, held.w2, held.b1, held.b2))


def test_scores() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=WIDE).log1p()
    idx = torch.tensor([[2, 1]])

    def scores(order: ScoreOrder, norm: bool, **settings: Any) -> list[float]:
        options = RouterOptions(top_k=2, score_order=order, norm_topk_probs=norm, **settings)
        return dense_scores(logits, idx, options)[0].tolist()

    # exp(log1p(j)) is j + 1, so the weights are 1, 2 and 3.
    assert scores(ScoreOrder.TOPK_THEN_SOFTMAX, False) == pytest.approx([3 / 5, 2 / 5])
    assert scores(ScoreOrder.SOFTMAX_THEN_TOPK, False) == pytest.approx([3 / 6, 2 / 6])
    assert scores(ScoreOrder.SOFTMAX_THEN_TOPK, True) == pytest.approx([3 / 5, 2 / 5])
    assert scores(ScoreOrder.SOFTMAX_THEN_TOPK, False, scale=12) == pytest.approx([6, 4])
    # Sigmoids of log(j + 1) are (j + 1) / (j + 2).
    for order in ScoreOrder:
        assert scores(order, False, score_function="sigmoid") == pytest.approx([3 / 4, 2 / 3])
        assert scores(order, True, score_function="sigmoid", scale=17) == pytest.approx([9, 8])
