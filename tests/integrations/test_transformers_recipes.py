"""The recipes of docs/transformers.md run: the losses and the tokens of one process, and a folder that it loads."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hf_models import HIDDEN, imported, loaded, save, tokens
from near import assert_near
from on_ranks import on_ranks
from recipes import TRANSFORMERS, Names, blocks, run_block

from sonic_ep.testing import Rank, assert_bitwise

# transformers builds its meshes on the accelerator that it finds.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs: ranks on the CPU")

BATCH, STEPS, NEW_TOKENS = 4, 3, (3, 2)


def test_every_block_is_run_here() -> None:
    training = {"Model", "Step", "Options", "Trainer", "Gradient checkpointing", "Generate"}
    assert set(blocks(TRANSFORMERS)) == {*training, "Save", "Load", "Tiny"}


def run(names: Names, *parts: str) -> Names:
    for part in parts:
        run_block(names, part, TRANSFORMERS)
    return names


def names_of(folder: Path, rank: Rank) -> Names:
    """What the blocks expect, with a half of the batch on each of two ranks."""
    imported()
    names: Names = {"path": save(folder, "Qwen3Moe"), "folder": folder / "saved", "ep_size": rank.world_size}
    names |= {"dtype": torch.float32, "lr": 1e-3, "max_norm": 1.0, "steps": STEPS, "use_cpu": True}
    names |= {"ids": tokens(BATCH).chunk(rank.world_size)[rank.rank], "new_tokens": NEW_TOKENS[rank.rank]}
    return names | {"Momentum": torch.optim.AdamW}


@on_ranks(2, pool="cpu_pool")
def test_training_saving_and_generating(rank: Rank, tmp_path: Path) -> None:
    names = run(names_of(tmp_path, rank), "Options", "Model", "Gradient checkpointing")
    names["configure"]()
    assert names["model"].is_gradient_checkpointing
    whole = {**names, "ids": tokens(BATCH), "model": loaded(names["path"])}
    for _ in range(STEPS):
        mean = run(names, "Step")["loss"].detach() / rank.world_size
        dist.all_reduce(mean)
        assert_near(mean, run(whole, "Step")["loss"], units=BATCH * HIDDEN)
    run(names, "Save", "Generate")
    dist.barrier()
    alone = run(names, "Load")["whole"]
    expected = alone.generate(names["ids"], max_new_tokens=names["new_tokens"], do_sample=False)
    assert_bitwise(names["texts"], expected)


def test_a_tiny_model_is_written(tmp_path: Path) -> None:
    imported()
    run({"path": tmp_path}, "Tiny")
    assert (tmp_path / "model.safetensors").stat().st_size < 2**22


@pytest.mark.thorough
@on_ranks(2, pool="cpu_pool")
def test_the_trainer_saves_models_that_one_process_loads(rank: Rank, tmp_path: Path) -> None:
    names = names_of(tmp_path, rank)
    names["dataset"] = [{"input_ids": row, "labels": row} for row in tokens(2 * STEPS * BATCH)]
    settings = {"RANK": str(rank.rank), "LOCAL_RANK": str(rank.rank), "WORLD_SIZE": str(rank.world_size)}
    with patch.dict("os.environ", settings | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}):
        run(names, "Model", "Trainer")
    dist.barrier()
    log = names["trainer"].state.log_history
    assert [entry["step"] for entry in log if "train_loss" in entry] == [STEPS]
    run(names, "Save")
    dist.barrier()
    saved = loaded(names["folder"] / f"checkpoint-{STEPS}").state_dict()
    for name, tensor in run(names, "Load")["whole"].state_dict().items():
        assert_bitwise(saved[name], tensor, name)
