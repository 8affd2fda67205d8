"""Dispatch by all-gather: every rank receives every token."""

from torch import Tensor

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.plan import pad_tokens


class AllGatherDispatch:
    """Every rank receives the C tokens of every rank; experts read row ``slot_of_row // K``."""

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives

    def receive(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """(W*C, H): tokens by source rank, padded with zeros from T to C."""
        return self._collectives.all_gather(pad_tokens(x_TH, plan.max_tokens, 0)).flatten(0, 1)

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """Slot f is of the gathered token f // K: with K=2, slots 5 and 9 are of tokens 2 and 4."""
        return plan.slot_of_row[: plan.rows()].long() // plan.top_k
