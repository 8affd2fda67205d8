"""Combine: rows of experts back to the origin ranks of their tokens. Owners push, origin ranks sum."""

from sonic_ep.config import CombineMode
from sonic_ep.fast.combine.all_to_all import AllToAllCombine
from sonic_ep.fast.combine.base import PushedCombine
from sonic_ep.fast.combine.rank_dedup import RankDedupCombine
from sonic_ep.fast.combine.reduce_scatter import ReduceScatterCombine
from sonic_ep.fast.workspace import Workspace


def combine_primitives(workspace: Workspace) -> dict[CombineMode, PushedCombine]:
    """Every combine mode over ``workspace``."""
    return {
        CombineMode.ALL_TO_ALL: AllToAllCombine(workspace),
        CombineMode.REDUCE_SCATTER: ReduceScatterCombine(workspace),
        CombineMode.RANK_DEDUP: RankDedupCombine(workspace),
    }
