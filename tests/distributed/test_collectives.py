"""The two collectives and the one adjoint that the reference is built on."""

from itertools import product

import torch
from on_ranks import on_ranks

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.reference.router import sum_over_ranks
from sonic_ep.testing import Rank, assert_bitwise

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64]


def part(source: int, target: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What ``source`` sends to ``target``: as many rows as the ranks differ, all different."""
    rows = abs(source - target)
    return (torch.arange(rows * 3, device=device) + 100 * source + 10 * target).view(rows, 3).to(dtype)


@on_ranks(1, 2, 3)
def test_rows_arrive_whole_and_in_rank_order(rank: Rank) -> None:
    collectives = BoundedCollectives(resolve_group(None))
    world = range(rank.world_size)
    for dtype, shape in product(DTYPES, ((4, 2), (0, 2), ())):
        mine = torch.full(shape, rank.rank + 1, dtype=dtype, device=rank.device)
        expected = torch.stack([torch.full_like(mine, other + 1) for other in world])
        assert_bitwise(collectives.all_gather(mine), expected)
    for dtype in DTYPES:
        sent = [part(rank.rank, other, dtype, rank.device) for other in world]
        due = [part(other, rank.rank, dtype, rank.device) for other in world]
        received = collectives.all_to_all_rows(torch.cat(sent), [len(s) for s in sent], [len(d) for d in due])
        assert_bitwise(received, torch.cat(due))


@on_ranks(3)
def test_gradients_are_summed_in_rank_order(rank: Rank) -> None:
    # 1e8 swallows a 1 in fp32, so the order of the sum shows in its bits.
    gradients = torch.tensor([[1e8, 1.0], [1.0, 1e8], [-1e8, -1e8]], device=rank.device)
    grad = sum_over_ranks(gradients[rank.rank], BoundedCollectives(resolve_group(None)))
    assert grad.tolist() == [(1e8 + 1.0) - 1e8 - 1.0, 0.0]
