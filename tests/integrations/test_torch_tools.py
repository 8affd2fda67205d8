"""PyTorch's own tools around a layer: FSDP2 beside a dense mesh, clipping, DDP, parallelize_module, old checkpoints.

With plain tensors of each rank's experts these gave wrong numbers and no error.
"""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from near import assert_near
from on_ranks import on_ranks
from promises import promise
from shards import full, local, share_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sonic_ep import ExpertParallel, Experts, MoE
from sonic_ep.checkpoint import state_dict_of_0_1
from sonic_ep.parallel import ExpertParallelStyle, clip_grad_norm_
from sonic_ep.testing import Rank, assert_bitwise

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 8, 8, 2
SIZES = (HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
TOKENS = 6
# Of a gradient in fp32, relative.
BOUND = 1e-6
MAX_NORM = 0.1


class Net(nn.Module):
    """A layer between dense ones."""

    def __init__(self, ep: ExpertParallel | None, device: torch.device, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.front = nn.Linear(HIDDEN, HIDDEN, device=device)
        self.moe = MoE(*SIZES, ep, bias=True, reduce_router_grad=False, device=device, **options)
        self.back = nn.Linear(HIDDEN, HIDDEN, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(self.moe(self.front(x)).y)
        return y


def meshes(rank: Rank) -> tuple[DeviceMesh, DeviceMesh]:
    """(efsdp, ep) of two ranks each, and the dense mesh of all."""
    mesh = init_device_mesh(rank.device.type, (rank.world_size // 2, 2), mesh_dim_names=("efsdp", "ep"))
    return mesh, mesh._flatten("dense")


def shard(net: Net, mesh: DeviceMesh, dense: DeviceMesh, **options: Any) -> None:
    """As docs/training.md has it."""
    fully_shard(net.moe.experts, mesh=mesh["efsdp"], **options)
    fully_shard(net, mesh=dense, **options)
    net.moe.experts.set_gradient_divide_factor(dense.size())
    # Gloo cannot scale within a reduction.
    net.moe.experts.set_force_sum_reduction_for_comms(True)


def tokens_of(rank: int, device: torch.device) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)


def loss_of(net: nn.Module, *ranks: int, device: torch.device) -> Tensor:
    """The mean over the tokens of these ranks."""
    return net(torch.cat([tokens_of(rank, device) for rank in ranks])).square().sum(dim=1).mean()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter.grad) for name, parameter in net.named_parameters()}


@promise("fsdp")
@on_ranks(4, pool="cpu_pool")
@pytest.mark.parametrize(
    ("backend", "reshard"),
    [("reference", True), pytest.param("reference", False, marks=pytest.mark.thorough), ("fast", True)],
)
def test_fsdp_over_efsdp_and_ep_is_one_process(rank: Rank, backend: str, reshard: bool) -> None:
    """Loss, gradients, their norm and the clipped gradients; and two steps of AdamW over all parameters at once."""
    everyone, device = range(rank.world_size), rank.device
    alone = Net(None, device)
    loss_of(alone, *everyone, device=device).backward()
    mesh, dense = meshes(rank)
    with ExpertParallel(mesh["ep"], backend=backend) as ep:
        net = Net(ep, device)
        shard(net, mesh, dense, reshard_after_forward=reshard)
        loss_of(net, rank.rank, device=device).backward()
        expected = gradients(alone)
        for name, got in gradients(net).items():
            assert (got - expected[name]).norm() <= BOUND * expected[name].norm(), name
        with pytest.raises(RuntimeError, match="same mesh"):
            nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
        norm = clip_grad_norm_(net.parameters(), MAX_NORM)
        assert_near(norm, nn.utils.clip_grad_norm_(alone.parameters(), MAX_NORM), units=8)
        clipped = gradients(alone)
        for name, got in gradients(net).items():
            assert (got - clipped[name]).norm() <= BOUND * clipped[name].norm(), name
        assert clip_grad_norm_([], 1.0) == 0
        with pytest.raises(ValueError, match="norm_type: got 0, expected a number above 0"):
            clip_grad_norm_(net.parameters(), MAX_NORM, norm_type=0)
        # Of a router of 2 rows over 4 ranks, two shards are empty.
        few = distribute_tensor(torch.tensor([[1.0], [-3.0]], device=device), dense, [Shard(0)]).requires_grad_()
        few.grad = few.detach().clone()
        largest = clip_grad_norm_([few, *net.parameters()], 1e9, norm_type=torch.inf)
        assert_near(largest, max(torch.tensor(3.0), *(grad.abs().max() for grad in gradients(net).values())), units=1)
        for one in net.parameters(), alone.parameters():
            next(one).grad.fill_(torch.inf)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="non-finite"):
            clip_grad_norm_(net.parameters(), MAX_NORM, error_if_nonfinite=True)


@on_ranks(2)
@both_backends
def test_a_style_of_parallelize_module(rank: Rank, backend: str) -> None:
    """The layer and the experts alone, with their values; and on the meta device, filled later."""
    mesh = init_device_mesh(rank.device.type, (rank.world_size,), mesh_dim_names=("ep",))
    alone, x = Net(None, rank.device), tokens_of(rank.rank, rank.device)
    for path in ("moe", "moe.experts"):
        net = Net(None, rank.device)
        if rank.rank > 0:
            # Rank 0's weights count.
            net.get_submodule(path).reset_parameters()
        parallelize_module(net, mesh, {path: ExpertParallelStyle(backend=backend)})
        assert local(net.moe.experts.w1).shape[0] == EXPERTS // rank.world_size
        assert_near(net(x), alone(x), units=2 * HIDDEN)
        # The same mesh again changes nothing.
        parallelize_module(net, mesh, {path: ExpertParallelStyle()})
        with (
            ExpertParallel(backend=backend) as another,
            pytest.raises(ValueError, match="these experts are spread over an ExpertParallel already"),
        ):
            net.moe.experts.shard(another)
    plain = MoE(*SIZES, device=rank.device, distribute=False)
    parallelize_module(plain, mesh, {"": ExpertParallelStyle(backend=backend)})
    assert not isinstance(plain.experts.w1, DTensor)
    assert f"experts.w1@{rank.rank}/2" in plain.state_dict()
    torch.manual_seed(3)
    filled = MoE(*SIZES, device=rank.device)
    later = MoE(*SIZES, device="meta")
    parallelize_module(later, mesh, {"": ExpertParallelStyle(backend=backend)})
    later.to_empty(device=rank.device)
    torch.manual_seed(3)
    later.reset_parameters()
    for name, value in filled.named_parameters():
        got = later.get_parameter(name)
        assert_bitwise(local(got), share_of(value.detach(), got), name)
    with pytest.raises(TypeError, match="ExpertParallelStyle: got Linear, expected a MoE or Experts of sonic_ep"):
        parallelize_module(net, mesh, {"front": ExpertParallelStyle()})


@promise("torch-tools")
@on_ranks(4, pool="cpu_pool")
def test_dtensors_of_other_ranks_are_refused(rank: Rank) -> None:
    """Of another mesh or dimension, in unequal shares, of x. DDP over ranks with the same experts is right."""
    mesh, dense = meshes(rank)
    device, x = rank.device, tokens_of(rank.rank, rank.device)
    with ExpertParallel(mesh["ep"], backend="reference") as ep:
        with pytest.raises(NotImplementedError, match="broadcast"):
            DistributedDataParallel(Experts(*SIZES[:3], ep))
        plain = Net(ep, device, distribute=False)
        DistributedDataParallel(plain, process_group=mesh["efsdp"].get_group())(x).sum().backward()
        with pytest.raises(ValueError, match="got a DTensor for the share of this rank alone"):
            fully_shard(plain, mesh=dense)
        # Copies and loaded parameters are marked when they are used.
        twin = copy.deepcopy(Net(ep, device, distribute=False))
        twin.load_state_dict(twin.state_dict(), assign=True)
        twin(x).sum().backward()
        with pytest.raises(ValueError, match="expert weights of this rank alone"):
            clip_grad_norm_(twin.parameters(), MAX_NORM)
        net = Net(ep, device)
        idx, scores = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1)
        w1, w2 = net.moe.experts.w1, net.moe.experts.w2
        other = DTensor.from_local(local(w1), mesh["efsdp"], w1.placements, run_check=False)
        unequal = distribute_tensor(torch.zeros(3, 2 * INTERMEDIATE, HIDDEN), mesh["ep"], [Shard(0)])
        for wrong in (other, w1.redistribute(placements=[Shard(1)]), unequal):
            with pytest.raises(ValueError, match="w1: got a DTensor"):
                ep.moe_routed(x, idx, scores, wrong, w2)
        with pytest.raises(TypeError, match=r"x: got DTensor, expected a torch.Tensor .*: pass its to_local\(\)"):
            ep.moe_routed(DTensor.from_local(x, mesh["ep"], [Shard(0)]), idx, scores, w1, w2)
        router = DTensor.from_local(net.moe.router.weight.detach(), mesh["ep"], [Replicate()])
        with pytest.raises(ValueError, match="router: got a DTensor, expected reduce_router_grad=True, or plain"):
            ep.moe(x, router, w1, w2, TOP_K, reduce_router_grad=False)
        with pytest.raises(ValueError, match="got a router and a routing"):
            net.moe.experts(x, idx, scores, router=net.moe.router)
        whole = {name: full(value) for name, value in net.moe.experts.state_dict().items()}
        net.moe.experts.load_state_dict(whole, assign=True)
        with pytest.raises(ValueError, match="got plain weights of 8 experts on 2 ranks, expected a share of E=8"):
            net.moe.experts(x, idx, scores)
        net = Net(None, device)
        fully_shard(net, mesh=dense)
        with pytest.raises(ValueError, match="got weights that are DTensors, expected plain ones: call it "):
            net.moe.experts.shard(ep)


@on_ranks(2)
@both_backends
def test_calls_take_dtensors_of_their_own_group(rank: Rank, backend: str) -> None:
    """The bits of their local tensors, and gradients that are DTensors; a replicated router, too."""
    x = tokens_of(rank.rank, rank.device)
    idx = torch.arange(TOKENS, device=rank.device).remainder(EXPERTS).unsqueeze(1)
    scores = torch.ones_like(idx, dtype=torch.float32)
    with ExpertParallel(backend=backend) as ep:
        layer = MoE(*SIZES, ep, device=rank.device)
        w1, w2 = layer.experts.w1, layer.experts.w2
        plain = [local(weight).clone().requires_grad_() for weight in (w1, w2)]
        router = local(layer.router.weight).clone()
        replicated = DTensor.from_local(router, w1.device_mesh, [Replicate()])
        for call in (
            lambda *held: ep.moe_routed(x, idx, scores, *held),
            lambda *held: ep.moe(x, replicated if isinstance(held[0], DTensor) else router, *held, TOP_K).y,
        ):
            assert_bitwise(call(w1, w2), call(*plain))
            grads = torch.autograd.grad(call(w1, w2).square().sum(), [w1, w2])
            for grad, expected in zip(grads, torch.autograd.grad(call(*plain).square().sum(), plain), strict=True):
                assert grad.placements == w1.placements
                assert_bitwise(local(grad), expected)


@on_ranks(2)
def test_a_checkpoint_of_0_1_loads_on_as_many_ranks(rank: Rank) -> None:
    """Plain tensors of each rank's experts under the names of that version."""
    with ExpertParallel(backend="reference") as ep:
        net = Net(ep, rank.device)
        saved = {}
        for name, value in net.state_dict().items():
            if not name.endswith("_extra_state"):
                saved[name.replace("router.weight", "router_w").replace("experts.", "")] = local(value).clone()
        assert {"moe.router_w", "moe.w1", "moe.b2", "front.weight"} < saved.keys()
        for options in ({}, {"distribute": False}):
            again = Net(ep, rank.device, **options)
            with torch.no_grad():
                for parameter in again.parameters():
                    parameter.zero_()
            again.load_state_dict(state_dict_of_0_1(again, saved))
            for got, expected in zip(again.parameters(), net.parameters(), strict=True):
                assert_bitwise(local(got), local(expected))
        saved["moe.w1"] = saved["moe.w1"][:1]
        with pytest.raises(
            ValueError, match=r"moe.w1: got \(1, 16, 16\), expected \(4, 16, 16\): load on as many ranks"
        ):
            state_dict_of_0_1(again, saved)
    dist.barrier()
