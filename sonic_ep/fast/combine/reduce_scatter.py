"""Combine by reduce-scatter: every rank sends a partial sum of every token to its origin rank."""

from sonic_ep.fast.combine.ordered_sum import PartialSums


class ReduceScatterCombine(PartialSums):
    """Two roundings: ``p_q = round(sum over k on q of score_k * y_k)`` on rank q, then ``out = round(sum of p_q)``.

    Both sums are fp32; k ascends in the first, q in the second. A rank without a slot of the token sends +0.
    """

    _dense = True
