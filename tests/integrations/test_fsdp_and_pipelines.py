"""FSDP2 over ranks with the same experts, and backward in two halves, as zero-bubble pipelines run it."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from layer_inputs import layer_inputs
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble
from torch.distributed.tensor import DTensor

from sonic_ep import ExpertParallel, MoE
from sonic_ep.testing import CASES, Rank, assert_bitwise

TOKENS, HIDDEN, EXPERTS = 6, 8, 4
CASE = replace(CASES["uniform"], tokens=(4, 2), hidden=8, intermediate=4, num_experts=6, top_k=3)
LOSS = nn.MSELoss(reduction="sum")


@promise("split-backward")
@on_ranks(2)
@pytest.mark.parametrize(("top_k", "balanced"), [(3, False), (6, True)])
@both_backends
def test_backward_in_two_halves(rank: Rank, backend: str, top_k: int, balanced: bool) -> None:
    """With fewer choices than experts, and with all. balanced: whether the loss has a term of the logits."""
    x, weights, dy = layer_inputs(rank, CASE)
    with ExpertParallel(backend=backend) as ep:

        def loss() -> Tensor:
            out = ep.moe(x, *weights, top_k)
            return (out.y * dy).sum() + (out.router_logits.square().sum() if balanced else 0)

        expected = torch.autograd.grad(loss(), [x, *weights])
        outputs = [loss()]
        (dx,), groups = stage_backward_input(outputs, None, [x], iter(weights))
        assert_bitwise(dx, expected[0])
        stage_backward_weight(iter(weights), groups)
        assert_same_bits([weight.grad for weight in weights], expected[1:])


@promise("split-backward")
@on_ranks(1)
@both_backends
def test_a_graph_is_freed_with_its_result(rank: Rank, backend: str) -> None:
    """What a forward keeps is freed with its result, after half a backward, a whole one, or none."""
    x = torch.randn(TOKENS, HIDDEN, device=rank.device, requires_grad=True)
    dy = torch.ones_like(x).detach()
    with ExpertParallel(backend=backend) as ep:
        layer = MoE(HIDDEN, 4, EXPERTS, 2, ep=ep, device=rank.device)

        def first_half(y: Tensor) -> Any:
            return stage_backward_input([y.sum()], None, [x], layer.parameters())

        runs = {
            "none": lambda y: None,
            "first half": first_half,
            "both halves": lambda y: stage_backward_weight(layer.parameters(), first_half(y)[1]),
            "given and retained": lambda y: torch.autograd.grad(y, x, dy, retain_graph=True),
        }
        # Reference cycles of Python would be collected; those through nodes of autograd never are.
        gc.disable()
        try:
            for name, run in runs.items():
                freed: list[str] = []
                y, marker = layer(x).y, Marker()
                weakref.finalize(marker, freed.append, name)
                node_of_function(y).metadata["marker"] = marker
                del marker
                run(y)
                del y
                assert freed == [name]
        finally:
            gc.enable()


class Marker:
    """Its end can be seen."""


def node_of_function(y: Tensor) -> Any:
    """The node of the library's own function: of y itself, or the next one."""
    node: Any = y.grad_fn
    while not isinstance(node, torch._C._FunctionBase):
        node = node.next_functions[0][0]
    return node


class Block(nn.Module):
    """A layer with a residual."""

    def __init__(self, ep: ExpertParallel, device: torch.device) -> None:
        super().__init__()
        self.moe = MoE(HIDDEN, 4, EXPERTS, 2, ep=ep, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x).y


# Over gloo PyTorch sends no tensor of a GPU from rank to rank.
@pytest.mark.own_gpus
@promise("split-backward")
@on_ranks(2)
@both_backends
def test_an_interleaved_schedule_that_splits_backward(rank: Rank, backend: str) -> None:
    """Four stages on two ranks, each of which is an EP group of its own."""
    groups = [dist.new_group([other]) for other in range(rank.world_size)]
    count = 2 * rank.world_size
    mine = [rank.rank, rank.world_size + rank.rank]
    with ExpertParallel(groups[rank.rank], backend=backend) as ep:
        torch.manual_seed(5)
        blocks = [Block(ep, rank.device) for _ in range(count)]
        x = torch.randn(count * TOKENS, HIDDEN, device=rank.device)
        target = torch.randn_like(x)
        whole = nn.Sequential(*blocks)
        # Gradients add up in the order of micro-batches, as in the schedule.
        for part, wanted in zip(x.chunk(count), target.chunk(count), strict=True):
            LOSS(whole(part), wanted).backward()
        expected = {place: [p.grad for p in blocks[place].parameters()] for place in mine}
        for place in mine:
            blocks[place].zero_grad()
        stages = [PipelineStage(blocks[place], place, count, rank.device) for place in mine]
        schedule = ScheduleInterleavedZeroBubble(stages, n_microbatches=count, loss_fn=LOSS, scale_grads=False)
        given = (x,) if rank.rank == 0 else ()
        schedule.step(*given, target=target if rank.rank == rank.world_size - 1 else None)
        for place in mine:
            for parameter, want in zip(blocks[place].parameters(), expected[place], strict=True):
                assert torch.equal(parameter.grad, want), f"stage {place}"


Call = Callable[[nn.Module, Tensor], Tensor]


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


def assert_sharded_is_right(
    rank: Rank, mesh: DeviceMesh, module: nn.Module, shard: Callable[[], object], call: Call = nn.Module.__call__
) -> None:
    """Gradients of this rank's x, and of every parameter unsharded, are the means of those without FSDP."""
    torch.manual_seed(10 + rank.rank)
    x = torch.randn(5, HIDDEN, device=rank.device, requires_grad=True)

    def gradients() -> dict[str, Tensor]:
        call(module, x).square().sum().backward()
        leaves = {"x": x, **dict(module.named_parameters())}
        grads = {name: tensor.grad for name, tensor in leaves.items()}
        module.zero_grad()
        x.grad = None
        return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}

    expected = gradients()
    for name in list(expected)[1:]:
        dist.all_reduce(expected[name], group=mesh.get_group())
        expected[name] /= mesh.size()
    shard()
    found = gradients()
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        # FSDP's hooks change the order of a sum of three terms.
        error = (found[name] - want).norm() / want.norm()
        assert error <= 4 * torch.finfo(want.dtype).eps, f"{name}: {error}"


def assert_sharded_layer_is_right(rank: Rank, ep: ExpertParallel, mesh: DeviceMesh, reshard: bool) -> None:
    """The layer as the root of FSDP, its output written in place."""
    torch.manual_seed(3)
    layer = MoE(HIDDEN, 4, 4, 2, ep=ep, bias=True, device=rank.device)
    shard = partial(fully_shard, layer, mesh=mesh, reshard_after_forward=reshard)
    assert_sharded_is_right(rank, mesh, layer, shard, lambda layer, x: layer(x).y.add_(x))


# FSDP2's processes die over gloo, with tensors of a GPU.
@pytest.mark.own_gpus
@promise("fsdp")
@on_ranks(2)
@both_backends
def test_a_sharded_layer_and_a_net_around_one(rank: Rank, backend: str) -> None:
    mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    own = [dist.new_group([other]) for other in range(rank.world_size)][rank.rank]
    with ExpertParallel(own, backend=backend) as ep:
        for reshard in (True, False):
            assert_sharded_layer_is_right(rank, ep, mesh, reshard)
        torch.manual_seed(3)
        net = Net(ep, rank.device)

        def shard() -> None:
            fully_shard(net.moe, mesh=mesh, reshard_after_forward=True)
            fully_shard(net, mesh=mesh)

        assert_sharded_is_right(rank, mesh, net, shard)


@promise("fsdp")
@on_ranks(4, pool="cpu_pool")
@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.thorough)])
def test_groups_of_two_ranks_whose_replicas_are_sharded(rank: Rank, backend: str) -> None:
    mesh = init_device_mesh(rank.device.type, (2, 2), mesh_dim_names=("data", "expert"))
    with ExpertParallel(mesh["expert"], backend=backend) as ep:
        assert_sharded_layer_is_right(rank, ep, mesh["data"], reshard=True)
