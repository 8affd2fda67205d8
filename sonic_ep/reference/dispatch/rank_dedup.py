"""Dispatch without repetition: one row for each distinct (token, rank) pair."""

from torch import Tensor

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.plan import pair_exchange


class RankDedupDispatch:
    """Every rank receives each token that has a slot on it once, packed by source rank, then token."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives

    def receive(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """(P, H): the tokens with a slot on this rank, in the order of ``packed_of_token``."""
        exchange = pair_exchange(plan)
        return self._collectives.all_to_all_rows(x_TH[exchange.tokens], exchange.send_splits, exchange.receive_splits)

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """The place of each row's token: with K=2 and ``packed_of_token`` [0, -1, 1], slot 5 is at place 1."""
        token_of_row_N = plan.slot_of_row[: plan.rows()].long() // plan.top_k
        return plan.packed_of_token.flatten()[token_of_row_N].long()
