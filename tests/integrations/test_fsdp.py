"""FSDP2 around a layer: parameters are freed after forward, gathered for backward, and gradients are those without it.

FSDP shards over ranks that hold the same experts: EP groups of one rank, or EP 2 times data 2.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from on_ranks import on_ranks
from promises import promise
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sonic_ep import ExpertParallel, MoE
from sonic_ep.testing import Rank

TOKENS, HIDDEN = 5, 8
Gradients = dict[str, Tensor | None]


class Net(nn.Module):
    """A layer between two others, with its input added in place."""

    def __init__(self, ep: ExpertParallel, device: torch.device) -> None:
        super().__init__()
        self.front = nn.Linear(HIDDEN, HIDDEN, device=device)
        self.moe = MoE(HIDDEN, 4, 4, 2, ep=ep, bias=True, device=device)
        self.back = nn.Linear(HIDDEN, HIDDEN, device=device)

    def forward(self, x: Tensor) -> Tensor:
        h = self.front(x)
        y = self.moe(h).y
        y += h
        return self.back(y)


def alone(rank: Rank) -> dist.ProcessGroup | None:
    """A group of this rank alone."""
    return [dist.new_group([other]) for other in range(rank.world_size)][rank.rank]


def in_place(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x).y
    y += x
    return y


def out_of_place(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).y + x


def gradients_of(module: nn.Module, rank: Rank, call: Callable[[nn.Module, Tensor], Tensor]) -> Gradients:
    """Of this rank's x and of every parameter, whole; None where there is none."""
    module.zero_grad()
    torch.manual_seed(10 + rank.rank)
    x = torch.randn(TOKENS, HIDDEN, device=rank.device, requires_grad=True)
    call(module, x).square().sum().backward()

    def whole(tensor: Tensor | None) -> Tensor | None:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    return {"x": x.grad, **{name: whole(parameter.grad) for name, parameter in module.named_parameters()}}


def averaged(gradients: Gradients, mesh: DeviceMesh) -> Gradients:
    """Those of parameters as FSDP averages them; that of x stays this rank's own."""
    for name, gradient in gradients.items():
        if gradient is not None and name != "x":
            dist.all_reduce(gradient, group=mesh.get_group())
            gradient /= mesh.size()
    return gradients


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name]
        assert got is not None, f"no gradient of {name}"
        assert want is not None
        # FSDP's hooks stand between the terms of a sum of three, which is taken in another order then.
        error = (got - want).norm() / want.norm()
        assert error <= 4 * torch.finfo(want.dtype).eps, f"{name}: {error}"


def assert_sharded_layer_is_right(rank: Rank, ep: ExpertParallel, mesh: DeviceMesh, reshard: bool) -> None:
    """The layer as the root of FSDP: its output is written in place, and backward gathers what forward has freed."""
    torch.manual_seed(3)
    layer = MoE(HIDDEN, 4, 4, 2, ep=ep, bias=True, device=rank.device)
    expected = averaged(gradients_of(layer, rank, out_of_place), mesh)
    layer.zero_grad()
    fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    assert_same(gradients_of(layer, rank, in_place), expected)


@promise("fsdp")
@on_ranks(2)
@pytest.mark.parametrize("reshard", [True, False])
@both_backends
def test_a_sharded_layer_whose_output_is_written_in_place(rank: Rank, backend: str, reshard: bool) -> None:
    mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    with ExpertParallel(alone(rank), backend=backend) as ep:
        assert_sharded_layer_is_right(rank, ep, mesh, reshard)


@promise("fsdp")
@on_ranks(2)
@both_backends
def test_a_sharded_layer_inside_a_sharded_net(rank: Rank, backend: str) -> None:
    mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    with ExpertParallel(alone(rank), backend=backend) as ep:
        torch.manual_seed(3)
        net = Net(ep, rank.device)
        expected = averaged(gradients_of(net, rank, nn.Module.__call__), mesh)
        net.zero_grad()
        fully_shard(net.moe, mesh=mesh, reshard_after_forward=True)
        fully_shard(net, mesh=mesh)
        assert_same(gradients_of(net, rank, nn.Module.__call__), expected)


@promise("fsdp")
@on_ranks(4, pool="cpu_pool")
@both_backends
def test_groups_of_two_ranks_whose_replicas_are_sharded(rank: Rank, backend: str) -> None:
    """Four ranks, two to an EP group: ranks with the same experts share them by FSDP."""
    mesh = init_device_mesh(rank.device.type, (2, 2), mesh_dim_names=("data", "expert"))
    with ExpertParallel(mesh["expert"], backend=backend) as ep:
        assert_sharded_layer_is_right(rank, ep, mesh["data"], reshard=True)
