"""sonic_ep.MoE: the same layer on any number of ranks from one seed, trained as any module is."""

import copy
import pickle

import pytest
import torch
from backends import both_backends
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

import sonic_ep
from sonic_ep import ExpertParallel, MoE
from sonic_ep.testing import Rank, RankPool, assert_bitwise

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 8, 8, 2
SIZES = (HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)


def parameters(rank: Rank, seed_by_rank: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(7 + (rank.rank if seed_by_rank else 0))
    with ExpertParallel(backend="reference") as ep:
        layer = MoE(*SIZES, ep, bias=True, device=rank.device)
    return {name: value.detach().cpu() for name, value in layer.named_parameters()}


def test_the_seed_decides_and_not_the_number_of_ranks(pool: RankPool) -> None:
    """And rank 0, where ranks have seeds of their own."""
    (whole,) = pool.run(parameters, False, world_size=1)
    for seed_by_rank in (False, True):
        shares = pool.run(parameters, seed_by_rank, world_size=2)
        for name in ("w1", "w2", "b1", "b2"):
            assert_bitwise(torch.cat([share[name] for share in shares]), whole[name], name)
        for share in shares:
            assert_bitwise(share["router_w"], whole["router_w"])


def test_initial_values_are_spread_as_they_should_be() -> None:
    torch.manual_seed(0)
    layer = MoE(256, 128, 8, 2, ExpertParallel(), bias=True)
    for weight, fan_in in ((layer.w1, 256), (layer.w2, 128), (layer.router_w, 256)):
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    # No two experts, and no two weights of one expert, start from the same numbers.
    assert len(layer.w1[:, 0, 0].unique()) == 8
    assert not torch.equal(layer.w1[0].flatten()[:100], layer.w2[0].flatten()[:100])
    assert layer.b1.eq(0).all()


def test_forward_and_state() -> None:
    torch.manual_seed(0)
    options = {"activation": "relu_sq", "score_order": "softmax_then_topk", "norm_topk_probs": True}
    layer = MoE(*SIZES, ExpertParallel(), **options)
    assert {name for name, _ in layer.named_parameters()} == {"router_w", "w1", "w2"}
    assert set(layer.expert_parameters()) == {layer.w1, layer.w2}
    x = torch.randn(2, 5, HIDDEN, requires_grad=True)
    out = layer(x)
    assert out.y.shape == x.shape
    assert int(out.tokens_per_expert.sum()) == 10 * TOP_K
    out.y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    again = MoE(*SIZES, ExpertParallel(), **options)
    again.load_state_dict(layer.state_dict())
    assert_bitwise(again(x).y, out.y)
    assert "num_experts=8 (8 here), top_k=2" in repr(layer)


@promise("reset-parameters")
@on_ranks(4, pool="cpu_pool")
def test_sharded_on_the_meta_device_and_filled_later(rank: Rank) -> None:
    """Two ranks share each half of the experts, unequally: three experts."""
    mesh = init_device_mesh(rank.device.type, (2, 2), mesh_dim_names=("data", "expert"))
    sizes = (HIDDEN, INTERMEDIATE, 6, TOP_K)
    with ExpertParallel(mesh["expert"], backend="reference") as ep:
        torch.manual_seed(3)
        expected = MoE(*sizes, ep, bias=True, device=rank.device)
        for dimension in (0, 1):
            layer = MoE(*sizes, ep, bias=True, device="meta")
            fully_shard(layer, mesh=mesh["data"], shard_placement_fn=lambda _, d=dimension: Shard(d))
            layer.to_empty(device=rank.device)
            for parameter in layer.parameters():
                parameter.detach().fill_(torch.nan)
            torch.manual_seed(3)
            layer.reset_parameters()
            for name, value in expected.named_parameters():
                assert_bitwise(layer.get_parameter(name).full_tensor().detach(), value.detach(), name)
        expected.w2 = nn.Parameter(DTensor.from_local(expected.w2.detach(), mesh["data"], [Partial()]))
        with pytest.raises(TypeError, match=r"placements of w2: got \(Partial\(sum\),\), expected Shard and Replicate"):
            expected.reset_parameters()


def test_copies_share_the_group_and_pickles_say_why_not() -> None:
    layer = MoE(*SIZES, ExpertParallel())
    twin = copy.deepcopy(layer)
    assert twin.ep is layer.ep
    assert twin.w1 is not layer.w1
    x = torch.randn(3, HIDDEN)
    assert_bitwise(twin(x).y, layer(x).y)
    with pytest.raises(TypeError, match="belongs to its process and cannot be pickled; save a module's state_dict"):
        pickle.dumps(layer)
    with pytest.raises(TypeError, match="MoE: ep: got NoneType, expected an ExpertParallel"):
        MoE(*SIZES, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="moe: ep: got str, expected an ExpertParallel"):
        sonic_ep.moe(*[torch.zeros(1)] * 4, 1, ep="x")  # type: ignore[arg-type]
    assert all(hasattr(sonic_ep, name) for name in sonic_ep.__all__)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: got 0, expected a whole number of at least 1"),
        ({"intermediate_size": -1}, "intermediate_size: got -1"),
        ({"num_experts": 0}, "num_experts: got 0"),
        ({"top_k": 9}, "top_k: got 9, expected at most E=8"),
        ({"activation": "mish"}, "activation: got 'mish', expected one of 'swiglu'"),
        ({"gate_layout": "both"}, "gate_layout: got 'both', expected one of 'interleaved'"),
        ({"score_order": "any"}, "score_order: got 'any', expected one of 'topk_then_softmax'"),
        ({"norm_topk_probs": "no"}, "norm_topk_probs: got 'no', expected True or False"),
        ({"reduce_router_grad": 1}, "reduce_router_grad: got 1, expected True or False"),
        ({"dtype": torch.float64}, "dtype: got torch.float64, expected torch.bfloat16 or"),
    ],
)
def test_wrong_sizes_and_options(changes: dict[str, object], message: str) -> None:
    sizes = dict(zip(("hidden_size", "intermediate_size", "num_experts", "top_k"), SIZES, strict=True))
    with pytest.raises(ValueError, match=f"rank 0 of 1: {message}"):
        MoE(**{**sizes, **changes}, ep=ExpertParallel())  # type: ignore[arg-type]


class Lora(nn.Module):
    """An adapter of rank one for each expert."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        experts, out, into = weight.shape
        self.down = nn.Parameter(torch.randn(experts, 1, into, device=weight.device))
        self.up = nn.Parameter(torch.randn(experts, out, 1, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


@on_ranks(2)
@both_backends
def test_adapters_of_experts_are_held_by_this_rank_alone(rank: Rank, backend: str) -> None:
    """Adapters of experts train, and DDP ignores them and the originals."""
    torch.manual_seed(rank.rank)
    with ExpertParallel(backend=backend) as ep:
        layer = MoE(*SIZES, ep, bias=True, device=rank.device)
        adapter = Lora(layer.w1)
        parametrize.register_parametrization(layer, "w1", adapter)
        own = [layer.parametrizations.w1.original, adapter.down, adapter.up, layer.w2, layer.b1, layer.b2]
        assert set(layer.expert_parameters()) == set(own)
        assert all(isinstance(parameter, nn.Parameter) for parameter in layer.expert_parameters())
        before = [parameter.detach().clone() for parameter in own]
        ignored = [name for name, parameter in layer.named_parameters() if parameter in set(own)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layer, ignored)
        DistributedDataParallel(layer)
        assert_same_bits([parameter.detach() for parameter in own], before)
        optimizer = torch.optim.AdamW(layer.expert_parameters())
        layer(torch.randn(20, HIDDEN, device=rank.device)).y.square().sum().backward()
        optimizer.step()
        for parameter, was in zip(own, before, strict=True):
            assert not torch.equal(parameter.detach(), was)


def test_reset_fills_the_original_of_a_parametrized_weight() -> None:
    """And the original of one that a hook computes, which is of the experts too."""
    pruned = MoE(*SIZES, ExpertParallel(), bias=True)
    prune.random_unstructured(pruned, "w1", amount=0.5)
    prune.random_unstructured(pruned, "router_w", amount=0.5)
    assert set(pruned.expert_parameters()) == {pruned.w1_orig, pruned.w2, pruned.b1, pruned.b2}
    torch.manual_seed(3)
    expected = MoE(*SIZES, ExpertParallel())
    torch.manual_seed(4)
    layer = MoE(*SIZES, ExpertParallel())
    parametrize.register_parametrization(layer, "w1", Lora(layer.w1))
    torch.manual_seed(3)
    layer.reset_parameters()
    assert_bitwise(layer.parametrizations.w1.original.detach(), expected.w1.detach())
    assert_bitwise(layer.w2.detach(), expected.w2.detach())
    prune.random_unstructured(layer, "router_w", amount=0.5)
    with torch.no_grad():
        layer.router_w_orig.zero_()
    torch.manual_seed(3)
    layer.reset_parameters()
    assert_bitwise(layer.router_w_orig.detach(), expected.router_w.detach())
    parametrizations.weight_norm(layer, "w2")
    with pytest.raises(TypeError, match="w2: got a weight computed from several tensors, expected one original"):
        layer.reset_parameters()
