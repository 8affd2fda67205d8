"""Predicted costs against counting, and what "auto" makes of them; counted traffic against moving every row."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from sonic_ep import CombineMode, DispatchMode, EPConfig, RoutingPlan, cost
from sonic_ep.cost import RankCounts, Traffic, Workload, choose_modes, combine_traffic, dispatch_traffic, rank_counts
from sonic_ep.reference.plan import build_plan
from sonic_ep.testing import CASES, Case, draw

# Of each rank its tokens, of each token the ranks of its slots that are not dropped.
Owners = list[list[list[int]]]
# Rows in the memory of a rank (the first) that move from one rank (the second) to another (the third): so many.
Moves = Iterator[tuple[int, int, int, int]]


def test_worked_example() -> None:
    """The example of ``sonic_ep.plan``: rows of rank 0 (6 valid, 3 of them remote) and of rank 1 (5, 3 of them)."""
    matrices = {"pair_tokens": [[2, 2], [2, 2]], "pair_slots": [[3, 3], [3, 2]]}
    first, second = (rank_counts(rank, max_tokens=3, tokens=3, **matrices) for rank in range(2))
    assert dispatch_traffic(first, 1) == {
        # Stage 3 + 3; copy its own 3 + 3; serve 3; write 3 received.
        DispatchMode.ALL_GATHER: Traffic(link_in=3, link_out=3, memory=18),
        # Stage 3 + 3; read 2 of its own; serve 2; write 6 rows, or the 4 tokens they are copies of.
        DispatchMode.ALL_TO_ALL: Traffic(link_in=2, link_out=2, memory=16),
        DispatchMode.RANK_DEDUP: Traffic(link_in=2, link_out=2, memory=14),
    }
    assert combine_traffic(first, 1) == {
        # Read 6 rows; 3 (or 2) arrive and are read; write 3 tokens.
        CombineMode.ALL_TO_ALL: Traffic(link_in=3, link_out=3, memory=15),
        CombineMode.REDUCE_SCATTER: Traffic(link_in=3, link_out=3, memory=15),
        CombineMode.RANK_DEDUP: Traffic(link_in=2, link_out=2, memory=13),
    }
    assert (cost.staging_bytes(first, 1), cost.staging_bytes(second, 4)) == (6, 24)
    assert dispatch_traffic(second, 4)[DispatchMode.ALL_TO_ALL] == Traffic(link_in=8, link_out=8, memory=60)
    assert combine_traffic(second, 4)[CombineMode.ALL_TO_ALL] == Traffic(link_in=12, link_out=12, memory=56)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_auto_picks_modes_and_a_choice_of_the_caller_stands(world_size: int, top_k: int) -> None:
    load = Workload(world_size=world_size, top_k=top_k, num_experts=64)
    auto = choose_modes(EPConfig(), load)
    assert isinstance(auto.dispatch, DispatchMode)
    assert isinstance(auto.combine, CombineMode)
    for dispatch, combine in product(DispatchMode, CombineMode):
        chosen = choose_modes(EPConfig(dispatch=dispatch, combine=combine), load)
        assert (chosen.dispatch, chosen.combine) == (dispatch, combine)
        half = choose_modes(EPConfig(dispatch=dispatch), load)
        assert (half.dispatch, half.combine) == (dispatch, auto.combine)


def test_auto_takes_the_cheapest() -> None:
    load = Workload(world_size=8, top_k=2, num_experts=64)
    # A token goes to fewer than two of seven other ranks: nobody gathers every token for that.
    assert choose_modes(EPConfig(), load).dispatch is DispatchMode.ALL_TO_ALL
    for seconds_per_byte in (cost.dispatch_seconds_per_byte, cost.combine_seconds_per_byte):
        assert all(seconds > 0 for seconds in seconds_per_byte(load, cost.H200_NVLINK).values())
    slow_memory = replace(cost.H200_NVLINK, memory=1.0)
    fast_engine = replace(cost.H200_NVLINK, copy_engine=1e15, memory=1e15)
    assert choose_modes(EPConfig(), load, slow_memory).dispatch is DispatchMode.ALL_TO_ALL
    assert choose_modes(EPConfig(), load, fast_engine).dispatch is DispatchMode.ALL_GATHER
    # Partial sums win where a token has several slots on a rank.
    chosen = choose_modes(EPConfig(), Workload(world_size=2, top_k=8, num_experts=64))
    assert chosen.combine is CombineMode.RANK_DEDUP


def read(at: int, by: int, rows: int = 1) -> tuple[int, int, int, int]:
    return at, at, by, rows


def write(at: int, by: int, rows: int = 1) -> tuple[int, int, int, int]:
    return at, by, at, rows


def dispatched(owners: Owners, max_tokens: int, mode: DispatchMode) -> Moves:
    """Tokens are staged where they are; owners read them there and write what they receive."""
    ranks = range(len(owners))
    for source in ranks:
        tokens = len(owners[source])
        if len(ranks) > 1:
            yield from (read(source, source, tokens), write(source, source, tokens))
        for owner in ranks if mode is DispatchMode.ALL_GATHER else ():
            rows = tokens if source == owner else max_tokens
            yield from (read(source, owner, rows), write(owner, owner, rows))
    for source, owner, slots in () if mode is DispatchMode.ALL_GATHER else pairs_of(owners):
        yield from (read(source, owner), write(owner, owner, slots if mode is DispatchMode.ALL_TO_ALL else 1))


def combined(owners: Owners, max_tokens: int, mode: CombineMode) -> Moves:
    """Owners read their rows and write what they send; origins read that and write their tokens."""
    ranks = range(len(owners))
    sent = {
        CombineMode.ALL_TO_ALL: slots_of(owners),
        CombineMode.REDUCE_SCATTER: [(p, q) for p in ranks for _ in owners[p] for q in ranks],
        CombineMode.RANK_DEDUP: [(origin, owner) for origin, owner, _ in pairs_of(owners)],
    }
    yield from (read(owner, owner) for _, owner in slots_of(owners))
    for origin, owner in sent[mode]:
        if origin != owner:
            yield from (write(origin, owner), read(origin, origin))
    for origin in ranks:
        tokens = len(owners[origin])
        yield write(origin, origin, tokens)
        for owner in set(ranks) - {origin} if mode is CombineMode.REDUCE_SCATTER else ():
            yield write(origin, owner, max_tokens - tokens)


def slots_of(owners: Owners) -> list[tuple[int, int]]:
    """(source, owner) of every slot."""
    return [(p, q) for p, tokens in enumerate(owners) for slots in tokens for q in slots]


def pairs_of(owners: Owners) -> list[tuple[int, int, int]]:
    """(source, owner, slots there) of every distinct pair of a token and a rank."""
    return [(p, q, slots.count(q)) for p, tokens in enumerate(owners) for slots in tokens for q in set(slots)]


def traffic_of(moves: Iterable[tuple[int, int, int, int]], row_bytes: int, world_size: int) -> list[Traffic]:
    """Of every rank."""
    memory, into, out_of = Counter[int](), Counter[int](), Counter[int]()
    for at, source, target, rows in moves:
        memory[at] += rows * row_bytes
        if source != target:
            into[target] += rows * row_bytes
            out_of[source] += rows * row_bytes
    return [Traffic(link_in=into[rank], link_out=out_of[rank], memory=memory[rank]) for rank in range(world_size)]


def plans_of(case: Case, world_size: int) -> list[RoutingPlan]:
    """The plan of every rank. C exceeds every T, so that no test takes one for the other."""
    tokens = [case.tokens_of_rank(rank) for rank in range(world_size)]
    ids_WCK = torch.full((world_size, max(tokens) + 2, case.top_k), -1, dtype=torch.int32)
    for rank, ids_TK in enumerate(draw(case, world_size).topk_idx.split(tokens)):
        ids_WCK[rank, : len(ids_TK)] = ids_TK
    sizes = {"num_experts": case.num_experts, "row_capacity": ids_WCK.numel()}
    return [build_plan(ids_WCK, rank=rank, num_tokens=held, **sizes) for rank, held in enumerate(tokens)]


def counts_of(owners: Owners, max_tokens: int) -> list[RankCounts]:
    ranks = range(len(owners))
    of_slots, of_pairs = Counter(slots_of(owners)), Counter((p, q) for p, q, _ in pairs_of(owners))
    slots, pairs = ([[count[p, q] for q in ranks] for p in ranks] for count in (of_slots, of_pairs))
    sizes = {"max_tokens": max_tokens, "pair_tokens": pairs, "pair_slots": slots}
    return [rank_counts(rank, tokens=len(owners[rank]), **sizes) for rank in ranks]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_traffic_by_moving_every_row(case: Case, world_size: int) -> None:
    plans = plans_of(case, world_size)
    held, most = plans[0].experts_per_rank, plans[0].max_tokens
    # From the ids alone: every other field of a plan is derived.
    owners = [
        [[expert // held for expert in slots if expert >= 0] for slots in tokens[: plan.num_tokens]]
        for plan, tokens in zip(plans, plans[0].expert_ids.tolist(), strict=True)
    ]
    counts, row_bytes = counts_of(owners, most), case.hidden * case.dtype.itemsize
    for modes, predicted, moves in (
        (DispatchMode, dispatch_traffic, dispatched),
        (CombineMode, combine_traffic, combined),
    ):
        for mode in modes:
            found = [predicted(count, row_bytes)[mode] for count in counts]
            assert found == traffic_of(moves(owners, most, mode), row_bytes, world_size), mode
            # What one rank sends another receives, and one rank alone uses no link.
            assert sum(rank.link_in for rank in found) == sum(rank.link_out for rank in found)
            assert world_size > 1 or (found[0].link_in, found[0].link_out) == (0, 0)
    ids, shape = plans[0].expert_ids[1:].nbytes, {"world_size": world_size, "max_tokens": most, "top_k": case.top_k}
    # Scores are fp32, as wide as an id.
    assert [cost.exchange_link_bytes(**shape, with_scores=scores) for scores in (False, True)] == [ids, 2 * ids]
    for plan, count in zip(plans, counts, strict=True):
        assert (count.rows, count.packed_rows) == (plan.rows(), plan.packed_rows())
        # What callers count by.
        slots = [[int((owner == q).sum()) for q in range(world_size)] for owner in plan.owner_of_slot()]
        sizes = {"max_tokens": most, "tokens": plan.num_tokens, "pair_tokens": plan.pair_tokens.tolist()}
        assert rank_counts(plan.rank, **sizes, pair_slots=slots) == count
        assert cost.staging_bytes(count, 10) == (2 * plan.num_tokens * 10 if world_size > 1 else 0)
        gather = 2 * plan.rows() * 10
        expected = {DispatchMode.ALL_GATHER: gather, DispatchMode.ALL_TO_ALL: 0, DispatchMode.RANK_DEDUP: gather}
        assert cost.canonical_gather_bytes(count, 10) == expected


@pytest.mark.parametrize(
    ("world_size", "top_k", "num_experts"), [(2, 3, 8), (4, 2, 8), (3, 4, 9), (1, 2, 4), (2, 4, 4)]
)
def test_predicted_rows_are_those_of_every_choice_made_once(world_size: int, top_k: int, num_experts: int) -> None:
    held = num_experts // world_size
    choices = [[expert // held for expert in chosen] for chosen in combinations(range(num_experts), top_k)]
    tokens, load = len(choices), Workload(world_size=world_size, top_k=top_k, num_experts=num_experts)
    assert load.remote_pairs == pytest.approx(sum(len(set(owners) - {0}) for owners in choices) / tokens)
    assert load.remote_slots == pytest.approx(sum(owner > 0 for owners in choices for owner in owners) / tokens)
    counts = counts_of([choices] * world_size, tokens)[0]
    dispatch, combine = (
        {mode: traffic.link_in / tokens for mode, traffic in by_mode(counts, 1).items()}
        for by_mode in (dispatch_traffic, combine_traffic)
    )
    expected = {DispatchMode.ALL_TO_ALL: load.remote_pairs, DispatchMode.RANK_DEDUP: load.remote_pairs}
    assert dispatch == pytest.approx({**expected, DispatchMode.ALL_GATHER: load.remote_ranks})
    expected = {CombineMode.RANK_DEDUP: load.remote_pairs, CombineMode.REDUCE_SCATTER: load.remote_ranks}
    assert combine == pytest.approx({**expected, CombineMode.ALL_TO_ALL: load.remote_slots})
