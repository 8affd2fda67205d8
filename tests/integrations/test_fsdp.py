"""FSDP2 around a layer, over ranks that hold the same experts: gradients are those without it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def alone(rank: Rank, backend: str) -> Iterator[tuple[ExpertParallel, DeviceMesh]]:
    """A group of this rank alone, and the mesh of all ranks."""
    mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    own = [dist.new_group([other]) for other in range(rank.world_size)][rank.rank]
    with ExpertParallel(own, backend=backend) as ep:
        yield ep, mesh


def gradients_of(module: nn.Module, rank: Rank, call: Callable[[nn.Module, Tensor], Tensor]) -> Gradients:
    """Of this rank's x and of every parameter, unsharded."""
    module.zero_grad()
    torch.manual_seed(10 + rank.rank)
    x = torch.randn(TOKENS, HIDDEN, device=rank.device, requires_grad=True)
    call(module, x).square().sum().backward()

    def whole(tensor: Tensor | None) -> Tensor | None:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    return {"x": x.grad, **{name: whole(parameter.grad) for name, parameter in module.named_parameters()}}


def averaged(gradients: Gradients, mesh: DeviceMesh) -> Gradients:
    """Gradients of parameters as FSDP averages them."""
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
        # FSDP's hooks change the order of a sum of three terms.
        error = (got - want).norm() / want.norm()
        assert error <= 4 * torch.finfo(want.dtype).eps, f"{name}: {error}"


def assert_sharded_layer_is_right(rank: Rank, ep: ExpertParallel, mesh: DeviceMesh, reshard: bool) -> None:
    """The layer as the root of FSDP, its output written in place."""
    torch.manual_seed(3)
    layer = MoE(HIDDEN, 4, 4, 2, ep=ep, bias=True, device=rank.device)
    expected = averaged(gradients_of(layer, rank, lambda layer, x: layer(x).y + x), mesh)
    layer.zero_grad()
    fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    assert_same(gradients_of(layer, rank, lambda layer, x: layer(x).y.add_(x)), expected)


@promise("fsdp")
@on_ranks(2)
@pytest.mark.parametrize("reshard", [True, False])
@both_backends
def test_a_sharded_layer_whose_output_is_written_in_place(rank: Rank, backend: str, reshard: bool) -> None:
    with alone(rank, backend) as (ep, mesh):
        assert_sharded_layer_is_right(rank, ep, mesh, reshard)


@promise("fsdp")
@on_ranks(2)
@both_backends
def test_a_sharded_layer_inside_a_sharded_net(rank: Rank, backend: str) -> None:
    with alone(rank, backend) as (ep, mesh):
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
    mesh = init_device_mesh(rank.device.type, (2, 2), mesh_dim_names=("data", "expert"))
    with ExpertParallel(mesh["expert"], backend=backend) as ep:
        assert_sharded_layer_is_right(rank, ep, mesh["data"], reshard=True)
