"""Combine by all-to-all, the plain definition: one row for each slot goes home and is summed there."""

from __future__ import annotations

import torch
from torch import Tensor

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.plan import NO_ROW, RoutingPlan
from sonic_ep.reference.combine.ordered_sum import ordered_sum
from sonic_ep.reference.plan import slot_exchange


class AllToAllCombine:
    """``out = round(sum over k of score_k * y_k)`` on the token's own rank: fp32, k ascending, one rounding."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives

    def combine(self, rows_RH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """(T, H) from rows in canonical order. Rows past the valid ones are not read."""
        exchange = slot_exchange(plan)
        home_NH = self._collectives.all_to_all_rows(
            rows_RH[exchange.rows], exchange.receive_splits, exchange.send_splits
        )
        place_of_slot_TK = _places(exchange.slots, plan.num_tokens, plan.top_k)
        scores_TK = None if scores_WCK is None else scores_WCK[plan.rank, : plan.num_tokens]
        return ordered_sum(home_NH, place_of_slot_TK, scores_TK)


def _places(slots_N: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """Where each slot t*K + k stands in ``slots_N``, (T, K) int64; -1 where it does not."""
    place_F = slots_N.new_full((num_tokens * top_k,), NO_ROW)
    place_F[slots_N] = torch.arange(len(slots_N), device=slots_N.device)
    return place_F.view(num_tokens, top_k)
