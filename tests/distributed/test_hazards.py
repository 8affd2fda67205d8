"""Silent errors: reused shared memory, late ranks, other groups, replays, offsets past 32 bits.

Every run has the bits of the reference backend, in forward and backward.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import ON_GPUS
from far_memory import skip_without_memory
from layer_inputs import plan_of
from matrix import DIAGONAL, matrix
from on_ranks import on_ranks
from promises import promise
from there_and_back import Modes, assert_same, both, by_any_modes, by_modes, changing, delay, outcome_of, there_and_back
from torch import Tensor

from sonic_ep import CombineMode, EPConfig, ExpertParallel
from sonic_ep.distributed.group import resolve_group
from sonic_ep.plan import RoutingPlan
from sonic_ep.testing import CASES, Case, Rank, assert_bitwise, draw

pytestmark = pytest.mark.fast
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def for_gpus(*values: int) -> Any:
    """A setting that runs on GPUs: interpreted, it takes long."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def assert_like_the_reference(rank: Rank, case: Case, modes: Modes) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    with both(modes) as (fast, reference):
        assert_same(outcome_of(fast, inputs), outcome_of(reference, inputs), "")


@on_ranks()
@by_modes
@pytest.mark.parametrize(
    ("world_size", "late"),
    [
        *[for_gpus(1, False), for_gpus(2, False), for_gpus(4, False), *((size, False) for size in ON_GPUS)],
        *[(2, True), for_gpus(3, True), *((size, True) for size in ON_GPUS)],
    ],
)
def test_six_iterations_over_reused_memory(rank: Rank, late: bool, modes: Modes) -> None:
    """late: in each iteration another rank is late."""
    with both(modes) as (fast, reference):
        for iteration in range(6):
            inputs = draw(changing(iteration), rank.world_size, rank.device)
            expected = outcome_of(reference, inputs)
            if late and iteration % rank.world_size == rank.rank:
                delay(rank)
            assert_same(outcome_of(fast, inputs), expected, f"in iteration {iteration}")


@promise("mismatch")
@on_ranks(2)
@by_modes
def test_receive_flags_of_an_earlier_step_are_not_taken(rank: Rank, modes: Modes) -> None:
    """Every flag is still set by an earlier step, and the rank that sends is late."""
    from sonic_ep.fast.combine.base import FLAGS

    inputs = draw(changing(0), rank.world_size, rank.device)
    with both(modes) as (fast, reference):
        expected = outcome_of(reference, inputs)
        assert_same(outcome_of(fast, inputs), expected, "before")
        workspace = fast._backend._context(rank.device).workspace
        flags = workspace.reserve(FLAGS, 1).local.view(torch.int64)
        flags[::2], flags[1::2] = workspace._collectives.sync_tag.tag, 1
        workspace.synchronize()
        dist.barrier()
        run_waiting = workspace.run_waiting

        def late(*arguments: Any, **constants: Any) -> None:
            delay(rank)
            run_waiting(*arguments, **constants)

        with pytest.MonkeyPatch.context() as patch:
            if rank.rank == 0:
                patch.setattr(workspace, "run_waiting", late)
            other = draw(replace(changing(0), seed=7), rank.world_size, rank.device)
            expected = outcome_of(reference, other)
            assert_same(outcome_of(fast, other), expected, "with flags left up")


@on_ranks(2)
@by_any_modes
def test_memory_is_written_again_after_a_late_reader(rank: Rank, modes: Modes) -> None:
    """Two dispatches in a row, and two sums over ranks, of which rank 0 reads late."""
    from sonic_ep.fast.all_reduce import Summand, sum_over_ranks

    inputs = draw(changing(0), rank.world_size, rank.device)
    x = inputs.x[inputs.tokens_of(rank.rank)]
    with both(modes) as (fast, reference), pytest.MonkeyPatch.context() as patch:
        plan, expected = plan_of(fast, inputs), plan_of(reference, inputs)
        rows = [reference.dispatch(tokens, expected)[: expected.rows()] for tokens in (x, -x)]
        workspace = fast._backend._context(rank.device).workspace
        barrier = workspace.barrier_after_write
        if rank.rank == 0:
            patch.setattr(workspace, "barrier_after_write", lambda: [barrier(), delay(rank)])
        for found, wanted in zip([fast.dispatch(tokens, plan) for tokens in (x, -x)], rows, strict=True):
            assert_bitwise(found[: len(wanted)], wanted)
        for number in (1, 10):
            own = x.new_full((1,), number, dtype=torch.float32)
            summand = Summand(parts=own, shape=own.shape, dtype=own.dtype)
            assert float(sum_over_ranks([summand], workspace)[0]) == 2 * number


@on_ranks(for_gpus(1), 2, for_gpus(3))
@by_any_modes
def test_two_workspaces_interleaved(rank: Rank, modes: Modes) -> None:
    """Two objects over one group alternate, with different shapes and dtypes."""
    cases = [changing(0), replace(changing(1, torch.float32), hidden=40, top_k=2)]
    drawn = [draw(case, rank.world_size, rank.device) for case in cases]
    with both(modes) as (first, reference), both(modes) as (second, _):
        expected = [outcome_of(reference, inputs) for inputs in drawn]
        for _ in range(3):
            steps = [there_and_back(ep, inputs) for ep, inputs in zip((first, second), drawn, strict=True)]
            *_, last = zip(*steps, strict=True)
            for found, wanted in zip(last, expected, strict=True):
                assert_same(found, wanted, "of two interleaved")


@promise("nothing-shared")
@on_ranks(2, for_gpus(3))
@by_modes
def test_nothing_that_backward_needs_is_in_shared_memory(rank: Rank, modes: Modes) -> None:
    """Two forwards of one object before either backward, and the backwards in the other order."""
    drawn = [draw(changing(iteration), rank.world_size, rank.device) for iteration in (0, 3)]
    with both(modes) as (fast, reference):
        expected = [outcome_of(reference, inputs) for inputs in drawn]
        steps = [there_and_back(fast, inputs) for inputs in drawn]
        for step in steps:
            for _ in range(3):
                next(step)
        for step, wanted in reversed(list(zip(steps, expected, strict=True))):
            assert_same(next(step), wanted, "of two forwards before one backward")


@on_ranks()
@by_any_modes
@pytest.mark.parametrize(("world_size", "members"), [(4, 2), for_gpus(8, 4)])
def test_subgroups_side_by_side(rank: Rank, members: int, modes: Modes) -> None:
    for first in range(0, rank.world_size, members):
        group = dist.new_group(list(range(first, first + members)))
        if first <= rank.rank < first + members:
            mine, case = group, changing(first)
    inputs = draw(case, members, rank.device)
    with both(modes, mine) as (fast, reference):
        for iteration in range(2):
            expected = outcome_of(reference, inputs)
            assert_same(outcome_of(fast, inputs), expected, f"in a subgroup, iteration {iteration}")


@on_ranks(for_gpus(3), for_gpus(5), for_gpus(6))
@by_modes
def test_groups_of_no_power_of_two(rank: Rank, modes: Modes) -> None:
    case = replace(CASES["uneven_tokens"], num_experts=30, dtype=torch.bfloat16, hidden=12, tokens=(4, 1, 3, 0))
    assert_like_the_reference(rank, case, modes)


@on_ranks()
@matrix(backend=("fast",), world_size=(2,), hidden=(1, 7, 8, 33, 100, 4100), dtype=DTYPES, modes=DIAGONAL)
def test_rows_of_any_width(rank: Rank, backend: str, hidden: int, dtype: torch.dtype, modes: Modes) -> None:
    """The last is wider than what any kernel takes at a time."""
    case = replace(CASES["dropped_slots"], hidden=hidden, dtype=dtype, tokens=(5, 3))
    assert_like_the_reference(rank, case, modes)


@on_ranks(2)
@by_modes
def test_views_as_arguments(rank: Rank, modes: Modes) -> None:
    """Every second column and row at an odd offset; and rows of 16 bytes that begin at 2, gradients of them too."""
    inputs = draw(replace(changing(0), hidden=8), rank.world_size, rank.device)

    def spread(tensor: Tensor) -> Tensor:
        wide = torch.empty(2 * len(tensor) + 1, 2 * tensor.shape[1] + 1, dtype=tensor.dtype, device=rank.device)
        return wide[1::2, 1::2].copy_(tensor)

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous().t()

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)

    tokens = inputs.tokens_of(rank.rank)
    with both(modes) as (fast, reference):
        expected = outcome_of(reference, inputs)
        for of_x, of_others in ((spread, transposed), (shifted, shifted)):
            plan = fast.plan(of_others(inputs.topk_idx)[tokens], inputs.case.num_experts)
            x = of_x(inputs.x[tokens]).detach().requires_grad_()
            rows = fast.dispatch(x, plan)
            assert_bitwise(rows[: plan.rows()].detach(), expected["rows"])
            scores = inputs.topk_scores[tokens].double().requires_grad_()
            y = fast.combine(of_others(rows * rows), scores, plan)
            y.backward(of_others(inputs.dy[tokens]))
            found = {"y": y.detach(), "dx": x.grad, "dscores": scores.grad.float()}
            assert_same({"rows": expected["rows"], **found}, expected, "of views")


@on_ranks(1, 2)
@pytest.mark.parametrize("case", ["one_rank", "dropped_slots"])
def test_exact_sizes_and_bounds_on_every_rank(rank: Rank, case: str) -> None:
    """Exact sizes differ from rank to rank; neither they nor bounds that hold spoil anything, huge ones included."""
    inputs = draw(replace(CASES[case], hidden=12, tokens=(4, 2)), rank.world_size, rank.device)
    with ExpertParallel(backend="reference") as reference:
        expected = outcome_of(reference, inputs)
    for flags in ({}, {"max_rows": 1000}, {"max_rows": 2**70}, {"max_rows": 2**70, "cpu_sync_on_runtime": False}):
        config = EPConfig(**{"cpu_sync_on_runtime": True, **flags})
        with ExpertParallel(backend="fast", config=config) as fast:
            assert_same(outcome_of(fast, inputs), expected, str(config))
            fast.check()


# Bytes for one token, for some, and for all but one.
@on_ranks(for_gpus(1), 2, for_gpus(3))
@pytest.mark.parametrize("most_bytes", [1, 400, 6 * 5 * 8 * 4])
def test_chunks_of_the_receive_buffer(rank: Rank, most_bytes: int) -> None:
    """A receive buffer for few tokens takes them in chunks, of which the last may not be full."""
    from sonic_ep.fast.combine import AllToAllCombine, RankDedupCombine, ReduceScatterCombine
    from sonic_ep.fast.workspace import Workspace

    case = replace(CASES["repeated_experts"], tokens=(7, 4), hidden=8)
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    workspace = Workspace(resolve_group(None), rank.device)
    for mode, kind in zip(CombineMode, (AllToAllCombine, ReduceScatterCombine, RankDedupCombine), strict=True):
        with ExpertParallel(backend="reference", config=EPConfig(combine=mode)) as reference:
            plan = plan_of(reference, inputs)
            rows = reference.dispatch(inputs.x[tokens], plan)
            expected = reference.combine(rows, inputs.topk_scores[tokens], plan)
        workspace.enter()
        primitive = kind(workspace, most_bytes)
        found, scores = primitive.weighted(rows, inputs.topk_scores[tokens], plan)
        assert_bitwise(found, expected, mode.value)
        # Of one rank (T, K).
        by_rank = scores.view(rank.world_size, -1, case.top_k)
        for source in range(rank.world_size):
            theirs = inputs.tokens_of(source)
            here = slice(theirs.stop - theirs.start)
            assert_bitwise(by_rank[source, here], inputs.topk_scores[theirs], "scores")
        assert_bitwise(primitive.combine(rows, scores, plan), expected, mode.value)
        assert int(workspace.ticket) == 0
    workspace.close()


# More elements than 32 bits can count, in rows so wide that few programs reach them all.
WIDE = 2**16
TALL = 2**31 // WIDE + 3


@pytest.fixture
def memory_for_far_rows(request: pytest.FixtureRequest) -> None:
    skip_without_memory(request.node.callspec.params["pool"], 3 * WIDE * TALL * 2)


@on_ranks(1)
@pytest.mark.usefixtures("memory_for_far_rows")
def test_offsets_past_32_bits(rank: Rank) -> None:
    """A plan whose rows lie at the end of a tensor of more than 2**31 elements, moved there and back."""
    from sonic_ep.fast.combine.all_to_all import AllToAllCombine
    from sonic_ep.fast.combine.rank_dedup import RankDedupCombine
    from sonic_ep.fast.dispatch.all_to_all import pull_to_rows
    from sonic_ep.fast.permute import gather_rows
    from sonic_ep.fast.workspace import Workspace

    def index(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=rank.device)

    # The pool fills fresh memory; these four gigabytes stay untouched.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        far = (TALL - 1, TALL - 2)
        plan = RoutingPlan(
            rank=0,
            num_tokens=2,
            expert_ids=index(0, 0).view(1, 2, 1),
            counts=index(2),
            row_of_slot=index(*far).view(1, 2, 1),
            group_ends=index(2),
            slot_of_row=torch.full((TALL,), -1, dtype=torch.int32, device=rank.device),
            pair_tokens=index(2).view(1, 1),
            packed_of_token=index(0, 1).view(1, 2),
        )
        workspace = Workspace(resolve_group(None), rank.device)
        x_TH = torch.randn(2, WIDE, device=rank.device).bfloat16()
        table = workspace.staging("tokens", 1).addresses
        rows_RH = pull_to_rows(x_TH, table, workspace.epoch, plan, plan.row_capacity)
        assert rows_RH.numel() > 2**31
        assert_bitwise(rows_RH[list(far)], x_TH)
        assert_bitwise(gather_rows(rows_RH, index(*far, -1), plan.group_ends)[:2], x_TH)
        if rank.device.type == "cuda":
            # The kernel visits every valid row, which an interpreter could not do in minutes.
            every_row = torch.arange(TALL, dtype=torch.int32, device=rank.device)
            taken = gather_rows(rows_RH, every_row, every_row[-1:] + 1)
            assert_bitwise(taken[[TALL - 1, TALL - 2]], x_TH)
        workspace.enter()
        for combine in (RankDedupCombine, AllToAllCombine):
            assert_bitwise(combine(workspace).combine(rows_RH, None, plan), x_TH)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
