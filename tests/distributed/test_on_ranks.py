"""The decorator by which a test is its own body on live ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from on_ranks import on_ranks

from sonic_ep.testing import Rank, RankError, RankPool


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("value", [0.5, 2.0])
def test_arguments_and_fixtures_arrive_on_every_rank(rank: Rank, value: float, tmp_path: Path) -> None:
    total = torch.tensor([value], device=rank.device)
    if rank.world_size > 1:
        assert dist.get_world_size() == rank.world_size
        dist.all_reduce(total)
    assert total.item() == value * rank.world_size
    assert tmp_path.is_dir()


@on_ranks(3)
def fails_on_the_last(rank: Rank, limit: int) -> None:
    assert rank.rank < limit, "a rank too many"


@on_ranks(1)
def returns(rank: Rank) -> int:
    return rank.rank


def test_bodies_that_fail_and_bodies_that_return(cpu_pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 2 of 3 failed") as raised:
        fails_on_the_last(pool=cpu_pool, world_size=3, limit=2)
    line = fails_on_the_last.body.__code__.co_firstlineno + 2
    assert f'test_on_ranks.py", line {line}, in fails_on_the_last' in str(raised.value)
    assert "AssertionError: a rank too many" in str(raised.value)
    assert raised.value.rank == 2
    with pytest.raises(RankError, match="a body that returns int, expected one that asserts"):
        returns(pool=cpu_pool, world_size=1)


def test_wrong_parameters_and_pools_are_refused_where_they_are_written() -> None:
    for body in (lambda world_size: None, lambda rank, cpu_pool: None, lambda: None):
        with pytest.raises(TypeError, match=r"got parameters \[.*\], expected 'rank' first and no pool"):
            on_ranks(1)(body)
    with pytest.raises(ValueError, match="pool: got 'gpu_pool', expected one of pool, cpu_pool, cuda_pool"):
        on_ranks(1, pool="gpu_pool")
