"""Tokens in shared memory, where peers can read them: the first half of every dispatch."""

from __future__ import annotations

from torch import Tensor

from sonic_ep.fast.workspace import SharedBuffer, Workspace

TOKENS = "tokens"


def reserve_tokens(workspace: Workspace, capacity: int, row_bytes: int, name: str = TOKENS) -> SharedBuffer:
    """Collective. Shared memory for the C tokens of each rank."""
    return workspace.reserve(name, capacity * row_bytes)


def stage_tokens(x_TH: Tensor, capacity: int, workspace: Workspace, name: str = TOKENS) -> SharedBuffer:
    """Collective. x (T, H) of every rank where all can read it, until the next call stages there."""
    staged = reserve_tokens(workspace, capacity, x_TH.shape[1] * x_TH.element_size(), name)
    group = workspace.group
    if group.world_size > 1:
        workspace.fence()
        staged.rows(group.rank, tuple(x_TH.shape), x_TH.dtype).copy_(x_TH)
        workspace.publish()
    return staged
