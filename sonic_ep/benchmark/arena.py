"""Where benches run: the group, its shared memory, the link's ceilings, and the one way to check and to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep.benchmark.place import BUSY_SECONDS
from sonic_ep.benchmark.results import Against, Bar, Entry, MemoryTraffic, Results, Traffic
from sonic_ep.benchmark.workload import Shape, Sizes
from sonic_ep.ceilings import meeting
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler.timing import Ceiling, Timing, captured
from sonic_ep.testing.checks import poison
from sonic_ep.testing.timing import measure_in_turn

if TYPE_CHECKING:
    # It needs triton, which the reference and most commands do without.
    from sonic_ep.fast.workspace import Workspace

Check = Callable[[Any], None]


class WrongError(AssertionError):
    """A result is wrong on some rank; every rank raises it, so they stay in step."""


class How(str, Enum):
    """How the host launches what is timed.

    EAGER: as called, so the host's own time counts wherever it is the slower of the two. QUEUED: behind work that lets
    the host get ahead, as inside a layer. GRAPH: a CUDA graph, replayed, behind such work too.
    """

    EAGER = "eager"
    QUEUED = "queued"
    GRAPH = "graph"


class Way(str, Enum):
    """How bytes cross the link, by the names of ``LinkCeilings``."""

    COPY_ENGINE_IN = "copy_engine_in"
    COPY_ENGINE_OUT = "copy_engine_out"
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many rounds are timed, and how many warm up before."""

    timed: int
    warmup: int

    @property
    def count(self) -> int:
        """Of both."""
        return self.timed + self.warmup


ROUNDS_OF_LARGE = Rounds(timed=50, warmup=5)
# Of small shapes, and of what the host may take longer for than the GPU.
ROUNDS_OF_SMALL = Rounds(timed=200, warmup=5)
# Of whatever there is, on the CPU.
ROUNDS_OF_SMOKE = Rounds(timed=2, warmup=0)
# Below so many bytes of a rank's tokens a shape is small.
SMALL_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Other work, by its name, that is timed in turn with a work which is held against it; see ``results.Against``."""

    name: str
    text: str
    link: float = 0.0
    most: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One thing to measure.

    function: allocates its outputs, and returns what ``check`` looks at; check raises ``AssertionError``.
    inputs: what it reads anew in every call, one row or more each.
    traffic: what comes over the link, where that is what takes the time.
    flops: of a rank's matrix products. beside: what it is held against.
    """

    name: str
    shape: Shape
    function: Callable[[], Any]
    check: Check
    inputs: tuple[Tensor, ...] = ()
    traffic: Traffic | None = None
    bar: Bar | None = None
    flops: float | None = None
    beside: tuple[Beside, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A work as it is launched."""

    work: Work
    function: Callable[[], Any]


class KeepLast:
    """``function``, to be called ``rounds`` times, and what the last of them returned.

    What the others return is let go at once: of works that take turns, results are kept when all else is done.
    """

    def __init__(self, function: Callable[[], Any], rounds: int) -> None:
        self._function = function
        self._left = rounds
        self._kept: list[Any] = []

    def __call__(self) -> None:
        """One round."""
        result = self._function()
        self._left -= 1
        if self._left == 0:
            self._kept.append(result)

    def take(self) -> Any:
        """What the last round returned, once."""
        return self._kept.pop()


@dataclass(frozen=True, kw_only=True, eq=False)
class Arena:
    """What all that a run measures shares. Methods are collective.

    fence: a meeting of all ranks, on the current stream. busy_seconds: what a GPU is kept busy for before a round, so
    that the host gets ahead.
    """

    group: EPGroup
    device: torch.device
    barrier_before_write: Callable[[], None]
    results: Results
    busy_seconds: float = BUSY_SECONDS

    @property
    def on_gpu(self) -> bool:
        """Whether times mean anything."""
        return self.device.type == "cuda"

    def run(self, work: Work, how: How) -> Entry:
        """Check that ``work`` is right, time it, check what the last round left, and check once more.

        Raises ``WrongError`` on every rank if it is wrong on any, and ``AboveCeilingError`` if it is too fast.
        """
        short = how is How.EAGER or work.shape.tokens * work.shape.row_bytes < SMALL_BYTES
        rounds = ROUNDS_OF_SMALL if short else ROUNDS_OF_LARGE
        found = self.alternate([work], how, rounds if self.on_gpu else ROUNDS_OF_SMOKE)
        return self.record(found[work.name])

    def record(self, found: Entry | WrongError) -> Entry:
        """Count ``found`` as a result. Raises it if it is an error, ``AboveCeilingError`` if it is too fast."""
        if isinstance(found, WrongError):
            raise found
        # A rate above the ceiling fails this bench, before it counts as a result.
        _ = found.share
        self.results.entries.append(found)
        return found

    def alternate(self, works: Sequence[Work], how: How, rounds: Rounds) -> Mapping[str, Entry | WrongError]:
        """Time ``works`` in turn, round by round, each of them checked by itself as in ``run``: what came of each.

        GPUs get slower as they get warm: what is to be compared takes turns. What is wrong beforehand is not timed, and
        the others are. ``record`` makes results of what is returned.
        """
        wrong: dict[str, WrongError] = {}
        with torch.no_grad():
            trials = [self.trial(work, how) for work in works]
            trials = still_right(trials, self.prove, wrong)
            lasts = {trial.work.name: KeepLast(trial.function, rounds.count) for trial in trials}
            timings = self.time(list(lasts.values()), rounds, ahead=how is not How.EAGER)
            timed = dict(zip(lasts, timings, strict=True))
            trials = still_right(trials, lambda trial: self.check_last(trial, lasts[trial.work.name]), wrong)
            trials = still_right(trials, self.prove, wrong)
        timed = {trial.work.name: timed[trial.work.name] for trial in trials}
        return {**{trial.work.name: entry_of(trial.work, how, timed) for trial in trials}, **wrong}

    def trial(self, work: Work, how: How) -> Trial:
        """``work`` as it is launched, captured for a graph."""
        function = captured(work.function, self.device) if how is How.GRAPH else work.function
        return Trial(work=work, function=function)

    def prove(self, trial: Trial) -> None:
        """Run on other inputs, spoil what comes of it, run on the inputs and check.

        So the right answer is beforehand neither in shared memory nor in memory that an output gets again.
        """
        with other_inputs(trial.work.inputs):
            poison(trial.function())
        agree(self.group, lambda: trial.work.check(trial.function()))

    def check_last(self, trial: Trial, last: KeepLast) -> None:
        """Check what the last round left."""
        agree(self.group, lambda: trial.work.check(last.take()))

    def give_back_memory(self) -> None:
        """What PyTorch's allocator holds and nobody uses goes back to the GPU."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    @property
    def behind_work(self) -> How:
        """QUEUED, or what there is of it on the CPU."""
        return How.QUEUED if self.on_gpu else How.EAGER

    def time(self, functions: Sequence[Callable[[], object]], rounds: Rounds, *, ahead: bool) -> list[Timing]:
        """What rounds of each function take, in turn; ``ahead``: behind work that lets the host get ahead."""
        enter = meeting(self.barrier_before_write, self.device, ahead=ahead, busy_seconds=self.busy_seconds)
        timed, warmup, device, group = rounds.timed, rounds.warmup, self.device, self.group
        return measure_in_turn(functions, rounds=timed, warmup=warmup, device=device, group=group, enter=enter)

    def traffic(self, nbytes: float, way: Way, memory_bytes: float | None = None) -> Traffic | None:
        """Bytes over the link held against the ceiling of their way; None on one rank.

        memory_bytes: what a rank's memory reads and writes meanwhile.
        """
        if self.group.world_size == 1:
            return None
        ceilings = self.results.ceilings
        ceiling = memory = None
        if ceilings is not None:
            ceiling = Ceiling(name=f"the {way.value} ceiling", bytes_per_second=getattr(ceilings, way.value))
        if memory_bytes is not None:
            memory = MemoryTraffic(nbytes=memory_bytes, bytes_per_second=self.results.memory_rate)
        return Traffic(nbytes=nbytes, ceiling=ceiling, memory=memory)


@dataclass(frozen=True, kw_only=True, eq=False)
class SuiteArena(Arena):
    """What the suites of the fast backend share besides: its shared memory, and the shapes."""

    workspace: Workspace
    sizes: Sizes


def still_right(trials: Sequence[Trial], check: Callable[[Trial], None], wrong: dict[str, WrongError]) -> list[Trial]:
    """Those of ``trials`` that ``check`` finds right; what it says of the others goes to ``wrong``."""
    for trial in trials:
        try:
            check(trial)
        except WrongError as error:
            # Its frames would keep what they hold alive, graphs among it.
            wrong[trial.work.name] = error.with_traceback(None)
    return [trial for trial in trials if trial.work.name not in wrong]


def entry_of(work: Work, how: How, timed: Mapping[str, Timing]) -> Entry:
    """The entry of ``work``, held against what is right of what was timed beside it; its bar is the first there."""
    against = tuple(
        Against(text=other.text, measured=timed[other.name].median, link=other.link, most=other.most)
        for other in work.beside
        if other.name in timed
    )
    return Entry(
        name=work.name,
        how=how.value,
        shape=work.shape,
        timing=timed[work.name],
        traffic=work.traffic,
        bar=next((other.bar for other in against if other.bar is not None), work.bar),
        flops=work.flops,
        against=against,
    )


@contextmanager
def other_inputs(inputs: Sequence[Tensor]) -> Iterator[None]:
    """The rows of each tensor in another order while this lasts, and what is no index with the other sign.

    It is undone, the last first, and not copied back: what is large would take as much memory again. A tensor that is
    given twice is turned once.
    """
    different = {id(tensor): tensor for tensor in inputs}
    with torch.no_grad(), ExitStack() as turned:
        for tensor in different.values():
            turn_rows(tensor, 1)
            turned.callback(turn_rows, tensor, -1)
        yield


def turn_rows(tensor: Tensor, by: int) -> None:
    """Move the rows ``by`` rows down in place, the last to the top; what is no index changes its sign.

    >>> given = torch.tensor([1.0, 2.0, 4.0])
    >>> turn_rows(given, 1)
    >>> given
    tensor([-4., -1., -2.])
    """
    moved = tensor.roll(by, dims=0)
    tensor.copy_(moved.neg_() if moved.is_floating_point() else moved)


def agree(group: EPGroup, check: Callable[[], None]) -> None:
    """Collective: run ``check``, and raise ``WrongError`` on every rank if it raised ``AssertionError`` on any."""
    failure: str | None = None
    try:
        check()
    except AssertionError as error:
        failure = str(error)
    failures = [failure]
    if group.world_size > 1:
        failures = [None] * group.world_size
        dist.all_gather_object(failures, failure, group=group.process_group)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None]
    if found:
        raise WrongError("; ".join(found))
