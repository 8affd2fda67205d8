"""The plan against its definition: a worked example, a slow and plain second derivation, and a check that bites."""

from dataclasses import fields, replace

import pytest
import torch
from backends import WORLD_SIZES, both_backends
from torch import Tensor

from sonic_ep import EPConfig, ExpertParallel, PlanError, RoutingPlan, RowOverflowError
from sonic_ep.distributed.group import resolve_group
from sonic_ep.plan import malformed_field, row_ceiling
from sonic_ep.reference.plan import build_plan, pair_exchange, slot_exchange
from sonic_ep.testing import CASES, Case, Rank, RankPool, assert_bitwise, draw
from sonic_ep.testing.cases import repeating

TENSOR_FIELDS = [field.name for field in fields(RoutingPlan) if field.type == "Tensor"]
WORKED_IDS = [[[0, 2], [1, 0], [3, 2]], [[2, 1], [-1, 3], [0, 0]]]


def plan_of(ids_WCK: Tensor, rank: int, num_experts: int, row_capacity: int | None = None) -> RoutingPlan:
    ceiling = ids_WCK.numel() if row_capacity is None else row_capacity
    tokens = ids_WCK.shape[1]
    return build_plan(
        ids_WCK.to(torch.int32), rank=rank, num_tokens=tokens, num_experts=num_experts, row_capacity=ceiling
    )


def test_worked_example() -> None:
    """The numbers in the docstring of sonic_ep.plan."""
    ids = torch.tensor(WORKED_IDS)
    plans = [plan_of(ids, rank, 4, row_capacity=6 - rank) for rank in range(2)]
    for plan in plans:
        plan.check()
        assert plan.counts.tolist() == [4, 2, 3, 2]
        assert plan.row_of_slot.tolist() == [[[0, 0], [4, 1], [3, 1]], [[2, 5], [-1, 4], [2, 3]]]
        assert plan.pair_tokens.tolist() == [[2, 2], [2, 2]]
    assert plans[0].group_ends.tolist() == [4, 6]
    assert plans[0].slot_of_row.tolist() == [0, 3, 10, 11, 2, 7]
    assert plans[0].packed_of_token.tolist() == [[0, 1, -1], [2, -1, 3]]
    assert plans[1].group_ends.tolist() == [3, 5]
    assert plans[1].slot_of_row.tolist() == [1, 5, 6, 4, 9]
    assert plans[1].packed_of_token.tolist() == [[0, -1, 1], [2, 3, -1]]
    assert [plan.rows() for plan in plans] == [6, 5]
    assert [plan.packed_rows() for plan in plans] == [4, 4]


def test_exchanges_of_the_worked_example() -> None:
    ids = torch.tensor(WORKED_IDS)
    slots = slot_exchange(plan_of(ids, 0, 4))
    # Rank 0 keeps slots 0, 3, 2 (rows 0, 1, 4 of its own) and sends 1, 5, 4 (rows 0, 1, 3 of rank 1).
    assert slots.slots.tolist() == [0, 3, 2, 1, 5, 4]
    assert (slots.send_splits, slots.receive_splits) == ([3, 3], [3, 3])
    assert slots.rows.tolist() == [0, 1, 4, 2, 3, 5]
    pairs = pair_exchange(plan_of(ids, 0, 4))
    assert pairs.tokens.tolist() == [0, 1, 0, 2]
    assert (pairs.send_splits, pairs.receive_splits) == ([2, 2], [2, 2])


def by_hand(ids: list[list[list[int]]], rank: int, num_experts: int) -> dict[str, list[int]]:
    """The fields of a plan by loops over slots, sorted as tuples: (expert, rank, token, k)."""
    held = num_experts // len(ids)
    slots = [
        (expert, source, token, k)
        for source, tokens in enumerate(ids)
        for token, experts in enumerate(tokens)
        for k, expert in enumerate(experts)
        if expert >= 0
    ]
    mine = sorted(slot for slot in slots if slot[0] // held == rank)
    place = {
        slot[1:]: row
        for owner in range(len(ids))
        for row, slot in enumerate(sorted(slot for slot in slots if slot[0] // held == owner))
    }
    max_tokens, top_k = len(ids[0]), len(ids[0][0])
    every = [(r, t, k) for r in range(len(ids)) for t in range(max_tokens) for k in range(top_k)]
    here = sorted({(source, token) for _, source, token, _ in mine})
    return {
        "counts": [sum(slot[0] == expert for slot in slots) for expert in range(num_experts)],
        "row_of_slot": [place.get(slot, -1) for slot in every],
        "group_ends": [sum(slot[0] <= rank * held + i for slot in mine) for i in range(held)],
        "slot_of_row": [(r * max_tokens + t) * top_k + k for _, r, t, k in mine],
        "pair_tokens": [
            len({slot[2] for slot in slots if slot[1] == source and slot[0] // held == owner})
            for source in range(len(ids))
            for owner in range(len(ids))
        ],
        "packed_of_token": [
            here.index((r, t)) if (r, t) in here else -1 for r in range(len(ids)) for t in range(max_tokens)
        ],
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_every_field_against_a_second_derivation(world_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_experts, max_tokens, top_k = 24, 7, 1 + 2 * seed
    # From -6: about a fifth of the slots are dropped; repetition is likely.
    ids = torch.randint(-6, num_experts, (world_size, max_tokens, top_k), generator=generator).clamp(min=-1)
    for rank in range(world_size):
        expected = by_hand(ids.tolist(), rank, num_experts)
        plan = plan_of(ids, rank, num_experts)
        plan.check()
        for name, values in expected.items():
            found = getattr(plan, name).flatten()
            assert found[: len(values)].tolist() == values, name
            assert bool((found[len(values) :] == -1).all()), name


def exchanged(rank: Rank, backend: str, case: Case) -> list[Tensor]:
    inputs = draw(case, rank.world_size, rank.device)
    mine = inputs.topk_idx[inputs.tokens_of(rank.rank)]
    with ExpertParallel(backend=backend) as ep:
        plan = ep.plan(mine, case.num_experts)
        ep.check()
    plan.check()
    assert_same_plan(plan, reference_plan(mine, case.num_experts))
    return [getattr(plan, name).cpu() for name in ("expert_ids", "counts", "row_of_slot", "pair_tokens")]


def reference_plan(mine: Tensor, num_experts: int, config: EPConfig | None = None) -> RoutingPlan:
    with ExpertParallel(backend="reference", config=config) as ep:
        return ep.plan(mine, num_experts)


def assert_same_plan(plan: RoutingPlan, expected: RoutingPlan) -> None:
    assert (plan.rank, plan.num_tokens) == (expected.rank, expected.num_tokens)
    for name in TENSOR_FIELDS:
        assert_bitwise(getattr(plan, name), getattr(expected, name), name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@both_backends
def test_ranks_hold_one_and_the_same_plan(pool: RankPool, backend: str, world_size: int, case: Case) -> None:
    by_rank = pool.run(exchanged, backend, case, world_size=world_size)
    inputs = draw(case, world_size)
    for rank, tensors in enumerate(by_rank):
        for mine, first in zip(tensors, by_rank[0], strict=True):
            assert_bitwise(mine, first)
        here = inputs.topk_idx[inputs.tokens_of(rank)]
        assert torch.equal(tensors[0][rank, : len(here)].long(), here)
        assert bool((tensors[0][rank, len(here) :] == -1).all())


@pytest.mark.parametrize("name", TENSOR_FIELDS)
def test_check_goes_red_on_a_changed_field(name: str) -> None:
    plan = plan_of(torch.tensor(WORKED_IDS), 0, 4, row_capacity=6)
    plan.check()
    tensor = getattr(plan, name)
    for index in range(tensor.numel()):
        wrong = tensor.clone()
        wrong.view(-1)[index] += 1
        with pytest.raises(PlanError):
            replace(plan, **{name: wrong}).check()
    for malformed in (tensor.long(), tensor[..., :-1]):
        with pytest.raises(PlanError):
            replace(plan, **{name: malformed}).check()


@pytest.mark.parametrize("changes", [{"rank": 1}, {"num_tokens": 2}, {"num_tokens": 4}])
def test_check_goes_red_on_another_place(changes: dict[str, int]) -> None:
    with pytest.raises(PlanError):
        replace(plan_of(torch.tensor(WORKED_IDS), 0, 4), **changes).check()  # type: ignore[arg-type]


def test_row_ceiling() -> None:
    sizes = {"world_size": 4, "max_tokens": 10, "top_k": 8, "experts_per_rank": 3}
    assert row_ceiling(**sizes, distinct=True) == 4 * 10 * 3
    assert row_ceiling(**sizes, distinct=False) == 4 * 10 * 8


LARGE = {
    "several tiles": Case(name="several tiles", tokens=(350, 1, 201), top_k=5, num_experts=24, hidden=1),
    "more choices than slots in a tile": Case(name="wide", tokens=(3,), top_k=600, num_experts=606, hidden=1),
    "many experts": Case(name="many experts", tokens=(129,), top_k=8, num_experts=1200, hidden=1),
    "repeated in a tile": Case(name="repeated", tokens=(150,), top_k=6, choose=repeating, hidden=1),
    "int32 ids": Case(name="int32 ids", tokens=(40,), hidden=1),
}


def planned_large(rank: Rank, case: Case) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    mine = inputs.topk_idx[inputs.tokens_of(rank.rank)]
    mine = mine.int() if case.name == "int32 ids" else mine
    configs = [EPConfig(), EPConfig(max_rows=10**6, cpu_sync_on_runtime=True)]
    # How many tiles there are has no part in how many rows there are: the other two at the small size.
    if case.name == "int32 ids":
        configs += [EPConfig(cpu_sync_on_runtime=True), EPConfig(max_rows=10**6)]
    for config in configs:
        with ExpertParallel(backend="fast", config=config) as ep:
            plan = ep.plan(mine, case.num_experts)
            ep.check()
        assert_same_plan(plan, reference_plan(mine, case.num_experts, config))


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_plans_of_many_tiles(pool: RankPool, world_size: int, case: Case) -> None:
    pool.run(planned_large, case, world_size=world_size)


def planned_out_of_range(rank: Rank, bad_rank: int, bad_id: int) -> str:
    """Ids out of range count as dropped, and every rank hears of them, once: when asked, or ``PLANS_AHEAD`` later."""
    from sonic_ep.fast.device_errors import PLANS_AHEAD

    good = torch.tensor([[0, 3], [2, 1]], device=rank.device)
    bad = torch.tensor([[0, bad_id], [2, 1]], device=rank.device)
    messages = []
    with ExpertParallel(backend="fast") as ep:
        for ask, between in ((ep.check, 0), (lambda: ep.plan(good, num_experts=rank.world_size * 2), PLANS_AHEAD - 1)):
            plan = ep.plan(bad if rank.rank == bad_rank else good, num_experts=rank.world_size * 2)
            for _ in range(between):
                ep.plan(good, num_experts=rank.world_size * 2).check()
            with pytest.raises(ValueError, match="topk_idx: got expert ids out of range") as raised:
                ask()
            messages.append(str(raised.value))
            plan.check()
            assert plan.expert_ids[bad_rank].tolist() == [[0, -1], [2, 1]]
        ep.check()
        ep.plan(good, num_experts=rank.world_size * 2).check()
    # The second of the wrong plans, of step 2, was raised by a later one.
    assert [words.split(" (in ")[1] for words in messages] == ["step 1)", "step 2)"]
    assert messages[0].split(" (in ")[0] == messages[1].split(" (in ")[0]
    return messages[0].split(" (in ")[0]


@pytest.mark.parametrize("bad_id", [-2, 4, 2**31 - 1, 2**40, -(2**33) + 1])
def test_ids_out_of_range_are_flagged_on_the_device(pool: RankPool, bad_id: int) -> None:
    expected = "topk_idx: got expert ids out of range on rank 1, expected 0 to 3, or -1 for a dropped slot"
    found = pool.run(planned_out_of_range, 1, bad_id, world_size=2)
    assert found == [f"rank {rank} of 2: {expected}" for rank in range(2)]


def overflowing_on_the_device(rank: Rank, case: Case) -> list[str]:
    """Without a read on the host the bound is passed on the device: NaN rows now, and the error when asked."""
    from sonic_ep.fast.device_errors import PLANS_AHEAD

    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    fitting = torch.zeros_like(inputs.topk_idx[tokens]) - 1
    messages = []
    with ExpertParallel(backend="fast", config=EPConfig(max_rows=20)) as ep:
        for ask, between in ((ep.check, 0), (lambda: ep.plan(fitting, case.num_experts), PLANS_AHEAD - 1)):
            plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
            rows = ep.dispatch(inputs.x[tokens], plan)
            assert rows.shape[0] == 20
            assert bool(rows.isnan().all())
            y = ep.combine(torch.ones_like(rows), inputs.topk_scores[tokens], plan)
            assert bool(y.isnan().all())
            for _ in range(between):
                ep.plan(fitting, case.num_experts)
            with pytest.raises(RowOverflowError) as raised:
                ask()
            messages.append(str(raised.value))
        rows = ep.dispatch(inputs.x[tokens], ep.plan(fitting, case.num_experts))
        ep.check()
        return messages


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_overflow_on_the_device(pool: RankPool, world_size: int) -> None:
    case = CASES["one_rank"]
    last, rows = world_size - 1, world_size * 13 * 3
    for rank, messages in enumerate(pool.run(overflowing_on_the_device, case, world_size=world_size)):
        expected = (
            f"rank {rank} of {world_size}: max_rows: got 20, expected at least {rows}: "
            f"rank {last} is routed {rows} rows"
        )
        # Plan, dispatch and combine are a step each.
        assert messages == [f"{expected} (in step {step})" for step in (1, 4)]


def overflowing(rank: Rank, backend: str, case: Case) -> list[str]:
    """The errors of two calls that pass the bound; then the group still works."""
    inputs = draw(case, rank.world_size, rank.device)
    mine = inputs.topk_idx[inputs.tokens_of(rank.rank)]
    messages = []
    with ExpertParallel(backend=backend, config=EPConfig(max_rows=20, cpu_sync_on_runtime=True)) as ep:
        for _ in range(2):
            with pytest.raises(RowOverflowError) as raised:
                ep.plan(mine, case.num_experts)
            messages.append(str(raised.value))
    inputs = draw(CASES["uniform"], rank.world_size, rank.device)
    for bound, rows in ((60, 60), (100, 78)):
        with ExpertParallel(backend=backend, config=EPConfig(max_rows=bound)) as ep:
            plan = ep.plan(inputs.topk_idx[inputs.tokens_of(rank.rank)], case.num_experts)
        assert plan.row_capacity == rows
        plan.check()
    return messages


@both_backends
def test_overflow_names_rows_and_bound_on_every_rank(pool: RankPool, backend: str) -> None:
    # Two ranks of 13 tokens and 3 slots each, all on the last rank.
    for rank, messages in enumerate(pool.run(overflowing, backend, CASES["one_rank"], world_size=2)):
        expected = (
            f"rank {rank} of 2: max_rows: got 20, expected at least 78: rank 1 is routed 78 rows (all ranks: [0, 78])"
        )
        assert messages == [expected, expected]


@pytest.mark.parametrize("exact", [False, True])
def test_max_rows_holds_with_and_without_exact_sizes(exact: bool) -> None:
    idx = torch.tensor([[0], [1], [-1]])
    for bound, fits in ((1, False), (2, True), (3, True)):
        with ExpertParallel(config=EPConfig(max_rows=bound, cpu_sync_on_runtime=exact)) as ep:
            if fits:
                assert ep.plan(idx, num_experts=2).rows() == 2
            else:
                with pytest.raises(RowOverflowError, match="max_rows: got 1, expected at least 2"):
                    ep.plan(idx, num_experts=2)


def test_more_slots_than_int32_counts_are_refused() -> None:
    refused = pytest.raises(ValueError, match=f"got {2**31} slots, expected at most {2**31 - 2**20}")
    with ExpertParallel(max_tokens_per_rank=2**31) as ep, refused:
        ep.plan(torch.zeros(1, 1, dtype=torch.int64), num_experts=2)


def test_a_plan_of_more_slots_than_int32_counts_is_malformed() -> None:
    def plan_with(slots: int) -> RoutingPlan:
        shapes = dict.fromkeys(("counts", "group_ends", "slot_of_row"), (1,))
        shapes |= dict.fromkeys(("expert_ids", "row_of_slot"), (1, slots, 1))
        shapes |= {"pair_tokens": (1, 1), "packed_of_token": (1, slots)}
        # As much as that would not fit in memory.
        held = {name: torch.empty(shape, dtype=torch.int32, device="meta") for name, shape in shapes.items()}
        return RoutingPlan(rank=0, num_tokens=1, **held)

    assert malformed_field(plan_with(2**31 - 2**20)) is None
    assert malformed_field(plan_with(2**31 - 2**20 + 1)) == "expert_ids"


def varying_tokens(rank: Rank, backend: str, tokens: list[list[int]]) -> list[int]:
    """Capacities of plans made one after the other, T of rank r in call i being tokens[i][r]."""
    with ExpertParallel(backend=backend) as ep:
        plans = [ep.plan(torch.zeros(T[rank.rank], 1, dtype=torch.int64, device=rank.device), 4) for T in tokens]
    for plan in plans:
        plan.check()
    return [plan.max_tokens for plan in plans]


@both_backends
def test_capacity_is_agreed_on_the_first_call_that_brings_a_token(pool: RankPool, backend: str) -> None:
    found = pool.run(varying_tokens, backend, [[0, 0], [3, 5], [5, 0], [0, 0]], world_size=2)
    assert found == [[0, 5, 5, 5]] * 2


def ids_and_scores(rank: Rank, case: Case) -> None:
    from sonic_ep.fast.plan import PlanShape, gathered_counts
    from sonic_ep.fast.workspace import Workspace

    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    max_tokens = max(case.tokens_of_rank(source) for source in range(rank.world_size))
    sizes = {"max_tokens": max_tokens, "top_k": case.top_k, "num_experts": case.num_experts}
    shape = PlanShape(rank=rank.rank, world_size=rank.world_size, **sizes)
    workspace, meetings = Workspace(resolve_group(None), rank.device), []
    barrier_before_write, barrier_after_write = workspace.barrier_before_write, workspace.barrier_after_write
    device_errors = torch.zeros(3, dtype=torch.int32, device=rank.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "fence", lambda: (meetings.append("fence"), barrier_before_write()))
        patch.setattr(workspace, "publish", lambda: (meetings.append("publish"), barrier_after_write()))
        scores = inputs.topk_scores[tokens].double()
        counts = gathered_counts(inputs.topk_idx[tokens], shape, workspace, device_errors, scores)
    assert meetings == ["fence", "publish"]
    assert counts.scores is not None
    for source in range(rank.world_size):
        theirs = inputs.tokens_of(source)
        here = slice(case.tokens_of_rank(source))
        assert_bitwise(counts.expert_ids[source, here], inputs.topk_idx[theirs].int(), "ids")
        assert_bitwise(counts.scores[source, here], inputs.topk_scores[theirs], "scores")
    workspace.barrier_after_write()
    workspace.close()


@pytest.mark.fast
@pytest.mark.parametrize("case", ["uneven_tokens", "zero_token_ranks"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_scores_travel_with_the_ids_in_one_exchange(pool: RankPool, world_size: int, case: str) -> None:
    pool.run(ids_and_scores, CASES[case], world_size=world_size)
