"""The harness must bite: each kind of wrong answer is fed to it, and has to fail."""

import ast
import inspect
from dataclasses import replace
from math import nan
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_ranks import on_ranks
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.profiler import verification
from sonic_ep.reference.dense import dense_moe
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing import CASES, Inputs, Rank, assert_as_accurate, assert_bitwise, checks, draw
from sonic_ep.testing.checks import Accuracy, Errors, Yardstick
from sonic_ep.testing.oracle import compare, moe_oracle, routed_oracle, run_moe, run_routed

WORLD_SIZE = 4


def refused(match: str = "relative error") -> Any:
    return pytest.raises(AssertionError, match=match)


def wrong_answers(right: Tensor, inputs: Inputs) -> list[Tensor]:
    second, last = inputs.tokens_of(1), inputs.tokens_of(WORLD_SIZE - 1)
    scores = inputs.topk_scores.clone()
    scores[4, 1] = 0
    dropped_score = dense_moe(inputs.x, inputs.topk_idx, scores, inputs.experts)
    other_call = dense_moe(inputs.dy, inputs.topk_idx, inputs.topk_scores, inputs.experts)
    shifted_rank, stale_buffer, one_nan, sign_flipped = (right.clone() for _ in range(4))
    shifted_rank[second] = right[second].roll(1, dims=0)
    stale_buffer[last] = other_call[last]
    one_nan[0, 0] = nan
    sign_flipped[1, 0] *= -1
    swapped_rows = right[[0, 1, 3, 2, *range(4, len(right))]]
    return [shifted_rank, stale_buffer, one_nan, sign_flipped, swapped_rows, dropped_score, torch.zeros_like(right)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["uniform", "uneven_tokens", "prime_tokens"])
def test_wrong_answers_fail(case: str, dtype: torch.dtype) -> None:
    inputs = draw(replace(CASES[case], dtype=dtype), WORLD_SIZE)
    oracle = routed_oracle(inputs)
    truth, plain = oracle.truth["y"], oracle.plain["y"]
    for right in (truth.to(dtype), plain):
        assert_as_accurate(right, truth, plain, "y")
    for wrong in wrong_answers(truth.to(dtype), inputs):
        with refused("y: relative error"):
            assert_as_accurate(wrong, truth, plain, "y")


def test_small_zeros_one_row_a_zero_that_is_none_and_a_vector_are_wrong() -> None:
    truth = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth[2] = 0
    plain, row, zero = (truth.bfloat16() for _ in range(3))
    row[77] *= 1.02
    zero[2, 3] = 1e-30
    vector = truth[0]
    assert_as_accurate(vector.float(), vector, vector.float())
    # An absolute tolerance would let small zeros pass.
    small = [(torch.zeros_like(plain[:10]), truth[3:13] * size, plain[3:13] * size) for size in (1e-3, 1e-6)]
    for wrong in ((row, truth, plain), (zero, truth, plain), *small, (vector.float() * 1.001, vector, vector.float())):
        with refused():
            assert_as_accurate(*wrong)


def test_twice_the_error_is_the_limit_of_both_errors() -> None:
    truth = torch.ones(16, 16, dtype=torch.float64)
    plain = (truth * (1 + 2**-10)).float()
    assert_as_accurate((truth * (1 + 1.99 * 2**-10)).float(), truth, plain)
    with refused():
        assert_as_accurate((truth * (1 + 2.01 * 2**-10)).float(), truth, plain)
    bound = Errors(norm=1.0, worst_row=1.0)
    for norm, worst_row, ok in ((1.0, 1.0, True), (2.0, 1.0, False), (1.0, 2.0, False)):
        accuracy = Accuracy(name="y", got=Errors(norm=norm, worst_row=worst_row), bound=bound)
        assert (accuracy.ok, accuracy.ratio) == (ok, max(norm, worst_row))


def test_parts_of_ranks_make_the_errors_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    got = truth.bfloat16()
    stick = Yardstick(truth, got)
    whole = stick.judge("whole", [stick.part(got)])
    shares = (slice(0, 2), slice(2, 2), slice(2, 9))
    joined = stick.judge("parts", [stick.part(got[share], share) for share in shares])
    # As of ranks that each know their own share of the truth.
    of_shares = checks.pooled("shares", [stick.parts(got[share], share) for share in shares], got.dtype)
    for found in (joined, of_shares):
        for errors, expected in ((found.got, whole.got), (found.bound, whole.bound)):
            assert errors.norm == pytest.approx(expected.norm)
            assert errors.worst_row == expected.worst_row


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_yardstick_that_is_not_finite_measures_nothing(value: float) -> None:
    truth = torch.randn(10, 8, dtype=torch.float64)
    broken = truth.clone()
    broken[3, 2] = value
    for pair in ((truth, broken.half()), (broken, truth.half())):
        for answer in (torch.zeros(10, 8).half(), truth.half()):
            with refused("not finite"):
                assert_as_accurate(answer, *pair)


@pytest.mark.parametrize("module", [checks, verification], ids=lambda module: module.__name__)
def test_optimised_python_checks_as_well(module: ModuleType) -> None:
    """``python -O`` leaves out assert statements."""
    assert not [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Assert)]


@on_ranks(1, 3, pool="cpu_pool")
def test_a_tensor_that_is_wrong_on_one_rank_fails_on_all_and_no_other_does(rank: Rank) -> None:
    case, wrong_here = CASES["uniform"], rank.rank == min(1, rank.world_size - 1)
    inputs = draw(case, rank.world_size)
    oracles = {
        run_moe: moe_oracle(inputs, choose_experts(F.linear(inputs.x, inputs.router_w), case.top_k)),
        run_routed: routed_oracle(inputs),
    }
    with ExpertParallel(backend="reference") as ep:
        for run, oracle in oracles.items():
            right = dict(run(inputs, ep))
            for wrong in (None, "counts", *oracle.truth):
                outcome = {name: tensor.clone() for name, tensor in right.items()}
                if wrong_here and wrong in outcome:
                    outcome[wrong][0] *= 1.001
                facts = {"plan": True, "counts": not (wrong_here and wrong == "counts")}
                failed = [finding.name for finding in compare(outcome, oracle, inputs, ep, facts) if not finding.ok]
                assert failed == ([] if wrong is None else [wrong])


def test_forms_and_bits_have_to_match() -> None:
    truth, with_nan = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([nan, 0.0])
    with refused(r"got torch\.float16, expected torch\.float32"):
        assert_as_accurate(truth.half(), truth, truth.float())
    with refused(r"got shape \(1, 2\), expected \(2, 2\)"):
        assert_as_accurate(truth[:1].float(), truth, truth.float())
    assert_bitwise(with_nan, with_nan.clone())
    with refused(r"1 of 2 elements differ, the first at \(1,\): got -0\.0, expected 0\.0"):
        assert_bitwise(torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0]))
    with refused(r"got torch\.int32, expected torch\.int64"):
        assert_bitwise(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    with refused("shape"):
        assert_bitwise(torch.zeros(1), torch.zeros(1, 1))
