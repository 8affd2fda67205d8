"""The runs that ``train_lm.py`` compares: on all ranks, once a backend; then densely in one process, in two dtypes."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

# Defaults of its functions hold the world's group, if there is one when it is imported, and torch.optim imports it
# late. Then the group's threads would live on after destroy_process_group, into the interpreter's own end.
import torch.distributed.nn.functional
from lm_batches import batches, standard_library_text
from lm_comparison import agreement, gap
from lm_course import Course
from lm_memory import Held, Sample, Watch, held
from lm_model import DenseFeedForward, ExpertParallelFeedForward, FeedForward, LanguageModel
from lm_options import Settings
from lm_report import Outcome
from lm_training import OneProcess, Ranks, Step, WorldOfRanks, training
from torch import Tensor

# It lets TRITON_INTERPRET=1 run the fast backend on the CPU.
import sonic_ep.testing  # noqa: F401
from sonic_ep import ExpertParallel, MoE

LINES_OF_PROGRESS = 8
# No shorter timeout is needed: a rank that fails ends all of them.
MOST_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """A run on ranks: losses (steps,) fp64, and for each step the router logits (layers, T, E) of the whole batch.

    held: what each rank held meanwhile, if it was sampled. seconds: of all steps, on rank 0. process_group: how
    torch.distributed moved tensors.
    """

    backend: str
    losses: Tensor
    logits: Sequence[Tensor]
    held: tuple[Held, ...] = ()
    seconds: float = 0.0
    process_group: str | None = None


class Journal:
    """The results of a run's steps on one rank, in memory that is allocated before the first step.

    losses (steps,) fp64, and for each step logits (layers, T, E) fp32 in ``pieces``. NaN where nothing was kept.
    """

    def __init__(self, settings: Settings, rank: int, device: torch.device) -> None:
        sizes, layouts = settings.sizes, settings.course.layouts
        shapes = [(sizes.layers, layout.tokens[rank], sizes.experts) for layout in layouts]
        counts = [math.prod(shape) for shape in shapes]
        self.losses = torch.full((len(layouts),), math.nan, dtype=torch.float64, device=device)
        self.logits = torch.full((sum(counts),), math.nan, device=device)
        self.pieces = [piece.view(shape) for piece, shape in zip(self.logits.split(counts), shapes, strict=True)]

    def keep(self, number: int, step: Step) -> None:
        """Store the results of step ``number`` (from 0)."""
        self.losses[number] = step.loss
        self.pieces[number].copy_(step.logits)


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """What a rank has of the runs under test, by their place: rank 0 all, another rank that which it trains densely.

    store: lives on when the process group has ended.
    """

    rank: int
    world_size: int
    store: Any
    recorded: Mapping[int, Recorded]

    def own(self, place: int) -> bool:
        """Whether this rank trains densely for run number ``place``; the runs are dealt to the ranks in turn."""
        return place % self.world_size == self.rank


def train_on_ranks(settings: Settings, device: torch.device) -> Runs:
    """Collective: the runs under test. The process group begins and ends in here."""
    join_ranks(device)
    world = dist.group.WORLD
    assert world is not None
    rank, world_size, store = dist.get_rank(), dist.get_world_size(), world.get_group_store()
    if rank == 0 and settings.tested.left_out is not None:
        print(f"no fast run: {settings.tested.left_out}", flush=True)
    recorded = {}
    for place, backend in enumerate(settings.tested.backends):
        run = train_with(backend, settings, device, readers={0, place % world_size})
        if run is not None:
            recorded[place] = run
    dist.destroy_process_group()
    return Runs(rank=rank, world_size=world_size, store=store, recorded=recorded)


def train_with(backend: str, settings: Settings, device: torch.device, readers: set[int]) -> Recorded | None:
    """Collective: one run under test, from the weights and batches that every run has. None but on ``readers``."""
    course = settings.course
    with ExpertParallel(backend=backend, config=settings.config, max_tokens_per_rank=course.max_tokens) as ep:
        steps = steps_of(build(settings, ep, ExpertParallelFeedForward, device), settings, WorldOfRanks(), device)
        if ep.rank == 0:
            print(f"backend {ep.backend}, {ep.world_size} ranks on {device.type}", flush=True)
        journal, watch = Journal(settings, ep.rank, device), Watch(device, course.samples_at)
        begin = time.perf_counter()
        keep_all(steps, journal, watch, Progress(run=backend, steps=settings.recipe.steps, shown=ep.rank == 0))
        seconds = time.perf_counter() - begin
        found = [gathered(backend, journal, watch.samples, settings, seconds, reader) for reader in sorted(readers)]
        return next((run for run in found if run is not None), None)


def keep_all(steps: Iterator[Step], journal: Journal, watch: Watch, progress: Progress) -> None:
    """Go through ``steps``. When ``watch`` looks, nothing refers to a step any more."""
    for number in range(progress.steps):
        journal.keep(number, next(steps))
        progress.show(number + 1, journal.losses[number])
        watch.look(number + 1)


def join_ranks(device: torch.device) -> None:
    """Form the process group: NCCL where each rank has a GPU of its own, else gloo."""
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own_gpu = device.type == "cuda" and local_ranks <= torch.cuda.device_count()
    # The ranks share the processor; and on a busy one two threads that wait for each other are slower than one.
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if own_gpu else "gloo")


def gathered(
    backend: str, journal: Journal, samples: Sequence[Sample], settings: Settings, seconds: float, reader: int
) -> Recorded | None:
    """Collective: what all ranks have kept, put together on rank ``reader``."""
    mine = (journal.logits.cpu(), tuple(samples))
    every = [mine] * dist.get_world_size() if dist.get_rank() == reader else None
    dist.gather_object(mine, every, dst=reader)
    if every is None:
        return None
    return Recorded(
        backend=backend,
        losses=journal.losses.cpu(),
        logits=whole_logits([logits for logits, _samples in every], settings),
        held=held_by_ranks([samples for _logits, samples in every], settings.course),
        seconds=seconds,
        process_group=dist.get_backend(),
    )


def whole_logits(by_rank: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """For each step (layers, T, E) of the whole batch, its tokens in order, from all that each rank has kept."""
    sizes, layouts = settings.sizes, settings.course.layouts
    pieces = [
        logits.split([sizes.layers * layout.tokens[rank] * sizes.experts for layout in layouts])
        for rank, logits in enumerate(by_rank)
    ]
    steps = zip(*pieces, strict=True)
    return [torch.cat([piece.view(sizes.layers, -1, sizes.experts) for piece in step], dim=1) for step in steps]


def held_by_ranks(by_rank: Sequence[Sequence[Sample]], course: Course) -> tuple[Held, ...]:
    """What each rank held, judged; empty where memory was not sampled."""
    if not course.samples_at:
        return ()
    return tuple(
        held(rank, samples, [layout.tokens[rank] for layout in course.layouts], course.warm_up)
        for rank, samples in enumerate(by_rank)
    )


def train_all_densely(runs: Runs, settings: Settings, device: torch.device) -> list[Outcome]:
    """Collective, without a process group: ``train_densely`` for every run, in order. Nothing but on rank 0."""
    own = {place: train_densely(settings, run, device) for place, run in runs.recorded.items() if runs.own(place)}
    if runs.rank != 0:
        for place, outcome in own.items():
            runs.store.set(f"outcome {place}", pickle.dumps(outcome))
        return []
    others = [f"outcome {place}" for place in runs.recorded if place not in own]
    if others:
        runs.store.wait(others, MOST_PATIENCE)
    return [own.get(place) or pickle.loads(runs.store.get(f"outcome {place}")) for place in runs.recorded]


def train_densely(settings: Settings, recorded: Recorded, device: torch.device) -> Outcome:
    """The same training in this process alone, in fp32 and in fp64 side by side, and how ``recorded`` agrees with it.

    Choosing the K largest logits is a step function: where two are equal but for the last bit, rounding decides, and
    that moves the loss by far more than rounding does. So the dense runs take over the choices of the run under test,
    and the logits that those were made by are held to the same bound as the losses. Two runs under test may choose
    differently, so each has dense runs of its own.
    """
    progress = Progress(run=f"dense ({recorded.backend})", steps=settings.recipe.steps)
    plain_run = dense_steps(settings, recorded, torch.float32, device)
    truth_run = dense_steps(settings, recorded, torch.float64, device)
    plain_losses, truth_losses, losses, logits = [], [], [], []
    for number, (plain, truth) in enumerate(zip(plain_run, truth_run, strict=True)):
        plain_losses.append(plain.loss.item())
        truth_losses.append(truth.loss.item())
        losses.append(gap(recorded.losses[number].to(device), plain.loss, truth.loss))
        logits.append(gap(recorded.logits[number].to(device), plain.logits, truth.logits))
        progress.show(number + 1, plain.loss)
    return Outcome(
        backend=recorded.backend,
        ranks=recorded.losses.tolist(),
        plain=plain_losses,
        truth=truth_losses,
        losses=agreement(f"{recorded.backend}: losses", losses),
        logits=agreement(f"{recorded.backend}: router logits", logits),
        held=recorded.held,
        seconds=recorded.seconds,
    )


def dense_steps(settings: Settings, recorded: Recorded, dtype: torch.dtype, device: torch.device) -> Iterator[Step]:
    """The dense training in ``dtype``, from the fp32 weights of the run under test."""
    feed_forward = partial(DenseFeedForward, choices=choices(recorded.logits, settings.sizes.top_k))
    model = build(settings, ExpertParallel(backend="reference"), feed_forward, device)
    return steps_of(model.to(dtype), settings, OneProcess(), device)


def choices(logits_of_steps: Sequence[Tensor], top_k: int) -> Iterator[Tensor]:
    """The K experts of each token by step and layer, (T, K) each: the largest logits, of equal ones the first.

    logits_of_steps: (layers, T, E) each.
    """
    for logits_LTE in logits_of_steps:
        yield from logits_LTE.sort(dim=2, descending=True, stable=True).indices[:, :, :top_k]


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
    recipe = settings.recipe
    return training(
        model, batches(standard_library_text(), settings.course.layouts, recipe.seed), recipe, ranks, device
    )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A line about every so many steps of a run, if it is ``shown``."""

    run: str
    steps: int
    shown: bool = True

    def show(self, done: int, loss: Tensor) -> None:
        """Call this after each step. done: the number of steps that are done."""
        every = max(1, self.steps // LINES_OF_PROGRESS)
        if self.shown and (done in (1, self.steps) or done % every == 0):
            print(f"{self.run:>17}  step {done:>4}/{self.steps}  loss {loss.item():.4f}", flush=True)
