"""Dispatch by all-gather: every rank receives every token, by copy engine."""

from __future__ import annotations

import torch
from torch import Tensor

from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.staging import TOKENS
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan


class AllGatherDispatch:
    """Every rank receives the C tokens of every rank; experts read through ``slot_of_row // K``."""

    def __init__(self, workspace: Workspace) -> None:
        self._gather = CopyEngineGather(workspace, TOKENS)

    def reserve(self, plan: RoutingPlan, row_bytes: int) -> None:
        """Collective. Allocate what ``receive`` needs for rows of ``row_bytes``."""
        self._gather.reserve(plan.capacity, row_bytes)

    def receive(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """(W*C, H): tokens by source rank; unspecified behind the T tokens that a rank has."""
        return self._gather.start(x_TH, plan.capacity).wait()

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """Slot f belongs to token f // K of the gathered ones: with K=2, slots 5 and 9 are of tokens 2 and 4."""
        return torch.div(plan.slot_of_row, plan.top_k, rounding_mode="floor")
