"""Modes × flags × cases × dtypes × ranks on both backends: the layer against the oracle, the primitives by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest
import torch
from backends import both_backends, dispatch_primitives_of
from layer_inputs import plan_of
from matrix import DIAGONAL, FLAGS, SIZES, Cell, matrix
from near import assert_near
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel, RowOverflowError
from sonic_ep.plan import RoutingPlan
from sonic_ep.testing import CASES, Accuracy, Inputs, Rank, assert_bitwise, draw, verify_moe, verify_routed
from sonic_ep.testing.cases import OptionTrial, option_trials
from sonic_ep.testing.oracle import run_moe, run_routed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What runs with all flags every day. Other tests of the fast backend have both flags.
INTERPRETED_FLAGS = {"case": "zero_token_ranks", "combine": CombineMode.RANK_DEDUP}
HIDDEN = 8
OPTION_TRIALS = {trial.case.name: trial for trial in option_trials()}


def two_ranks(cell: Cell) -> bool:
    """Every mode once, on two ranks; the routed layer is run every day in more settings."""
    return cell["world_size"] == 2 and (cell["dispatch"], cell["combine"]) in DIAGONAL


def assert_accurate(findings: Iterable[Accuracy]) -> None:
    assert not (wrong := [str(finding) for finding in findings if not finding.ok]), "\n".join(wrong)


@promise("accuracy")
@on_ranks()
@matrix(world_size=SIZES, case=CASES, dispatch=DispatchMode, combine=CombineMode)
def test_routed_layer_matches_the_oracle(
    rank: Rank, backend: str, case: str, dispatch: DispatchMode, combine: CombineMode
) -> None:
    with ExpertParallel(backend=backend, config=EPConfig(dispatch=dispatch, combine=combine)) as ep:
        assert_accurate(verify_routed(CASES[case], ep, rank.device))


@promise("accuracy")
@on_ranks()
@matrix(
    lambda cell: two_ranks(cell) and (cell["backend"] == "reference" or cell["case"] == "uneven_tokens"),
    world_size=SIZES,
    case=("uneven_tokens", "uniform_bf16"),
    dispatch=DispatchMode,
    combine=CombineMode,
)
def test_layer_with_its_router_matches_the_oracle(
    rank: Rank, backend: str, case: str, dispatch: DispatchMode, combine: CombineMode
) -> None:
    with ExpertParallel(backend=backend, config=EPConfig(dispatch=dispatch, combine=combine)) as ep:
        assert_accurate(verify_moe(CASES[case], ep, rank.device))


# Interpreted, every day runs every sixth trial, on two ranks.
@on_ranks()
@pytest.mark.parametrize(
    ("backend", "world_size", "trial"),
    [
        pytest.param(backend, size, trial, marks=pytest.mark.thorough if place % every else (), id=f"{backend}-{name}")
        for backend, size, every in (("reference", 3, 1), ("fast", 2, 6))
        for place, (name, trial) in enumerate(OPTION_TRIALS.items())
    ],
)
def test_options_modes_and_flags_together_match_the_oracle(rank: Rank, backend: str, trial: OptionTrial) -> None:
    with ExpertParallel(backend=backend, config=trial.config) as ep:
        for verify in (verify_moe, verify_routed):
            assert_accurate(verify(trial.case, ep, rank.device))


@promise("flags")
@on_ranks()
@matrix(
    lambda cell: two_ranks(cell) and (cell["backend"] == "reference" or INTERPRETED_FLAGS.items() <= cell.items()),
    world_size=(1, 2, 4),
    case=("uneven_tokens", "zero_token_ranks", "uniform_bf16"),
    dispatch=DispatchMode,
    combine=CombineMode,
)
def test_flags_change_no_bit(rank: Rank, backend: str, case: str, dispatch: DispatchMode, combine: CombineMode) -> None:
    inputs = draw(CASES[case], rank.world_size, rank.device)
    outcomes = []
    for flags in FLAGS:
        with ExpertParallel(backend=backend, config=EPConfig(dispatch=dispatch, combine=combine, **flags)) as ep:
            outcomes.append({**run_routed(inputs, ep), **run_moe(inputs, ep)})
    for flags, outcome in zip(FLAGS, outcomes, strict=True):
        assert_same_bits(outcome, outcomes[0], f"with {flags}")


@promise("modes")
@on_ranks()
@matrix(lambda cell: cell["world_size"] == 3 and cell["backend"] == "reference", world_size=(1, 3, 4), case=CASES)
def test_modes_agree_bit_for_bit(rank: Rank, backend: str, case: str) -> None:
    inputs = draw(CASES[case], rank.world_size, rank.device)
    outcomes = {}
    for dispatch, combine in product(DispatchMode, CombineMode):
        with ExpertParallel(backend=backend, config=EPConfig(dispatch=dispatch, combine=combine)) as ep:
            outcomes[dispatch, combine] = run_routed(inputs, ep)
    for (dispatch, combine), outcome in outcomes.items():
        same = CombineMode.REDUCE_SCATTER if combine is CombineMode.RANK_DEDUP else combine
        for expected in (outcomes[DispatchMode.ALL_TO_ALL, combine], outcomes[dispatch, same]):
            assert_same_bits(outcome, expected, f"with {dispatch.value}+{combine.value}")


def expert_rows(inputs: Inputs) -> Tensor:
    """A made-up output of every slot, (N, K, H): any rank can tell it from the slot's number."""
    tokens, top_k = inputs.topk_idx.shape
    generator = torch.Generator().manual_seed(99)
    rows = torch.randn(tokens, top_k, HIDDEN, generator=generator, dtype=torch.float64)
    return rows.to(inputs.case.dtype).to(inputs.x.device)


def one_by_one(terms: list[Tensor], dtype: torch.dtype) -> Tensor:
    """fp32 sum from the left, starting at zero, one rounding."""
    total = torch.zeros(HIDDEN, dtype=torch.float32, device=terms[0].device if terms else "cpu")
    for term in terms:
        total = total + term.float()
    return total.to(dtype)


def combined_by_hand(mode: CombineMode, rows: Tensor, scores: Tensor, owners: list[int]) -> Tensor:
    """all_to_all: round(sum over k). Otherwise round(sum over ranks of round(sum over k on the rank))."""
    terms = [score * row.float() for score, row in zip(scores, rows, strict=True)]
    if mode is CombineMode.ALL_TO_ALL:
        return one_by_one([term for term, owner in zip(terms, owners, strict=True) if owner >= 0], rows.dtype)
    by_rank = [[t for t, owner in zip(terms, owners, strict=True) if owner == r] for r in sorted(set(owners) - {-1})]
    return one_by_one([one_by_one(own, rows.dtype) for own in by_rank], rows.dtype)


def canonical(inputs: Inputs, slots: Tensor, rank: int) -> Tensor:
    """The rank's entries of ``slots`` (N, K, ...) in the order of its rows."""
    experts = range(*inputs.experts_of(rank).indices(inputs.case.num_experts))
    where = torch.cat([(inputs.topk_idx == expert).nonzero() for expert in experts])
    return slots[where[:, 0], where[:, 1]]


def row_buffer(plan: RoutingPlan, inputs: Inputs, slots: Tensor) -> Tensor:
    """(R, H): the valid rows of ``slots`` (N, K, H), NaN behind them."""
    rows = slots.new_full((plan.row_capacity, HIDDEN), float("nan"))
    rows[: plan.rows()] = canonical(inputs, slots, plan.rank)
    return rows


def owners_of_slots(inputs: Inputs, experts_per_rank: int) -> Tensor:
    """Rank of each slot's expert, (N, K); -1 where the slot is dropped."""
    return (inputs.topk_idx // experts_per_rank).where(inputs.topk_idx >= 0, -1)


@promise("order")
@on_ranks()
@matrix(
    lambda cell: cell["world_size"] == (3 if cell["backend"] == "reference" else 2), world_size=SIZES[:4], case=CASES
)
def test_each_mode_receives_its_tokens_and_rows_arrive_in_canonical_order(rank: Rank, backend: str, case: str) -> None:
    inputs = draw(CASES[case], rank.world_size, rank.device)
    x_TH = inputs.x[inputs.tokens_of(rank.rank)]
    token_of_slot = torch.arange(len(inputs.x), device=rank.device)[:, None].expand_as(inputs.topk_idx)
    expected = inputs.x[canonical(inputs, token_of_slot, rank.rank)]
    for mode in DispatchMode:
        with ExpertParallel(backend=backend, config=EPConfig(dispatch=mode)) as ep:
            plan = plan_of(ep, inputs)
            rows = ep.dispatch(x_TH, plan)
        assert rows.shape == (plan.row_capacity, inputs.case.hidden)
        assert_bitwise(rows[: plan.rows()], expected, mode.value)
    primitives = dispatch_primitives_of(backend, rank.device)
    received = {mode: primitive.receive(x_TH, plan) for mode, primitive in primitives.items()}
    here = (owners_of_slots(inputs, plan.experts_per_rank) == rank.rank).any(dim=1)
    # Behind the packed tokens a backend may leave room.
    assert_bitwise(received[DispatchMode.RANK_DEDUP][: int(here.sum())], inputs.x[here])
    gathered = received[DispatchMode.ALL_GATHER].view(rank.world_size, plan.max_tokens, inputs.case.hidden)
    for source in range(rank.world_size):
        theirs = inputs.x[inputs.tokens_of(source)]
        assert_bitwise(gathered[source, : len(theirs)], theirs)
    assert received[DispatchMode.ALL_TO_ALL].shape[0] == plan.row_capacity


def assert_combined_by_hand(got: Tensor, plan: RoutingPlan, inputs: Inputs, scores: Tensor, mode: CombineMode) -> None:
    """Holds what this rank ``got`` against sums by hand. scores: (N, K)."""
    tokens = inputs.tokens_of(plan.rank)
    rows, owners = expert_rows(inputs)[tokens], owners_of_slots(inputs, plan.experts_per_rank)[tokens].tolist()
    assert got.shape == (len(owners), HIDDEN)
    for token, owner in enumerate(owners):
        expected = combined_by_hand(mode, rows[token], scores[tokens][token], owner)
        assert_bitwise(got[token].cpu(), expected.cpu(), f"token {token}")


@on_ranks()
@matrix(
    world_size=(3,),
    case=("uniform", "dropped_slots", "repeated_experts", "zero_token_ranks"),
    dtype=DTYPES[:2],
    combine=CombineMode,
)
def test_gradient_of_x_has_the_roundings_of_the_combine_mode(
    rank: Rank, backend: str, case: str, dtype: torch.dtype, combine: CombineMode
) -> None:
    """The sum of the gradients of the token's rows, in that mode's order; rows past the valid are never read."""
    inputs = draw(replace(CASES[case], dtype=dtype, top_k=6), rank.world_size, rank.device)
    slots = expert_rows(inputs)
    x = torch.zeros_like(inputs.x[inputs.tokens_of(rank.rank), :HIDDEN]).contiguous().requires_grad_()
    with ExpertParallel(backend=backend, config=EPConfig(combine=combine)) as ep:
        plan = plan_of(ep, inputs)
        ep.dispatch(x, plan).backward(row_buffer(plan, inputs, slots))
    assert_combined_by_hand(x.grad, plan, inputs, torch.ones_like(inputs.topk_scores), combine)


@promise("modes")
@on_ranks()
@matrix(
    world_size=SIZES,
    case=("uniform", "dropped_slots", "repeated_experts", "zero_token_ranks", "uneven_tokens", "top_all"),
    dtype=DTYPES,
    combine=CombineMode,
)
def test_order_and_roundings(rank: Rank, backend: str, case: str, dtype: torch.dtype, combine: CombineMode) -> None:
    inputs = draw(replace(CASES[case], dtype=dtype), rank.world_size, rank.device)
    scores = inputs.topk_scores.masked_fill(inputs.topk_idx < 0, float("nan"))
    with ExpertParallel(backend=backend, config=EPConfig(combine=combine)) as ep:
        plan = plan_of(ep, inputs)
        y = ep.combine(row_buffer(plan, inputs, expert_rows(inputs)), scores[inputs.tokens_of(rank.rank)], plan)
    assert_combined_by_hand(y, plan, inputs, scores, combine)


@promise("written")
@on_ranks()
@matrix(world_size=(2, 4), case=("uniform", "dropped_slots", "repeated_experts"), dtype=DTYPES, modes=DIAGONAL)
def test_gradients_of_rows_and_scores(
    rank: Rank, backend: str, case: str, dtype: torch.dtype, modes: tuple[DispatchMode, CombineMode]
) -> None:
    """Products and sums in fp32; a row's gradient is rounded once, and the gradient that comes in stays as it is.

    Rows without a slot have the gradient zero: sums over all rows, as of a bias, run over them too.
    """
    inputs = draw(replace(CASES[case], dtype=dtype), rank.world_size, rank.device)
    tokens, slots = inputs.tokens_of(rank.rank), expert_rows(inputs)
    scores = inputs.topk_scores[tokens].clone().requires_grad_()
    dy = inputs.dy[tokens, :HIDDEN].contiguous()
    with ExpertParallel(backend=backend, config=EPConfig(dispatch=modes[0], combine=modes[1])) as ep:
        plan = plan_of(ep, inputs)
        rows = row_buffer(plan, inputs, slots).requires_grad_()
        ep.combine(rows, scores, plan).backward(kept := dy.clone())
    assert_bitwise(kept, dy)
    weighted = inputs.topk_scores[:, :, None] * inputs.dy[:, None, :HIDDEN].float()
    expected_rows = torch.zeros_like(rows)
    expected_rows[: plan.rows()] = canonical(inputs, weighted.to(dtype), rank.rank)
    assert_bitwise(rows.grad, expected_rows, "gradient of the rows")
    expected_scores = (slots[tokens].float() * dy[:, None].float()).sum(dim=-1)
    expected_scores[inputs.topk_idx[tokens] < 0] = 0
    assert_near(scores.grad, expected_scores, HIDDEN)


@promise("rows")
@on_ranks()
@matrix(
    lambda cell: cell["case"] == "uneven_tokens" and (not cell["exact"] or cell["combine"] is CombineMode.RANK_DEDUP),
    world_size=(2,),
    case=("dropped_slots", "uneven_tokens", "zero_token_ranks", "repeated_experts"),
    combine=CombineMode,
    exact=(False, True),
)
def test_combine_takes_rows_without_the_unspecified_tail(
    rank: Rank, backend: str, case: str, combine: CombineMode, exact: bool
) -> None:
    """Any number of rows from the valid ones to R: the same bits as with all R, of which the tail is NaN."""
    inputs = draw(CASES[case], rank.world_size, rank.device)
    tokens, slots = inputs.tokens_of(rank.rank), expert_rows(inputs)
    dy = inputs.dy[tokens, :HIDDEN].contiguous()
    outcomes = []
    with ExpertParallel(backend=backend, config=EPConfig(combine=combine, cpu_sync_on_runtime=exact)) as ep:
        plan = plan_of(ep, inputs)
        valid, room = plan.rows(), plan.row_capacity
        assert (valid == room) is exact
        for count in sorted({room, valid, (valid + room) // 2}, reverse=True):
            rows = row_buffer(plan, inputs, slots)[:count].requires_grad_()
            scores = inputs.topk_scores[tokens].clone().requires_grad_()
            y = ep.combine(rows, scores, plan)
            y.backward(dy)
            assert rows.grad is not None
            assert rows.grad.shape == (count, HIDDEN)
            assert not rows.grad[valid:].any()
            outcomes.append({"y": y.detach(), "rows": rows.grad[:valid], "scores": scores.grad})
    for outcome in outcomes[1:]:
        assert_same_bits(outcome, outcomes[0])


def without_last_row(ep: ExpertParallel, inputs: Inputs, slots: Tensor) -> tuple[RoutingPlan, dict[str, Tensor]]:
    """The plan; y and the gradients of a combine that lacks the last valid row of the last rank."""
    tokens = inputs.tokens_of(ep.rank)
    plan = plan_of(ep, inputs)
    count = plan.rows() - (ep.rank == ep.world_size - 1)
    rows = row_buffer(plan, inputs, slots)[:count].requires_grad_()
    scores = inputs.topk_scores[tokens].clone().requires_grad_()
    y = ep.combine(rows, scores, plan)
    y.backward(inputs.dy[tokens, :HIDDEN].contiguous())
    return plan, {"y": y.detach(), "rows": rows.grad, "scores": scores.grad}


def assert_same_but_for_kinds_of_nan(got: Tensor, expected: Tensor, name: str) -> None:
    """Bits, but that a GPU's arithmetic makes another NaN than PyTorch fills in."""
    assert torch.equal(got.isnan(), expected.isnan()), name
    assert_bitwise(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0), name)


@promise("rows")
@pytest.mark.fast
@on_ranks(2)
@pytest.mark.parametrize("combine", [CombineMode.ALL_TO_ALL, CombineMode.RANK_DEDUP])
def test_a_missing_row_is_nan_for_its_token_and_flagged_on_its_rank(rank: Rank, combine: CombineMode) -> None:
    """Where the host does not know how many rows are valid. All else keeps its bits, and the group goes on."""
    inputs = draw(CASES["dropped_slots"], rank.world_size, rank.device)
    slots, tokens = expert_rows(inputs), inputs.tokens_of(rank.rank)
    scores = inputs.topk_scores[tokens].clone().requires_grad_()
    with ExpertParallel(backend="fast", config=EPConfig(combine=combine)) as ep:
        plan, found = without_last_row(ep, inputs, slots)
        if rank.rank == 1:
            with pytest.raises(ValueError, match=r"^rank 1 of 2: rows of combine: got 1 fewer than"):
                ep.check()
        else:
            ep.check()
        ep.check()
        y = ep.combine(row_buffer(plan, inputs, slots), scores, plan)
        y.backward(inputs.dy[tokens, :HIDDEN].contiguous())
        assert scores.grad is not None
    last = torch.zeros(rank.world_size, 1, 1, dtype=torch.int32, device=rank.device) + rank.world_size - 1
    lacks_WCK = (plan.owner_of_slot() == last) & (plan.row_of_slot == plan.counts.view(2, -1)[1].sum() - 1)
    lacks_TK = lacks_WCK[rank.rank, : plan.num_tokens]
    assert_same_but_for_kinds_of_nan(found["scores"], scores.grad.masked_fill(lacks_TK, float("nan")), "scores")
    y_lacking = y.detach().masked_fill(lacks_TK.any(dim=1, keepdim=True), float("nan"))
    assert_same_but_for_kinds_of_nan(found["y"], y_lacking, "y")
    assert not found["rows"].isnan().any()


@promise("rows")
@on_ranks(2)
@both_backends
def test_fewer_rows_than_the_valid_ones_are_refused_where_the_host_knows(rank: Rank, backend: str) -> None:
    """Before communication, on this rank alone; the call may then be repeated."""
    inputs = draw(CASES["uniform"], rank.world_size, rank.device)
    scores = inputs.topk_scores[inputs.tokens_of(rank.rank)]
    for exact in (False, True) if backend == "reference" else (True,):
        with ExpertParallel(backend=backend, config=EPConfig(cpu_sync_on_runtime=exact)) as ep:
            plan = plan_of(ep, inputs)
            rows = row_buffer(plan, inputs, expert_rows(inputs))
            if rank.rank == 0:
                with pytest.raises(ValueError, match=r"^rank 0 of 2: rows of combine: got 2 fewer than"):
                    ep.combine(rows[: plan.rows() - 2], scores, plan)
            ep.combine(rows, scores, plan)


@promise("overflow")
@pytest.mark.fast
@on_ranks(2)
def test_an_overflow_is_nan_with_fewer_rows_too(rank: Rank) -> None:
    inputs = draw(CASES["one_rank"], rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    with ExpertParallel(backend="fast", config=EPConfig(max_rows=20)) as ep:
        plan = plan_of(ep, inputs)
        rows = ep.dispatch(inputs.x[tokens], plan)[: plan.rows()].detach().requires_grad_()
        y = ep.combine(rows, inputs.topk_scores[tokens], plan)
        y.sum().backward()
        assert rows.grad is not None
        assert rows.grad.shape == rows.shape == (20 * rank.rank, inputs.case.hidden)
        assert bool(y.isnan().all())
        with pytest.raises(RowOverflowError):
            ep.check()


@on_ranks()
@matrix(world_size=(2,), dtype=(torch.float64, torch.float16, torch.bfloat16), combine=CombineMode)
def test_any_scores_are_used_in_fp32(rank: Rank, backend: str, dtype: torch.dtype, combine: CombineMode) -> None:
    generator = torch.Generator().manual_seed(rank.rank)
    idx = torch.tensor([[0, 1], [1, 0]], device=rank.device)
    scores = torch.rand(2, 2, dtype=torch.float64, generator=generator).to(rank.device, dtype)
    with ExpertParallel(backend=backend, config=EPConfig(combine=combine)) as ep:
        plan = ep.plan(idx, num_experts=2)
        rows = torch.randn(plan.row_capacity, HIDDEN, generator=generator).to(rank.device, torch.bfloat16)
        assert_bitwise(ep.combine(rows, scores, plan), ep.combine(rows, scores.float(), plan))
