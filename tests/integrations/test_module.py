"""sonic_ep.MoE: the same layer on any number of ranks from one seed, trained as any module is."""

import copy
import pickle

import pytest
import torch
from backends import both_backends
from near import assert_near
from on_ranks import on_ranks
from promises import promise
from shards import full, local, share_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn.utils import parametrizations, parametrize, prune

import sonic_ep
from sonic_ep import ExpertParallel, Experts, MoE
from sonic_ep.testing import Rank, RankPool, assert_bitwise

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 8, 8, 2
SIZES = (HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)


def parameters(rank: Rank, seed_by_rank: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(7 + (rank.rank if seed_by_rank else 0))
    with ExpertParallel(backend="reference") as ep:
        layer = MoE(*SIZES, ep, bias=True, device=rank.device)
    return {name: local(value).cpu() for name, value in layer.named_parameters()}


def test_the_seed_decides_and_not_the_number_of_ranks(pool: RankPool) -> None:
    """And rank 0, where ranks have seeds of their own."""
    (whole,) = pool.run(parameters, False, world_size=1)
    for seed_by_rank in (False, True):
        shares = pool.run(parameters, seed_by_rank, world_size=2)
        for name in ("experts.w1", "experts.w2", "experts.b1", "experts.b2"):
            assert_bitwise(torch.cat([share[name] for share in shares]), whole[name], name)
        for share in shares:
            assert_bitwise(share["router.weight"], whole["router.weight"])


def test_initial_values_are_spread_as_they_should_be() -> None:
    torch.manual_seed(0)
    layer = MoE(256, 128, 8, 2, ExpertParallel(), bias=True)
    for weight, fan_in in ((layer.experts.w1, 256), (layer.experts.w2, 128), (layer.router.weight, 256)):
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    # No two experts, and no two weights of one expert, start from the same numbers.
    assert len(layer.experts.w1[:, 0, 0].unique()) == 8
    assert not torch.equal(layer.experts.w1[0].flatten()[:100], layer.experts.w2[0].flatten()[:100])
    assert layer.experts.b1.eq(0).all()


def test_forward_and_state() -> None:
    torch.manual_seed(0)
    options = {"activation": "relu_sq", "score_order": "softmax_then_topk", "norm_topk_probs": True}
    layer = MoE(*SIZES, ExpertParallel(), **options)
    assert {name for name, _ in layer.named_parameters()} == {"router.weight", "experts.w1", "experts.w2"}
    assert set(layer.expert_parameters()) == {layer.experts.w1, layer.experts.w2}
    x = torch.randn(2, 5, HIDDEN, requires_grad=True)
    out = layer(x)
    assert out.y.shape == x.shape
    assert int(out.tokens_per_expert.sum()) == 10 * TOP_K
    out.y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    again = MoE(*SIZES, ExpertParallel(), **options)
    again.load_state_dict(layer.state_dict())
    assert_bitwise(again(x).y, out.y)
    assert "num_experts=8 (8 here), activation=relu_sq" in repr(layer)
    assert "num_experts=8, top_k=2" in repr(layer)


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
                assert_bitwise(full(layer.get_parameter(name)), full(value), name)
        expected.experts.w2 = nn.Parameter(DTensor.from_local(local(expected.experts.w2), mesh["data"], [Partial()]))
        with pytest.raises(TypeError, match=r"placements of w2: got \(Partial\(sum\),\), expected Shard and Replicate"):
            expected.reset_parameters()


def test_copies_share_the_group_and_pickles_say_why_not() -> None:
    layer = MoE(*SIZES, ExpertParallel())
    twin = copy.deepcopy(layer)
    assert twin.ep is layer.ep
    assert twin.experts.w1 is not layer.experts.w1
    x = torch.randn(3, HIDDEN)
    assert_bitwise(twin(x).y, layer(x).y)
    with pytest.raises(TypeError, match="belongs to its process and cannot be pickled; save a module's state_dict"):
        pickle.dumps(layer)
    with pytest.raises(TypeError, match="MoE: ep: got str, expected an ExpertParallel or None"):
        MoE(*SIZES, "ep")  # type: ignore[arg-type]
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
    """An adapter of rank one for each expert: a row of the weight, and a column of zeros."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(weight.detach()[:, :1].clone())
        self.up = nn.Parameter(torch.zeros_like(weight.detach()[:, :, :1]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


@on_ranks(2)
@both_backends
def test_adapters_of_experts_train_on_their_ranks(rank: Rank, backend: str) -> None:
    """Adapters are DTensors as the weights are, and train as on one process."""
    x = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1)).to(rank.device)
    found = {}
    with ExpertParallel(backend=backend) as ep:
        for spread in (None, ep):
            torch.manual_seed(0)
            experts = MoE(*SIZES, spread, bias=True, device=rank.device).experts
            parametrize.register_parametrization(experts, "w1", Lora(experts.w1))
            adapter = experts.parametrizations.w1[0]
            adapted = [experts.parametrizations.w1.original, adapter.down, adapter.up]
            assert set(experts.parameters()) == {*adapted, experts.w2, experts.b1, experts.b2}
            idx = torch.arange(20, device=rank.device).remainder(EXPERTS).unsqueeze(1)
            y = experts(x, idx, torch.ones_like(idx, dtype=torch.float32))
            y.square().sum().backward()
            # Both ranks have brought the same tokens.
            found[spread] = [parameter.grad for parameter in adapted]
    for alone, of_both in zip(found[None], found[ep], strict=True):
        assert_near(local(of_both) / 2, share_of(alone, of_both), units=20)


@on_ranks(2)
def test_plain_shares_are_named_by_their_rank(rank: Rank) -> None:
    """``distribute=False``: the values of the DTensors, under names that no tool takes for those of replicas."""
    with ExpertParallel(backend="reference") as ep:
        torch.manual_seed(3)
        expected = MoE(*SIZES, ep, bias=True, device=rank.device)
        torch.manual_seed(3)
        layer = MoE(*SIZES, ep, bias=True, device=rank.device, distribute=False)
        mine, other = (f"experts.w1@{one}/2" for one in (rank.rank, 1 - rank.rank))
        state = layer.state_dict()
        assert mine in state
        assert other not in state
        x = torch.randn(5, HIDDEN, device=rank.device)
        assert_bitwise(layer(x).y, expected(x).y)
        assert_bitwise(layer.experts.w1, local(expected.experts.w1))
        layer.load_state_dict(state)
        state[other] = state.pop(mine)
        with pytest.raises(RuntimeError, match=f'(?s)Missing key.*"{mine}".*Unexpected key.*"{other}"'):
            layer.load_state_dict(state)


def test_reset_fills_the_original_of_a_parametrized_weight() -> None:
    """And the original of one that a hook computes, which is of the experts too."""
    pruned = MoE(*SIZES, bias=True)
    prune.random_unstructured(pruned.experts, "w1", amount=0.5)
    experts = pruned.experts
    assert set(pruned.expert_parameters()) == {experts.w1_orig, experts.w2, experts.b1, experts.b2}
    torch.manual_seed(3)
    expected = MoE(*SIZES)
    torch.manual_seed(4)
    layer = MoE(*SIZES)
    parametrize.register_parametrization(layer.experts, "w1", Lora(layer.experts.w1))
    prune.random_unstructured(layer.router, "weight", amount=0.5)
    with torch.no_grad():
        layer.router.weight_orig.zero_()
    torch.manual_seed(3)
    layer.reset_parameters()
    assert_bitwise(layer.experts.parametrizations.w1.original.detach(), expected.experts.w1.detach())
    assert_bitwise(layer.experts.w2.detach(), expected.experts.w2.detach())
    assert_bitwise(layer.router.weight_orig.detach(), expected.router.weight.detach())
    parametrizations.weight_norm(layer.experts, "w2")
    with pytest.raises(TypeError, match="w2: got a weight computed from several tensors, expected one original"):
        layer.reset_parameters()


@promise("checkpoints")
def test_a_gate_layout_is_part_of_a_checkpoint() -> None:
    layer = MoE(*SIZES, gate_layout="concat")
    with pytest.raises(ValueError, match="gate_layout: got a checkpoint of 'interleaved', expected 'concat'"):
        layer.load_state_dict(MoE(*SIZES).state_dict())


def test_a_cast_of_the_module_leaves_the_correction_in_fp32() -> None:
    layer = MoE(*SIZES, correction_bias=True, router_bias=True)
    layer.router.correction_bias += 1e-4
    layer.to(torch.bfloat16)
    assert_bitwise(layer.router.correction_bias, torch.full((EXPERTS,), 1e-4))
    assert layer(torch.randn(3, HIDDEN, dtype=torch.bfloat16)).y.dtype == torch.bfloat16
    assert layer.to("meta").router.correction_bias.is_meta


def test_without_a_group_all_experts_are_here() -> None:
    """And such a layer can be pickled."""
    torch.manual_seed(0)
    alone = MoE(*SIZES)
    torch.manual_seed(0)
    expected = MoE(*SIZES, ExpertParallel(backend="reference"))
    x = torch.randn(3, HIDDEN)
    assert_bitwise(alone(x).y, expected(x).y)
    assert_bitwise(pickle.loads(pickle.dumps(alone))(x).y, expected(x).y)
    with pytest.raises(TypeError, match="Experts: ep: got str, expected an ExpertParallel or None"):
        Experts(*SIZES[:3], "ep")  # type: ignore[arg-type]
