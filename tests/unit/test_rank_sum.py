"""The sum over ranks, and the gradient of the router's weight, which is one."""

import pytest
import torch
from backends import both_backends
from routers import randn, routed
from torch import Tensor

from sonic_ep.config import RouterOptions
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.testing import Rank, RankPool, assert_bitwise


def sums_over_ranks(rank: Rank) -> None:
    from sonic_ep.fast.collectives import reserve_sum, sum_over_ranks
    from sonic_ep.fast.workspace import Workspace

    workspace = Workspace(resolve_group(None), rank.device)
    reserve_sum(workspace, 5000)
    summands = [1e8, 1.0, -1e8]
    mine = torch.tensor([summands[rank.rank], summands[::-1][rank.rank]], device=rank.device)
    assert sum_over_ranks(mine, workspace).tolist() == [0.0, 0.0]
    # In ranks' order 1e8 - 1e8 + 1 would be 1.
    mine = torch.tensor([[1e8, -1e8, 1.0][rank.rank]], device=rank.device)
    assert sum_over_ranks(mine, workspace).tolist() == [1.0]
    mine = torch.arange(5000, device=rank.device).view(2, 2500) + 10_000.0 * rank.rank
    total = sum_over_ranks(mine, workspace)
    # Integers below 2^24 are exact.
    expected = 3.0 * torch.arange(5000, device=rank.device).view(2, 2500) + 30_000.0
    assert_bitwise(total, expected)
    assert_bitwise(sum_over_ranks(mine, workspace), expected)
    workspace.close()


@pytest.mark.fast
def test_sums_over_ranks_are_in_their_order(pool: RankPool) -> None:
    pool.run(sums_over_ranks, world_size=3)


def sum_over_one(rank: Rank) -> None:
    from sonic_ep.fast.collectives import reserve_sum, sum_over_ranks
    from sonic_ep.fast.workspace import Workspace

    workspace = Workspace(resolve_group(None), rank.device)
    values = randn(rank, 3, 4)
    assert reserve_sum(workspace, 12) is None
    assert sum_over_ranks(values, workspace) is values


@pytest.mark.fast
def test_a_sum_over_one_rank_shares_nothing(pool: RankPool) -> None:
    pool.run(sum_over_one, world_size=1)


def weight_gradients(rank: Rank, backend: str) -> None:
    """With and without the sum over the ranks, of which one has no tokens."""
    weight = randn(rank, 8, 16)
    for x_dtype, tokens in ((torch.bfloat16, 5), (torch.float32, 5 * (rank.rank != 1))):
        x = randn(rank, tokens, 16, seed=rank.rank).to(x_dtype)

        def gradient(reduce: bool, x: Tensor = x) -> Tensor:
            own = weight.clone().requires_grad_()
            routing = routed(rank, backend, x, own, RouterOptions(top_k=2, reduce_router_grad=reduce))
            (routing.topk_scores.square().sum() + routing.logits.square().sum()).backward()
            return own.grad

        own = gradient(reduce=False)
        by_rank = BoundedCollectives(resolve_group(None)).all_gather(own)
        expected = by_rank[0].clone()
        for other in by_rank[1:]:
            expected += other
        assert_bitwise(gradient(reduce=True), expected)
        assert not torch.equal(own, expected)


@both_backends
def test_the_weight_gradient_is_summed_in_rank_order_or_not_at_all(pool: RankPool, backend: str) -> None:
    pool.run(weight_gradients, backend, world_size=3)


def allocations(rank: Rank) -> list[int]:
    """Shared buffers that there are after each of: nothing, a frozen router, no gradients, forward, backward."""
    from sonic_ep.fast.router import route as fast_route
    from sonic_ep.fast.symmetric_memory import transport_of
    from sonic_ep.fast.workspace import Workspace

    group, made = resolve_group(None), []

    class Counted:
        def allocate(self, nbytes: int, byte: int) -> object:
            made.append(nbytes)
            return transport_of(BoundedCollectives(group), rank.device).allocate(nbytes, byte)

    workspace = Workspace(group, rank.device, Counted())
    counts = [len(made)]
    x, weight = randn(rank, 5, 16).requires_grad_(), randn(rank, 8, 16)
    options = RouterOptions(top_k=2)
    fast_route(x, weight, options, workspace).logits.sum().backward()
    counts.append(len(made))
    # Under reentrant checkpointing forward runs like this, and a backward comes of it.
    with torch.no_grad():
        fast_route(x, weight.clone().requires_grad_(), options, workspace)
    counts.append(len(made))
    routing = fast_route(x, weight.requires_grad_(), options, workspace)
    counts.append(len(made))
    routing.logits.sum().backward()
    counts.append(len(made))
    workspace.close()
    return counts


@pytest.mark.fast
def test_backward_allocates_nothing_that_ranks_share(pool: RankPool) -> None:
    for counts in pool.run(allocations, world_size=2):
        assert counts == [1, 1, 2, 2, 2]
