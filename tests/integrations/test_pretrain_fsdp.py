"""The pretraining example: FSDP2 over efsdp x ep, AdamW, clipping, and a checkpoint of four ranks on two and on one."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import HANG_SECONDS
from same import assert_same_bits
from torch import Tensor
from torch.distributed.tensor import DTensor
from training_example import EXAMPLES, module_of_example, no_launcher

from sonic_ep.testing import Rank, RankPool

STEPS = 4
CPU = torch.device("cpu")


def settings_of(folder: Path) -> Any:
    return module_of_example("pretrain_fsdp").Settings(folder=folder, steps=STEPS)


def whole(state: Any, name: str = "") -> dict[str, Tensor]:
    """Collective. Every tensor of a state by its path: all of a DTensor; numbers and flags as tensors, too."""
    if isinstance(state, dict | list):
        places = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: tensor for key, value in places for path, tensor in whole(value, f"{name}/{key}").items()}
    if isinstance(state, DTensor):
        state = state.full_tensor()
    return {name: state} if isinstance(state, Tensor) else {f"{name}={state}": torch.empty(0)}


def loaded(folder: Path, again: Path | None = None) -> dict[str, Tensor]:
    """Collective. All that a checkpoint gives to a new model and optimizer, which save it ``again``."""
    example = module_of_example("pretrain_fsdp")
    model = example.build(settings_of(folder), CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    step = example.load(folder, model, optimizer)
    if again is not None:
        example.save(again, model, optimizer, step)
    return whole(example.state_of(model, optimizer, step))


def train_and_load(_rank: Rank, folder: Path) -> Any:
    settings = settings_of(folder)
    return module_of_example("pretrain_fsdp").pretrain("train", settings, CPU), loaded(settings.checkpoint)


def resume_and_save(_rank: Rank, folder: Path) -> Any:
    settings = settings_of(folder)
    found = loaded(settings.checkpoint, again=folder / "again")
    return module_of_example("pretrain_fsdp").pretrain("resume", settings, CPU), found
