"""Dispatch: tokens to the ranks of their experts. Every rank stages its tokens and pulls those that it needs."""

from sonic_ep.config import DispatchMode
from sonic_ep.fast.dispatch.all_gather import AllGatherDispatch
from sonic_ep.fast.dispatch.all_to_all import AllToAllDispatch
from sonic_ep.fast.dispatch.base import PulledDispatch
from sonic_ep.fast.dispatch.rank_dedup import RankDedupDispatch
from sonic_ep.fast.workspace import Workspace


def dispatch_primitives(workspace: Workspace) -> dict[DispatchMode, PulledDispatch]:
    """Every dispatch mode over ``workspace``."""
    return {
        DispatchMode.ALL_GATHER: AllGatherDispatch(workspace),
        DispatchMode.ALL_TO_ALL: AllToAllDispatch(workspace),
        DispatchMode.RANK_DEDUP: RankDedupDispatch(workspace),
    }
