"""The recipes of docs/transformers.md run: the same losses as one process, and a folder that it loads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from near import assert_near
from recipes import TRANSFORMERS, Names, blocks, run_block

from sonic_ep.testing import Rank, RankPool, assert_bitwise

pytest.importorskip("transformers.distributed", reason="needs transformers: pip install 'sonic-ep[transformers]'")

BATCH, LR, STEPS, NEW_TOKENS = 4, 1e-3, 3, (3, 2)


def test_every_block_is_run_here() -> None:
    training = {"Model", "Step", "Options", "Trainer", "Gradient checkpointing", "Generate"}
    assert set(blocks(TRANSFORMERS)) == {*training, "Save", "Load"}


def run(names: Names, *parts: str) -> Names:
    for part in parts:
        run_block(names, part, TRANSFORMERS)
    return names


def names_of(folder: Path, rank: int, world_size: int) -> Names:
    """What the blocks expect: half of the batch on each of two ranks."""
    ids = hf_models.tokens(BATCH).chunk(world_size)[rank]
    names: Names = {"path": folder / "pretrained", "folder": folder / "saved", "ep_size": world_size, "ids": ids}
    names |= {"dtype": torch.float32, "lr": LR, "max_norm": 1.0, "Momentum": torch.optim.AdamW}
    return names | {"new_tokens": NEW_TOKENS[rank], "steps": STEPS, "use_cpu": True}


def losses_of_steps(names: Names) -> list[torch.Tensor]:
    """The mean over the ranks before each step."""
    losses = []
    for _ in range(STEPS):
        loss = run(names, "Step")["loss"].detach().clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss)
    return losses


def on_ranks(rank: Rank, folder: Path) -> Any:
    """Losses, and what the model writes after the steps."""
    names = run(names_of(folder, rank.rank, rank.world_size), "Options", "Model", "Gradient checkpointing")
    names["configure"]()
    assert names["model"].is_gradient_checkpointing
    losses = losses_of_steps(names)
    run(names, "Save", "Generate")
    return torch.stack(losses), names["texts"]


def test_steps_generate_and_save(cpu_pool: RankPool, tmp_path: Path) -> None:
    hf_models.save("Qwen3Moe", tmp_path / "pretrained")
    (losses, text), (_, other) = cpu_pool.run(on_ranks, tmp_path, world_size=2)
    alone = names_of(tmp_path, 0, 1)
    alone |= {"torch": torch, "clip_grad_norm_": torch.nn.utils.clip_grad_norm_}
    alone["AutoModelForCausalLM"] = importlib.import_module("transformers").AutoModelForCausalLM
    alone["model"] = hf_models.loaded(tmp_path / "pretrained")
    assert_near(losses, torch.stack(losses_of_steps(alone)), units=BATCH * hf_models.HIDDEN)
    whole = run(alone, "Load")["whole"]
    prompts = hf_models.tokens(BATCH).chunk(2)
    for found, prompt, new_tokens in zip((text, other), prompts, NEW_TOKENS, strict=True):
        assert_bitwise(found, whole.generate(prompt, max_new_tokens=new_tokens, do_sample=False))


def trained_by_trainer(rank: Rank, folder: Path, world_size: int) -> list[float]:
    names = names_of(folder, rank.rank, world_size) | {"folder": folder / f"of {world_size}"}
    names["dataset"] = [{"input_ids": row, "labels": row} for row in hf_models.tokens(2 * STEPS * BATCH)]
    run(names, "Model")
    run(names, "Trainer")
    assert (names["folder"] / f"checkpoint-{STEPS}" / "model.safetensors").exists()
    return [entry["train_loss"] for entry in names["trainer"].state.log_history if "train_loss" in entry]


@pytest.mark.thorough
def test_the_trainer(cpu_pool: RankPool, tmp_path: Path) -> None:
    hf_models.save("Qwen3Moe", tmp_path / "pretrained")
    first, second = cpu_pool.run(trained_by_trainer, tmp_path, 2, world_size=2)
    assert len(first) == 1
    assert first == second
