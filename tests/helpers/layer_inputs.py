"""One rank's share of a case, as leaves that require gradients."""

from torch import Tensor

from sonic_ep.testing import Case, Rank, draw
from sonic_ep.testing.oracle import leaf, leaf_experts


def layer_inputs(rank: Rank, case: Case) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, the weights, and the gradient of y, of this rank."""
    inputs = draw(case, rank.world_size, rank.device)
    experts = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    tokens = inputs.tokens_of(rank.rank)
    return leaf(inputs.x[tokens]), [leaf(inputs.router_w), experts.w1, experts.w2], inputs.dy[tokens]


def routing_of(rank: Rank, case: Case) -> tuple[Tensor, Tensor]:
    """topk_idx and topk_scores of this rank."""
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    return inputs.topk_idx[tokens], inputs.topk_scores[tokens]
