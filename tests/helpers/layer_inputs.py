"""One rank's share of a case."""

from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.plan import RoutingPlan
from sonic_ep.testing import Case, Inputs, Rank, draw
from sonic_ep.testing.oracle import leaf, leaf_experts


def layer_inputs(rank: Rank, case: Case) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, the weights (leaves that require gradients), and the gradient of y."""
    inputs = draw(case, rank.world_size, rank.device)
    experts = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    tokens = inputs.tokens_of(rank.rank)
    return leaf(inputs.x[tokens]), [leaf(inputs.router_w), experts.w1, experts.w2], inputs.dy[tokens]


def routing_of(rank: Rank, case: Case) -> tuple[Tensor, Tensor]:
    """topk_idx and topk_scores."""
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    return inputs.topk_idx[tokens], inputs.topk_scores[tokens]


def plan_of(ep: ExpertParallel, inputs: Inputs) -> RoutingPlan:
    return ep.plan(inputs.topk_idx[inputs.tokens_of(ep.rank)], inputs.case.num_experts)
