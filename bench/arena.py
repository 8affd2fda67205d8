"""Where benches run: the group, its shared memory, the link's ceilings, and the one way to check and to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from report import Bar, Entry, MemoryTraffic, Results, Traffic
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
class Pace:
    """Rounds of an entry: those of large shapes, of small ones, and those that warm up."""

    large: int
    small: int
    warmup: int


GPU_PACE = Pace(large=50, small=200, warmup=5)
SMOKE_PACE = Pace(large=2, small=2, warmup=0)
# Below so many bytes of a rank's tokens a shape is small.
SMALL_BYTES = 2**24
# Ten times what a cache holds.
COPIED_BYTES = 2**29
# No id, no row and no count.
SPOILED = -7


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One thing to measure.

    function: allocates its outputs, and returns what ``check`` looks at; check raises ``AssertionError``.
    inputs: what it reads anew in every call, one row or more each.
    traffic: what comes over the link, where that is what takes the time.
    """

    name: str
    shape: Shape
    function: Callable[[], Any]
    check: Check
    inputs: tuple[Tensor, ...] = ()
    traffic: Traffic | None = None
    bar: Bar | None = None


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
        last: list[Any] = []
        with torch.no_grad():
            function = captured(work.function, self.device) if how is How.GRAPH else work.function

            def keep_last() -> None:
                last[:] = [function()]

            self.prove(work, function)
            timing = self.time(keep_last, work.shape, ahead=how is not How.EAGER)
            agree(self.group, lambda: work.check(last.pop()))
            self.prove(work, function)
        entry = Entry(
            name=work.name, how=how.value, shape=work.shape, timing=timing, traffic=work.traffic, bar=work.bar
        )
        # A rate above the ceiling fails this bench, before it counts as a result.
        _ = entry.share
        self.results.entries.append(entry)
        return entry

    def prove(self, work: Work, function: Callable[[], Any]) -> None:
        """Run on other inputs, spoil what comes of it, run on the inputs and check.

        So the right answer is beforehand neither in shared memory nor in memory that an output gets again.
        """
        with other_inputs(work.inputs):
            spoil(function())
        agree(self.group, lambda: work.check(function()))

    @property
    def behind_work(self) -> How:
        """QUEUED, or what there is of it on the CPU."""
        return How.QUEUED if self.on_gpu else How.EAGER

    def time(self, function: Callable[[], object], shape: Shape, *, ahead: bool) -> Timing:
        """What a round takes; ``ahead``: behind work that lets the host get ahead."""
        pace = GPU_PACE if self.on_gpu else SMOKE_PACE
        small = shape.tokens * shape.row_bytes < SMALL_BYTES
        return measure(
            function,
            rounds=pace.small if small else pace.large,
            warmup=pace.warmup,
            device=self.device,
            group=self.group,
            enter=meeting(self.workspace, ahead=ahead),
        )

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
    """Nothing right is left in ``result``, a tensor or a dataclass of tensors."""
    values = [getattr(result, field.name) for field in fields(result)] if is_dataclass(result) else [result]
    for tensor in values:
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
    pace, group = GPU_PACE, workspace.group
    return measure(
        transfer, rounds=pace.large, warmup=pace.warmup, device=workspace.device, group=group, enter=enter
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
