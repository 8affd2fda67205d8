"""Routed experts of torchtitan on ranks of tests: configs, overrides, meshes, and what one process has."""

import re
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from shards import full
from torch import Tensor, nn
from torch.distributed import fsdp

from sonic_ep.testing import Rank

# Its models import this name, which PyTorch 2.11 does not have.
RUNS = find_spec("torchtitan") is not None and hasattr(fsdp, "DataParallelMeshDims")
needs_torchtitan = pytest.mark.skipif(
    not RUNS, reason="needs torchtitan, which takes Python 3.11 or later, and a PyTorch that its models import with"
)
MODULE = "sonic_ep.integrations.torchtitan"
DISPATCHER, REGION = f"{MODULE}.token_dispatcher", f"{MODULE}.routed_experts"
DIM, INTERMEDIATE, EXPERTS, TOP_K = 16, 16, 8, 2
VOCABULARY = 32
SWIGLU = ("w1_EFD", "w2_EDF", "w3_EFD")
GPT_OSS = ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")


def normal(weight: Tensor) -> None:
    nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)


def moe_config(names: tuple[str, ...] = SWIGLU, *, pad_multiple: int | None = None) -> Any:
    """A ``MoE.Config`` of torchtitan, with the experts of Qwen3 or, by the names of their weights, of GPT-OSS."""
    from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config
    from torchtitan.models.common.token_dispatcher import TorchAOTokenDispatcher
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    gate = {"weight": normal, "bias": normal}
    of_router = {"gate_param_init": gate, "top_k": TOP_K, "score_func": "softmax", "route_norm": True}
    router = make_router_config(dim=DIM, num_experts=EXPERTS, **of_router)
    sizes = {"dim": DIM, "hidden_dim": INTERMEDIATE, "num_experts": EXPERTS}
    given = {**sizes, "param_init": dict.fromkeys(names, normal)}
    routed = make_routed_experts_config(**given, top_k=TOP_K, comm_backend="standard")
    if names == GPT_OSS:
        routed.inner_experts = GptOssGroupedExperts.Config(**given)
    if pad_multiple is not None:
        of_dispatcher = {"num_experts": EXPERTS, "top_k": TOP_K, "pad_multiple": pad_multiple}
        routed.token_dispatcher = TorchAOTokenDispatcher.Config(**of_dispatcher)
    return make_moe_config(num_experts=EXPERTS, router=router, routed_experts=routed)


def place(config: Any, *, enable_ep: bool = True) -> None:
    """Set the placements of a ``MoE.Config`` as models of torchtitan do."""
    import spmd_types
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config

    columns, rows, whole = spmd_types.S(1), spmd_types.S(2), spmd_types.R
    layout = {"w1_EFD": columns, "w3_EFD": columns, "w2_EDF": rows}
    layout |= {"mlp1_weight_EGD": columns, "mlp1_bias_EG": columns, "mlp2_weight_EDF": rows, "mlp2_bias_ED": whole}
    names = config.routed_experts.inner_experts.param_init
    of_experts = {name: layout[name] for name in names}
    set_moe_sharding_config(config, enable_ep=enable_ep, enable_sp=False, expert_param_layout=of_experts)


def overridden(config: Any, *imports: str) -> Any:
    """A copy of the config in which torchtitan has applied ``--override.imports``."""
    from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports

    config = deepcopy(config)
    assert apply_overrides(OverrideConfig(imports=parse_cli_imports(list(imports))), config)
    return config


def meshes(rank: Rank, backend: str = "partial_dtensor", **degrees: int) -> Any:
    """The ``ParallelDims`` of these ranks. backend: torchtitan's SPMD backend, which is set for this process."""
    # Registers "fake", the backend that torchtitan gives to dimensions of one rank.
    from torch.testing._internal.distributed import fake_pg  # noqa: F401
    from torchtitan.distributed import parallel_dims, utils

    utils.set_spmd_backend(backend)
    sizes = {"dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1, "pp": 1, "ep": 1, **degrees}
    dims = parallel_dims.ParallelDims(**sizes, world_size=rank.world_size, spmd_backend=backend)
    # It takes a machine without GPUs for one with CUDA.
    with patch.object(parallel_dims, "device_type", rank.device.type):
        dims.build_mesh()
    return dims


def built(config: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The module, with the same weights wherever and with whatever dispatcher it is built."""
    torch.manual_seed(0)
    with torch.device(device):
        module = config.build()
    module.init_states()
    return module.to(dtype)


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Tokens of the whole group with their routing, and how many each rank has of them."""

    tokens: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    # Experts that are chosen: all, or the first ones, so that other ranks get no rows.
    chosen: int = EXPERTS
    seed: int = 1
    x: Tensor = field(init=False)
    scores: Tensor = field(init=False)
    ids: Tensor = field(init=False)
    grad: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator, total = torch.Generator().manual_seed(self.seed), sum(self.tokens)
        x, grad = torch.randn(2, 1, total, DIM, generator=generator).to(self.dtype)
        scores = torch.rand(1, total, TOP_K, generator=generator)
        ids = torch.rand(1, total, self.chosen, generator=generator).topk(TOP_K).indices
        for name, value in {"x": x, "grad": grad, "scores": scores, "ids": ids}.items():
            object.__setattr__(self, name, value)

    def run(self, experts: nn.Module, rank: int | None = None) -> dict[str, Tensor]:
        """Output and gradients of ``RoutedExperts`` for the tokens of a rank, None for those of all."""
        device = next(experts.parameters()).device
        x, grad, scores, ids = (
            (t if rank is None else t.split(self.tokens, 1)[rank]).to(device)
            for t in (self.x, self.grad, self.scores, self.ids)
        )
        x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
        counts_E = torch.bincount(ids.flatten(), minlength=EXPERTS)
        experts.zero_grad()
        out = experts(x, scores, ids, counts_E)
        out.backward(grad)
        found = {"out": out.detach(), "x": x.grad, "scores": scores.grad}
        return found | {name: local(parameter.grad) for name, parameter in experts.named_parameters()}


def local(grad: Any) -> Tensor:
    return grad.to_local() if hasattr(grad, "to_local") else grad


def of_group(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collective. What each rank has found, put together: tokens, and experts."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {name: value.cpu() for name, value in found.items()})
    along = {"out": 1, "x": 1, "scores": 1}
    return {name: torch.cat([each[name] for each in ranks], dim=along.get(name, 0)) for name in found}


def in_one_process(config: Any, routed: Routed) -> dict[str, Tensor]:
    """What torchtitan's own ``LocalTokenDispatcher`` finds for all tokens."""
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    config = deepcopy(config.routed_experts)
    config.token_dispatcher = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
    return routed.run(built(config, torch.device("cpu"), routed.dtype))


def product_of_groups(_: object, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
    """``GroupedExperts._grouped_mm`` in any dtype."""
    ends = offs.tolist()
    return torch.cat([A[a:b] @ B_t[g] for g, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True))])


def truth(config: Any, routed: Routed) -> dict[str, Tensor]:
    """The same in double precision: torchtitan's modules without their casts to bf16."""
    from torchtitan.models.common.moe import GroupedExperts

    exact = Routed(tokens=routed.tokens, dtype=routed.dtype, chosen=routed.chosen, seed=routed.seed)
    for name in ("x", "grad"):
        object.__setattr__(exact, name, getattr(exact, name).double())
    with (
        patch.object(Tensor, "bfloat16", Tensor.double),
        patch.object(GroupedExperts, "_grouped_mm", product_of_groups),
    ):
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

        config = deepcopy(config.routed_experts)
        config.token_dispatcher = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
        module = built(config, torch.device("cpu"), routed.dtype).double()
        return exact.run(module)


def qwen3_config() -> Any:
    """A Qwen3 of two MoE layers, small."""
    from torchtitan.models.common import Embedding, Linear
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.rope import CosSinRoPE
    from torchtitan.models.qwen3 import Qwen3Model, _build_qwen3_moe_layers, _qwen3_norm

    heads = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rope": CosSinRoPE.Config(dim=8, max_seq_len=32, theta=1e4)}
    of_moe = {"moe_hidden_dim": INTERMEDIATE, "num_experts": EXPERTS, "top_k": TOP_K, "moe_comm_backend": "standard"}
    weight = {"param_init": {"weight": normal}}
    layers = _build_qwen3_moe_layers(n_layers=2, dim=DIM, attn_backend="flex", **heads, **of_moe)
    for layer in layers:
        # One that the CPU runs without a compiler.
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return Qwen3Model.Config(
        vocab_size=VOCABULARY,
        dim=DIM,
        norm=_qwen3_norm(DIM),
        tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=DIM, **weight),
        lm_head=Linear.Config(in_features=DIM, out_features=VOCABULARY, **weight),
        layers=layers,
    )


def qwen3_gradients(
    rank: Rank, *imports: str, checkpointing: str = "none", tp: int = 1, ep: int = 2, compiled: bool = False
) -> dict[str, Tensor]:
    """Loss and whole gradients of that model, overridden and parallelized by torchtitan itself. Collective.

    Each data-parallel rank has a batch of its own. compiled: by torchtitan, each block without a graph break.
    """
    # FSDP2 of PyTorch 2.13 takes no plain tensors, which torchtitan's default, spmd_types, gives it.
    spmd = "partial_dtensor"
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
    from torchtitan.distributed.utils import get_spmd_context
    from torchtitan.models.qwen3 import parallelize_qwen3

    parallelism = ParallelismConfig(expert_parallel_degree=ep, tensor_parallel_degree=tp, spmd_backend=spmd)
    training = TrainingConfig(mixed_precision_param="float32", mixed_precision_reduce="float32")
    config = qwen3_config()
    config.update_from_config(config=SimpleNamespace(parallelism=parallelism, training=training))
    model = built(overridden(config, *imports) if imports else config, rank.device)
    dims = meshes(rank, spmd, ep=ep, tp=tp)
    policies = {"none": None, "full": FullAC.Config(), "selective": SelectiveAC.Config()}
    compiling = CompileConfig(enable=compiled, components=["model"], backend="aot_eager")
    given = {"training": training, "parallelism": parallelism, "compile_config": compiling, "dump_folder": ""}
    tokens = torch.randint(VOCABULARY, (rank.world_size, 2, 8), generator=torch.Generator().manual_seed(3))
    mine = tokens[rank.rank // tp].to(rank.device)
    with get_spmd_context(parallel_dims=dims)():
        model = parallelize_qwen3(model, parallel_dims=dims, ac_config=policies[checkpointing], **given)
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                # Gloo cannot scale within a reduction.
                module.set_force_sum_reduction_for_comms(True)
        logits = model(mine)
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), mine.flatten(), reduction="sum")
        loss.backward()
    found = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    return {
        "loss": loss.detach()[None],
        **{re.sub("_checkpoint_wrapped_module.|_orig_mod.", "", name): g for name, g in found.items()},
    }
