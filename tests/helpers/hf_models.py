"""Tiny random models of transformers' MoE families, in one process and over ranks. Imports transformers when called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from recipes import whole
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 32, 16, 4, 2, 64
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
# One layer is dense where a family has such layers.
OF_DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}
OF_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# By the name of the class of their configuration, without "Config".
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen3Moe": {"num_experts": EXPERTS, "norm_topk_prob": True},
    "DeepseekV3": {**OF_DEEPSEEK, **OF_MLA, "num_key_value_heads": 4},
    "GptOss": {"num_local_experts": EXPERTS, "layer_types": ["sliding_attention", "full_attention"]},
    "Glm4Moe": {**OF_DEEPSEEK, "use_qk_norm": True},
    "Olmoe": {"num_experts": EXPERTS},
}


def save(family: str, folder: Path, **settings: Any) -> None:
    """A random model of the family, in ``folder``."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES[family], **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial weights of 0.02 hide an error of the experts behind the residual; biases of zero hide theirs.
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)


def loaded(folder: Path, *, experts: str | None = None, **distributed: Any) -> nn.Module:
    """The model of ``folder``: in this process, or with these fields of ``DistributedConfig``, over the world."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import sonic_ep.integrations.transformers  # noqa: F401

    options: dict[str, Any] = {"distributed_config": DistributedConfig(**distributed)} if distributed else {}
    if experts is not None:
        options["experts_implementation"] = experts
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


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


def joined(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss of the whole batch, and the logits of all ranks, in their order. Gradients are whole already."""
    losses, logits = [None] * dist.get_world_size(), [None] * dist.get_world_size()
    dist.all_gather_object(losses, mine["loss"])
    dist.all_gather_object(logits, mine["logits"])
    return {**mine, "loss": torch.stack(losses).mean(), "logits": torch.cat(logits)}
