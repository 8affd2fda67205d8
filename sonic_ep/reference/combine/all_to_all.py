"""Combine by all-to-all, the plain definition: one row for each slot returns and is summed there."""

import torch
from torch import Tensor

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.plan import NO_ROW, RoutingPlan
from sonic_ep.reference.combine.ordered_sum import ordered_sum
from sonic_ep.reference.plan import slot_exchange


class AllToAllCombine:
    """``out = round(sum over k of score_k * y_k)`` on the token's rank: fp32, k ascending, one rounding."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives

    def combine(self, rows_NH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """(T, H) from rows in canonical order. Rows past the valid ones are not read."""
        exchange = slot_exchange(plan)
        sent_NH = rows_NH[exchange.rows]
        received_NH = self._collectives.all_to_all_rows(sent_NH, exchange.receive_splits, exchange.send_splits)
        place_TK = exchange.slots.new_full((plan.num_tokens, plan.top_k), NO_ROW)
        place_TK.view(-1)[exchange.slots] = torch.arange(len(exchange.slots), device=place_TK.device)
        scores_TK = None if scores_WCK is None else scores_WCK[plan.rank, : plan.num_tokens]
        return ordered_sum(received_NH, place_TK, scores_TK)
