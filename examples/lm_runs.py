"""The runs that ``train_lm.py`` compares: on all ranks, once a backend; then densely in one process, in two dtypes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

# Defaults of its functions hold the world's group, if there is one when it is imported, and torch.optim imports it
# late. Then the group's threads would live on after destroy_process_group, into the interpreter's own end.
import torch.distributed.nn.functional
from lm_comparison import agreement, gap
from lm_model import DenseFeedForward, ExpertParallelFeedForward, FeedForward, LanguageModel
from lm_options import Settings
from lm_report import Outcome
from lm_training import OneProcess, Ranks, Step, WorldOfRanks, batches, standard_library_text, training
from torch import Tensor

from sonic_ep import ExpertParallel, MoE

LINES_OF_PROGRESS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """A run on ranks: losses (steps,) fp64, and the router logits (steps, layers, T, E) of the whole batches."""

    backend: str
    losses: Tensor
    logits: Tensor


def train_on_ranks(settings: Settings, device: torch.device) -> list[Recorded]:
    """Collective: the runs under test, in order. None but on rank 0. The process group begins and ends in here."""
    join_ranks(device)
    if dist.get_rank() == 0 and settings.tested.left_out is not None:
        print(f"no fast run: {settings.tested.left_out}", flush=True)
    runs = [train_with(backend, settings, device) for backend in settings.tested.backends]
    dist.destroy_process_group()
    return [run for run in runs if run is not None]


def train_with(backend: str, settings: Settings, device: torch.device) -> Recorded | None:
    """Collective: one run under test, from the weights and on the batches that every run has. None but on rank 0."""
    with ExpertParallel(backend=backend, config=settings.config) as ep:
        steps = steps_of(build(settings, ep, ExpertParallelFeedForward, device), settings, WorldOfRanks(), device)
        if ep.rank == 0:
            print(f"backend {ep.backend}, {ep.world_size} ranks on {device.type}", flush=True)
            steps = shown(backend, steps, settings)
        return gathered(backend, list(steps))


def join_ranks(device: torch.device) -> None:
    """Form the process group: NCCL where each rank has a GPU of its own, else gloo."""
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own_gpu = device.type == "cuda" and local_ranks <= torch.cuda.device_count()
    # The ranks share the processor; and on a busy one two threads that wait for each other are slower than one.
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if own_gpu else "gloo")


def gathered(backend: str, steps: list[Step]) -> Recorded | None:
    """Collective: the steps of all ranks, put together on rank 0."""
    mine = torch.stack([step.logits for step in steps]).cpu()
    every = [mine] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, every)
    if every is None:
        return None
    losses = torch.stack([step.loss for step in steps]).cpu()
    return Recorded(backend=backend, losses=losses, logits=torch.cat(every, dim=2))


def train_densely(settings: Settings, recorded: Recorded, device: torch.device) -> Outcome:
    """The same training in this process alone, in fp32 and in fp64 side by side, and how ``recorded`` agrees with it.

    Choosing the K largest logits is a step function: where two are equal but for the last bit, rounding decides, and
    that moves the loss by far more than rounding does. So the dense runs take over the choices of the run under test,
    and the logits that those were made by are held to the same bound as the losses. Two runs under test may choose
    differently, so each has dense runs of its own.
    """
    plain_run = shown(f"dense ({recorded.backend})", dense_steps(settings, recorded, torch.float32, device), settings)
    truth_run = dense_steps(settings, recorded, torch.float64, device)
    plain_losses, truth_losses, losses, logits = [], [], [], []
    for number, (plain, truth) in enumerate(zip(plain_run, truth_run, strict=True)):
        plain_losses.append(plain.loss.item())
        truth_losses.append(truth.loss.item())
        losses.append(gap(recorded.losses[number].to(device), plain.loss, truth.loss))
        logits.append(gap(recorded.logits[number].to(device), plain.logits, truth.logits))
    return Outcome(
        backend=recorded.backend,
        ranks=recorded.losses.tolist(),
        plain=plain_losses,
        truth=truth_losses,
        losses=agreement(f"{recorded.backend}: losses", losses),
        logits=agreement(f"{recorded.backend}: router logits", logits),
    )


def dense_steps(settings: Settings, recorded: Recorded, dtype: torch.dtype, device: torch.device) -> Iterator[Step]:
    """The dense training in ``dtype``, from the fp32 weights of the run under test."""
    feed_forward = partial(DenseFeedForward, choices=choices(recorded.logits, settings.sizes.top_k))
    model = build(settings, ExpertParallel(backend="reference"), feed_forward, device)
    return steps_of(model.to(dtype), settings, OneProcess(), device)


def choices(logits_SLTE: Tensor, top_k: int) -> Iterator[Tensor]:
    """The K experts of each token by layer and step, (T, K) each: the largest logits, of equal ones the first."""
    for logits_TE in logits_SLTE.flatten(0, 1):
        yield logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


def build(
    settings: Settings, ep: ExpertParallel, feed_forward: Callable[[MoE], FeedForward], device: torch.device
) -> LanguageModel:
    """Collective over ``ep``: the model, its first weights given by the seed, whatever the number of ranks."""
    sizes = settings.sizes
    torch.manual_seed(settings.recipe.seed)

    def make() -> FeedForward:
        layer = MoE(sizes.hidden, sizes.intermediate, sizes.experts, sizes.top_k, ep, device=device)
        return feed_forward(layer)

    return LanguageModel(sizes, make).to(device)


def steps_of(model: LanguageModel, settings: Settings, ranks: Ranks, device: torch.device) -> Iterator[Step]:
    """Train ``model`` on the text; collective over ``ranks``."""
    windows = batches(standard_library_text(), settings.recipe, settings.sizes.context)
    return training(model, windows, settings.recipe, ranks, device)


def shown(run: str, steps: Iterator[Step], settings: Settings) -> Iterator[Step]:
    """``steps``, with a line about every so many of them."""
    total = settings.recipe.steps
    every = max(1, total // LINES_OF_PROGRESS)
    for done, step in enumerate(steps, start=1):
        if done == 1 or done % every == 0 or done == total:
            print(f"{run:>17}  step {done:>4}/{total}  loss {step.loss.item():.4f}", flush=True)
        yield step
