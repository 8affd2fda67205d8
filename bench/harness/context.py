"""Where benches run, and the one way to check and to time them: correct first, then timed, then correct still."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

import torch
from schema import Baseline, Document, Entry, write
from torch import Tensor

from harness.results import LinkTraffic, Results, Threshold, measured_results, micros, shape_record, time_fields
from sonic_ep.api import ExpertParallel
from sonic_ep.cli.exit_codes import PASS
from sonic_ep.cli.measured import Run, run_measured
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler.agreement import WrongResultError
from sonic_ep.profiler.bandwidth import ROUNDS, ROUNDS_OF_SHARED_GPUS
from sonic_ep.profiler.machine import environment
from sonic_ep.profiler.measuring import Stage, TimedWork
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.timing import Ceiling, RoundTimer, Timing
from sonic_ep.testing.interpreted import install_interpreter

if TYPE_CHECKING:
    # It needs triton, which the reference does without.
    from sonic_ep.fast.workspace import Workspace

ItemT = TypeVar("ItemT")

# Longer than the host takes to launch a forward and backward.
BUSY_SECONDS = 5e-3
# What the thresholds are stated for. An H100, for one, has the same link and slower memory.
RANKS_OF_THRESHOLDS = 2
GPU_OF_THRESHOLDS = "NVIDIA H200"
# Below so many bytes of a rank's tokens a shape is small.
SMALL_BYTES = 2**24


class Method(str, Enum):
    """The host launches as called; behind work that lets it get ahead; or a CUDA graph, replayed behind such work."""

    EAGER = "eager"
    QUEUED = "queued"
    GRAPH = "graph"


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many rounds are timed, and how many warm up before."""

    rounds: int
    warmup: int


ROUNDS_OF_LARGE = Rounds(rounds=50, warmup=5)
# Of small shapes, and of what the host may take longer for than the GPU.
ROUNDS_OF_SMALL = Rounds(rounds=200, warmup=5)
# Of all shapes, on the CPU.
ROUNDS_OF_SMOKE = Rounds(rounds=2, warmup=0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A case timed in turn, by its name, plus ``link`` seconds. most: the threshold, as a multiple of their sum."""

    name: str
    text: str
    link: float = 0.0
    most: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BenchCase(TimedWork):
    """One thing to measure. traffic: what comes over the link, where that takes the time. flops: of a rank's GEMMs."""

    shape: Shape
    traffic: LinkTraffic | None = None
    threshold: Threshold | None = None
    flops: float | None = None
    compared_with: tuple[Comparison, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """What came of a case that was correct before and after it was timed."""

    entry: Entry
    timing: Timing
    flops: float | None

    @staticmethod
    def of(case: BenchCase, method: Method, timings: Mapping[str, Timing], *, held: bool = False) -> Finding:
        """Compared with the other cases in ``timings``, and its thresholds if ``held``; keeps no function.

        Raises ``AboveCeilingError`` if it is too fast.
        """
        timing, baselines, limit = timings[case.name], [], case.threshold
        median = timing.median
        for other in case.compared_with:
            if other.name in timings:
                measured = timings[other.name].median
                total = measured + other.link
                times = {"measured_us": micros(measured), "link_us": micros(other.link), "sum_us": micros(total)}
                baselines.append(Baseline(what=other.text, **times, ratio=round(median / total, 4)))
                if other.most is not None:
                    limit = Threshold(text=f"at most {other.most:g} times {other.text}", seconds=other.most * total)
        found = {} if case.traffic is None else case.traffic.figures(median, f"{case.name}, {method.value}")
        if held and limit is not None:
            found |= {"threshold": limit.text, "threshold_us": micros(limit.seconds), "met": median <= limit.seconds}
        entry = Entry(
            name=case.name,
            how=method.value,
            shape=shape_record(case.shape),
            tflop_per_s=None if case.flops is None else round(case.flops / median / 1e12, 2),
            baselines=tuple(baselines),
            **found,
            **time_fields(timing),
        )
        return Finding(entry=entry, timing=timing, flops=case.flops)


# What the fixtures ``run`` and ``tell`` of the suites are.
RunCase = Callable[[BenchCase, Method], None]
Tell = Callable[[Finding], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class BenchContext:
    """What all cases of a run share. Methods are collective. held: whether times are compared with thresholds."""

    timer: RoundTimer
    results: Results
    held: bool = False

    @property
    def group(self) -> EPGroup:
        """All ranks of the run."""
        return self.timer.group

    @property
    def device(self) -> torch.device:
        """This rank's."""
        return self.timer.device

    @property
    def on_gpu(self) -> bool:
        """Whether times mean anything."""
        return self.device.type == "cuda"

    @property
    def behind_work(self) -> Method:
        """QUEUED, or EAGER on the CPU, which has no queue."""
        return Method.QUEUED if self.on_gpu else Method.EAGER

    def run(self, case: BenchCase, method: Method) -> Finding:
        """Check, time, check again, record. Raises ``WrongResultError`` on every rank, or ``AboveCeilingError``."""
        short = method is Method.EAGER or case.shape.tokens * case.shape.row_bytes < SMALL_BYTES
        rounds = ROUNDS_OF_SMALL if short else ROUNDS_OF_LARGE
        return self.record(self.alternate([case], method, rounds if self.on_gpu else ROUNDS_OF_SMOKE)[case.name])

    def record(self, found: Finding | WrongResultError) -> Finding:
        """Count ``found`` as a result. Raises it if it is an error."""
        if isinstance(found, WrongResultError):
            raise found
        self.results.entries.append(found.entry)
        return found

    def alternate(
        self, cases: Sequence[BenchCase], method: Method, rounds: Rounds
    ) -> Mapping[str, Finding | WrongResultError]:
        """Time ``cases`` round by round in turn, each checked before and after; one that is wrong stops no other.

        GPUs get slower as they get warm: what is compared takes turns.
        """
        stage = Stage(timer=replace(self.timer, ahead=method is not Method.EAGER), as_graphs=method is Method.GRAPH)
        wrong: dict[str, WrongResultError] = {}
        with torch.no_grad():
            works = _passing({case.name: stage.launched(case) for case in cases}, stage.prove, wrong)
            timed = dict(zip(works, stage.time([*works.values()], **asdict(rounds)), strict=True))
            timings = {name: found.timing for name, found in timed.items()}
            works = {name: found.work for name, found in _passing(timed, stage.confirm, wrong).items()}
            # The results of the last rounds are freed.
            del timed
            works = _passing(works, stage.prove, wrong)
        timings = {name: timings[name] for name in works}
        right = [case for case in cases if case.name in works]
        return {**{case.name: Finding.of(case, method, timings, held=self.held) for case in right}, **wrong}

    def free_cached_memory(self) -> None:
        """Give unused memory of PyTorch's allocator back to the GPU."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def traffic(self, nbytes: float, ceiling: str, memory_bytes: float | None = None) -> LinkTraffic | None:
        """Bytes over the link compared with one of ``LinkBandwidth``; None on one rank."""
        if self.group.world_size == 1:
            return None
        bandwidth, memory_rate = self.results.bandwidth, self.results.memory_rate
        rate = None if bandwidth is None else getattr(bandwidth, ceiling)
        limit = rate and Ceiling(name=f"the {ceiling} ceiling", bytes_per_second=rate)
        return LinkTraffic(nbytes=nbytes, ceiling=limit, memory_bytes=memory_bytes, memory_rate=memory_rate)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes of a run. plans: slots of the group, W*C*K, of the plans that are timed, at E and K of ``large``."""

    large: Shape
    small: Shape
    layer: Shape
    plans: tuple[int, ...]


SMOKE = Sizes(
    large=Shape(tokens=6, hidden=16, num_experts=8, top_k=2),
    small=Shape(tokens=2, hidden=16, num_experts=8, top_k=2),
    layer=Shape(tokens=6, hidden=16, intermediate=8, num_experts=8, top_k=2),
    plans=(32, 96),
)


def thresholds_hold(device: torch.device, world_size: int) -> bool:
    """Whether this is what the thresholds are stated for: so many GPUs of that kind, one for each rank."""
    own_gpus = torch.cuda.device_count() >= world_size == RANKS_OF_THRESHOLDS
    return own_gpus and torch.cuda.get_device_name(device) == GPU_OF_THRESHOLDS


@dataclass(frozen=True, kw_only=True, eq=False)
class SuiteContext(BenchContext):
    """What the suites of the fast backend share besides: its shared memory, and the shapes."""

    workspace: Workspace
    sizes: Sizes

    def rounds(self, on_gpus: Rounds) -> Rounds:
        """Of a layer, which takes half a second and more where kernels are interpreted."""
        return on_gpus if self.on_gpu else Rounds(rounds=1, warmup=0)


@contextmanager
def layer_context(run: Run, commit: str | None) -> Iterator[BenchContext]:
    """Collective: a context for the world, whose ranks meet by the backend of ``run``; its rates are measured first."""
    install_interpreter()
    device = run.place.device
    with ExpertParallel(backend=run.backend) as ep:
        group = ep.group
        shared = device.type == "cuda" and group.world_size > torch.cuda.device_count()
        timer = RoundTimer(group=group, device=device, barrier=lambda: ep.meet(device), busy_seconds=BUSY_SECONDS)
        machine = environment(device, group.world_size, commit, run.command)
        if machine["note"] is not None:
            run.say(f"note: {machine['note']}")
        results = measured_results(timer, machine, rounds=ROUNDS_OF_SHARED_GPUS if shared else ROUNDS)
        yield BenchContext(timer=timer, results=results)


def run_script(options: argparse.Namespace, path: str, documents: Callable[[Run], Iterable[Document]]) -> int:
    """Collective: an exit code. Writes each document, so that a run that is cut short leaves what it found."""

    def measure(run: Run) -> int:
        for document in documents(run):
            if options.json is not None and run.place.rank == 0:
                write(document, options.json)
        if options.json is not None:
            run.say(f"wrote {options.json}")
        return PASS

    return run_measured(options, path, measure)


@contextmanager
def other_inputs(*inputs: Tensor) -> Iterator[None]:
    """While this lasts the rows of each tensor are rotated by one, and floats negated.

    Undone by the inverse, the last tensor first: a copy would take as much memory again.
    """

    def turn_rows(tensor: Tensor, by: int) -> None:
        moved = tensor.roll(by, dims=0)
        tensor.copy_(moved.neg_() if moved.is_floating_point() else moved)

    with torch.no_grad(), ExitStack() as turned:
        for tensor in {id(tensor): tensor for tensor in inputs}.values():
            turn_rows(tensor, 1)
            turned.callback(turn_rows, tensor, -1)
        yield


def _passing(
    items: Mapping[str, ItemT], check: Callable[[ItemT], None], wrong: dict[str, WrongResultError]
) -> dict[str, ItemT]:
    """The items that pass ``check``; the errors of the others go to ``wrong``."""
    passed = {}
    for name, item in items.items():
        try:
            check(item)
            passed[name] = item
        except WrongResultError as error:
            # The frames of its tracebacks would keep graphs and their memory alive.
            error.__cause__ = error.__context__ = None
            wrong[name] = error.with_traceback(None)
    return passed
