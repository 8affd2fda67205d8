"""The steps of ``train_lm.py``: all of one shape, or in a soak each of its own, with samples of memory."""

from __future__ import annotations

from dataclasses import dataclass

from lm_batches import BATCH, Layout, changing_layouts, even_layouts
from lm_training import Recipe

SAMPLES = 40
# A single sample has no other to be compared with.
LEAST_SAMPLES = 2
# 1 / WARM_UP_PART of a soak passes before memory is judged: a rare T loads code when it first comes.
WARM_UP_PART = 4
# A tenth of what 200 steps take. At the whole rate the batches of one byte drive runs that differ by rounding apart, to
# 0.1 nats after some hundreds of steps, and then the bound says nothing; at this one the bound of the losses was below
# 1e-4 to the end with each of five seeds, and no run passed half of it.
LEARNING_RATE = 0.01


@dataclass(frozen=True, kw_only=True)
class Course:
    """The layouts of all steps, and what follows from them.

    max_tokens: C; None: the layer finds it in its first call. samples_at: step counts at which each rank samples its
    memory. warm_up: the steps after which memory may no longer grow.
    """

    layouts: tuple[Layout, ...]
    max_tokens: int | None = None
    samples_at: range = range(0)
    warm_up: int = 0

    @property
    def is_soak(self) -> bool:
        """Whether memory is sampled."""
        return len(self.samples_at) > 0


def even_course(recipe: Recipe, context: int, ranks: int) -> Course:
    """Every step alike."""
    return Course(layouts=even_layouts(recipe.steps, context, ranks))


def soak_recipe(steps: int, seed: int) -> Recipe:
    """The recipe of a soak, with a low learning rate."""
    return Recipe(steps=steps, seed=seed, learning_rate=LEARNING_RATE)


def soak_course(recipe: Recipe, context: int, ranks: int) -> Course:
    """T and routing change from step to step. C is given, as it has to be where T may grow: a whole batch."""
    every = max(1, recipe.steps // SAMPLES)
    return Course(
        layouts=changing_layouts(recipe.steps, context, ranks, recipe.seed),
        max_tokens=BATCH * context,
        samples_at=range(every, recipe.steps + 1, every),
        warm_up=max(ranks, recipe.steps // WARM_UP_PART),
    )
