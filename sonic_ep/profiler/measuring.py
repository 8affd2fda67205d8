"""Right first, then timed, then right still: how the works of a profile are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from sonic_ep.api import ExpertParallel
from sonic_ep.ceilings import meeting
from sonic_ep.profiler.agreement import WrongResultError, in_step
from sonic_ep.profiler.problem import Inputs, Work
from sonic_ep.testing.checks import poison
from sonic_ep.testing.timing import Captured, Timing, captured, measure_in_turn

# What the timed rounds of a profile take together, so that a start of a training run does not wait for them.
SECONDS_OF_ROUNDS = 1.5
# Rows up to so many bytes make small works.
MOST_BYTES_OF_GRAPHS = 2**28
FEWEST_ROUNDS, MOST_ROUNDS = 3, 50


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """Where works run: a lane to meet by, and the device. Methods are collective.

    What can fail on one rank while the others wait for nothing fails on all: making other inputs, capturing, checking.
    A rank that fails inside a primitive (out of memory, say) leaves the others waiting inside theirs, where nothing can
    be agreed on: they wait as long as the process group, or the fast backend's kernels, have patience.

    as_graphs: small works in CUDA graphs. Called one by one they would take what the host needs to launch them.
    """

    lane: ExpertParallel
    device: torch.device
    fewest_rounds: int
    as_graphs: bool = False

    def prove(self, works: Sequence[Work], inputs: Inputs) -> None:
        """Run each of ``works`` on other inputs, so that nothing right is left over anywhere, then on these.

        Raises ``WrongResultError`` on every rank if a result is wrong on any.
        """
        others = in_step(self.lane.group, inputs.others, expected=RuntimeError, raised=RuntimeError)
        for work in works:
            work.run(others)
            self._expect_right(work, work.run(inputs))

    def prove_last(self, works: Sequence[Work]) -> None:
        """Hold what the last round of each left against the reference."""
        for work in works:
            self._expect_right(work, work.last.pop())

    def rounds_for(self, functions: Sequence[Callable[[], object]]) -> int:
        """How many rounds of all of them take about ``SECONDS_OF_ROUNDS``: the same on every rank."""
        begin = perf_counter()
        self.time_launched(functions, rounds=1)
        seconds = max(perf_counter() - begin, 1e-6)
        fitting = min(MOST_ROUNDS, max(self.fewest_rounds, int(SECONDS_OF_ROUNDS / seconds)))
        return self.lane.agree(fitting, self.device)

    def time(self, works: Sequence[Work], inputs: Inputs, *, rounds: int | None) -> list[Timing]:
        """What each of ``works`` takes, in turn, ``rounds`` of each, or as many as fit."""
        functions = [self.launched(work, inputs) for work in works]
        # The turn that tells how many rounds fit is also the warm-up, with results kept as they are in the rounds.
        fitting = self.rounds_for(functions)
        return self.time_launched(functions, rounds or fitting)

    def time_launched(self, functions: Sequence[Callable[[], object]], rounds: int) -> list[Timing]:
        """What each of ``functions`` takes, in turn, round by round, the host ahead of a GPU."""
        barrier_before_write = partial(self.lane.meet, self.device)
        enter = meeting(barrier_before_write, self.device, ahead=True)
        group, device = self.lane.group, self.device
        return measure_in_turn(functions, rounds=rounds, warmup=0, device=device, group=group, enter=enter)

    def launched(self, work: Work, inputs: Inputs) -> Callable[[], object]:
        """One round of ``work``, as a graph where that tells the GPU's own time; its result is ``work.last``."""
        if not self.as_graphs:
            return partial(work.keep_last, inputs)
        # Host and GPU go apart here: the host waits for no other rank before all have captured.
        return in_step(
            self.lane.group, partial(self._captured, work, inputs), expected=RuntimeError, raised=RuntimeError
        )

    def _captured(self, work: Work, inputs: Inputs) -> Captured:
        graph = captured(partial(work.run, inputs), self.device)
        # What the capture's warm-up found is not to be taken for what a replay gives.
        poison(graph.result)
        work.last[:] = [graph.result]
        return graph

    def _expect_right(self, work: Work, result: object) -> None:
        def check() -> None:
            try:
                work.check(result)
            except AssertionError as error:
                raise AssertionError(f"{work.name}: {error}") from None

        in_step(self.lane.group, check, expected=AssertionError, raised=WrongResultError)
