"""The plan against its definition: a worked example, a slow second derivation, and ``check`` on changed fields."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from backends import ON_GPUS, both_backends
from fast_kernels import before_each_launch
from on_ranks import on_ranks
from plans_ahead import FEW_PLANS, plans_ahead
from promises import promise
from torch import Tensor
from workspaces import workspace_of

from sonic_ep import DispatchMode, EPConfig, ExpertParallel, PlanError, RoutingPlan, RowOverflowError
from sonic_ep.plan import malformed_field, row_ceiling
from sonic_ep.reference.plan import build_plan, pair_exchange, slot_exchange
from sonic_ep.testing import CASES, Case, Rank, assert_bitwise, draw
from sonic_ep.testing.cases import repeating

TENSOR_FIELDS = [field.name for field in fields(RoutingPlan) if field.type == "Tensor"]
WORKED_IDS = torch.tensor([[[0, 2], [1, 0], [3, 2]], [[2, 1], [-1, 3], [0, 0]]])


def plan_of(ids_WCK: Tensor, rank: int, num_experts: int, row_capacity: int | None = None) -> RoutingPlan:
    ceiling, tokens = ids_WCK.numel() if row_capacity is None else row_capacity, ids_WCK.shape[1]
    return build_plan(ids_WCK.int(), rank=rank, num_tokens=tokens, num_experts=num_experts, row_capacity=ceiling)


def test_worked_example() -> None:
    """The numbers in the docstring of sonic_ep.plan."""
    plans = [plan_of(WORKED_IDS, rank, 4, row_capacity=6 - rank) for rank in range(2)]
    expected = (
        ([4, 6], [0, 3, 10, 11, 2, 7], [[0, 1, -1], [2, -1, 3]]),
        ([3, 5], [1, 5, 6, 4, 9], [[0, -1, 1], [2, 3, -1]]),
    )
    for plan, (group_ends, slot_of_row, packed_of_token) in zip(plans, expected, strict=True):
        plan.check()
        assert plan.counts.tolist() == [4, 2, 3, 2]
        assert plan.row_of_slot.tolist() == [[[0, 0], [4, 1], [3, 1]], [[2, 5], [-1, 4], [2, 3]]]
        assert plan.pair_tokens.tolist() == [[2, 2], [2, 2]]
        assert plan.group_ends.tolist() == group_ends
        assert plan.tokens_per_expert.tolist() == [[4, 2], [3, 2]][plan.rank]
        assert plan.slot_of_row.tolist() == slot_of_row
        assert plan.packed_of_token.tolist() == packed_of_token
        assert (plan.rows(), plan.packed_rows()) == (group_ends[-1], 4)
    slots, pairs = slot_exchange(plans[0]), pair_exchange(plans[0])
    # Rank 0 keeps slots 0, 3, 2 (rows 0, 1, 4 of its own) and sends 1, 5, 4 (rows 0, 1, 3 of rank 1).
    assert slots.slots.tolist() == [0, 3, 2, 1, 5, 4]
    assert slots.rows.tolist() == [0, 1, 4, 2, 3, 5]
    assert (slots.send_splits, slots.receive_splits) == ([3, 3], [3, 3])
    assert pairs.tokens.tolist() == [0, 1, 0, 2]
    assert (pairs.send_splits, pairs.receive_splits) == ([2, 2], [2, 2])


def by_hand(ids: list[list[list[int]]], rank: int, num_experts: int) -> dict[str, list[int]]:
    """The fields of a plan from its slots as tuples (expert, rank, token, k), sorted."""
    ranks, max_tokens, top_k, held = len(ids), len(ids[0]), len(ids[0][0]), num_experts // len(ids)
    every = [(r, t, k) for r in range(ranks) for t in range(max_tokens) for k in range(top_k)]
    slots = sorted((ids[r][t][k], r, t, k) for r, t, k in every if ids[r][t][k] >= 0)
    of_owner = [[slot for slot in slots if slot[0] // held == owner] for owner in range(ranks)]
    row_of = {slot[1:]: row for owned in of_owner for row, slot in enumerate(owned)}
    pairs = [sorted({slot[1:3] for slot in owned}) for owned in of_owner]
    place_of = {pair: place for place, pair in enumerate(pairs[rank])}
    return {
        "counts": [sum(slot[0] == expert for slot in slots) for expert in range(num_experts)],
        "row_of_slot": [row_of.get(slot, -1) for slot in every],
        "group_ends": [sum(slot[0] <= rank * held + i for slot in of_owner[rank]) for i in range(held)],
        "slot_of_row": [(r * max_tokens + t) * top_k + k for _, r, t, k in of_owner[rank]],
        "pair_tokens": [sum(r == source for r, _ in owned) for source in range(ranks) for owned in pairs],
        "packed_of_token": [place_of.get((r, t), -1) for r in range(ranks) for t in range(max_tokens)],
    }


@promise("order")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_every_field_against_a_second_derivation(world_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_experts, max_tokens, top_k = 24, 7, 1 + 2 * seed
    # From -6: about a fifth of the slots are dropped; repetition is likely.
    ids = torch.randint(-6, num_experts, (world_size, max_tokens, top_k), generator=generator).clamp(min=-1)
    for rank in range(world_size):
        plan = plan_of(ids, rank, num_experts)
        plan.check()
        for name, values in by_hand(ids.tolist(), rank, num_experts).items():
            found = getattr(plan, name).flatten()
            assert found[: len(values)].tolist() == values, name
            assert bool((found[len(values) :] == -1).all()), name


def ids_of(rank: Rank, case: Case) -> Tensor:
    inputs = draw(case, rank.world_size, rank.device)
    return inputs.topk_idx[inputs.tokens_of(rank.rank)]


MANY_TILES = [
    Case(name="several tiles", tokens=(130, 1, 70), top_k=5, num_experts=24, hidden=1),
    Case(name="more choices than slots in a tile", tokens=(3,), top_k=600, num_experts=624, hidden=1),
    Case(name="many experts", tokens=(65,), top_k=8, num_experts=1200, hidden=1),
    Case(name="repeated in a tile", tokens=(150,), top_k=6, choose=repeating, hidden=1),
    Case(name="int32 ids", tokens=(40,), hidden=1),
]
EXACT, BOUNDED = {"cpu_sync_on_runtime": True}, {"max_rows": 10**6}
SIZES = [1, 3, *(pytest.param(size, marks=pytest.mark.thorough) for size in (2, 4, *ON_GPUS))]


@promise("order")
@on_ranks(*SIZES)
@both_backends
@pytest.mark.parametrize("case", [*CASES.values(), *MANY_TILES], ids=lambda case: case.name)
def test_ranks_hold_one_and_the_same_plan(rank: Rank, backend: str, case: Case) -> None:
    inputs, mine, settings = draw(case, rank.world_size), ids_of(rank, case), [{}]
    if case.name == "several tiles":
        settings.append(EXACT | BOUNDED)
    if case.name == "int32 ids":
        mine = mine.int()
        settings += [EXACT, BOUNDED, EXACT | BOUNDED]
    for flags in settings:
        plans = []
        for name in (backend, "reference"):
            with ExpertParallel(backend=name, config=EPConfig(**flags)) as ep:
                plans.append(ep.plan(mine, case.num_experts))
                ep.check()
        plan, expected = plans
        plan.check()
        assert (plan.rank, plan.num_tokens) == (expected.rank, expected.num_tokens) == (rank.rank, len(mine))
        for name in TENSOR_FIELDS:
            assert_bitwise(getattr(plan, name), getattr(expected, name), name)
    for source, ids_CK in enumerate(plan.expert_ids.cpu()):
        theirs = inputs.topk_idx[inputs.tokens_of(source)]
        assert torch.equal(ids_CK[: len(theirs)].long(), theirs)
        assert bool((ids_CK[len(theirs) :] == -1).all())


@pytest.mark.parametrize("name", [*TENSOR_FIELDS, "rank", "num_tokens"])
def test_check_refuses_a_changed_field(name: str) -> None:
    """Of a tensor: another dtype, a column less, and each number one larger."""
    plan = plan_of(WORKED_IDS, 0, 4, row_capacity=6)
    plan.check()
    wrong = {"rank": [1], "num_tokens": [2, 4]}.get(name)
    if wrong is None:
        right = getattr(plan, name)
        larger = torch.eye(right.numel(), dtype=right.dtype).view(-1, *right.shape) + right
        wrong = [right.long(), right[..., :-1], *larger]
    for value in wrong:
        with pytest.raises(PlanError):
            replace(plan, **{name: value}).check()


def plans_until_raised(ep: ExpertParallel, good: Callable[[], object], error: type[Exception]) -> str:
    """What the plan ``FEW_PLANS`` after a wrong call raises; then all is well."""
    for _ in range(FEW_PLANS - 1):
        good()
    with pytest.raises(error) as raised:
        good()
    good()
    ep.check()
    return str(raised.value)


@pytest.mark.fast
@on_ranks(2)
def test_ids_out_of_range_are_found_on_the_device(rank: Rank) -> None:
    """They count as dropped, and every rank raises, once: by ``check``, or by a later plan."""
    good = torch.tensor([[0, 3], [2, 1]], device=rank.device)
    named = rf"^rank {rank.rank} of 2: topk_idx: got expert ids out of range on rank 1, expected 0 to 3(.|\n)*step "
    wrong_ids = (-2, 4, 2**31 - 1, 2**40, -(2**33) + 1)
    with plans_ahead(FEW_PLANS), ExpertParallel(backend="fast") as ep:
        for step, wrong in enumerate(wrong_ids, start=1):
            ids = good.clone()
            if rank.rank == 1:
                ids[0, 1] = wrong
            plan = ep.plan(ids, num_experts=4)
            plan.check()
            assert plan.expert_ids[1].tolist() == [[0, -1], [2, 1]]
            if wrong != wrong_ids[-1]:
                with pytest.raises(ValueError, match=rf"{named}{step}\)$"):
                    ep.check()
        message = plans_until_raised(ep, lambda: ep.plan(good, num_experts=4).check(), ValueError)
        assert re.match(rf"{named}{step}\)$", message)


@pytest.mark.fast
@on_ranks(1, pytest.param(2, marks=pytest.mark.thorough), 3)
def test_overflow_is_found_on_the_device(rank: Rank) -> None:
    """Without a host read: all rows are NaN now, and the error comes later."""
    case = CASES["one_rank"]
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    x, scores, ids = inputs.x[tokens], inputs.topk_scores[tokens], inputs.topk_idx[tokens]
    fitting = torch.full_like(ids, -1)
    with plans_ahead(FEW_PLANS), ExpertParallel(backend="fast", config=EPConfig(max_rows=20)) as ep:

        def overflow() -> None:
            plan = ep.plan(ids, case.num_experts)
            rows = ep.dispatch(x, plan)
            assert rows.shape[0] == 20
            assert bool(rows.isnan().all())
            assert bool(ep.combine(torch.ones_like(rows), scores, plan).isnan().all())

        overflow()
        with pytest.raises(RowOverflowError) as raised:
            ep.check()
        overflow()
        later = plans_until_raised(ep, lambda: ep.plan(fitting, case.num_experts), RowOverflowError)
        ep.dispatch(x, ep.plan(fitting, case.num_experts))
        ep.check()
    # Plan, dispatch and combine are a step each.
    for step, message in ((1, str(raised.value)), (4, later)):
        assert_overflow(message, rank, rows=rank.world_size * 13 * 3)
        assert message.endswith(f"step {step})")


def assert_overflow(message: str, rank: Rank, rows: int) -> None:
    last = rank.world_size - 1
    named = f"rank {rank.rank} of {rank.world_size}: max_rows: got 20, expected at least {rows}"
    assert re.match(rf"{named}\b.*\brank {last}\b.*\b{rows} rows", message), message


@on_ranks(2)
@both_backends
def test_overflow_of_exact_sizes_names_rows_and_bound_on_every_rank(rank: Rank, backend: str) -> None:
    """Two ranks of 13 tokens and 3 slots each, all on the last rank. Afterwards the group still works."""
    case = CASES["one_rank"]
    with ExpertParallel(backend=backend, config=EPConfig(max_rows=20, cpu_sync_on_runtime=True)) as ep:
        for _ in range(2):
            with pytest.raises(RowOverflowError, match=r"\[0, 78\]") as raised:
                ep.plan(ids_of(rank, case), case.num_experts)
            assert_overflow(str(raised.value), rank, rows=78)
    for bound, rows in ((60, 60), (100, 78)):
        with ExpertParallel(backend=backend, config=EPConfig(max_rows=bound)) as ep:
            plan = ep.plan(ids_of(rank, CASES["uniform"]), case.num_experts)
        assert plan.row_capacity == rows
        plan.check()


def test_max_rows_holds_with_and_without_exact_sizes() -> None:
    idx, overflow = torch.tensor([[0], [1], [-1]]), "max_rows: got 1, expected at least 2"
    for bound, exact in product((1, 2, 3), (False, True)):
        refused = pytest.raises(RowOverflowError, match=overflow) if bound == 1 else nullcontext()
        with ExpertParallel(config=EPConfig(max_rows=bound, cpu_sync_on_runtime=exact)) as ep, refused:
            assert ep.plan(idx, num_experts=2).rows() == 2
    sizes = {"world_size": 4, "max_tokens": 10, "top_k": 8, "experts_per_rank": 3}
    assert row_ceiling(**sizes, distinct=True) == 4 * 10 * 3
    assert row_ceiling(**sizes, distinct=False) == 4 * 10 * 8


def test_more_slots_than_int32_counts_are_refused_and_malformed() -> None:
    refused = pytest.raises(ValueError, match=f"got {2**31} slots, expected at most {2**31 - 2**20}")
    with ExpertParallel(max_tokens_per_rank=2**31) as ep, refused:
        ep.plan(torch.zeros(1, 1, dtype=torch.int64), num_experts=2)
    shapes = dict.fromkeys(("counts", "group_ends", "slot_of_row"), (1,))
    for slots, malformed in ((2**31 - 2**20, None), (2**31 - 2**20 + 1, "expert_ids")):
        shapes |= dict.fromkeys(("expert_ids", "row_of_slot"), (1, slots, 1))
        shapes |= {"pair_tokens": (1, 1), "packed_of_token": (1, slots)}
        held = {name: torch.empty(shape, dtype=torch.int32, device="meta") for name, shape in shapes.items()}
        assert malformed_field(RoutingPlan(rank=0, num_tokens=1, **held)) == malformed


@on_ranks(2)
@both_backends
def test_max_tokens_is_agreed_on_in_every_call(rank: Rank, backend: str) -> None:
    """The largest T of the call, on ranks that bring more and on those that do not."""
    calls = ((0, 0), (3, 5), (9, 0), (0, 0), (1, 2))
    with ExpertParallel(backend=backend) as ep:
        ids = [torch.zeros(tokens[rank.rank], 1, dtype=torch.int64, device=rank.device) for tokens in calls]
        plans = [ep.plan(idx, 4) for idx in ids]
    for plan in plans:
        plan.check()
    assert [plan.max_tokens for plan in plans] == [0, 5, 9, 0, 2]


@pytest.mark.fast
@on_ranks(1, 3)
@pytest.mark.parametrize("name", ["uneven_tokens", "zero_token_ranks"])
def test_ids_scores_and_tokens_are_exchanged_together(rank: Rank, name: str) -> None:
    """By one kernel before one barrier."""
    from sonic_ep.fast.dispatch import dispatch_primitives
    from sonic_ep.fast.plan import PlanShape
    from sonic_ep.fast.planner import Planner
    from sonic_ep.fast.staging import stage_call

    case, ranks = CASES[name], range(rank.world_size)
    inputs, barriers = draw(case, rank.world_size, rank.device), []
    own, max_tokens = inputs.tokens_of(rank.rank), max(map(case.tokens_of_rank, ranks))
    sizes = {"max_tokens": max_tokens, "num_experts": case.num_experts}
    shape = PlanShape(rank=rank.rank, world_size=rank.world_size, top_k=case.top_k, **sizes)
    x, launched = inputs.x[own], list[str]()
    with workspace_of(rank) as workspace, pytest.MonkeyPatch.context() as patch:
        for barrier in ("barrier_before_write", "barrier_after_write"):
            run = getattr(workspace, barrier)
            patch.setattr(workspace, barrier, lambda run=run, name=barrier: (barriers.append(name), run()))
        planner = Planner(workspace.group, EPConfig(), workspace)
        dispatch = dispatch_primitives(workspace)[DispatchMode.ALL_TO_ALL]
        rows = dispatch.reserve(max_tokens, x.shape[1] * x.element_size())
        planner.begin()
        staged = planner.reserve(max_tokens, case.top_k, scored=True, rows=rows)
        with before_each_launch(launched.append):
            given = (inputs.topk_idx[own], inputs.topk_scores[own], x)
            stage_call(*(tensor.contiguous() for tensor in given), staged, workspace, **sizes)
        assert launched == ["stage_kernel"] * (max_tokens > 0)
        pending = planner.plan(staged, shape, num_tokens=len(x), distinct=False)
        plan = pending.plan
        received = dispatch.pull(x, staged.rows, plan, plan.row_capacity)
        assert barriers == ["barrier_after_write"] * (max_tokens > 0)
        x_WCH = x.new_zeros(rank.world_size, max_tokens, x.shape[1])
        for source in ranks:
            theirs, here = inputs.tokens_of(source), slice(case.tokens_of_rank(source))
            assert_bitwise(plan.expert_ids[source, here], inputs.topk_idx[theirs].int(), "ids")
            assert_bitwise(pending.scores_WCK[source, here], inputs.topk_scores[theirs], "scores")
            x_WCH[source, here] = inputs.x[theirs]
        token_of_row = plan.slot_of_row[: plan.rows()] // case.top_k
        assert_bitwise(received[: plan.rows()], x_WCH.flatten(0, 1)[token_of_row], "rows")
        workspace.barrier_after_write()


@pytest.mark.fast
@on_ranks(1)
def test_counts_are_copied_and_the_host_waits_for_every_one(rank: Rank) -> None:
    """The one host read of exact sizes: as many as there are, zeros among them, one copy after the other."""
    from sonic_ep.fast.planner import NOT_ARRIVED, HostCopy

    copy = HostCopy(rank.device)
    for counts in ([3, 0], [0, 0], [7, 1, 2], [5]):
        copy.start(torch.tensor(counts, dtype=torch.int32, device=rank.device))
        assert copy.wait() == counts
    copy.start(torch.tensor([NOT_ARRIVED, NOT_ARRIVED], dtype=torch.int32, device=rank.device))
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    writer = threading.Timer(0.05, lambda: (copy._host[1:].fill_(5), time.sleep(0.05), copy._host[:1].fill_(4)))
    writer.start()
    assert copy.wait() == [4, 5]
    writer.join()
