"""What the fast backend holds on one device: shared memory, the primitives over it, and the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sonic_ep.config import EPConfig
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.fast.combine import combine_primitives
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.dispatch import dispatch_primitives
from sonic_ep.fast.planner import Planner
from sonic_ep.fast.workspace import Workspace

TOKENS_AGAIN = "tokens_again"


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceContext:
    """The workspace of one device, every primitive over it, and the planner."""

    workspace: Workspace
    planner: Planner
    dispatch: Any
    combine: Any
    gather: CopyEngineGather

    @staticmethod
    def make(collectives: BoundedCollectives, config: EPConfig, device: torch.device) -> DeviceContext:
        """Collective: allocates shared memory."""
        workspace = Workspace(collectives.group, device, collectives=collectives)
        return DeviceContext(
            workspace=workspace,
            planner=Planner(collectives.group, config, workspace),
            dispatch=dispatch_primitives(workspace),
            combine=combine_primitives(workspace),
            gather=CopyEngineGather(workspace, TOKENS_AGAIN),
        )
