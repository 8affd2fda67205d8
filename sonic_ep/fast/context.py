"""What the fast backend holds on one device: shared memory, the primitives over it, and the planner."""

import torch

from sonic_ep.config import EPConfig
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.fast.combine import combine_primitives
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.dispatch import dispatch_primitives
from sonic_ep.fast.planner import Planner
from sonic_ep.fast.workspace import Workspace


class DeviceContext:
    """The workspace of one device, every primitive over it, and the planner. Collective: allocates shared memory."""

    def __init__(self, collectives: BoundedCollectives, config: EPConfig, device: torch.device) -> None:
        self.workspace = Workspace(collectives.group, device, collectives=collectives)
        self.planner = Planner(collectives.group, config, self.workspace)
        self.dispatch = dispatch_primitives(self.workspace)
        self.combine = combine_primitives(self.workspace)
        self.gather = CopyEngineGather(self.workspace, "tokens_again")
