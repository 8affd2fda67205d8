"""What ``train_lm.py`` writes about its trainings: a picture, and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_comparison import FACTOR, Agreement
from lm_memory import Held
from lm_options import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by the colour-blind too, and in grey by their widths and marks.
BLUE, GREEN, ORANGE, GREY = "#0072B2", "#009E73", "#D55E00", "#444444"
DENSE = "dense, one process"
# Short ones, as the lines below have to be seen between them.
DASHES = (0, (3, 3))


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the run of a backend is drawn: over wider lines, narrower ones."""

    color: str
    width: float
    alpha: float


LOOKS = {"reference": Look(color=BLUE, width=8, alpha=0.35), "fast": Look(color=GREEN, width=4, alpha=0.8)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The losses of each step by a run on ranks and its two dense runs, and how losses and router logits agree.

    held, seconds: see ``Recorded``.
    """

    backend: str
    ranks: list[float]
    plain: list[float]
    truth: list[float]
    losses: Agreement
    logits: Agreement
    held: tuple[Held, ...] = ()
    seconds: float = 0.0

    @property
    def agree(self) -> bool:
        """Whether both agree."""
        return self.losses.ok and self.logits.ok

    @property
    def flat(self) -> bool:
        """Whether no rank's memory grew; True where it was not sampled."""
        return all(rank.flat for rank in self.held)

    @property
    def ok(self) -> bool:
        """Whether losses and logits agree and memory is flat."""
        return self.agree and self.flat


def as_json(outcomes: Sequence[Outcome], settings: Settings) -> dict[str, Any]:
    """The settings, and for each backend's run losses, distances from fp64 and bounds, lists of one number a step."""
    return {
        "ranks": settings.ranks,
        "experts": settings.sizes.experts,
        "top_k": settings.sizes.top_k,
        "context": settings.sizes.context,
        "seed": settings.recipe.seed,
        "agree": all(outcome.agree for outcome in outcomes),
        "left_out": settings.tested.left_out,
        "runs": {outcome.backend: _numbers(outcome) for outcome in outcomes},
    }


def _numbers(outcome: Outcome) -> dict[str, Any]:
    return {
        "agree": outcome.agree,
        "losses": {
            "expert_parallel": outcome.ranks,
            "dense_fp32": outcome.plain,
            "dense_fp64": outcome.truth,
        },
        "loss_distance": _distances(outcome.losses),
        "router_logits_distance": _distances(outcome.logits),
    }


def _distances(found: Agreement) -> dict[str, list[float]]:
    return {
        "expert_parallel": [gap.tested for gap in found.gaps],
        "dense_fp32": [gap.plain for gap in found.gaps],
        "bound": list(found.bounds),
    }


def write_picture(outcomes: Sequence[Outcome], settings: Settings, path: Path) -> None:
    """The losses of all runs above; below, a panel a backend, their distances from fp64.

    Raises ``ImportError`` without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, len(outcomes), height_ratios=(3, 2))
    _draw_losses(figure.add_subplot(grid[0, :]), outcomes, settings)
    panels: list[Axes] = []
    for place, outcome in enumerate(outcomes):
        panels.append(figure.add_subplot(grid[1, place], sharey=panels[0] if panels else None))
        _draw_distances(panels[place], outcome, settings)
    # Room for the legends above the bounds, on the axis that all panels share.
    panels[0].set_ylim(top=panels[0].get_ylim()[1] * 10)
    figure.savefig(path, format="png", dpi=130)


def _draw_losses(axes: Axes, outcomes: Sequence[Outcome], settings: Settings) -> None:
    sizes, steps = settings.sizes, range(1, settings.recipe.steps + 1)
    for outcome in outcomes:
        look = LOOKS[outcome.backend]
        label = f"{outcome.backend}, W={settings.ranks}"
        axes.plot(steps, outcome.ranks, color=look.color, lw=look.width, alpha=look.alpha, label=label)
    for place, outcome in enumerate(outcomes):
        axes.plot(steps, outcome.plain, color=ORANGE, lw=1.6, ls=DASHES, label=None if place else DENSE)
    axes.set_title(
        "Byte-level MoE language model on the source of Python's standard library\n"
        f"W={settings.ranks} ranks, E={sizes.experts} experts, top K={sizes.top_k}, "
        f"{settings.recipe.steps} steps, seed {settings.recipe.seed}, fp32"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss [nats per byte]")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_distances(axes: Axes, outcome: Outcome, settings: Settings) -> None:
    steps, found = range(1, settings.recipe.steps + 1), outcome.losses
    tested, plain = [gap.tested for gap in found.gaps], [gap.plain for gap in found.gaps]
    axes.semilogy(steps, found.bounds, color=GREY, ls="--", label=f"bound: {FACTOR:g} x dense so far")
    axes.semilogy(steps, tested, "o", color=LOOKS[outcome.backend].color, ms=4, label=outcome.backend)
    axes.semilogy(steps, plain, "x", color=ORANGE, ms=4, label="dense fp32")
    axes.set_title(f"{outcome.backend}: {'agrees' if outcome.agree else 'DIFFERS'}", fontsize="medium")
    axes.set_xlabel("step")
    axes.set_ylabel("distance from dense fp64 [nats]")
    axes.label_outer()
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, loc="upper left", fontsize="small", columnspacing=1.0, handlelength=1.5)
