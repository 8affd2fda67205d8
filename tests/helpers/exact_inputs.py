"""Inputs of which no order of summation rounds anything, and the certificate that says so.

All inputs are whole numbers and all scores powers of two. So every product and every sum is a multiple of a known unit,
and where the sum of all absolute values, in that unit, fits the significand of the dtype, each intermediate is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from random_cases import Example, Kind
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.backend import Experts
from sonic_ep.config import ScoreOrder
from sonic_ep.reference.dense import dense_scores
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing import Case, Inputs

SCORES = (0.5, 1.0, 2.0)
# Of both kinds of scores: a half, and a quarter squared and squared again, as it stands in the gradient of a softmax.
UNIT_OF_ROUTED, UNIT_OF_ROUTER = 2.0**-1, 2.0**-8
# exp(-APART) is nothing beside 1 in fp64, and nothing at all in fp32.
APART = 128
MOST_TIED = 4
# Candidates drawn for each token of a router.
CANDIDATES = 24
# Of inputs: the less there is room for, the smaller.
LARGEST = MappingProxyType({torch.float32: 3, torch.float16: 2, torch.bfloat16: 1})
# A share of entries that are not zero is tried after the other, until the certificate holds.
SHARES = tuple(0.75**step for step in range(24))


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draws whole numbers of one share of entries that are not zero."""

    generator: torch.Generator
    share: float
    most: int
    dtype: torch.dtype

    def whole(self, *shape: int) -> Tensor:
        """Whole numbers from ``-most`` to ``most``, most of them zero where the share is small."""
        values = torch.randint(-self.most, self.most + 1, shape, generator=self.generator)
        return (values * (torch.rand(shape, generator=self.generator) < self.share)).to(self.dtype)


def exact_inputs(example: Example) -> Inputs:
    """The inputs of an exact example, on the CPU; the densest of which the certificate holds."""
    for place, share in enumerate(SHARES):
        generator = torch.Generator().manual_seed(example.case.seed * len(SHARES) + place)
        most = LARGEST[example.case.dtype]
        draw = Draw(generator=generator, share=share, most=most, dtype=example.case.dtype)
        inputs = _routed(example, draw) if example.kind is Kind.EXACT_ROUTED else _with_router(example, draw)
        if _fits(inputs, example.kind):
            return inputs
    raise AssertionError(f"seed {example.seed}: no share of entries makes its sums fit {example.case.dtype}")


def _group_tokens(example: Example) -> int:
    return sum(example.case.tokens_of_rank(rank) for rank in range(example.world_size))


def _routed(example: Example, draw: Draw) -> Inputs:
    tokens, case = _group_tokens(example), example.case
    choice_NK = torch.randint(len(SCORES), (tokens, case.top_k), generator=draw.generator)
    return Inputs(
        case=case,
        world_size=example.world_size,
        x=draw.whole(tokens, case.hidden),
        dy=draw.whole(tokens, case.hidden),
        topk_idx=case.choose(draw.generator, tokens, case, example.world_size).to(example.ids_dtype),
        topk_scores=torch.tensor(SCORES)[choice_NK].to(example.scores_dtype),
        router_w=draw.whole(case.num_experts, case.hidden),
        dlogits=torch.zeros(tokens, case.num_experts),
        experts=_experts(case, draw),
    )


def _experts(case: Case, draw: Draw) -> Experts:
    width = ACTIVATIONS[case.activation].up_width(case.intermediate)
    return Experts(
        w1=draw.whole(case.num_experts, width, case.hidden),
        w2=draw.whole(case.num_experts, case.hidden, case.intermediate),
        b1=draw.whole(case.num_experts, width) if case.bias else None,
        b2=draw.whole(case.num_experts, case.hidden) if case.bias else None,
        activation=ACTIVATIONS[case.activation],
        layout=GATE_LAYOUTS[case.gate_layout],
    )


def _with_router(example: Example, draw: Draw) -> Inputs:
    """Logits tie, or are so far apart that the smaller one counts for nothing; a softmax of them is exact.

    In half precision a token has one expert, with the score 1: 128 times a gradient would not fit.
    """
    tokens, case = _group_tokens(example), example.case
    router_w_EH = _router_of_classes(case, draw)
    candidates_MH = draw.whole(CANDIDATES * tokens, case.hidden)
    good_M = _exact_softmax(candidates_MH, router_w_EH, case)
    if case.dtype == torch.float32 and int(good_M.sum()) >= tokens:
        x = candidates_MH[good_M][:tokens]
    else:
        case = replace(case, top_k=1, score_order=ScoreOrder.TOPK_THEN_SOFTMAX)
        x, router_w_EH = candidates_MH[:tokens], draw.whole(case.num_experts, case.hidden)
    # Logits are whole numbers that fp32 holds: their order, and so the choice, has one right answer.
    logits_NE = x.double() @ router_w_EH.double().T
    idx_NK = choose_experts(logits_NE, case.top_k)
    return Inputs(
        case=case,
        world_size=example.world_size,
        x=x,
        dy=draw.whole(tokens, case.hidden),
        topk_idx=idx_NK,
        topk_scores=dense_scores(logits_NE, idx_NK, case.router_options()).float(),
        router_w=router_w_EH,
        dlogits=draw.whole(tokens, case.num_experts).float(),
        experts=_experts(case, draw),
    )


def _router_of_classes(case: Case, draw: Draw) -> Tensor:
    """(E, H): experts share their row with one or two or three others, somewhere among the E."""
    classes = max(1, case.num_experts // int(torch.tensor([1, 2, 4])[torch.randint(3, (), generator=draw.generator)]))
    rows_CH = torch.randint(-1, 2, (classes, case.hidden), generator=draw.generator).to(draw.dtype) * APART
    order_E = torch.randperm(case.num_experts, generator=draw.generator)
    return rows_CH[order_E % classes]


def _exact_softmax(x_MH: Tensor, router_w_EH: Tensor, case: Case) -> Tensor:
    """(M,): whether the largest logits, of all and of those chosen, are 1, 2 or 4 equal ones."""
    logits_ME = x_MH.double() @ router_w_EH.double().T
    tied_M = (logits_ME == logits_ME.amax(dim=1, keepdim=True)).sum(dim=1)
    chosen_M = tied_M.clamp(max=case.top_k)
    powers = torch.tensor([1, 2, MOST_TIED])
    good_M = torch.isin(chosen_M, powers)
    return good_M if case.score_order is ScoreOrder.TOPK_THEN_SOFTMAX else good_M & torch.isin(tied_M, powers)


def _fits(inputs: Inputs, kind: Kind) -> bool:
    """Whether every intermediate of forward and backward, in its unit, fits the significand of the dtype."""
    room = 2 / torch.finfo(inputs.case.dtype).eps
    found = _largest(inputs)
    if kind is Kind.EXACT_ROUTED:
        return found.layer <= UNIT_OF_ROUTED * room and found.scores <= UNIT_OF_ROUTED * FP32_ROOM
    if inputs.case.top_k == 1 and inputs.case.dtype != torch.float32:
        # The score is 1, and its gradient is multiplied with a zero of the softmax.
        return found.layer + found.router_without_scores <= room and found.scores <= FP32_ROOM
    return (
        found.layer <= room / MOST_TIED / 2
        and found.router <= UNIT_OF_ROUTER * FP32_ROOM
        # What stands beside APART has a unit as many times as large.
        and found.router_times_weight <= UNIT_OF_ROUTER * FP32_ROOM / 2
    )


FP32_ROOM = 2 / torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class Largest:
    """Upper bounds of the magnitude of every partial sum, in any order.

    layer: of what the layer computes. scores: of gradients of scores. router: of what the router's backward computes
    from them, but for x; router_times_weight: of that for x, over ``APART``. router_without_scores: of what it makes
    of the gradient of the logits alone.
    """

    layer: float
    scores: float
    router: float
    router_times_weight: float
    router_without_scores: float


def _largest(inputs: Inputs) -> Largest:
    """All inputs with their absolute values, and no derivative smaller than it may be."""
    token_S, choice_S = (inputs.topk_idx >= 0).nonzero(as_tuple=True)
    expert_S = inputs.topk_idx[token_S, choice_S].long()
    score_S1 = inputs.topk_scores.double().abs()[token_S, choice_S, None]
    x_SH, dy_SH = (tensor.double().abs()[token_S] for tensor in (inputs.x, inputs.dy))
    w1, w2 = (weight.double().abs() for weight in (inputs.experts.w1, inputs.experts.w2))
    b1, b2 = (None if bias is None else bias.double().abs() for bias in (inputs.experts.b1, inputs.experts.b2))
    hidden_SF = torch.einsum("sfh,sh->sf", w1[expert_S], x_SH) + (0 if b1 is None else b1[expert_S])
    hidden_SF = hidden_SF.requires_grad_()
    activated_SI = inputs.experts.activation(hidden_SF, inputs.experts.layout)
    y_SH = torch.einsum("shi,si->sh", w2[expert_S], activated_SI.detach()) + (0 if b2 is None else b2[expert_S])
    # Weighted before or after the product: whichever is larger.
    weighted_SH = dy_SH * score_S1.clamp(min=1)
    dactivated_SI = torch.einsum("sh,shi->si", weighted_SH, w2[expert_S])
    (dhidden_SF,) = torch.autograd.grad(activated_SI, hidden_SF, dactivated_SI)
    dx_SH = torch.einsum("sf,sfh->sh", dhidden_SF, w1[expert_S])
    activated_SI, hidden_SF = activated_SI.detach() * score_S1.clamp(min=1), hidden_SF.detach()
    tokens, experts = inputs.x.shape[0], w1.shape[0]
    over_experts = [
        torch.einsum("sf,sh->sfh", dhidden_SF, x_SH),
        torch.einsum("sh,si->shi", weighted_SH, activated_SI),
        dhidden_SF,
        weighted_SH,
    ]
    over_tokens = [y_SH * score_S1.clamp(min=1), dx_SH]
    sums = [_summed(part, expert_S, experts) for part in over_experts]
    sums += [_summed(part, token_S, tokens) for part in over_tokens]
    dscore_T = _summed((dy_SH * y_SH).sum(dim=1), token_S, tokens)
    dlogits_TE = inputs.dlogits.double().abs()
    # d(logit) = s (g - sum of s g); divided by the sum of the chosen, each g is up to MOST_TIED times as large, twice.
    softmax_T = dscore_T * (4 * MOST_TIED if inputs.case.norm_topk_probs else 2)
    every_TE = dlogits_TE + softmax_T[:, None]
    weight_EH, x_TH = inputs.router_w.double().abs(), inputs.x.double().abs()
    return Largest(
        layer=_max(*sums, hidden_SF, activated_SI, dactivated_SI, dhidden_SF, y_SH),
        scores=_max(dscore_T),
        router=_max(every_TE, every_TE.T @ x_TH),
        router_times_weight=_max(every_TE @ weight_EH) / APART + _max(*sums) / APART,
        router_without_scores=_max(dlogits_TE.T @ x_TH, dlogits_TE @ weight_EH),
    )


def _summed(part: Tensor, index: Tensor, size: int) -> Tensor:
    return part.new_zeros((size, *part.shape[1:])).index_add(0, index, part)


def _max(*tensors: Tensor) -> float:
    return max((float(tensor.max()) for tensor in tensors if tensor.numel()), default=0.0)
