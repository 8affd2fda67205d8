"""Calls of ``ExpertParallel`` as ``torch.ops.sonic_ep``: for compilers, export, FakeTensor, selective checkpointing."""

from sonic_ep.ops.exchange import combine, dispatch, plan
from sonic_ep.ops.moe import ByName, moe, moe_routed
from sonic_ep.ops.operator import by_operator, register, registered_now

__all__ = ["ByName", "by_operator", "combine", "dispatch", "moe", "moe_routed", "plan", "register", "registered_now"]
