"""Combine by reduce-scatter: every rank sums its rows of every token, and the partial sums return."""

import torch
from torch import Tensor

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.plan import NO_ROW, RoutingPlan
from sonic_ep.reference.combine.ordered_sum import ordered_sum


class ReduceScatterCombine:
    """Two roundings: ``p_q = round(sum over k on q of score_k * y_k)`` on rank q, then ``out = round(sum of p_q)``.

    Both sums are fp32; k ascends in the first, q in the second. A rank without a slot of the token adds +0.
    """

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives

    def combine(self, rows_NH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """(T, H) from rows in canonical order. Rows past the valid ones are not read."""
        here_WCK = plan.row_of_slot.where(plan.owner_of_slot() == plan.rank, NO_ROW)
        weights_MK = None if scores_WCK is None else scores_WCK.flatten(0, 1)
        partial_MH = ordered_sum(rows_NH, here_WCK.flatten(0, 1), weights_MK)
        even = [plan.max_tokens] * plan.world_size
        received_MH = self._collectives.all_to_all_rows(partial_MH, even, even)
        first_of_rank_W = torch.arange(plan.world_size, device=rows_NH.device) * plan.max_tokens
        tokens_T = torch.arange(plan.num_tokens, device=rows_NH.device)
        return ordered_sum(received_MH, tokens_T[:, None] + first_of_rank_W)
