"""Combine without repetition: one partial sum for each distinct (token, rank) pair goes to the token's origin rank."""

from sonic_ep.fast.combine.ordered_sum import PartialSums


class RankDedupCombine(PartialSums):
    """The sums of ``ReduceScatterCombine`` with absent ranks skipped: equal to it bit for bit."""

    _dense = False
