"""Predicted costs against counting, and what "auto" makes of them; counted traffic against moving every row."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import pytest
import torch

from sonic_ep import CombineMode, DispatchMode, EPConfig, RoutingPlan
from sonic_ep.cost import (
    H200_NVLINK,
    RankCounts,
    Traffic,
    Workload,
    canonical_gather_bytes,
    choose_modes,
    combine_seconds_per_byte,
    combine_traffic,
    dispatch_seconds_per_byte,
    dispatch_traffic,
    exchange_link_bytes,
    rank_counts,
    reference_dispatch_link_bytes,
    staging_bytes,
)
from sonic_ep.reference.plan import build_plan
from sonic_ep.testing import CASES, Case, draw


@pytest.mark.parametrize(
    ("world_size", "top_k", "num_experts"), [(2, 3, 8), (4, 2, 8), (3, 4, 9), (1, 2, 4), (2, 4, 4)]
)
def test_expected_pairs_by_counting_every_choice(world_size: int, top_k: int, num_experts: int) -> None:
    held = num_experts // world_size
    choices = list(combinations(range(num_experts), top_k))
    remote = [len({expert // held for expert in chosen} - {0}) for chosen in choices]
    slots = [sum(expert >= held for expert in chosen) for chosen in choices]
    load = Workload(world_size=world_size, top_k=top_k, num_experts=num_experts)
    assert load.remote_pairs == pytest.approx(sum(remote) / len(choices))
    assert load.remote_slots == pytest.approx(sum(slots) / len(choices))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_auto_picks_modes_and_a_choice_of_the_caller_stands(world_size: int, top_k: int) -> None:
    load = Workload(world_size=world_size, top_k=top_k, num_experts=64)
    auto = choose_modes(EPConfig(), load)
    assert isinstance(auto.dispatch, DispatchMode)
    assert isinstance(auto.combine, CombineMode)
    for dispatch, combine in ((dispatch, combine) for dispatch in DispatchMode for combine in CombineMode):
        chosen = choose_modes(EPConfig(dispatch=dispatch, combine=combine), load)
        assert (chosen.dispatch, chosen.combine) == (dispatch, combine)
        half = choose_modes(EPConfig(dispatch=dispatch), load)
        assert (half.dispatch, half.combine) == (dispatch, auto.combine)


def test_auto_takes_the_cheapest() -> None:
    load = Workload(world_size=8, top_k=2, num_experts=64)
    # A token goes to fewer than two of seven other ranks: nobody gathers every token for that.
    assert choose_modes(EPConfig(), load).dispatch is DispatchMode.ALL_TO_ALL
    for costs in (dispatch_seconds_per_byte(load, H200_NVLINK), combine_seconds_per_byte(load, H200_NVLINK)):
        assert all(cost > 0 for cost in costs.values())
    slow_memory = replace(H200_NVLINK, memory=1.0)
    fast_engine = replace(H200_NVLINK, copy_engine=1e15, memory=1e15)
    assert choose_modes(EPConfig(), load, slow_memory).dispatch is DispatchMode.ALL_TO_ALL
    assert choose_modes(EPConfig(), load, fast_engine).dispatch is DispatchMode.ALL_GATHER


def test_partial_sums_win_where_a_token_has_several_slots_on_a_rank() -> None:
    chosen = choose_modes(EPConfig(), Workload(world_size=2, top_k=8, num_experts=64))
    assert chosen.combine is CombineMode.RANK_DEDUP


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A routing as nested lists: owners[p][t] are the ranks of token t's slots, without those dropped, T of rank p."""

    max_tokens: int
    owners: list[list[list[int]]]

    @property
    def world_size(self) -> int:
        return len(self.owners)

    @property
    def tokens(self) -> list[int]:
        return [len(tokens) for tokens in self.owners]

    def slots(self) -> list[tuple[int, int]]:
        """(source, owner) of every slot."""
        return [(p, q) for p, tokens in enumerate(self.owners) for slots in tokens for q in slots]

    def pairs(self) -> list[tuple[int, int, int]]:
        """(source, owner, slots there) of every distinct pair of a token and a rank."""
        return [(p, q, slots.count(q)) for p, tokens in enumerate(self.owners) for slots in tokens for q in set(slots)]


@dataclass(kw_only=True)
class Ledger:
    """One row at a time: whose memory is touched, and by whom."""

    link_in: Counter[int] = field(default_factory=Counter)
    link_out: Counter[int] = field(default_factory=Counter)
    memory: Counter[int] = field(default_factory=Counter)

    def read(self, memory: int, *, by: int) -> None:
        self.memory[memory] += 1
        if memory != by:
            self.link_out[memory] += 1
            self.link_in[by] += 1

    def write(self, memory: int, *, by: int) -> None:
        self.memory[memory] += 1
        if memory != by:
            self.link_out[by] += 1
            self.link_in[memory] += 1

    def traffic(self, rank: int, row_bytes: int) -> Traffic:
        link_in, link_out, memory = (rows[rank] * row_bytes for rows in (self.link_in, self.link_out, self.memory))
        return Traffic(link_in=link_in, link_out=link_out, memory=memory)


def stage(drawn: Drawn, ledger: Ledger) -> None:
    for rank, tokens in enumerate(drawn.tokens):
        for _ in range(tokens if drawn.world_size > 1 else 0):
            ledger.read(rank, by=rank)
            ledger.write(rank, by=rank)


def gather_all(drawn: Drawn, ledger: Ledger) -> None:
    stage(drawn, ledger)
    for source, tokens in enumerate(drawn.tokens):
        for owner in range(drawn.world_size):
            for _ in range(tokens if source == owner else drawn.max_tokens):
                ledger.read(source, by=owner)
                ledger.write(owner, by=owner)


def scatter_slots(drawn: Drawn, ledger: Ledger) -> None:
    stage(drawn, ledger)
    for source, owner, slots in drawn.pairs():
        ledger.read(source, by=owner)
        for _ in range(slots):
            ledger.write(owner, by=owner)


def pack_pairs(drawn: Drawn, ledger: Ledger) -> None:
    stage(drawn, ledger)
    for source, owner, _ in drawn.pairs():
        ledger.read(source, by=owner)
        ledger.write(owner, by=owner)


def return_to_origin(sent: Sequence[tuple[int, int]], drawn: Drawn, ledger: Ledger) -> None:
    """Owners read their rows, (home, owner) of ``sent`` travel, homes read them and write their tokens."""
    for _, owner in drawn.slots():
        ledger.read(owner, by=owner)
    for home, owner in sent:
        if home != owner:
            ledger.write(home, by=owner)
            ledger.read(home, by=home)
    for home, tokens in enumerate(drawn.tokens):
        for _ in range(tokens):
            ledger.write(home, by=home)


def return_slots(drawn: Drawn, ledger: Ledger) -> None:
    return_to_origin(drawn.slots(), drawn, ledger)


def return_dense(drawn: Drawn, ledger: Ledger) -> None:
    ranks = range(drawn.world_size)
    return_to_origin([(home, owner) for home in ranks for _ in drawn.owners[home] for owner in ranks], drawn, ledger)
    for home, tokens in enumerate(drawn.tokens):
        for owner in set(ranks) - {home}:
            for _ in range(tokens, drawn.max_tokens):
                ledger.write(home, by=owner)


def return_pairs(drawn: Drawn, ledger: Ledger) -> None:
    return_to_origin([(home, owner) for home, owner, _ in drawn.pairs()], drawn, ledger)


Mover = Callable[[Drawn, Ledger], None]
DISPATCH_BY_ROW: dict[DispatchMode, Mover] = {
    DispatchMode.ALL_GATHER: gather_all,
    DispatchMode.ALL_TO_ALL: scatter_slots,
    DispatchMode.RANK_DEDUP: pack_pairs,
}
COMBINE_BY_ROW: dict[CombineMode, Mover] = {
    CombineMode.ALL_TO_ALL: return_slots,
    CombineMode.REDUCE_SCATTER: return_dense,
    CombineMode.RANK_DEDUP: return_pairs,
}


def plans_of(case: Case, world_size: int) -> list[RoutingPlan]:
    """The plan of every rank. C exceeds every T, so that no test takes one for the other."""
    inputs = draw(case, world_size)
    tokens = [case.tokens_of_rank(rank) for rank in range(world_size)]
    max_tokens = max(tokens) + 2
    ids_WCK = torch.full((world_size, max_tokens, case.top_k), -1, dtype=torch.int32)
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
    ranks = range(len(plans))
    return [
        rank_counts(
            plan.rank,
            max_tokens=plan.max_tokens,
            tokens=plan.num_tokens,
            pair_tokens=plan.pair_tokens.tolist(),
            pair_slots=[[int((owner_CK == owner).sum()) for owner in ranks] for owner_CK in plan.owner_of_slot()],
        )
        for plan in plans
    ]


def by_row(mover: Mover, drawn: Drawn, row_bytes: int) -> list[Traffic]:
    ledger = Ledger()
    mover(drawn, ledger)
    return [ledger.traffic(rank, row_bytes) for rank in range(drawn.world_size)]


def worked_counts() -> list[RankCounts]:
    """Both ranks of the worked example of ``sonic_ep.plan``."""
    return [
        rank_counts(rank, max_tokens=3, tokens=3, pair_tokens=[[2, 2], [2, 2]], pair_slots=[[3, 3], [3, 2]])
        for rank in range(2)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_traffic_by_moving_every_row(case: Case, world_size: int) -> None:
    plans = plans_of(case, world_size)
    counts, drawn = counts_of(plans), drawn_of(plans)
    row_bytes = case.hidden * case.dtype.itemsize
    dispatched = [dispatch_traffic(count, row_bytes) for count in counts]
    combined = [combine_traffic(count, row_bytes) for count in counts]
    assert [traffic.keys() for traffic in dispatched] == [DISPATCH_BY_ROW.keys()] * world_size
    assert [traffic.keys() for traffic in combined] == [COMBINE_BY_ROW.keys()] * world_size
    for dispatch, mover in DISPATCH_BY_ROW.items():
        assert [traffic[dispatch] for traffic in dispatched] == by_row(mover, drawn, row_bytes), dispatch
    for combine, mover in COMBINE_BY_ROW.items():
        assert [traffic[combine] for traffic in combined] == by_row(mover, drawn, row_bytes), combine


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_one_rank_sends_another_receives(case: Case, world_size: int) -> None:
    counts = counts_of(plans_of(case, world_size))
    for mode in DispatchMode:
        traffic = [dispatch_traffic(count, 6)[mode] for count in counts]
        assert sum(rank.link_in for rank in traffic) == sum(rank.link_out for rank in traffic)
    for mode in CombineMode:
        traffic = [combine_traffic(count, 6)[mode] for count in counts]
        assert sum(rank.link_in for rank in traffic) == sum(rank.link_out for rank in traffic)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_counts_agree_with_the_plan(case: Case) -> None:
    plans = plans_of(case, 3)
    for plan, counts in zip(plans, counts_of(plans), strict=True):
        assert (counts.world_size, counts.max_tokens, counts.tokens) == (3, plan.max_tokens, plan.num_tokens)
        assert (counts.rows, counts.packed_rows) == (plan.rows(), plan.packed_rows())
        gather = canonical_gather_bytes(counts, 10)
        read_and_written = 2 * plan.rows() * 10
        assert gather[DispatchMode.ALL_GATHER] == gather[DispatchMode.RANK_DEDUP] == read_and_written
        assert gather[DispatchMode.ALL_TO_ALL] == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_sends_a_row_for_each_slot(case: Case, world_size: int) -> None:
    plans = plans_of(case, world_size)
    slots = drawn_of(plans).slots()
    for rank, counts in enumerate(counts_of(plans)):
        link_in = reference_dispatch_link_bytes(counts, 6)
        assert link_in[DispatchMode.ALL_TO_ALL] == 6 * sum(q == rank != p for p, q in slots)
        for mode in (DispatchMode.ALL_GATHER, DispatchMode.RANK_DEDUP):
            assert link_in[mode] == dispatch_traffic(counts, 6)[mode].link_in


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
    assert (staging_bytes(first, 1), staging_bytes(second, 4)) == (6, 24)
    assert dispatch_traffic(second, 4)[DispatchMode.ALL_TO_ALL] == Traffic(link_in=8, link_out=8, memory=60)
    assert combine_traffic(second, 4)[CombineMode.ALL_TO_ALL] == Traffic(link_in=12, link_out=12, memory=56)


def test_rows_that_stay_cross_no_link() -> None:
    # Every token keeps its slots at home: the sparse modes send nothing, the dense ones what they always send.
    home = replace(worked_counts()[0], slots_in=0, slots_out=0, pairs_in=0, pairs_out=0)
    sparse = [dispatch_traffic(home, 1)[mode] for mode in (DispatchMode.ALL_TO_ALL, DispatchMode.RANK_DEDUP)]
    sparse += [combine_traffic(home, 1)[mode] for mode in (CombineMode.ALL_TO_ALL, CombineMode.RANK_DEDUP)]
    assert all((traffic.link_in, traffic.link_out) == (0, 0) for traffic in sparse)
    more = replace(home, slots_kept=home.slots_kept + 5, pairs_kept=home.pairs_kept + 1)
    for traffic in (dispatch_traffic, combine_traffic):
        before, after = traffic(home, 1), traffic(more, 1)
        assert [(t.link_in, t.link_out) for t in before.values()] == [(t.link_in, t.link_out) for t in after.values()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_rank_alone_uses_no_link(case: Case) -> None:
    (counts,) = counts_of(plans_of(case, 1))
    for traffic in (*dispatch_traffic(counts, 8).values(), *combine_traffic(counts, 8).values()):
        assert (traffic.link_in, traffic.link_out) == (0, 0)
    assert exchange_link_bytes(world_size=1, max_tokens=counts.max_tokens, top_k=case.top_k, with_scores=True) == 0


@pytest.mark.parametrize(("world_size", "top_k", "num_experts"), [(2, 3, 8), (4, 2, 8), (3, 4, 9)])
def test_counted_rows_are_those_predicted_when_every_choice_is_made_once(
    world_size: int, top_k: int, num_experts: int
) -> None:
    held = num_experts // world_size
    choices = [[expert // held for expert in chosen] for chosen in combinations(range(num_experts), top_k)]
    drawn = Drawn(max_tokens=len(choices), owners=[choices] * world_size)
    slots, pairs = Counter(drawn.slots()), Counter((source, owner) for source, owner, _ in drawn.pairs())
    ranks = range(world_size)
    counts = rank_counts(
        0,
        max_tokens=drawn.max_tokens,
        tokens=len(choices),
        pair_tokens=[[pairs[source, owner] for owner in ranks] for source in ranks],
        pair_slots=[[slots[source, owner] for owner in ranks] for source in ranks],
    )
    load = Workload(world_size=world_size, top_k=top_k, num_experts=num_experts)
    dispatch, combine = dispatch_traffic(counts, 1), combine_traffic(counts, 1)
    per_token = 1 / len(choices)
    for mode in (DispatchMode.ALL_TO_ALL, DispatchMode.RANK_DEDUP):
        assert dispatch[mode].link_in * per_token == pytest.approx(load.remote_pairs)
    assert dispatch[DispatchMode.ALL_GATHER].link_in * per_token == pytest.approx(load.remote_ranks)
    assert combine[CombineMode.RANK_DEDUP].link_in * per_token == pytest.approx(load.remote_pairs)
    assert combine[CombineMode.REDUCE_SCATTER].link_in * per_token == pytest.approx(load.remote_ranks)
    assert combine[CombineMode.ALL_TO_ALL].link_in * per_token == pytest.approx(load.remote_slots)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_bytes_of_the_exchange_are_those_of_the_tensors(case: Case, world_size: int) -> None:
    plan = plans_of(case, world_size)[0]
    ids_WCK = plan.expert_ids
    remote = [ids_WCK[rank] for rank in range(world_size) if rank != plan.rank]
    ids_bytes = sum(ids_CK.nbytes for ids_CK in remote)
    shape = {"world_size": world_size, "max_tokens": plan.max_tokens, "top_k": plan.top_k}
    assert exchange_link_bytes(**shape, with_scores=False) == ids_bytes
    scores_bytes = sum(ids_CK.float().nbytes for ids_CK in remote)
    assert exchange_link_bytes(**shape, with_scores=True) == ids_bytes + scores_bytes
