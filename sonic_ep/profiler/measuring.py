"""Times work, whose result is checked before the first round and after the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

from sonic_ep.profiler.agreement import WrongResultError, gathered, in_step
from sonic_ep.profiler.timing import RoundTimer, Timing, captured
from sonic_ep.profiler.verification import poison


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedWork:
    """One thing to time.

    run: allocates its outputs and returns what ``check`` looks at. check: raises ``AssertionError``.
    other_inputs: a context in which ``run`` reads other inputs from the same memory, whose result ``check`` refuses.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None]
    other_inputs: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedResult:
    """What a work took, and the result of its last round."""

    work: TimedWork
    timing: Timing
    last: Any


class KeepLast:
    """``function``, and the result of the last of ``rounds`` calls; the others are freed at once."""

    def __init__(self, function: Callable[[], Any], rounds: int) -> None:
        self._function, self._left = function, rounds
        self.result: Any = None

    def __call__(self) -> None:
        """One round."""
        result = self._function()
        self._left -= 1
        if self._left == 0:
            self.result = result


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """Proves, times and checks works. Methods are collective.

    An error of capturing or checking on one rank is one on every rank. A rank that fails inside a work raises alone,
    and the others time out.

    as_graphs: in CUDA graphs; called one by one, small works take as long as the host needs to launch them.
    """

    timer: RoundTimer
    as_graphs: bool = False

    def launched(self, work: TimedWork) -> TimedWork:
        """``work`` as it is timed: a CUDA graph, or itself."""
        if not self.as_graphs:
            return work
        # The host waits for no other rank while it captures.
        return replace(work, run=in_step(self.timer.group, partial(captured, work.run, self.timer.device)))

    def prove(self, work: TimedWork) -> None:
        """Run on other inputs, poison the result, run on the inputs, check, and poison again.

        Raises ``WrongResultError`` on every rank if the result is wrong on any. A correct result is then left over
        neither in shared memory before the check, nor in the output's memory before the rounds.
        """
        with work.other_inputs():
            poison(work.run())
        result = work.run()
        self._check(work, result)
        poison(result)

    def time(self, works: Sequence[TimedWork], *, rounds: int, warmup: int = 0) -> list[TimedResult]:
        """``rounds`` rounds of each work, alternating, after ``warmup`` more."""
        runs = [KeepLast(work.run, rounds + warmup) for work in works]
        found = zip(works, self.timer.time(runs, rounds=rounds, warmup=warmup), runs, strict=True)
        return [TimedResult(work=work, timing=timing, last=run.result) for work, timing, run in found]

    def confirm(self, timed: TimedResult) -> None:
        """Check the result of the last round. Raises ``WrongResultError`` on every rank if it is wrong on any."""
        self._check(timed.work, timed.last)

    def rounds_within(self, works: Sequence[TimedWork], seconds: float, *, fewest: int, most: int) -> int:
        """How many rounds of all works take ``seconds``, from one round of each, which also warms up."""
        begin = perf_counter()
        self.time(works, rounds=1)
        elapsed = max(perf_counter() - begin, 1e-6)
        return gathered(self.timer.group, min(most, max(fewest, int(seconds / elapsed))))[0]

    def _check(self, work: TimedWork, result: object) -> None:
        def check() -> None:
            try:
                work.check(result)
            except AssertionError as error:
                raise AssertionError(f"{work.name}: {error}") from None

        in_step(self.timer.group, check, AssertionError, WrongResultError)
