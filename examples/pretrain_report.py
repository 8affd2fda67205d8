"""What ``pretrain_fsdp.py`` and ``finetune_hf.py`` say: whether curves are the same up to rounding, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Told apart by the colour-blind too, and in grey by their widths and marks.
BLUE, GREEN, ORANGE, GREY = "#0072B2", "#009E73", "#D55E00", "#444444"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss, and the gradient norm before clipping, of step ``first`` (from 0) and of those after it."""

    first: int
    losses: list[float]
    norms: list[float]

    @property
    def steps(self) -> range:
        """The numbers of its steps."""
        return range(self.first, self.first + len(self.losses))

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def read(path: Path) -> Curve:
        """What ``write`` has written."""
        return Curve(**json.loads(path.read_text()))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Relative differences of losses and gradient norms, one of each a step, and the most that they may be."""

    losses: list[float]
    norms: list[float]
    bound: float

    @property
    def ok(self) -> bool:
        """Whether every difference is a number, and within the bound."""
        return all(difference <= self.bound for difference in [*self.losses, *self.norms])

    def __str__(self) -> str:
        found = f"losses {max(self.losses):.1e}, gradient norms {max(self.norms):.1e}, bound {self.bound:.1e}"
        return f"ranks and one process {'agree' if self.ok else 'DIFFER'}: largest relative difference: {found}"


def compare(parts: Sequence[Curve], alone: Curve, tokens: int, bound: float | None = None) -> Comparison:
    """The curves of the ranks, one after the other, with the one process's.

    tokens: N, of a batch. A loss and a gradient are sums over N tokens, and the ranks add them in another order: that
    moves a sum by N machine epsilons at most, and far less on average, which leaves room for what the weights' own
    rounding adds in a short run; ``bound`` replaces it, for a longer one. Raises ``ValueError`` unless the parts have
    the same steps as the one process.
    """
    steps = [step for part in parts for step in part.steps]
    if steps != list(alone.steps):
        raise ValueError(f"steps: got {steps} on ranks, expected those of one process: {list(alone.steps)}")
    return Comparison(
        losses=_differences([loss for part in parts for loss in part.losses], alone.losses),
        norms=_differences([norm for part in parts for norm in part.norms], alone.norms),
        bound=tokens * torch.finfo(torch.float32).eps if bound is None else bound,
    )


def _differences(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [abs(got - want) / abs(want) for got, want in zip(found, expected, strict=True)]


def report(parts: Mapping[str, Curve], alone: Curve, tokens: int, folder: Path, bound: float | None = None) -> bool:
    """Whether all agree: printed, and drawn as curves.png in ``folder``. parts: the curves on ranks, by label."""
    comparison = compare(list(parts.values()), alone, tokens, bound)
    print(comparison)
    try:
        write_picture(parts, alone, comparison, folder / "curves.png")
        print(f"picture: {folder / 'curves.png'}")
    except ImportError:
        print("no picture: matplotlib is not installed: pip install matplotlib")
    return comparison.ok


def write_picture(parts: Mapping[str, Curve], alone: Curve, comparison: Comparison, path: Path) -> None:
    """The losses above; below, how far losses and gradient norms are apart. ``ImportError`` without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    curves, distances = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves.plot(alone.steps, alone.losses, color=ORANGE, lw=8, alpha=0.35, label="one process, no restart")
    for (label, part), color, mark in zip(parts.items(), (BLUE, GREEN), ("o", "s"), strict=True):
        curves.plot(part.steps, part.losses, color=color, marker=mark, ms=4, lw=1.6, label=label)
    for axes in (curves, distances):
        axes.axvline(list(parts.values())[-1].first - 0.5, color=GREY, ls=":", label="restart")
        axes.grid(alpha=0.3)
    curves.set_title("FSDP2 over efsdp x ep, and a restart with other ranks, fp32")
    curves.set_ylabel("loss [nats per byte]")
    curves.legend()
    distances.set_yscale("symlog", linthresh=torch.finfo(torch.float32).eps / 2)
    distances.axhline(comparison.bound, color=GREY, ls="--", label="bound")
    distances.plot(alone.steps, comparison.losses, "o", color=BLUE, ms=4, label="losses")
    distances.plot(alone.steps, comparison.norms, "x", color=ORANGE, ms=5, label="gradient norms")
    distances.set_xlabel("step")
    distances.set_ylabel("relative difference from one process")
    distances.set_ylim(top=comparison.bound * 10)
    distances.legend(ncols=4, fontsize="small", loc="upper left")
    figure.savefig(path, format="png", dpi=130)
