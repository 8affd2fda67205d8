"""The documents of a report, as frozen values: times in microseconds, rates in GB/s, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from sonic_ep.config import ModePair
from sonic_ep.report.measured import PairTimes, Profile, Settings, Shape, Times
from sonic_ep.report.origin import Source


@dataclass(frozen=True, kw_only=True)
class Against:
    """What a suite holds an entry against, and how many times as long that entry takes."""

    what: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a suite."""

    name: str
    how: str
    shape: Shape
    times: Times
    gb_per_s: float | None
    ceiling: str | None
    percent: float | None
    floor_us: float | None
    tflop_per_s: float | None
    bar: str | None
    bar_us: float | None
    met: bool | None
    against: tuple[Against, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What the suites under ``bench/`` wrote."""

    source: Source
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class ProfileDocument:
    """A profile in a file of its own."""

    source: Source
    profile: Profile


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What one run of the end-to-end benchmark computed. group_tokens: T of the whole group."""

    group_tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    world_size: int
    dtype: str
    activation: str
    gate_layout: str | None
    score_order: str
    add_bias: bool
    norm_topk_probs: bool
    routing: str
    backend: str

    @property
    def rank_shape(self) -> Shape:
        """With the tokens of one rank, rounded up."""
        return Shape(
            tokens=-(-self.group_tokens // self.world_size),
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Error of one result and its bound, relative Frobenius norms; the same of the worst row."""

    name: str
    error: float
    bound: float
    worst_row: float
    worst_row_bound: float
    ok: bool

    @property
    def within(self) -> bool:
        """Whether both errors are at most their bounds: what ``ok`` has to say."""
        return self.error <= self.bound and self.worst_row <= self.worst_row_bound


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one rank, by formula and as the allocator counted them."""

    what: str
    formula_bytes: int | None
    measured_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class PassTimes:
    """One thing that was timed in one pass; TFLOP/s of one rank and of all."""

    pass_name: str
    what: str
    times: Times
    tflop_per_s: float | None
    tflop_per_s_of_group: float | None


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What follows from the times of one pass; ratios are of the layer's time to that of what they name."""

    pass_name: str
    exposed_communication_us: float | None
    link_us: float | None
    over_gemms: float | None
    over_gemms_and_link: float | None
    scaling_efficiency: float | None
    over_reference: float | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a pass, none below zero: of the rest nothing is left where parts overlap."""

    name: str
    us: float


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The parts of one pass, in order."""

    pass_name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One run of the end-to-end benchmark."""

    source: Source
    setup: Setup
    settings: Settings
    accuracy: tuple[Accuracy, ...]
    profile: Profile | None
    memory: tuple[MemoryUse, ...]
    times: tuple[PassTimes, ...]
    derived: tuple[Derived, ...]
    breakdown: tuple[Breakdown, ...]


@dataclass(frozen=True, kw_only=True)
class OverBest:
    """How many times the best pair's median one choice took, in one pass."""

    pass_name: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One shape and routing. pairs: the layer end to end. picked: by the profiler; predicted: by the cost rule."""

    shape: Shape
    routing: str
    profile: Profile
    pairs: tuple[PairTimes, ...]
    picked: ModePair
    predicted: ModePair
    over_best: tuple[OverBest, ...]
    predicted_over_best: tuple[OverBest, ...]

    def best(self, pass_name: str) -> PairTimes | None:
        """The fastest pair of a pass; None where the pass was not timed."""
        timed = [pair for pair in self.pairs if pair.what == pass_name]
        return min(timed, key=lambda pair: pair.times.median_us, default=None)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Profiler and layer over many shapes."""

    source: Source
    points: tuple[SweepPoint, ...]


Document = Suite | ProfileDocument | Layer | Sweep


@dataclass(frozen=True, kw_only=True)
class Documents:
    """All documents of a report, by kind, in the order in which they were given.

    passed_over: names of files that record no times.
    """

    everything: tuple[Document, ...]
    passed_over: tuple[str, ...] = ()

    @property
    def suites(self) -> tuple[Suite, ...]:
        """Those of kind suite."""
        return tuple(document for document in self.everything if isinstance(document, Suite))

    @property
    def profiles(self) -> tuple[ProfileDocument, ...]:
        """Those of kind profile."""
        return tuple(document for document in self.everything if isinstance(document, ProfileDocument))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Those of kind layer."""
        return tuple(document for document in self.everything if isinstance(document, Layer))

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        """Those of kind sweep."""
        return tuple(document for document in self.everything if isinstance(document, Sweep))
