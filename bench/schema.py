"""The schema of every document under ``bench/results``: the classes that write one also read it.

Times are in microseconds, rates in GB/s, sizes in bytes. Fields that older documents lack have defaults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field
from msgspec.structs import replace

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import Rates
from sonic_ep.profiler import ProfileReport

# Larger numbers are no measurements, and would overflow later sums and figures.
MOST = 2**62
# Two measurements of one link differ by up to 2 percent.
MOST_PERCENT = 102
Count = Annotated[int, Meta(ge=1, le=MOST)]
CountOrZero = Annotated[int, Meta(ge=0, le=MOST)]
# Binomial coefficients of more experts take hours.
Experts = Annotated[int, Meta(ge=1, le=2**16)]
Number = Annotated[float, Meta(ge=0, le=MOST)]
# Quotients of two such numbers are finite.
Positive = Annotated[float, Meta(ge=1e-9, le=MOST)]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Routing = Literal["uniform", "skewed", "one_rank", "given"]

BYTES_OF_DTYPE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
GIGA = 1e9


class JsonStruct(Struct, frozen=True, kw_only=True):
    """A JSON object; fields that it does not name are ignored."""


class Environment(JsonStruct, frozen=True, kw_only=True):
    """The machine, the versions and the command of one run. gpus: of one process. code: digest of the source."""

    gpu: str | None = None
    gpus: CountOrZero
    link: str | None = None
    torch: str
    triton: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    driver: str | None = None
    code: str | None = None
    processor: str | None = None
    world_size: Count
    process_group: str | None = None
    commit: str | None = None
    command: str
    date: str
    note: str | None = None

    @property
    def shares_gpus(self) -> bool:
        """Whether there are more ranks than GPUs."""
        return self.gpu is not None and self.world_size > self.gpus


class RatesRecord(JsonStruct, frozen=True, kw_only=True, omit_defaults=True):
    """Rates that the run measured, both directions of the link busy; memory: reads and writes of a large copy."""

    copy_engine_in: Positive | None = None
    copy_engine_out: Positive | None = None
    read: Positive | None = None
    write: Positive | None = None
    memory: Positive | None = None

    def for_costs(self) -> Rates | None:
        """In bytes/s; None unless every rate that ``sonic_ep.cost`` takes is known."""
        named = {"copy_engine": self.copy_engine_in, "link_read": self.read, "link_write": self.write}
        known = {name: rate * GIGA for name, rate in {**named, "memory": self.memory}.items() if rate is not None}
        return Rates(**known) if len(known) == 4 else None


class Document(JsonStruct, frozen=True, kw_only=True, omit_defaults=True, eq=False, tag_field="kind"):
    """A whole file. file: its name in a report, never written."""

    environment: Environment
    rates_gb_per_s: RatesRecord = RatesRecord()
    file: str = ""

    @property
    def kind(self) -> str:
        """The value of ``kind`` in JSON."""
        return str(self.__struct_config__.tag)


class Times(JsonStruct, frozen=True, kw_only=True):
    """Quantiles over rounds, each round that of its slowest rank."""

    rounds: Count
    median_us: Positive
    p10_us: Positive
    p90_us: Positive
    min_us: Positive
    max_us: Positive

    def __post_init__(self) -> None:
        found = [self.min_us, self.p10_us, self.median_us, self.p90_us, self.max_us]
        _require(found == sorted(found), f"Expected min, p10, median, p90 and max to ascend, got {found}")

    @property
    def spread_percent(self) -> float:
        """p90 - p10 in percent of the median."""
        return 100 * (self.p90_us - self.p10_us) / self.median_us


class ShapeRecord(JsonStruct, frozen=True, kw_only=True, omit_defaults=True):
    """tokens: T of each rank. intermediate: None where there are no experts."""

    tokens: CountOrZero = field(name="T")
    hidden: Count = field(name="H")
    intermediate: Count | None = field(name="I", default=None)
    num_experts: Experts = field(name="E")
    top_k: Experts = field(name="K")
    dtype: Dtype

    def __post_init__(self) -> None:
        _require(self.rank_bytes <= MOST, f"Expected T*H elements of at most {MOST} bytes, got {self}")

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank's x, T*H elements."""
        return self.tokens * self.hidden * BYTES_OF_DTYPE[self.dtype]

    def __str__(self) -> str:
        wide = "" if self.intermediate is None else f", I={self.intermediate}"
        return f"T={self.tokens}, H={self.hidden}{wide}, E={self.num_experts}, K={self.top_k}, {self.dtype}"


class Baseline(JsonStruct, frozen=True, kw_only=True):
    """What an entry is compared with: work timed in turn with it, and bytes beside it. ratio: the entry over both."""

    what: str
    measured_us: Number | None = None
    link_us: Number | None = None
    sum_us: Number | None = None
    ratio: Number


class Entry(Times, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a suite. floor_us: what the link or the memory needs. threshold: what the median is compared with."""

    name: str
    how: str
    shape: ShapeRecord
    remote_bytes: Number | None = None
    gb_per_s: Number | None = None
    memory_bytes: Number | None = None
    ceiling: str | None = None
    percent: Annotated[float, Meta(ge=0, le=MOST_PERCENT)] | None = None
    floor_us: Number | None = None
    floor_by: str | None = None
    tflop_per_s: Number | None = None
    baselines: tuple[Baseline, ...] = field(name="against", default=())
    threshold: str | None = field(name="bar", default=None)
    threshold_us: Number | None = field(name="bar_us", default=None)
    met: bool | None = None


class AccuracyRecord(JsonStruct, frozen=True, kw_only=True):
    """Error of one result and its bound, relative Frobenius norms; the same of the worst row."""

    name: str
    error: Number
    bound: Number
    worst_row: Number
    worst_row_bound: Number
    ok: bool

    def __post_init__(self) -> None:
        within = self.error <= self.bound and self.worst_row <= self.worst_row_bound
        _require(self.ok == within, f"Expected `ok` {within}, as errors and bounds say, got {self.ok}")


class Suite(Document, frozen=True, kw_only=True, tag="suite", eq=False):
    """Written by the suites. accuracy: of other libraries' layers beside ours, which need not be right."""

    entries: tuple[Entry, ...]
    accuracy: tuple[AccuracyRecord, ...] = ()


class ProfileShapeRecord(JsonStruct, frozen=True, kw_only=True):
    """tokens: T of each rank, in the order of the ranks."""

    tokens: Annotated[tuple[CountOrZero, ...], Meta(min_length=1)]
    hidden: Count
    top_k: Count
    num_experts: Count
    dtype: Dtype
    routing: Routing

    def __str__(self) -> str:
        tokens = "/".join(map(str, self.tokens if len(set(self.tokens)) > 1 else self.tokens[:1]))
        sizes = f"T={tokens}, H={self.hidden}, E={self.num_experts}, K={self.top_k}"
        return f"{sizes}, {self.dtype}, {self.routing} routing"


class ModeTimes(Times, frozen=True, kw_only=True):
    """One mode alone. mode: empty for the plan. link_bytes: over the link into the busiest rank."""

    kind: Literal["plan", "dispatch", "combine"]
    mode: str
    link_bytes: Number
    gb_per_s: Number | None = None
    ceiling: str | None = None
    # Traffic one way alone may pass a ceiling that was measured both ways.
    percent: Annotated[float, Meta(ge=0, le=2 * MOST_PERCENT)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = {"plan": [""], "dispatch": [*DispatchMode], "combine": [*CombineMode]}[self.kind]
        _require(self.mode in modes, f"Expected a mode of {self.kind}, got {self.mode!r}")

    @property
    def link_mib(self) -> float:
        """``link_bytes`` in MiB."""
        return self.link_bytes / 2**20

    def __str__(self) -> str:
        return f"{self.kind} {self.mode}".strip()


class PairTimes(Times, frozen=True, kw_only=True, omit_defaults=True):
    """Both modes together. pass_name: of the layer, or the path without experts. how: the way it was launched."""

    dispatch: DispatchMode
    combine: CombineMode
    pass_name: str = field(name="pass", default="ids to combined rows")
    how: str | None = None

    @property
    def pair(self) -> ModePair:
        """The modes."""
        return ModePair(dispatch=self.dispatch, combine=self.combine)

    def __str__(self) -> str:
        return pair_name(self.pair)


def pair_name(pair: ModePair) -> str:
    """Both modes, for people."""
    return f"{pair.dispatch.value} + {pair.combine.value}"


class Settings(JsonStruct, frozen=True, kw_only=True):
    """Modes, which may be "auto", and flags."""

    dispatch: str
    combine: str
    redispatch_x_in_backward: bool
    cpu_sync_on_runtime: bool
    max_rows: Count | None = None

    def __post_init__(self) -> None:
        # Raises ``ValueError`` for an unknown mode.
        EPConfig(dispatch=self.dispatch, combine=self.combine)

    @staticmethod
    def of(config: EPConfig) -> Settings:
        """To be written."""
        return msgspec.convert(msgspec.to_builtins(config), Settings)

    def named(self, redispatch: str = "redispatch_x_in_backward", cpu_sync: str = "cpu_sync_on_runtime") -> str:
        """Both modes and the flags that are set, by these names."""
        flags = {redispatch: self.redispatch_x_in_backward, cpu_sync: self.cpu_sync_on_runtime}
        flags |= {f"max_rows={self.max_rows}": self.max_rows is not None}
        return ", ".join([f"{self.dispatch} + {self.combine}", *(name for name, on in flags.items() if on)])


class Profile(JsonStruct, frozen=True, kw_only=True):
    """What the profiler measured and chose."""

    rates_gb_per_s: RatesRecord = RatesRecord()
    shape: ProfileShapeRecord
    backend: str
    ranks_per_gpu: Count | None = None
    modes: Annotated[tuple[ModeTimes, ...], Meta(min_length=1)]
    pairs: Annotated[tuple[PairTimes, ...], Meta(min_length=1)]
    config: Settings

    def __post_init__(self) -> None:
        _require_distinct((mode.kind, mode.mode) for mode in self.modes)
        _require_distinct(map(str, self.pairs))

    @staticmethod
    def of(report: ProfileReport) -> Profile:
        """To be written within another document."""
        return msgspec.convert(report.as_json(), Profile)


class ProfileDocument(Document, frozen=True, kw_only=True, tag="profile", eq=False):
    """A file of ``ProfileReport.as_json``, which has the fields of the profile at the top; reading nests them."""

    profile: Profile


class SetupRecord(JsonStruct, frozen=True, kw_only=True):
    """One run of the end-to-end benchmark. thiek: T of the whole group, H, I, E, K."""

    thiek: tuple[Count, Count, Count, Experts, Experts]
    world_size: Count
    dtype: Dtype
    activation: str
    gate_layout: str | None = None
    score_order: str
    add_bias: bool
    norm_topk_probs: bool
    routing: str
    backend: str

    def __post_init__(self) -> None:
        # Raises where T*H is too large.
        _ = self.rank_shape

    @property
    def rank_shape(self) -> ShapeRecord:
        """With the tokens of one rank, rounded up."""
        t, h, i, e, k = self.thiek
        tokens = -(-t // self.world_size)
        return ShapeRecord(tokens=tokens, hidden=h, intermediate=i, num_experts=e, top_k=k, dtype=self.dtype)


class MemoryUse(JsonStruct, frozen=True, kw_only=True):
    """Bytes of one rank, by formula and as the allocator counted them; None where unknown."""

    what: str
    formula_bytes: CountOrZero | None = None
    measured_bytes: CountOrZero | None = None


class PassTimes(Times, frozen=True, kw_only=True):
    """One thing timed in one pass; TFLOP/s of one rank and of all."""

    pass_name: str = field(name="pass")
    what: str
    tflop_per_s: Number | None = None
    tflop_per_s_of_group: Number | None = None


class Derived(JsonStruct, frozen=True, kw_only=True):
    """What follows from the times of one pass; ratios: the layer's time over that of what they name."""

    pass_name: str = field(name="pass")
    exposed_communication_us: float | None = None
    link_us: Number | None = None
    over_gemms: Number | None = None
    over_gemms_and_link: Number | None = None
    scaling_efficiency: Number | None = None
    over_reference: Number | None = None


class Breakdown(JsonStruct, frozen=True, kw_only=True):
    """Microseconds of each part of one pass, in order; the rest is 0 where parts overlap."""

    pass_name: str = field(name="pass")
    parts: dict[str, Number]


class Layer(Document, frozen=True, kw_only=True, tag="layer", eq=False):
    """Written by the end-to-end benchmark."""

    setup: SetupRecord
    config: Settings
    accuracy: tuple[AccuracyRecord, ...]
    profile: Profile | None = None
    memory: tuple[MemoryUse, ...]
    times: tuple[PassTimes, ...]
    derived: tuple[Derived, ...]
    breakdown: tuple[Breakdown, ...]

    @property
    def known_memory(self) -> list[MemoryUse]:
        """Uses of which a number is known: the reference has no formula, the CPU no allocator to ask."""
        return [use for use in self.memory if (use.formula_bytes, use.measured_bytes) != (None, None)]


class Point(JsonStruct, frozen=True, kw_only=True):
    """One shape and routing of a sweep. picked: by the profiler; predicted: by the cost rule.

    over_best, predicted_over_best: by pass, the layer's median with that pair over the best pair's.
    """

    shape: ShapeRecord
    routing: Routing
    profile: Profile
    pairs: Annotated[tuple[PairTimes, ...], Meta(min_length=1)]
    picked: ModePair
    predicted: ModePair
    over_best: dict[str, Number | None]
    predicted_over_best: dict[str, Number | None]

    def __post_init__(self) -> None:
        _require_distinct(f"{pair}, {pair.pass_name}" for pair in self.pairs)

    def fastest(self, pass_name: str) -> list[PairTimes]:
        """The pairs timed in a pass, the fastest first."""
        return sorted((pair for pair in self.pairs if pair.pass_name == pass_name), key=lambda pair: pair.median_us)


class Sweep(Document, frozen=True, kw_only=True, tag="sweep", eq=False):
    """Written by the sweep."""

    points: tuple[Point, ...]


class Untimed(Document, frozen=True, kw_only=True, tag="untimed", eq=False):
    """What a soak or a run of the property tests checked: all but where it ran is for other readers."""


KINDS: dict[str, type[Document]] = {"suite": Suite, "profile": ProfileDocument, "layer": Layer, "sweep": Sweep}
KINDS |= {"soak": Untimed, "properties": Untimed}


def write(document: Document, path: Path) -> None:
    """As JSON; makes folders. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(replace(document, file="")), indent=2) + b"\n")


def _require(holds: bool, message: str) -> None:
    # msgspec turns it into an error that names the place.
    if not holds:
        raise ValueError(message)


def _require_distinct(found: Iterable[Hashable]) -> None:
    again = [each for each, times in Counter(found).items() if times > 1]
    _require(not again, f"Expected every mode and pair once, got {again[:1]} again")
