"""torchtitan's MoE layers on ranks of tests: configs, overrides, meshes, and gradients of whole tensors."""

from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonic_ep.testing import Rank

needs_torchtitan = pytest.mark.skipif(
    find_spec("torchtitan") is None, reason="torchtitan is not installed: it needs Python 3.11 and a recent PyTorch"
)
MODULE = "sonic_ep.integrations.torchtitan"
DISPATCHER, REGION = f"{MODULE}.token_dispatcher", f"{MODULE}.routed_experts"
DIM, INTERMEDIATE, EXPERTS, TOP_K = 16, 16, 8, 2


def normal(weight: Tensor) -> None:
    nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)


def moe_config(kind: str = "swiglu", **of_router: Any) -> Any:
    """A ``MoE.Config`` of torchtitan: "swiglu" has the experts of Qwen3, "gpt_oss" those with biases."""
    from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    gate = {"weight": normal, "bias": normal}
    router = make_router_config(
        dim=DIM, num_experts=EXPERTS, gate_param_init=gate, top_k=TOP_K, score_func="softmax", route_norm=True
    )
    names = ("w1_EFD", "w2_EDF", "w3_EFD")
    sizes = {"dim": DIM, "hidden_dim": INTERMEDIATE, "num_experts": EXPERTS}
    routed = make_routed_experts_config(
        **sizes, top_k=TOP_K, param_init=dict.fromkeys(names, normal), comm_backend="standard"
    )
    if kind == "gpt_oss":
        names = ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")
        routed.inner_experts = GptOssGroupedExperts.Config(**sizes, param_init=dict.fromkeys(names, normal))
    return make_moe_config(num_experts=EXPERTS, router=router, routed_experts=routed)


def overridden(config: Any, *imports: Any) -> Any:
    """The config after torchtitan has applied ``--override.imports``."""
    from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports

    config = deepcopy(config)
    assert apply_overrides(OverrideConfig(imports=parse_cli_imports(list(imports))), config)
    return config


def meshes(rank: Rank, backend: str = "partial_dtensor", **degrees: int) -> Any:
    """torchtitan's ``ParallelDims`` of these ranks, for whose SPMD backend it is set."""
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


def shard(config: Any, *, tp: bool = False) -> None:
    """Placements of a ``MoE.Config``, as models of torchtitan set them."""
    import spmd_types
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config

    columns, rows, whole = spmd_types.S(1), spmd_types.S(2), spmd_types.R
    layout = {"w1_EFD": columns, "w3_EFD": columns, "w2_EDF": rows}
    layout |= {"mlp1_weight_EGD": columns, "mlp1_bias_EG": columns, "mlp2_weight_EDF": rows, "mlp2_bias_ED": whole}
    names = config.routed_experts.inner_experts.param_init
    set_moe_sharding_config(
        config, enable_ep=not tp, enable_sp=False, expert_param_layout={name: layout[name] for name in names}
    )


def built(config: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The module, with the same weights wherever and with whatever dispatcher it is built."""
    torch.manual_seed(0)
    with torch.device(device):
        module = config.build()
    module.init_states()
    return module.to(dtype)


def whole_gradients(module: nn.Module, experts: Callable[[str], bool] = lambda name: "inner_experts" in name) -> Any:
    """By name. Of experts the shares of all ranks, of anything else the sum over ranks. Collective."""
    found = {}
    for name, parameter in module.named_parameters():
        grad = getattr(parameter.grad, "to_local", lambda g=parameter.grad: g)().detach().clone()
        if experts(name):
            shares = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, grad)
            found[name] = torch.cat(shares)
        else:
            dist.all_reduce(grad)
            found[name] = grad
    return found
