"""Whether two training runs are the same up to float arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Both fp32 runs round the same sums, in different orders: their distances from fp64 are draws from one distribution,
# and the largest of one run's seldom exceeds twice that of the other's. 1.6 times was the most seen over ten seeds and
# 1, 2 and 4 ranks; an error of 1e-5 in what the layer returns is red.
FACTOR = 4.0
# A distance may be almost 0 by chance. One rounding each, of the sum over the batch and of the mean, always counts.
FLOOR_HALF_ULPS = 2


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One step's distances from the dense fp64 run, each the largest over the numbers compared.

    tested: of the run under test. plain: of the dense fp32 run. size: the largest magnitude in the fp64 run itself.
    """

    tested: float
    plain: float
    size: float


def gap(tested: Tensor, plain: Tensor, truth: Tensor) -> Gap:
    """The gap between three equal shapes of any floating dtype, on one device."""
    truth = truth.double()
    return Gap(
        tested=(tested.double() - truth).abs().max().item(),
        plain=(plain.double() - truth).abs().max().item(),
        size=truth.abs().max().item(),
    )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The gaps of a whole training, with what each may be. bounds: one for each of ``gaps``."""

    name: str
    gaps: Sequence[Gap]
    bounds: Sequence[float]

    @property
    def ok(self) -> bool:
        """Whether every distance is a number, and within its bound."""
        return all(gap.tested <= bound for gap, bound in zip(self.gaps, self.bounds, strict=True))

    def __str__(self) -> str:
        farthest = max(zip(self.gaps, self.bounds, strict=True), key=lambda step: step[0].tested)
        part = max(gap.tested / bound for gap, bound in zip(self.gaps, self.bounds, strict=True))
        verdict = "agree" if self.ok else "DIFFER"
        return (
            f"{self.name} {verdict}: largest distance from dense fp64 {farthest[0].tested:.2e}, "
            f"bound there {farthest[1]:.2e}; {part:.2f} of the bound at most"
        )


def agreement(name: str, gaps: Sequence[Gap]) -> Agreement:
    """The run under test against what float arithmetic alone does.

    The bound of a step is ``FACTOR`` times the largest distance of the dense fp32 run up to it, which counts as
    ``FLOOR_HALF_ULPS`` half units in the last place at least.
    """
    half_ulp = torch.finfo(torch.float32).eps / 2
    bounds, most = [], 0.0
    for step in gaps:
        most = max(most, step.plain)
        bounds.append(FACTOR * max(most, FLOOR_HALF_ULPS * half_ulp * step.size))
    return Agreement(name=name, gaps=gaps, bounds=bounds)
