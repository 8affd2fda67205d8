"""Ranks of a profile stay in step: what goes wrong on one of them is told on all, as what it is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from profiles import Asked, said_by

import sonic_ep.profiler.measuring as measuring
import sonic_ep.profiler.profiler as profiler_module
from sonic_ep import ExpertParallel
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler import WrongResultError
from sonic_ep.profiler.agreement import in_step
from sonic_ep.profiler.measuring import Stage
from sonic_ep.profiler.problem import Work, draw_rows
from sonic_ep.profiler.times import ProfileShape
from sonic_ep.testing import Rank, RankPool

CPU = torch.device("cpu")


def fail_to_judge(patched: Any, rank: int) -> None:
    """Rank 0, which alone judges, fails at it."""

    def judge(*arguments: Any) -> Any:
        raise RuntimeError("no judgement" if rank == 0 else "judged beside rank 0")

    patched.setattr(profiler_module, "mode_times", judge)


def test_an_error_in_judging_reaches_all(cpu_pool: RankPool) -> None:
    said = cpu_pool.run(said_by, Asked(), RuntimeError, fail_to_judge, world_size=2)
    assert said == ["rank 0 of 2: no judgement"] * 2


def capture_on_rank_0(rank: Rank) -> str:
    """What is told where only rank 0 has memory for a graph."""

    def capture(function: Any, device: torch.device) -> Any:
        if rank.rank:
            raise torch.OutOfMemoryError("no memory left")
        return SimpleNamespace(result=function())

    work = Work(name="work", run=lambda inputs: torch.zeros(1), check=lambda result: None)
    with pytest.MonkeyPatch.context() as patched, ExpertParallel(backend="reference") as lane:
        patched.setattr(measuring, "captured", capture)
        stage = Stage(lane=lane, device=CPU, fewest_rounds=1, as_graphs=True)
        with pytest.raises(RuntimeError) as raised:
            stage.time([work], SimpleNamespace(), rounds=1)  # type: ignore[arg-type]
    return str(raised.value)


def test_a_rank_that_cannot_capture_stops_all(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(capture_on_rank_0, world_size=2) == ["rank 1 of 2: no memory left"] * 2


def told_in_step(rank: Rank, errors: dict[int, Exception]) -> tuple[str, str]:
    """Kind and text of what this rank raises, if ranks fail with ``errors`` where a ValueError is expected."""

    def fail() -> None:
        if rank.rank in errors:
            raise errors[rank.rank]

    with pytest.raises(Exception) as raised:  # noqa: PT011
        in_step(resolve_group(None), fail, expected=ValueError, raised=WrongResultError)
    return type(raised.value).__name__, str(raised.value)


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ({1: ValueError("bad")}, "WrongResultError"),
        ({1: KeyError("bad")}, "RuntimeError"),
        ({0: KeyError("bad"), 1: ValueError("bad")}, "RuntimeError"),
    ],
)
def test_only_what_is_expected_is_raised_as_such(cpu_pool: RankPool, errors: dict[int, Exception], kind: str) -> None:
    told = cpu_pool.run(told_in_step, errors, world_size=2)
    assert told[0] == told[1]
    assert told[0][0] == kind
    assert all(f"rank {rank} of 2: " in told[0][1] for rank in errors)


def test_rows_behind_the_valid_ones_are_nan() -> None:
    shape = ProfileShape(tokens=(3,), hidden=16, top_k=2, num_experts=6, dtype="bfloat16", routing="given")
    with ExpertParallel(backend="reference") as ep:
        plan = ep.plan(torch.tensor([[0, 5], [-1, 2], [3, 3]]), 6)
    # A slot is dropped, so there is a place more than there are rows.
    assert plan.row_capacity == plan.rows() + 1
    rows_RH = draw_rows(plan, shape)
    assert rows_RH.shape == (plan.row_capacity, 16)
    assert rows_RH[: plan.rows()].isfinite().all()
    assert rows_RH[plan.rows() :].isnan().all()
