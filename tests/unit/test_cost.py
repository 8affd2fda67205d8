"""Predicted costs against counting, and what "auto" makes of them; counted traffic against moving every row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import pytest
import torch

from sonic_ep import CombineMode, DispatchMode, EPConfig, RoutingPlan, cost
from sonic_ep.cost import RankCounts, Traffic, Workload, choose_modes, combine_traffic, dispatch_traffic, rank_counts
from sonic_ep.reference.plan import build_plan
from sonic_ep.testing import CASES, Case, draw

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
up_to_four_ranks = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


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
    for costs in (
        cost.dispatch_seconds_per_byte(load, cost.H200_NVLINK),
        cost.combine_seconds_per_byte(load, cost.H200_NVLINK),
    ):
        assert all(seconds > 0 for seconds in costs.values())
    slow_memory = replace(cost.H200_NVLINK, memory=1.0)
    fast_engine = replace(cost.H200_NVLINK, copy_engine=1e15, memory=1e15)
    assert choose_modes(EPConfig(), load, slow_memory).dispatch is DispatchMode.ALL_TO_ALL
    assert choose_modes(EPConfig(), load, fast_engine).dispatch is DispatchMode.ALL_GATHER
    # Partial sums win where a token has several slots on a rank.
    chosen = choose_modes(EPConfig(), Workload(world_size=2, top_k=8, num_experts=64))
    assert chosen.combine is CombineMode.RANK_DEDUP


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A routing as nested lists: owners[p][t] are the ranks of token t's slots, without those dropped, T of rank p."""

    max_tokens: int
    owners: list[list[list[int]]]

    @property
    def ranks(self) -> range:
        return range(len(self.owners))

    def slots(self) -> list[tuple[int, int]]:
        """(source, owner) of every slot."""
        return [(p, q) for p, tokens in enumerate(self.owners) for slots in tokens for q in slots]

    def pairs(self) -> list[tuple[int, int, int]]:
        """(source, owner, slots there) of every distinct pair of a token and a rank."""
        return [(p, q, slots.count(q)) for p, tokens in enumerate(self.owners) for slots in tokens for q in set(slots)]


class Moved:
    """Rows in the memory of rank ``at`` that rank ``by`` reads or writes, counted for each rank."""

    def __init__(self) -> None:
        self.memory, self.link_in, self.link_out = Counter[int](), Counter[int](), Counter[int]()

    def read(self, at: int, *, by: int, times: int = 1) -> None:
        self._count(at, times, source=at, target=by)

    def write(self, at: int, *, by: int, times: int = 1) -> None:
        self._count(at, times, source=by, target=at)

    def _count(self, at: int, times: int, *, source: int, target: int) -> None:
        self.memory[at] += times
        self.link_out[source] += times * (source != target)
        self.link_in[target] += times * (source != target)

    def traffic(self, rank: int, row_bytes: int) -> Traffic:
        link_in, link_out, memory = (rows[rank] * row_bytes for rows in (self.link_in, self.link_out, self.memory))
        return Traffic(link_in=link_in, link_out=link_out, memory=memory)


def dispatched(drawn: Drawn, mode: DispatchMode) -> Moved:
    """Tokens are staged where they are; owners read them there and write what they receive."""
    moved, dense = Moved(), mode is DispatchMode.ALL_GATHER
    for source, tokens in enumerate(map(len, drawn.owners)):
        staged = tokens if len(drawn.ranks) > 1 else 0
        moved.read(source, by=source, times=staged)
        moved.write(source, by=source, times=staged)
        for owner in drawn.ranks if dense else ():
            rows = tokens if source == owner else drawn.max_tokens
            moved.read(source, by=owner, times=rows)
            moved.write(owner, by=owner, times=rows)
    for source, owner, slots in () if dense else drawn.pairs():
        moved.read(source, by=owner)
        moved.write(owner, by=owner, times=slots if mode is DispatchMode.ALL_TO_ALL else 1)
    return moved


def combined(drawn: Drawn, mode: CombineMode) -> Moved:
    """Owners read their rows and write what they send; origins read that and write their tokens."""
    moved, sent = (
        Moved(),
        {
            CombineMode.ALL_TO_ALL: drawn.slots(),
            CombineMode.REDUCE_SCATTER: [(p, q) for p in drawn.ranks for _ in drawn.owners[p] for q in drawn.ranks],
            CombineMode.RANK_DEDUP: [(origin, owner) for origin, owner, _ in drawn.pairs()],
        },
    )
    for _, owner in drawn.slots():
        moved.read(owner, by=owner)
    for origin, owner in sent[mode]:
        moved.write(origin, by=owner, times=origin != owner)
        moved.read(origin, by=origin, times=origin != owner)
    for origin, tokens in enumerate(map(len, drawn.owners)):
        moved.write(origin, by=origin, times=tokens)
        for owner in set(drawn.ranks) - {origin} if mode is CombineMode.REDUCE_SCATTER else ():
            moved.write(origin, by=owner, times=drawn.max_tokens - tokens)
    return moved


def plans_of(case: Case, world_size: int) -> list[RoutingPlan]:
    """The plan of every rank. C exceeds every T, so that no test takes one for the other."""
    inputs = draw(case, world_size)
    tokens = [case.tokens_of_rank(rank) for rank in range(world_size)]
    ids_WCK = torch.full((world_size, max(tokens) + 2, case.top_k), -1, dtype=torch.int32)
    for rank, ids_TK in enumerate(inputs.topk_idx.split(tokens)):
        ids_WCK[rank, : len(ids_TK)] = ids_TK
    return [
        build_plan(ids_WCK, rank=rank, num_tokens=held, num_experts=case.num_experts, row_capacity=ids_WCK.numel())
        for rank, held in enumerate(tokens)
    ]


def drawn_of(plans: Sequence[RoutingPlan]) -> Drawn:
    """From the ids alone: every other field of a plan is derived."""
    held = plans[0].experts_per_rank
    owners = [
        [[expert // held for expert in slots if expert >= 0] for slots in tokens[: plan.num_tokens]]
        for plan, tokens in zip(plans, plans[0].expert_ids.tolist(), strict=True)
    ]
    return Drawn(max_tokens=plans[0].max_tokens, owners=owners)


def counts_of(plans: Sequence[RoutingPlan]) -> list[RankCounts]:
    """As a caller obtains them, each rank from its own plan."""
    counts = []
    for plan in plans:
        slots = [[int((owner == q).sum()) for q in range(len(plans))] for owner in plan.owner_of_slot()]
        sizes = {"max_tokens": plan.max_tokens, "tokens": plan.num_tokens, "pair_tokens": plan.pair_tokens.tolist()}
        counts.append(rank_counts(plan.rank, **sizes, pair_slots=slots))
    return counts


@up_to_four_ranks
@every_case
def test_traffic_by_moving_every_row(case: Case, world_size: int) -> None:
    plans = plans_of(case, world_size)
    counts, drawn = counts_of(plans), drawn_of(plans)
    row_bytes = case.hidden * case.dtype.itemsize
    every_mode = ((DispatchMode, dispatch_traffic, dispatched), (CombineMode, combine_traffic, combined))
    for modes, predicted, moved in every_mode:
        of_ranks = [predicted(count, row_bytes) for count in counts]
        assert all(set(traffic) == set(modes) for traffic in of_ranks)
        for mode in modes:
            counted, rows = [traffic[mode] for traffic in of_ranks], moved(drawn, mode)
            assert counted == [rows.traffic(rank, row_bytes) for rank in range(world_size)], mode
            # What one rank sends another receives, and one rank alone uses no link.
            assert sum(rank.link_in for rank in counted) == sum(rank.link_out for rank in counted)
            assert world_size > 1 or (counted[0].link_in, counted[0].link_out) == (0, 0)


@up_to_four_ranks
@every_case
def test_counts_and_bytes_of_the_exchange_agree_with_the_plan(case: Case, world_size: int) -> None:
    plans = plans_of(case, world_size)
    ids = plans[0].expert_ids[1:].nbytes
    shape = {"world_size": world_size, "max_tokens": plans[0].max_tokens, "top_k": case.top_k}
    # Scores are fp32, as wide as an id.
    assert [cost.exchange_link_bytes(**shape, with_scores=scores) for scores in (False, True)] == [ids, 2 * ids]
    slots = drawn_of(plans).slots()
    for plan, counts in zip(plans, counts_of(plans), strict=True):
        assert (counts.world_size, counts.max_tokens, counts.tokens) == (world_size, plan.max_tokens, plan.num_tokens)
        assert (counts.rows, counts.packed_rows) == (plan.rows(), plan.packed_rows())
        gather = 2 * plan.rows() * 10
        expected = {DispatchMode.ALL_GATHER: gather, DispatchMode.ALL_TO_ALL: 0, DispatchMode.RANK_DEDUP: gather}
        assert cost.canonical_gather_bytes(counts, 10) == expected
        # The reference sends a row for each slot.
        link_in = cost.reference_dispatch_link_bytes(counts, 6)
        assert link_in[DispatchMode.ALL_TO_ALL] == 6 * sum(q == plan.rank != p for p, q in slots)
        for mode in (DispatchMode.ALL_GATHER, DispatchMode.RANK_DEDUP):
            assert link_in[mode] == dispatch_traffic(counts, 6)[mode].link_in


def worked_counts() -> list[RankCounts]:
    """Both ranks of the worked example of ``sonic_ep.plan``."""
    matrices = {"pair_tokens": [[2, 2], [2, 2]], "pair_slots": [[3, 3], [3, 2]]}
    return [rank_counts(rank, max_tokens=3, tokens=3, **matrices) for rank in range(2)]


def test_worked_example() -> None:
    """Rows of rank 0 (6 valid, 3 of them remote) and of rank 1 (5 valid, 3 of them remote)."""
    first, second = worked_counts()
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


def test_rows_that_stay_cross_no_link() -> None:
    # Every token keeps its slots on its rank: the sparse modes send nothing, the dense ones what they always send.
    kept = replace(worked_counts()[0], slots_in=0, slots_out=0, pairs_in=0, pairs_out=0)
    sparse = [dispatch_traffic(kept, 1)[mode] for mode in (DispatchMode.ALL_TO_ALL, DispatchMode.RANK_DEDUP)]
    sparse += [combine_traffic(kept, 1)[mode] for mode in (CombineMode.ALL_TO_ALL, CombineMode.RANK_DEDUP)]
    assert all((traffic.link_in, traffic.link_out) == (0, 0) for traffic in sparse)
    more = replace(kept, slots_kept=kept.slots_kept + 5, pairs_kept=kept.pairs_kept + 1)
    for traffic in (dispatch_traffic, combine_traffic):
        before, after = traffic(kept, 1), traffic(more, 1)
        assert [(t.link_in, t.link_out) for t in before.values()] == [(t.link_in, t.link_out) for t in after.values()]


COMBINATIONS = [(2, 3, 8), (4, 2, 8), (3, 4, 9), (1, 2, 4), (2, 4, 4)]


@pytest.mark.parametrize(("world_size", "top_k", "num_experts"), COMBINATIONS)
def test_predicted_rows_are_those_of_every_choice_made_once(world_size: int, top_k: int, num_experts: int) -> None:
    held, ranks = num_experts // world_size, range(world_size)
    choices = [[expert // held for expert in chosen] for chosen in combinations(range(num_experts), top_k)]
    tokens, load = len(choices), Workload(world_size=world_size, top_k=top_k, num_experts=num_experts)
    assert load.remote_pairs == pytest.approx(sum(len(set(owners) - {0}) for owners in choices) / tokens)
    assert load.remote_slots == pytest.approx(sum(owner > 0 for owners in choices for owner in owners) / tokens)
    drawn = Drawn(max_tokens=tokens, owners=[choices] * world_size)
    of_slots, of_pairs = Counter(drawn.slots()), Counter((source, owner) for source, owner, _ in drawn.pairs())
    slots, pairs = ([[count[p, q] for q in ranks] for p in ranks] for count in (of_slots, of_pairs))
    counts = rank_counts(0, max_tokens=tokens, tokens=tokens, pair_tokens=pairs, pair_slots=slots)
    dispatch, combine = (
        {mode: traffic.link_in / tokens for mode, traffic in by_mode(counts, 1).items()}
        for by_mode in (dispatch_traffic, combine_traffic)
    )
    expected = {DispatchMode.ALL_TO_ALL: load.remote_pairs, DispatchMode.RANK_DEDUP: load.remote_pairs}
    assert dispatch == pytest.approx({**expected, DispatchMode.ALL_GATHER: load.remote_ranks})
    expected = {CombineMode.RANK_DEDUP: load.remote_pairs, CombineMode.REDUCE_SCATTER: load.remote_ranks}
    assert combine == pytest.approx({**expected, CombineMode.ALL_TO_ALL: load.remote_slots})
