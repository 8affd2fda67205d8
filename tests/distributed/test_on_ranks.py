"""The decorator by which a test is its own body on live ranks."""

import pytest
from on_ranks import on_ranks

from sonic_ep.testing import Rank, RankError, RankPool


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
    with pytest.raises(RankError, match="a body that returns int, expected one that asserts"):
        returns(pool=cpu_pool, world_size=1)
