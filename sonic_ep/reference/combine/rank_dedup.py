"""Combine without repetition: one partial sum for each distinct (token, rank) pair returns."""

import torch
from torch import Tensor

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.plan import NO_ROW, RoutingPlan
from sonic_ep.reference.combine.ordered_sum import ordered_sum
from sonic_ep.reference.plan import pair_exchange


class RankDedupCombine:
    """The sums of ``ReduceScatterCombine``, bit for bit, without those of ranks that have no slot of the token."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives

    def combine(self, rows_NH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """(T, H) from rows in canonical order. Rows past the valid ones are not read."""
        here_WCK = plan.row_of_slot.where(plan.owner_of_slot() == plan.rank, NO_ROW)
        packed_M = (plan.packed_of_token.flatten() >= 0).nonzero().squeeze(1)
        weights_MK = None if scores_WCK is None else scores_WCK.flatten(0, 1)[packed_M]
        partial_PH = ordered_sum(rows_NH, here_WCK.flatten(0, 1)[packed_M], weights_MK)
        exchange = pair_exchange(plan)
        received_NH = self._collectives.all_to_all_rows(partial_PH, exchange.receive_splits, exchange.send_splits)
        place_TW = exchange.tokens.new_full((plan.num_tokens, plan.world_size), NO_ROW)
        splits_W = torch.tensor(exchange.send_splits, device=place_TW.device)
        rank_N = torch.arange(plan.world_size, device=place_TW.device).repeat_interleave(splits_W)
        place_TW[exchange.tokens, rank_N] = torch.arange(len(rank_N), device=place_TW.device)
        return ordered_sum(received_NH, place_TW)
