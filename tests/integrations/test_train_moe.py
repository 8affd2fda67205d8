"""The example to copy from: the same losses on any number of ranks, also after a restart with another number."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_example import module_of_example, no_launcher

from sonic_ep.testing import Rank, RankPool

STEPS = 3
# Losses are means over a thousand tokens of numbers that were rounded to bf16.
BOUND = torch.finfo(torch.bfloat16).eps


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    # What ranks return is found by name.
    module_of_example("train_moe")
    with no_launcher():
        yield


def on_ranks(rank: Rank, save: Path | None, resume: Path | None, steps: int) -> list[float]:
    example = module_of_example("train_moe")
    example.STEPS = steps
    return example.train(save, resume, rank.device)


def test_losses_do_not_depend_on_the_number_of_ranks(pool: RankPool, tmp_path: Path) -> None:
    uninterrupted = pool.run(on_ranks, None, None, 2 * STEPS, world_size=4)[0]
    first = pool.run(on_ranks, tmp_path, None, STEPS, world_size=2)
    second = pool.run(on_ranks, None, tmp_path, STEPS, world_size=4)
    assert first[0] == first[1]
    assert [*first[0], *second[0]] == pytest.approx(uninterrupted, rel=BOUND)
    assert uninterrupted[-1] < uninterrupted[0]
