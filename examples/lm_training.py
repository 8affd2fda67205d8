"""The training of ``train_lm.py``: its text, its batches, and the loop that every run goes through."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lm_model import LanguageModel
from torch import Tensor, nn

TEXT_BYTES = 4_000_000
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: SGD with Nesterov momentum, the rate rising over ``warmup`` steps and falling to zero at the end.

    SGD, because Adam would hide a gradient that is wrong by a constant factor. The rate is a third of one at which the
    model still learns, and falls, because at high rates two runs that differ by rounding part exponentially. There is
    no weight decay: its factor of almost one is rounded alike in every fp32 run, an error that would widen the bound.
    """

    steps: int
    seed: int
    learning_rate: float = 0.1
    momentum: float = 0.9
    warmup: int = 10

    def rate(self, step: int) -> float:
        """The learning rate at ``step`` (from 0), as a part of its peak."""
        return min(1.0, (step + 1) / self.warmup) * max(0.0, 1 - step / self.steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What one step showed.

    loss: the mean over the global batch in nats per byte, a fp64 scalar. logits: this process's, (layers, T, E).
    """

    loss: Tensor
    logits: Tensor


class Ranks(Protocol):
    """Who trains together."""

    def share(self, windows: Tensor) -> Tensor:
        """This rank's part of the global batch."""
        ...

    def sum(self, tensor: Tensor) -> None:
        """Collective. ``tensor`` becomes its sum over the ranks, the same bits on each."""
        ...


class OneProcess:
    """A process that trains alone, on the whole batch."""

    def share(self, windows: Tensor) -> Tensor:
        """All of it."""
        return windows

    def sum(self, tensor: Tensor) -> None:
        """Nothing to add."""


class WorldOfRanks:
    """The ranks of the world's process group."""

    def share(self, windows: Tensor) -> Tensor:
        """The sequences of this rank, as even a part as it goes."""
        return windows.tensor_split(dist.get_world_size())[dist.get_rank()]

    def sum(self, tensor: Tensor) -> None:
        """An all-reduce."""
        dist.all_reduce(tensor)


def standard_library_text() -> Tensor:
    """The source of this Python's standard library, file after file by name, as (bytes,) uint8.

    Raises ``FileNotFoundError`` if it is not there as files.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= TEXT_BYTES:
            break
    if not text:
        raise FileNotFoundError(f"{folder}: got no *.py files, expected the source of the standard library")
    return torch.frombuffer(text[:TEXT_BYTES], dtype=torch.uint8)


def batches(text: Tensor, recipe: Recipe, context: int) -> Iterator[Tensor]:
    """The global batch of each step, (B, S + 1) int64: S bytes to read, and each one's follower to predict."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.steps):
        starts = torch.randint(len(text) - context, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(context + 1)].long()


def training(
    model: LanguageModel, windows_of_steps: Iterator[Tensor], recipe: Recipe, ranks: Ranks, device: torch.device
) -> Iterator[Step]:
    """Train ``model``, a step for each item asked for. Collective over ``ranks``.

    windows_of_steps: global batches (B, S + 1), the same on every rank; each rank trains on its share of them.
    """
    replicated = model.replicated_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    for windows in windows_of_steps:
        optimizer.zero_grad()
        tokens = windows[:, 1:].numel()
        loss = summed_loss(model, ranks.share(windows).to(device)) / tokens
        loss.backward()
        sum_gradients(replicated, ranks)
        optimizer.step()
        schedule.step()
        total = loss.detach().double()
        ranks.sum(total)
        yield Step(loss=total, logits=model.router_logits())


def summed_loss(model: LanguageModel, windows: Tensor) -> Tensor:
    """The sum of the cross entropies of all bytes of ``windows`` (b, S + 1) but the first of each."""
    logits_bSV = model(windows[:, :-1])
    return F.cross_entropy(logits_bSV.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")


def sum_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Collective: every parameter's gradient becomes its sum over the ranks, in one exchange for all."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    ranks.sum(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))
