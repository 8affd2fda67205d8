"""The sum over ranks, and the gradient of the router's weight, which is one."""

import pytest
import torch
from backends import both_backends
from on_ranks import on_ranks
from routers import randn, routed
from torch import Tensor
from workspaces import new_workspace, workspace_of

from sonic_ep.config import RouterOptions
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.testing import Rank, assert_bitwise


@pytest.mark.fast
@on_ranks(3)
def test_ranks_are_summed_in_ascending_order(rank: Rank) -> None:
    from sonic_ep.fast.collectives import reserve_sum, sum_over_ranks

    with workspace_of(rank) as workspace:
        reserve_sum(workspace, 5000)
        summands = [1e8, 1.0, -1e8]
        mine = torch.tensor([summands[rank.rank], summands[::-1][rank.rank]], device=rank.device)
        assert sum_over_ranks(mine, workspace).tolist() == [0.0, 0.0]
        # In the order of the ranks 1e8 - 1e8 + 1 is 1.
        mine = torch.tensor([[1e8, -1e8, 1.0][rank.rank]], device=rank.device)
        assert sum_over_ranks(mine, workspace).tolist() == [1.0]
        mine = torch.arange(5000, device=rank.device).view(2, 2500) + 10_000.0 * rank.rank
        # Integers below 2^24 are exact.
        expected = 3.0 * torch.arange(5000, device=rank.device).view(2, 2500) + 30_000.0
        for _ in range(2):
            assert_bitwise(sum_over_ranks(mine, workspace), expected)


@pytest.mark.fast
@on_ranks(1)
def test_a_sum_over_one_rank_needs_no_shared_memory(rank: Rank) -> None:
    from sonic_ep.fast.collectives import reserve_sum, sum_over_ranks

    with workspace_of(rank) as workspace:
        values = randn(rank, 3, 4)
        assert reserve_sum(workspace, 12) is None
        assert sum_over_ranks(values, workspace) is values


@on_ranks(3)
@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_weight_gradient_is_summed_in_rank_order_or_not_at_all(
    rank: Rank, backend: str, dtype: torch.dtype
) -> None:
    """In fp32 one rank has no tokens."""
    weight = randn(rank, 8, 16)
    tokens = 0 if rank.rank == 1 and dtype == torch.float32 else 5
    x = randn(rank, tokens, 16, seed=rank.rank).to(dtype)

    def gradient(reduce: bool) -> Tensor:
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


@pytest.mark.fast
@on_ranks(2)
def test_shared_memory_is_allocated_in_forward_where_backward_may_follow(rank: Rank) -> None:
    from sonic_ep.fast.router import route
    from sonic_ep.fast.symmetric_memory import transport_of

    group, allocated = resolve_group(None), []

    class CountingTransport:
        def allocate(self, nbytes: int, byte: int) -> object:
            allocated.append(nbytes)
            return transport_of(BoundedCollectives(group), rank.device).allocate(nbytes, byte)

    workspace = new_workspace(rank, transport=CountingTransport())
    assert len(allocated) == 1
    x, weight, options = randn(rank, 5, 16).requires_grad_(), randn(rank, 8, 16), RouterOptions(top_k=2)
    route(x, weight, options, workspace).logits.sum().backward()
    assert len(allocated) == 1, "a frozen router"
    # Under reentrant checkpointing forward runs without gradients, and a backward follows.
    with torch.no_grad():
        route(x, weight.clone().requires_grad_(), options, workspace)
    assert len(allocated) == 2
    route(x, weight.requires_grad_(), options, workspace).logits.sum().backward()
    assert len(allocated) == 2
    workspace.close()
