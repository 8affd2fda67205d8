"""The harness must bite: each kind of wrong answer is fed to it, and has to fail."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import nan

import pytest
import torch
import torch.nn.functional as F
from limits import HANG_SECONDS
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.reference.dense import dense_moe
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing import (
    CASES,
    Accuracy,
    Errors,
    Inputs,
    Rank,
    RankPool,
    Yardstick,
    assert_as_accurate,
    assert_bitwise,
    draw,
)
from sonic_ep.testing.checks import pooled
from sonic_ep.testing.oracle import compare, moe_oracle, routed_oracle, run_moe, run_routed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WORLD_SIZE = 4


def accurate(name: str, dtype: torch.dtype) -> tuple[Inputs, Tensor, Tensor, Tensor]:
    """A case with its truth, plain PyTorch's answer, and an answer that is right: the truth rounded."""
    inputs = draw(replace(CASES[name], dtype=dtype), WORLD_SIZE)
    oracle = routed_oracle(inputs)
    return inputs, oracle.truth["y"], oracle.plain["y"], oracle.truth["y"].to(dtype)


def dropped_score(y: Tensor, inputs: Inputs) -> Tensor:
    """One of the K slots of one token counts nothing."""
    scores = inputs.topk_scores.clone()
    scores[4, 1] = 0
    return dense_moe(inputs.x, inputs.topk_idx, scores, inputs.experts)


def shifted_rank(y: Tensor, inputs: Inputs) -> Tensor:
    share = inputs.tokens_of(1)
    y[share] = y[share].roll(1, dims=0)
    return y


def stale_buffer(y: Tensor, inputs: Inputs) -> Tensor:
    """The last rank's rows are those of another call."""
    share = inputs.tokens_of(WORLD_SIZE - 1)
    other = dense_moe(inputs.dy, inputs.topk_idx, inputs.topk_scores, inputs.experts)
    y[share] = other[share]
    return y


WRONGS: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "all zero": lambda y, inputs: torch.zeros_like(y),
    "swapped rows": lambda y, inputs: y[[0, 1, 3, 2, *range(4, len(y))]],
    "dropped score": dropped_score,
    "shifted rank": shifted_rank,
    "stale buffer": stale_buffer,
    "one NaN": lambda y, inputs: y.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(nan).to(y)),
    "sign flipped": lambda y, inputs: y.index_put((torch.tensor(1), torch.tensor(0)), -y[1, 0]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONGS.values(), ids=WRONGS)
@pytest.mark.parametrize("case", ["uniform", "uneven_tokens", "prime_tokens"])
def test_wrong_answers_fail(case: str, wrong: Callable[[Tensor, Inputs], Tensor], dtype: torch.dtype) -> None:
    inputs, truth, plain, right = accurate(case, dtype)
    assert_as_accurate(right, truth, plain, "y")
    assert_as_accurate(plain, truth, plain, "y")
    with pytest.raises(AssertionError, match="y: relative error"):
        assert_as_accurate(wrong(right.clone(), inputs), truth, plain, "y")


@pytest.mark.parametrize("small", [1e-3, 1e-6])
def test_small_outputs_get_no_benefit(small: float) -> None:
    """Where an absolute tolerance would let zeros pass."""
    truth = torch.randn(10, 8, dtype=torch.float64) * small
    with pytest.raises(AssertionError):
        assert_as_accurate(torch.zeros(10, 8).bfloat16(), truth, truth.bfloat16())


def test_one_wrong_row_among_many_and_a_zero_that_is_none_are_wrong() -> None:
    truth = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth[2] = 0
    row, zero = truth.bfloat16(), truth.bfloat16()
    row[77] *= 1.02
    zero[2, 3] = 1e-30
    for wrong in (row, zero):
        with pytest.raises(AssertionError):
            assert_as_accurate(wrong, truth, truth.bfloat16())


def test_twice_the_error_is_the_limit() -> None:
    truth = torch.ones(16, 16, dtype=torch.float64)
    plain = (truth * (1 + 2**-10)).float()
    assert_as_accurate((truth * (1 + 1.99 * 2**-10)).float(), truth, plain)
    with pytest.raises(AssertionError):
        assert_as_accurate((truth * (1 + 2.01 * 2**-10)).float(), truth, plain)


def test_parts_of_ranks_make_the_errors_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    got = truth.bfloat16()
    stick = Yardstick(truth, got)
    whole = stick.judge("whole", [stick.part(got)])
    shares = (slice(0, 2), slice(2, 2), slice(2, 9))
    joined = stick.judge("parts", [stick.part(got[share], share) for share in shares])
    # As of ranks that each know their own share of the truth.
    of_shares = pooled("shares", [stick.parts(got[share], share) for share in shares], got.dtype)
    for found in (joined, of_shares):
        assert found.got.norm == pytest.approx(whole.got.norm)
        assert found.got.worst_row == whole.got.worst_row
        assert found.bound.norm == pytest.approx(whole.bound.norm)
        assert found.bound.worst_row == whole.bound.worst_row


def test_each_of_both_errors_is_held() -> None:
    bound = Errors(norm=1.0, worst_row=1.0)
    for norm, worst_row, ok in ((1.0, 1.0, True), (2.0, 1.0, False), (1.0, 2.0, False)):
        accuracy = Accuracy(name="y", got=Errors(norm=norm, worst_row=worst_row), bound=bound)
        assert (accuracy.ok, accuracy.ratio) == (ok, max(norm, worst_row))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_yardstick_that_is_not_finite_measures_nothing(value: float) -> None:
    truth = torch.randn(10, 8, dtype=torch.float64)
    broken = truth.clone()
    broken[3, 2] = value
    for pair in ((truth, broken.half()), (broken, truth.half())):
        for answer in (torch.zeros(10, 8).half(), truth.half()):
            with pytest.raises(AssertionError, match="not finite"):
                assert_as_accurate(answer, *pair)


def test_vectors_are_one_row() -> None:
    truth = torch.randn(8, dtype=torch.float64)
    assert_as_accurate(truth.float(), truth, truth.float())
    with pytest.raises(AssertionError):
        assert_as_accurate(truth.float() * 1.001, truth, truth.float())


def test_optimised_python_checks_as_well() -> None:
    program = (
        "import torch; from sonic_ep.testing import assert_as_accurate, assert_bitwise\n"
        "truth = torch.randn(4, 4).double(); zeros = torch.zeros(4, 4)\n"
        "calls = lambda: assert_as_accurate(zeros, truth, truth.float()), lambda: assert_bitwise(zeros.int(), zeros)\n"
        "for call in calls:\n"
        "    try: call()\n"
        "    except AssertionError: print('fails')"
    )
    said = subprocess.check_output([sys.executable, "-O", "-c", program], text=True, timeout=HANG_SECONDS)
    assert said.split() == ["fails", "fails"]


def wrong_on_rank_1(rank: Rank, name: str) -> list[str]:
    """One tensor is wrong on rank 1 alone; every rank has to hear of it."""
    case = CASES["uniform"]
    inputs = draw(case, rank.world_size, rank.device)
    with ExpertParallel(backend="reference") as ep:
        outcome = dict(run_moe(inputs, ep))
        idx = choose_experts(F.linear(inputs.x.float(), inputs.router_w.float()), case.top_k)
        oracle = moe_oracle(inputs, idx)
        facts = {"plan": True, "counts": name != "counts" or rank.rank != 1}
        if rank.rank == 1 and name in outcome:
            outcome[name] = outcome[name].clone()
            outcome[name][0] *= 1.001
        return [finding.name for finding in compare(outcome, oracle, inputs, ep, facts) if not finding.ok]


@pytest.mark.parametrize("name", ["y", "dx", "router_logits", "drouter_w", "dw1", "counts"])
def test_what_is_wrong_on_one_rank_fails_on_all(cpu_pool: RankPool, name: str) -> None:
    assert cpu_pool.run(wrong_on_rank_1, name, world_size=3) == [[name]] * 3


def test_forms_have_to_match() -> None:
    truth = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"got torch\.float16, expected torch\.float32"):
        assert_as_accurate(truth.half(), truth, truth.float())
    with pytest.raises(AssertionError, match=r"got shape \(1, 2\), expected \(2, 2\)"):
        assert_as_accurate(truth[:1].float(), truth, truth.float())


def test_bits() -> None:
    with_nan = torch.tensor([nan, 0.0])
    assert_bitwise(with_nan, with_nan.clone())
    with pytest.raises(AssertionError, match=r"1 of 2 elements differ, the first at \(1,\): got -0\.0, expected 0\.0"):
        assert_bitwise(torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0]))
    with pytest.raises(AssertionError, match=r"got torch\.int32, expected torch\.int64"):
        assert_bitwise(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(AssertionError, match="shape"):
        assert_bitwise(torch.zeros(1), torch.zeros(1, 1))


@pytest.mark.parametrize("name", ["y", "dx", "dscores", "dw1", "dw2", "db1", "db2"])
def test_every_tensor_of_the_layer_is_held(name: str) -> None:
    """The differential comparison notices a wrong value in any one of its tensors, and only there."""
    inputs = draw(CASES["uniform"], 1)
    with ExpertParallel(backend="reference") as ep:
        outcome = dict(run_routed(inputs, ep))
        oracle = routed_oracle(inputs)
        assert all(finding.ok for finding in compare(outcome, oracle, inputs, ep))
        outcome[name] = outcome[name].clone()
        outcome[name][0] *= 1.001
        failed = [finding.name for finding in compare(outcome, oracle, inputs, ep) if not finding.ok]
    assert failed == [name]
