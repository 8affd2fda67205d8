"""What ``train_lm.py`` writes about two trainings: a picture, numbers, and a few lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lm_comparison import FACTOR, Agreement
from lm_options import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#444444"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The losses of each step by the three runs, and how losses and router logits agree."""

    ranks: list[float]
    plain: list[float]
    truth: list[float]
    losses: Agreement
    logits: Agreement

    @property
    def ok(self) -> bool:
        """Whether both agree."""
        return self.losses.ok and self.logits.ok


def write_json(outcome: Outcome, settings: Settings, path: Path) -> None:
    """The losses of all runs, the distances from fp64 and their bounds, a list of one number a step each."""
    numbers = {
        "ranks": settings.ranks,
        "experts": settings.sizes.experts,
        "top_k": settings.sizes.top_k,
        "seed": settings.recipe.seed,
        "agree": outcome.ok,
        "losses": {
            "expert_parallel": outcome.ranks,
            "dense_fp32": outcome.plain,
            "dense_fp64": outcome.truth,
        },
        "loss_distance": _distances(outcome.losses),
        "router_logits_distance": _distances(outcome.logits),
    }
    path.write_text(json.dumps(numbers, indent=1) + "\n")


def _distances(found: Agreement) -> dict[str, list[float]]:
    return {
        "expert_parallel": [gap.tested for gap in found.gaps],
        "dense_fp32": [gap.plain for gap in found.gaps],
        "bound": list(found.bounds),
    }


def write_picture(outcome: Outcome, settings: Settings, path: Path) -> None:
    """The losses above, their distances from the fp64 run below. Raises ``ImportError`` without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_losses(upper, outcome, settings)
    _draw_distances(lower, outcome, settings)
    figure.savefig(path, format="png", dpi=130)


def _draw_losses(axes: Axes, outcome: Outcome, settings: Settings) -> None:
    sizes, steps = settings.sizes, range(1, settings.recipe.steps + 1)
    axes.plot(steps, outcome.ranks, color=BLUE, lw=5, alpha=0.45, label=f"expert-parallel, W={settings.ranks}")
    axes.plot(steps, outcome.plain, color=ORANGE, lw=1.3, label="dense, one process")
    axes.set_title(
        "Byte-level MoE language model on the source of Python's standard library\n"
        f"W={settings.ranks} ranks, E={sizes.experts} experts, top K={sizes.top_k}, "
        f"{settings.recipe.steps} steps, seed {settings.recipe.seed}, fp32"
    )
    axes.set_ylabel("loss [nats per byte]")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_distances(axes: Axes, outcome: Outcome, settings: Settings) -> None:
    steps, found = range(1, settings.recipe.steps + 1), outcome.losses
    tested, plain = [gap.tested for gap in found.gaps], [gap.plain for gap in found.gaps]
    axes.semilogy(steps, found.bounds, color=GREY, ls="--", label=f"bound ({FACTOR:g} x dense so far)")
    axes.semilogy(steps, tested, "o", color=BLUE, ms=4, label=f"expert-parallel, W={settings.ranks}")
    axes.semilogy(steps, plain, "x", color=ORANGE, ms=4, label="dense, one process")
    axes.set_xlabel("step")
    axes.set_ylabel("distance from dense fp64 [nats]")
    axes.grid(alpha=0.3)
    # Room for the legend above the bound.
    axes.set_ylim(top=max(found.bounds) * 20)
    axes.legend(ncols=3, loc="upper left")
