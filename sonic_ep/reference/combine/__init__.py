"""Combine: rows of experts return to the ranks of their tokens, weighted and summed."""

from sonic_ep.backend import CombinePrimitive
from sonic_ep.config import CombineMode
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.reference.combine.all_to_all import AllToAllCombine
from sonic_ep.reference.combine.rank_dedup import RankDedupCombine
from sonic_ep.reference.combine.reduce_scatter import ReduceScatterCombine


def combine_primitives(collectives: BoundedCollectives) -> dict[CombineMode, CombinePrimitive]:
    """Every combine mode over ``collectives``."""
    return {
        CombineMode.ALL_TO_ALL: AllToAllCombine(collectives),
        CombineMode.REDUCE_SCATTER: ReduceScatterCombine(collectives),
        CombineMode.RANK_DEDUP: RankDedupCombine(collectives),
    }
