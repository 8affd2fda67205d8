"""FSDP2 around a layer: parameters are freed after forward, gathered for backward, and gradients are those without it.

FSDP shards over ranks that hold the same experts: EP groups of one rank, or EP 2 times data 2.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sonic_ep import ExpertParallel, MoE
from sonic_ep.testing import Rank, RankPool

TOKENS, HIDDEN = 5, 8


class Net(nn.Module):
    """A layer between two others."""

    def __init__(self, ep: ExpertParallel, device: torch.device) -> None:
        super().__init__()
        self.front = nn.Linear(HIDDEN, HIDDEN, device=device)
        self.moe = MoE(HIDDEN, 4, 4, 2, ep=ep, bias=True, device=device)
        self.back = nn.Linear(HIDDEN, HIDDEN, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """The layer with its input added in place."""
        h = self.front(x)
        y = self.moe(h).y
        y += h
        return self.back(y)


def alone(rank: Rank) -> dist.ProcessGroup | None:
    """A group of this rank alone."""
    groups = [dist.new_group([other]) for other in range(rank.world_size)]
    return groups[rank.rank]


def in_place(layer: Callable[[Tensor], object], x: Tensor) -> None:
    y = layer(x).y  # type: ignore[attr-defined]
    y += x
    y.square().sum().backward()


def out_of_place(layer: Callable[[Tensor], object], x: Tensor) -> None:
    (layer(x).y + x).square().sum().backward()  # type: ignore[attr-defined]


def gradients_of(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Of x and of every parameter, whole; None where there is none."""

    def whole(tensor: Tensor | None) -> Tensor | None:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    return {"x": x.grad, **{name: whole(parameter.grad) for name, parameter in module.named_parameters()}}


def averaged(gradients: dict[str, Tensor | None], rank: Rank) -> dict[str, Tensor | None]:
    """Those of parameters as FSDP averages them; that of x stays this rank's own."""
    for name, gradient in gradients.items():
        if gradient is not None and name != "x":
            dist.all_reduce(gradient)
            gradient /= rank.world_size
    return gradients


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name]
        assert got is not None, f"no gradient of {name}"
        assert want is not None
        # FSDP's hooks stand between the terms of a sum of three, which is taken in another order then.
        error = (got - want).norm() / want.norm()
        assert error <= 4 * torch.finfo(want.dtype).eps, f"{name}: {error}"


def tokens_of(rank: Rank) -> Tensor:
    torch.manual_seed(10 + rank.rank)
    return torch.randn(TOKENS, HIDDEN, device=rank.device, requires_grad=True)


def layer_is_sharded(rank: Rank, backend: str, reshard: bool) -> None:
    """The layer as the root of FSDP: its output is written in place, and backward gathers what forward has freed."""
    mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    with ExpertParallel(alone(rank), backend=backend) as ep:
        torch.manual_seed(3)
        layer = MoE(HIDDEN, 4, 4, 2, ep=ep, bias=True, device=rank.device)
        x = tokens_of(rank)
        out_of_place(layer, x)
        expected = averaged(gradients_of(layer, x), rank)
        layer.zero_grad()
        x = tokens_of(rank)
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        in_place(layer, x)
        assert_same(gradients_of(layer, x), expected)


@pytest.mark.parametrize("reshard", [True, False])
@both_backends
def test_a_sharded_layer_whose_output_is_written_in_place(pool: RankPool, backend: str, reshard: bool) -> None:
    pool.run(layer_is_sharded, backend, reshard, world_size=2)


def net_is_sharded(rank: Rank, backend: str) -> None:
    mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    with ExpertParallel(alone(rank), backend=backend) as ep:
        torch.manual_seed(3)
        net = Net(ep, rank.device)
        x = tokens_of(rank)
        net(x).square().sum().backward()
        expected = averaged(gradients_of(net, x), rank)
        net.zero_grad()
        x = tokens_of(rank)
        fully_shard(net.moe, mesh=mesh, reshard_after_forward=True)
        fully_shard(net, mesh=mesh)
        net(x).square().sum().backward()
        assert_same(gradients_of(net, x), expected)


@both_backends
def test_a_sharded_layer_inside_a_sharded_net(pool: RankPool, backend: str) -> None:
    pool.run(net_is_sharded, backend, world_size=2)


def two_experts_groups(rank: Rank, backend: str) -> None:
    """Four ranks, two to an EP group: ranks with the same experts share them by FSDP."""
    mesh = init_device_mesh(rank.device.type, (2, 2), mesh_dim_names=("data", "expert"))
    with ExpertParallel(mesh["expert"], backend=backend) as ep:
        torch.manual_seed(3)
        layer = MoE(HIDDEN, 4, 4, 2, ep=ep, bias=True, device=rank.device)
        x = tokens_of(rank)
        out_of_place(layer, x)
        expected = gradients_of(layer, x)
        for name, gradient in expected.items():
            if name != "x" and gradient is not None:
                dist.all_reduce(gradient, group=mesh["data"].get_group())
                gradient /= 2
        layer.zero_grad()
        x = tokens_of(rank)
        fully_shard(layer, mesh=mesh["data"], reshard_after_forward=True)
        in_place(layer, x)
        assert_same(gradients_of(layer, x), expected)


@both_backends
def test_groups_of_two_ranks_whose_replicas_are_sharded(cpu_pool: RankPool, backend: str) -> None:
    cpu_pool.run(two_experts_groups, backend, world_size=4)
