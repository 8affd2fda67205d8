"""Tiny random models of transformers' MoE families, in one process and over ranks. Imports transformers when called."""

from __future__ import annotations

import gc
import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from near import assert_near
from recipes import whole
from torch import Tensor, nn

from sonic_ep.sharing import _made

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 32, 16, 4, 2, 64
IMPLEMENTATIONS = ("sonic_ep", "sonic_ep_dispatch")
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": TOP_K,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {
    "n_routed_experts": EXPERTS,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# By the name of the class of their configuration, without "Config".
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen3Moe": {"num_experts": EXPERTS, "norm_topk_prob": True},
    "DeepseekV3": {**GROUPED, **LATENT, "num_key_value_heads": 4},
    "GptOss": {"num_local_experts": EXPERTS, "layer_types": ["sliding_attention", "full_attention"]},
    "Glm4Moe": {**GROUPED, "use_qk_norm": True},
    "Olmoe": {"num_experts": EXPERTS},
}
# 1e-6, relative, in units of the last place of fp32. Sums over the batch are cut in two: that is one unit. Kernels that
# sum in fp64 round otherwise than PyTorch: that is five, as far as PyTorch in fp32 is from itself in fp64.
UNITS = 8


@cache
def imported() -> ModuleType:
    """transformers, quiet."""
    import transformers

    import sonic_ep.integrations.transformers  # noqa: F401

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # ``sonic_ep.shared`` collects garbage: what a large library has made at import takes half a second each time. Only
    # on ranks, which end without looking for leaks.
    if dist.is_initialized():
        gc.freeze()
    return transformers


def save(folder: Path, family: str, **settings: Any) -> Path:
    """A random model of the family in a folder of its own, written by rank 0. Collective."""
    transformers = imported()
    path = folder / family
    if dist.get_rank() == 0:
        config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES[family], **settings})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases and sinks are zeros at first. Larger weights make more of what fp32 rounds.
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(path)
    dist.barrier()
    return path


def loaded(path: Path, *, experts_implementation: str | None = None, **distributed: Any) -> nn.Module:
    """The model of ``path``: in this process, or with these fields of ``DistributedConfig`` over the world."""
    auto = imported().AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    options: dict[str, Any] = {"distributed_config": DistributedConfig(**distributed)} if distributed else {}
    if experts_implementation is not None:
        options["experts_implementation"] = experts_implementation
    return auto.from_pretrained(path, dtype=torch.float32, **options)


def close_shared() -> None:
    """What an earlier test left alive, in an error or in hooks, has other options; ``shared`` replaces closed ones."""
    for left in list(_made):
        left.close()


@contextmanager
def configured(**options: Any) -> Iterator[None]:
    """With these options of ``configure``, by default the backend that defines right."""
    imported()
    from sonic_ep.integrations.transformers import configure

    configure(**{"backend": "reference", **options})
    try:
        yield
    finally:
        configure()


def implementations(model: nn.Module) -> list[Any]:
    """What runs the experts of each layer."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    found = [inspect.getclosurevars(forward).nonlocals.get("implementation") for forward in forwards if forward]
    return [implementation for implementation in found if implementation is not None]


def experts_of_all_families() -> Iterator[nn.Module]:
    """An experts module on the meta device for each family with a rule for expert parallelism, as it is by default."""
    folder = Path(imported().__file__).parent / "models"
    for path in sorted(folder.glob("*/configuration_*.py")):
        rule, family = "ep_dispatch_experts", path.parent.name
        if rule not in path.read_text() or not (path.parent / f"modeling_{family}.py").exists():
            continue
        names = (f"transformers.models.{family}.{kind}_{family}" for kind in ("configuration", "modeling"))
        configurations, models = (vars(importlib.import_module(name)) for name in names)
        plans = {name: getattr(found, "base_model_ep_plan", None) for name, found in configurations.items()}
        of_experts = [name for name, plan in plans.items() if isinstance(plan, dict) and rule in plan.values()]
        classes = [found for name, found in models.items() if name.endswith("Experts") and "Shared" not in name]
        for experts, configuration in product(classes, of_experts):
            try:
                with torch.device("meta"):
                    made = experts(configurations[configuration]())
            except (TypeError, ValueError, AttributeError, RuntimeError):
                # Some have no experts by default, or sizes that differ from layer to layer.
                continue
            yield made


def tokens(batches: int, length: int = 8) -> Tensor:
    """Random sequences (batches, length)."""
    return torch.randint(3, VOCABULARY, (batches, length), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Loss, logits, and the gradient of each parameter by its name: all of it, also of DTensors."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def trained_on_ranks(model: nn.Module, ids: Tensor, tp_size: int = 1) -> dict[str, Tensor]:
    """As ``trained``, of equal parts of the batch, one for each TP group, whose losses gradients are of the mean of."""
    groups = dist.get_world_size() // tp_size
    mine = trained(model, ids.chunk(groups)[dist.get_rank() // tp_size])
    losses, logits = ([None] * dist.get_world_size() for _ in range(2))
    dist.all_gather_object(losses, mine["loss"])
    dist.all_gather_object(logits, mine["logits"])
    return {**mine, "loss": torch.stack(losses[::tp_size]).mean(), "logits": torch.cat(logits[::tp_size])}


def farthest(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest distance of a tensor, relative, in the Frobenius norm."""
    assert got.keys() == expected.keys()
    return max(float((got[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


def assert_all_near(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], units: float = UNITS) -> None:
    """Every tensor of both."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        try:
            assert_near(got[name], tensor, units)
        except AssertionError as error:
            raise AssertionError(name) from error
