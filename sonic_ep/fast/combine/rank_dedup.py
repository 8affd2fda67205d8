"""Combine without repetition: one partial sum for each distinct (token, rank) pair goes home."""

from __future__ import annotations

from torch import Tensor

from sonic_ep.fast.combine.ordered_sum import exchange_partial_sums, reserve_partial_sums
from sonic_ep.fast.receiving import MOST_RECEIVED_BYTES
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan


class RankDedupCombine:
    """The sums of ``ReduceScatterCombine`` with absent ranks skipped: equal to it bit for bit."""

    def __init__(self, workspace: Workspace, most_bytes: int = MOST_RECEIVED_BYTES) -> None:
        self._workspace = workspace
        self._most_bytes = most_bytes

    def reserve(self, plan: RoutingPlan, row_bytes: int) -> None:
        """Collective. Allocate what ``combine`` needs for rows of ``row_bytes``."""
        reserve_partial_sums(self._workspace, plan, row_bytes, self._most_bytes)

    def combine(self, rows_RH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """(T, H) from rows in canonical order. Rows past the valid ones are not read."""
        return exchange_partial_sums(
            rows_RH, scores_WCK, plan, self._workspace, dense=False, most_bytes=self._most_bytes
        )
