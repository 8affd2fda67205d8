"""Dispatch: rows of tokens travel to the ranks of their experts."""

from sonic_ep.backend import DispatchPrimitive
from sonic_ep.config import DispatchMode
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.reference.dispatch.all_gather import AllGatherDispatch
from sonic_ep.reference.dispatch.all_to_all import AllToAllDispatch
from sonic_ep.reference.dispatch.rank_dedup import RankDedupDispatch


def dispatch_primitives(collectives: BoundedCollectives) -> dict[DispatchMode, DispatchPrimitive]:
    """Every dispatch mode over ``collectives``."""
    return {
        DispatchMode.ALL_GATHER: AllGatherDispatch(collectives),
        DispatchMode.ALL_TO_ALL: AllToAllDispatch(collectives),
        DispatchMode.RANK_DEDUP: RankDedupDispatch(collectives),
    }
