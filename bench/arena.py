"""Where benches run: the group, its shared memory, the link's ceilings, and the one way to check and to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from report import Against, Bar, Entry, MemoryTraffic, Results, Traffic
from torch import Tensor
from workload import Shape, Sizes

from sonic_ep.fast.link import LinkCeilings, Stopwatch, link_ceilings
from sonic_ep.fast.workspace import Workspace
from sonic_ep.group import EPGroup
from sonic_ep.testing.checks import expect
from sonic_ep.testing.timing import Ceiling, Timing, captured, keep_busy, measure

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


ROUNDS_OF_LARGE = Rounds(timed=50, warmup=5)
ROUNDS_OF_SMALL = Rounds(timed=200, warmup=5)
# Of whatever there is, on the CPU.
ROUNDS_OF_SMOKE = Rounds(timed=2, warmup=0)
# Below so many bytes of a rank's tokens a shape is small.
SMALL_BYTES = 2**24
# Ten times what a cache holds.
COPIED_BYTES = 2**29
# No id, no row and no count.
SPOILED = -7


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Other work, by its name, that is timed in turn with a work which is held against it; see ``report.Against``."""

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
    """A work as it is launched. last: what its last round returned."""

    work: Work
    function: Callable[[], Any]
    last: list[Any] = field(default_factory=list)

    def keep_last(self) -> None:
        """One round."""
        self.last[:] = [self.function()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Arena:
    """What all benches of a run share. Methods are collective."""

    group: EPGroup
    device: torch.device
    workspace: Workspace
    sizes: Sizes
    results: Results

    @property
    def on_gpu(self) -> bool:
        """Whether times mean anything."""
        return self.device.type == "cuda"

    def run(self, work: Work, how: How) -> Entry:
        """Check that ``work`` is right, time it, check what the last round left, and check once more.

        Raises ``WrongError`` on every rank if it is wrong on any, and ``AboveCeilingError`` if it is too fast.
        """
        small = work.shape.tokens * work.shape.row_bytes < SMALL_BYTES
        rounds = ROUNDS_OF_SMALL if small else ROUNDS_OF_LARGE
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
            timings = self.time([trial.keep_last for trial in trials], rounds, ahead=how is not How.EAGER)
            timed = {trial.work.name: timing for trial, timing in zip(trials, timings, strict=True)}
            trials = still_right(trials, self.check_last, wrong)
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
            spoil(trial.function())
        agree(self.group, lambda: trial.work.check(trial.function()))

    def check_last(self, trial: Trial) -> None:
        """Check what the last round left."""
        agree(self.group, lambda: trial.work.check(trial.last.pop()))

    @property
    def behind_work(self) -> How:
        """QUEUED, or what there is of it on the CPU."""
        return How.QUEUED if self.on_gpu else How.EAGER

    def time(self, functions: Sequence[Callable[[], object]], rounds: Rounds, *, ahead: bool) -> list[Timing]:
        """What rounds of each function take, in turn; ``ahead``: behind work that lets the host get ahead."""
        if not functions:
            return []
        turns, several = cycle(functions), len(functions)
        timing = measure(
            lambda: next(turns)(),
            rounds=rounds.timed * several,
            warmup=rounds.warmup * several,
            device=self.device,
            group=self.group,
            enter=meeting(self.workspace, ahead=ahead),
        )
        return [Timing(rounds=timing.rounds[turn::several]) for turn in range(several)]

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
    """The rows of each tensor in another order while this lasts."""
    kept = [tensor.clone() for tensor in inputs]
    for tensor, right in zip(inputs, kept, strict=True):
        tensor.copy_(right.roll(1, dims=0))
    yield
    for tensor, right in zip(inputs, kept, strict=True):
        tensor.copy_(right)


def spoil(result: Any) -> None:
    """Nothing right is left in ``result``: a tensor, several, or a dataclass of tensors."""
    if is_dataclass(result):
        result = [getattr(result, of_result.name) for of_result in fields(result)]
    for tensor in result if isinstance(result, list | tuple) else [result]:
        if isinstance(tensor, Tensor):
            tensor.fill_(float("nan") if tensor.is_floating_point() else SPOILED)


def meeting(workspace: Workspace, *, ahead: bool) -> Callable[[], None]:
    """All ranks meet on the stream. ``ahead``: the GPU is kept busy first, so that the host gets ahead of it."""

    def enter() -> None:
        if ahead:
            keep_busy(workspace.device)
        workspace.fence()

    return enter


def measured_ceilings(workspace: Workspace, shape: Shape) -> LinkCeilings | None:
    """Collective: the ceilings of the link between GPUs, for as many bytes as a rank has in tokens; else None."""
    if workspace.device.type != "cuda":
        return None
    return link_ceilings(workspace, shape.tokens * shape.row_bytes, lambda transfer: seconds_of(transfer, workspace))


def memory_rate(device: torch.device, seconds: Stopwatch, nbytes: int = COPIED_BYTES) -> float:
    """What the memory of ``device`` moves in a copy of ``nbytes``, reads and writes, in bytes/s.

    seconds: what a copy takes. Raises ``AssertionError`` if it did not arrive.
    """
    source = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    taken = seconds(copy)
    expect(torch.equal(source, target), "memory: a copy is not what was copied")
    return (source.nbytes + target.nbytes) / taken


def seconds_of(transfer: Callable[[], object], workspace: Workspace) -> float:
    """Collective: the median over rounds of what ``transfer`` takes the slowest rank."""
    enter = meeting(workspace, ahead=True)
    rounds, group = ROUNDS_OF_LARGE, workspace.group
    return measure(
        transfer, rounds=rounds.timed, warmup=rounds.warmup, device=workspace.device, group=group, enter=enter
    ).median


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
