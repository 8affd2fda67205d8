"""The decorator by which a test is its own body on live ranks."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from on_ranks import on_ranks

from sonic_ep.testing import Rank, RankError, RankPool


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("value", [0.5, 2.0])
@pytest.mark.parametrize("word", ["a", "b"])
def test_arguments_arrive_on_every_rank(rank: Rank, word: str, value: float) -> None:
    assert word in ("a", "b")
    total = torch.tensor([value], device=rank.device)
    if rank.world_size > 1:
        assert dist.get_world_size() == rank.world_size
        dist.all_reduce(total)
    assert total.item() == value * rank.world_size


@on_ranks(pool="cpu_pool")
@pytest.mark.parametrize(("world_size", "expected"), [(1, 0), (2, 1)])
def test_sizes_may_come_from_a_table_and_fixtures_by_value(
    rank: Rank, world_size: int, expected: int, tmp_path: Path
) -> None:
    assert (rank.world_size, rank.device.type) == (world_size, "cpu")
    assert expected == world_size - 1
    assert tmp_path.is_dir()


@on_ranks(2, pool="cpu_pool")
@pytest.mark.thorough
def marked(rank: Rank) -> None:
    """Never collected: its marks are read below."""


@on_ranks(3)
def fails_on_the_last(rank: Rank, limit: int) -> None:
    assert rank.rank < limit, "a rank too many"


@on_ranks(1)
def returns(rank: Rank) -> int:
    return rank.rank


def test_a_failure_shows_rank_file_and_line(cpu_pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 2 of 3 failed") as raised:
        fails_on_the_last(pool=cpu_pool, world_size=3, limit=2)
    line = fails_on_the_last.body.__code__.co_firstlineno + 2
    assert f'test_on_ranks.py", line {line}, in fails_on_the_last' in str(raised.value)
    assert "AssertionError: a rank too many" in str(raised.value)
    assert raised.value.rank == 2


def test_a_body_that_returns_is_refused(cpu_pool: RankPool) -> None:
    with pytest.raises(RankError, match="a body that returns int, expected one that asserts"):
        returns(pool=cpu_pool, world_size=1)


def test_marks_parameters_and_names_stay() -> None:
    marks = [(mark.name, mark.args[:1]) for mark in marked.pytestmark]
    assert marks == [("thorough", ()), ("parametrize", ("world_size",))]
    test = test_arguments_arrive_on_every_rank
    assert list(inspect.signature(test).parameters) == ["pool", "world_size", "word", "value"]
    orders = [mark.args[0] for mark in test.pytestmark]
    # As they are written, from below: pytest varies the first the fastest.
    assert orders == ["word", "value", "world_size"]
    assert test.__doc__ == test.body.__doc__


def test_wrong_parameters_and_pools_are_refused_where_they_are_written() -> None:
    for body in (lambda world_size: None, lambda rank, cpu_pool: None, lambda: None):
        with pytest.raises(TypeError, match=r"got parameters \[.*\], expected 'rank' first and no pool"):
            on_ranks(1)(body)
    with pytest.raises(ValueError, match="pool: got 'gpu_pool', expected one of pool, cpu_pool, cuda_pool"):
        on_ranks(1, pool="gpu_pool")


def test_names_that_do_not_fit_are_pytests_to_refuse(tmp_path: Path) -> None:
    file = tmp_path / "test_wrong.py"
    file.write_text(
        "import pytest\nfrom on_ranks import on_ranks\n\n"
        "@on_ranks(1)\n@pytest.mark.parametrize('wrong', [1])\ndef test_it(rank): ...\n"
    )
    helpers = f"pythonpath={Path(inspect.getfile(on_ranks)).parent}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", helpers, str(file)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "uses no argument 'wrong'" in said
