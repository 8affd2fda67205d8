"""The training of ``train_lm.py``: the loop that every run goes through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lm_batches import Batch
from lm_model import LanguageModel
from torch import Tensor, nn


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
    """The processes that train together."""

    def share(self, batch: Batch) -> Tensor:
        """This rank's windows of the global batch, (b, S + 1)."""
        ...

    def sum(self, tensor: Tensor) -> None:
        """Collective. ``tensor`` becomes its sum over the ranks, the same bits on each."""
        ...


class OneProcess:
    """A process that trains alone, on the whole batch."""

    def share(self, batch: Batch) -> Tensor:
        """All windows."""
        return batch.windows

    def sum(self, tensor: Tensor) -> None:
        """Nothing to add."""


class WorldOfRanks:
    """The ranks of the world's process group."""

    def share(self, batch: Batch) -> Tensor:
        """The windows of this rank."""
        return batch.of_rank(dist.get_rank())

    def sum(self, tensor: Tensor) -> None:
        """An all-reduce."""
        dist.all_reduce(tensor)


def training(
    model: LanguageModel, batches: Iterator[Batch], recipe: Recipe, ranks: Ranks, device: torch.device
) -> Iterator[Step]:
    """Train ``model``, a step for each item asked for. Collective over ``ranks``.

    batches: the same on every rank; each rank trains on its share of them. Between two steps nothing of a batch is
    left, and no gradient: weights and momentum alone.
    """
    replicated = model.replicated_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)

    def trained(batch: Batch) -> Step:
        tokens = batch.windows[:, 1:].numel()
        loss = summed_loss(model, ranks.share(batch).to(device)) / tokens
        loss.backward()
        sum_gradients(replicated, ranks)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total = loss.detach().double()
        ranks.sum(total)
        return Step(loss=total, logits=model.take_router_logits())

    return map(trained, batches)


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
