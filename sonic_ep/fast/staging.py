"""Tokens in shared memory, where peers can read them: the first half of every dispatch."""

from __future__ import annotations

from torch import Tensor

from sonic_ep.fast.workspace import SharedBuffer, Workspace
from sonic_ep.plan import RoutingPlan

TOKENS = "tokens"


def reserve_tokens(workspace: Workspace, plan: RoutingPlan, row_bytes: int) -> SharedBuffer:
    """Collective. Shared memory for the C tokens of each rank."""
    return workspace.reserve(TOKENS, plan.capacity * row_bytes)


def stage_tokens(x_TH: Tensor, plan: RoutingPlan, workspace: Workspace) -> SharedBuffer:
    """Collective. x (T, H) of every rank where all can read it, until the next call stages there."""
    staged = reserve_tokens(workspace, plan, x_TH.shape[1] * x_TH.element_size())
    if plan.world_size > 1:
        workspace.fence()
        staged.rows(plan.rank, tuple(x_TH.shape), x_TH.dtype).copy_(x_TH)
        workspace.publish()
    return staged
