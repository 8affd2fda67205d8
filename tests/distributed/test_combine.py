"""The combine primitives, each against sums by hand with the same order and the same roundings: bit for bit."""

from dataclasses import replace

import pytest
import torch
from backends import WORLD_SIZES, both_backends
from combine_by_hand import BY_HAND, HIDDEN, canonical, expert_rows, owners_of_slots
from near import assert_near

from sonic_ep import CombineMode, EPConfig, ExpertParallel
from sonic_ep.reference.combine.ordered_sum import ordered_sum
from sonic_ep.testing import CASES, Case, Rank, RankPool, assert_bitwise, draw

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def combined(rank: Rank, backend: str, case: Case, mode: CombineMode, poison: float) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    slots = expert_rows(inputs)
    scores = inputs.topk_scores.masked_fill(inputs.topk_idx < 0, float("nan"))
    with ExpertParallel(backend=backend, config=EPConfig(combine=mode)) as ep:
        plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
        rows = torch.full((plan.row_capacity, HIDDEN), poison, dtype=case.dtype, device=rank.device)
        rows[: plan.rows()] = canonical(inputs, slots, rank.rank)
        y = ep.combine(rows, scores[tokens], plan)
    owners = owners_of_slots(inputs, plan.experts_per_rank)[tokens].tolist()
    assert y.shape == (len(owners), HIDDEN)
    for token, owner in enumerate(owners):
        expected = BY_HAND[mode](slots[tokens][token], scores[tokens][token], owner)
        assert_bitwise(y[token].cpu(), expected.cpu(), f"token {token}")


# Every dtype in groups of every size on the reference; the fast backend takes each dtype in a group of two, and bf16,
# whose roundings tell the modes apart most, in the others. Only fp32 tells the order of the ranks.
BACKEND_SIZE_DTYPE = [
    *(("reference", size, dtype) for size in (1, 2, 3, 4) for dtype in DTYPES),
    *(("fast", 2, dtype) for dtype in DTYPES),
    ("fast", 3, torch.float32),
    *(("fast", size, torch.bfloat16) for size in WORLD_SIZES if size != 2),
]


@pytest.mark.parametrize("mode", CombineMode)
@pytest.mark.parametrize(
    "case", ["uniform", "dropped_slots", "repeated_experts", "zero_token_ranks", "uneven_tokens", "top_all"]
)
@pytest.mark.parametrize(("backend", "world_size", "dtype"), BACKEND_SIZE_DTYPE, ids=str)
def test_order_and_roundings(
    pool: RankPool, backend: str, world_size: int, case: str, mode: CombineMode, dtype: torch.dtype
) -> None:
    pool.run(combined, backend, replace(CASES[case], dtype=dtype), mode, float("nan"), world_size=world_size)


def test_the_two_roundings_differ_from_one() -> None:
    """The modes are told apart by their bits: 256 + 1 + 1 is 258 at once, and 256 in bf16 if rounded in between."""
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    at_once = ordered_sum(rows, torch.tensor([[0, 1, 2]]))
    first = ordered_sum(rows, torch.tensor([[0, 1]]))
    in_two = ordered_sum(torch.cat([first, rows[2:]]), torch.tensor([[0, 1]]))
    assert (at_once.item(), in_two.item()) == (258.0, 256.0)


def test_an_absent_term_is_no_term() -> None:
    """Not even a NaN or an infinite score of it counts, and no minus zero appears."""
    rows = torch.tensor([[-1.0], [float("nan")]])
    weights = torch.tensor([[2.0, float("inf")], [float("nan"), float("nan")]])
    out = ordered_sum(rows, torch.tensor([[0, -1], [-1, -1]]), weights)
    assert_bitwise(out, torch.tensor([[-2.0], [0.0]]))


def score_gradient(rank: Rank, backend: str, case: Case, config: EPConfig) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    slots = expert_rows(inputs)
    scores = inputs.topk_scores[tokens].clone().requires_grad_()
    dy = inputs.dy[tokens, :HIDDEN].contiguous()
    with ExpertParallel(backend=backend, config=config) as ep:
        plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
        rows = torch.full((plan.row_capacity, HIDDEN), float("nan"), dtype=case.dtype, device=rank.device)
        rows[: plan.rows()] = canonical(inputs, slots, rank.rank)
        rows.requires_grad_()
        ep.combine(rows, scores, plan).backward(dy)
    assert rows.grad is not None
    assert scores.grad is not None
    weighted = inputs.topk_scores[:, :, None] * inputs.dy[:, None, :HIDDEN].float()
    expected_rows = canonical(inputs, weighted.to(case.dtype), rank.rank)
    assert_bitwise(rows.grad[: plan.rows()], expected_rows, "gradient of the rows")
    expected_scores = (slots[tokens].float() * dy[:, None].float()).sum(dim=-1)
    expected_scores[inputs.topk_idx[tokens] < 0] = 0
    assert_near(scores.grad, expected_scores, HIDDEN)


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all", "rank_dedup"])
@pytest.mark.parametrize("case", ["uniform", "dropped_slots", "repeated_experts"])
@pytest.mark.parametrize(
    ("backend", "world_size", "dtype"), [entry for entry in BACKEND_SIZE_DTYPE if entry[1] in (2, 4)], ids=str
)
def test_gradients_of_rows_and_scores(
    pool: RankPool, backend: str, world_size: int, case: str, dispatch: str, dtype: torch.dtype
) -> None:
    pool.run(
        score_gradient, backend, replace(CASES[case], dtype=dtype), EPConfig(dispatch=dispatch), world_size=world_size
    )


def scores_of_a_dtype(rank: Rank, backend: str, dtype: torch.dtype, mode: CombineMode) -> None:
    generator = torch.Generator().manual_seed(rank.rank)
    idx = torch.tensor([[0, 1], [1, 0]], device=rank.device)
    scores = torch.rand(2, 2, dtype=torch.float64, generator=generator).to(rank.device, dtype)
    with ExpertParallel(backend=backend, config=EPConfig(combine=mode)) as ep:
        plan = ep.plan(idx, num_experts=2)
        rows = torch.randn(plan.row_capacity, HIDDEN, generator=generator).to(rank.device, torch.bfloat16)
        assert_bitwise(ep.combine(rows, scores, plan), ep.combine(rows, scores.float(), plan))


@pytest.mark.parametrize("mode", CombineMode)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@both_backends
def test_scores_of_any_float_are_used_in_fp32(
    pool: RankPool, backend: str, dtype: torch.dtype, mode: CombineMode
) -> None:
    pool.run(scores_of_a_dtype, backend, dtype, mode, world_size=2)
