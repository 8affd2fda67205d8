"""Dispatch by all-to-all, the plain definition: one row for each slot, straight into canonical order."""

from torch import Tensor

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.plan import slot_exchange


class AllToAllDispatch:
    """Every rank receives one row for each slot that is routed to it."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives

    def receive(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """(R, H) in canonical row order; zeros past the valid rows."""
        exchange = slot_exchange(plan)
        sent_NH, splits = x_TH[exchange.slots // plan.top_k], (exchange.send_splits, exchange.receive_splits)
        rows_RH = x_TH.new_zeros((plan.row_capacity, *x_TH.shape[1:]))
        rows_RH[exchange.rows] = self._collectives.all_to_all_rows(sent_NH, *splits)
        return rows_RH

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """None: rows arrive in canonical order."""
        return None
