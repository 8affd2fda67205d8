"""Combine: rows of experts back to the origin ranks of their tokens. Owners push, origin ranks sum."""

from __future__ import annotations

from collections.abc import Mapping

from sonic_ep.config import CombineMode
from sonic_ep.fast.combine.all_to_all import AllToAllCombine
from sonic_ep.fast.combine.rank_dedup import RankDedupCombine
from sonic_ep.fast.combine.reduce_scatter import ReduceScatterCombine
from sonic_ep.fast.workspace import Workspace

FastCombine = AllToAllCombine | ReduceScatterCombine | RankDedupCombine


def combine_primitives(workspace: Workspace) -> Mapping[CombineMode, FastCombine]:
    """Every combine mode over ``workspace``."""
    return {
        CombineMode.ALL_TO_ALL: AllToAllCombine(workspace),
        CombineMode.REDUCE_SCATTER: ReduceScatterCombine(workspace),
        CombineMode.RANK_DEDUP: RankDedupCombine(workspace),
    }
