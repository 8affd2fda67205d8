"""The schema of every document under ``bench/results``: the classes that write one also read it.

Times are in microseconds, rates in GB/s, sizes in bytes. Fields that older documents lack have defaults.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from sonic_ep.config import AUTO, CombineMode, DispatchMode, EPConfig, ModePair
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
Difference = Annotated[float, Meta(ge=-MOST, le=MOST)]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Routing = Literal["uniform", "skewed", "one_rank", "given"]

BYTES_OF_DTYPE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
GIGA = 1e9
IDS_TO_ROWS = "ids to combined rows"
LETTERS_OF_VALUE = 60


class Record(Struct, frozen=True, kw_only=True):
    """A JSON object; fields that it does not name are ignored."""


class Environment(Record, frozen=True, kw_only=True):
    """The machine, the versions and the command of one run; None where unknown. code: digest of the package's source.

    gpus: how many one process sees.
    """

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


class RatesRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Rates that the run measured, both directions of the link busy; memory: reads and writes of a large copy."""

    copy_engine_in: Positive | None = None
    copy_engine_out: Positive | None = None
    read: Positive | None = None
    write: Positive | None = None
    memory: Positive | None = None

    def for_costs(self) -> Rates | None:
        """In bytes/s; None unless every rate that ``sonic_ep.cost`` takes is known."""
        engine, read, write, memory = self.copy_engine_in, self.read, self.write, self.memory
        if engine is None or read is None or write is None or memory is None:
            return None
        return Rates(copy_engine=engine * GIGA, link_read=read * GIGA, link_write=write * GIGA, memory=memory * GIGA)


class Document(Record, frozen=True, kw_only=True, omit_defaults=True, eq=False, tag_field="kind"):
    """A whole file. file: its name in a report, never written."""

    environment: Environment
    rates_gb_per_s: RatesRecord = RatesRecord()
    file: str = ""

    @property
    def kind(self) -> str:
        """The value of ``kind`` in JSON."""
        return str(type(self).__struct_config__.tag)


class Times(Record, frozen=True, kw_only=True):
    """Quantiles over rounds, each round that of its slowest rank."""

    rounds: Count
    median_us: Positive
    p10_us: Positive
    p90_us: Positive
    min_us: Positive
    max_us: Positive

    def __post_init__(self) -> None:
        ascending = ("min_us", "p10_us", "median_us", "p90_us", "max_us")
        for lower, upper in pairwise(ascending):
            least, got = getattr(self, lower), getattr(self, upper)
            _require(got >= least, f"Expected `{upper}` >= `{lower}`, {least}, got {got}")

    @property
    def spread_percent(self) -> float:
        """p90 - p10 in percent of the median."""
        return 100 * (self.p90_us - self.p10_us) / self.median_us


class ShapeRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """tokens: T of each rank. intermediate: None where there are no experts."""

    tokens: CountOrZero = field(name="T")
    hidden: Count = field(name="H")
    intermediate: Count | None = field(name="I", default=None)
    num_experts: Experts = field(name="E")
    top_k: Experts = field(name="K")
    dtype: Dtype

    def __post_init__(self) -> None:
        sizes = f"T={self.tokens}, H={self.hidden}"
        _require(self.rank_bytes <= MOST, f"Expected T*H elements of at most {MOST} bytes, got {sizes}")

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank's x, T*H elements."""
        return self.tokens * self.hidden * BYTES_OF_DTYPE[self.dtype]

    def __str__(self) -> str:
        wide = "" if self.intermediate is None else f", I={self.intermediate}"
        return f"T={self.tokens}, H={self.hidden}{wide}, E={self.num_experts}, K={self.top_k}, {self.dtype}"


class Baseline(Record, frozen=True, kw_only=True):
    """What a suite compares an entry with, and the entry's time over its.

    measured_us: other work timed in turn with the entry; link_us: what bytes take beside it; sum_us: both.
    """

    what: str
    measured_us: Number | None = None
    link_us: Number | None = None
    sum_us: Number | None = None
    ratio: Number


class Entry(Times, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a suite. floor_us: what the link or the memory needs at its measured rate, named by ``floor_by``.

    threshold: what the median is held against, in words.
    """

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


class Suite(Document, frozen=True, kw_only=True, tag="suite", eq=False):
    """Written by the suites."""

    entries: tuple[Entry, ...]


class ProfileShapeRecord(Record, frozen=True, kw_only=True):
    """tokens: T of each rank, in the order of the ranks."""

    tokens: Annotated[tuple[CountOrZero, ...], Meta(min_length=1)]
    hidden: Count
    top_k: Count
    num_experts: Count
    dtype: Dtype
    routing: Routing

    def __str__(self) -> str:
        tokens = str(self.tokens[0]) if len(set(self.tokens)) == 1 else "/".join(map(str, self.tokens))
        sizes = f"T={tokens}, H={self.hidden}, E={self.num_experts}, K={self.top_k}"
        return f"{sizes}, {self.dtype}, {self.routing} routing"


class ModeTimes(Times, frozen=True, kw_only=True):
    """One mode alone; mode: empty for the plan. link_bytes: over the link into the busiest rank.

    percent: of the ceiling; traffic one way alone may pass a ceiling measured both ways.
    """

    kind: Literal["plan", "dispatch", "combine"]
    mode: str
    link_bytes: Number
    gb_per_s: Number | None = None
    ceiling: str | None = None
    percent: Annotated[float, Meta(ge=0, le=2 * MOST_PERCENT)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = {"plan": [""], "dispatch": [*DispatchMode], "combine": [*CombineMode]}[self.kind]
        _require(self.mode in modes, f"Expected a mode of {self.kind}, got {self.mode!r}")


class PairTimes(Times, frozen=True, kw_only=True, omit_defaults=True):
    """Both modes together, in a pass of the layer or from ids to combined rows; how: the way it was launched."""

    dispatch: DispatchMode
    combine: CombineMode
    pass_name: str = field(name="pass", default=IDS_TO_ROWS)
    how: str | None = None

    @property
    def pair(self) -> ModePair:
        """The modes."""
        return ModePair(dispatch=self.dispatch, combine=self.combine)

    def __str__(self) -> str:
        return pair_name(self.pair)


def pair_name(pair: ModePair) -> str:
    """Both modes in words."""
    return f"{pair.dispatch.value} + {pair.combine.value}"


Pairs = Annotated[tuple[PairTimes, ...], Meta(min_length=1)]


class Settings(Record, frozen=True, kw_only=True):
    """Modes, which may be "auto", and flags."""

    dispatch: str
    combine: str
    redispatch_x_in_backward: bool
    cpu_sync_on_runtime: bool
    max_rows: Count | None = None

    def __post_init__(self) -> None:
        for mode, modes in ((self.dispatch, DispatchMode), (self.combine, CombineMode)):
            names = [AUTO, *(each.value for each in modes)]
            _require(mode in names, f"Expected one of {', '.join(names)}, got {mode!r}")

    @staticmethod
    def of(config: EPConfig) -> Settings:
        """To be written."""
        return msgspec.convert(msgspec.to_builtins(config), Settings)

    def named(self, redispatch: str = "redispatch_x_in_backward", cpu_sync: str = "cpu_sync_on_runtime") -> str:
        """Both modes and the flags that are set, by these names."""
        flags = {redispatch: self.redispatch_x_in_backward, cpu_sync: self.cpu_sync_on_runtime}
        bound = [] if self.max_rows is None else [f"max_rows={self.max_rows}"]
        return ", ".join([f"{self.dispatch} + {self.combine}", *(name for name, on in flags.items() if on), *bound])


class Profile(Record, frozen=True, kw_only=True):
    """What the profiler measured and chose."""

    shape: ProfileShapeRecord
    backend: str
    ranks_per_gpu: Count | None = None
    modes: Annotated[tuple[ModeTimes, ...], Meta(min_length=1)]
    pairs: Pairs
    config: Settings
    rates_gb_per_s: RatesRecord = RatesRecord()

    def __post_init__(self) -> None:
        _require_distinct((mode.kind, mode.mode) for mode in self.modes)
        _require_distinct((pair.dispatch.value, pair.combine.value) for pair in self.pairs)

    @staticmethod
    def of(report: ProfileReport) -> Profile:
        """To be written within another document."""
        return msgspec.convert(report.as_json(), Profile)


class ProfileDocument(Document, frozen=True, kw_only=True, tag="profile", eq=False):
    """A file of ``ProfileReport.as_json``, which has the fields of the profile at the top; ``parse`` nests them."""

    profile: Profile


class SetupRecord(Record, frozen=True, kw_only=True):
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
        self.rank_shape  # noqa: B018  raises where T*H is out of range

    @property
    def rank_shape(self) -> ShapeRecord:
        """With the tokens of one rank, rounded up."""
        tokens, hidden, intermediate, num_experts, top_k = self.thiek
        return ShapeRecord(
            tokens=-(-tokens // self.world_size),
            hidden=hidden,
            intermediate=intermediate,
            num_experts=num_experts,
            top_k=top_k,
            dtype=self.dtype,
        )


class AccuracyRecord(Record, frozen=True, kw_only=True):
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


class MemoryUse(Record, frozen=True, kw_only=True):
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


class Derived(Record, frozen=True, kw_only=True):
    """What follows from the times of one pass; ratios: the layer's time over that of what they name."""

    pass_name: str = field(name="pass")
    # A difference of two medians may be negative.
    exposed_communication_us: Difference | None = None
    link_us: Number | None = None
    over_gemms: Number | None = None
    over_gemms_and_link: Number | None = None
    scaling_efficiency: Number | None = None
    over_reference: Number | None = None


class Breakdown(Record, frozen=True, kw_only=True):
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


class Point(Record, frozen=True, kw_only=True):
    """One shape and routing of a sweep. picked: by the profiler; predicted: by the cost rule.

    pairs: the layer end to end. over_best, predicted_over_best: by pass, the choice's median over the best pair's.
    """

    shape: ShapeRecord
    routing: Routing
    profile: Profile
    pairs: Pairs
    picked: ModePair
    predicted: ModePair
    over_best: dict[str, Number | None]
    predicted_over_best: dict[str, Number | None]

    def __post_init__(self) -> None:
        _require_distinct((pair.dispatch.value, pair.combine.value, pair.pass_name) for pair in self.pairs)

    def fastest(self, pass_name: str) -> list[PairTimes]:
        """The pairs timed in a pass, the fastest first."""
        return sorted((pair for pair in self.pairs if pair.pass_name == pass_name), key=lambda pair: pair.median_us)


class Sweep(Document, frozen=True, kw_only=True, tag="sweep", eq=False):
    """Written by the sweep."""

    points: tuple[Point, ...]


class Untimed(Document, frozen=True, kw_only=True, tag="untimed", eq=False):
    """What a soak or a run of the property tests checked: all but where it ran is for other readers."""


KINDS: dict[str, type[Document]] = {
    "suite": Suite,
    "profile": ProfileDocument,
    "layer": Layer,
    "sweep": Sweep,
    "properties": Untimed,
    "soak": Untimed,
}


def write(document: Document, path: Path) -> None:
    """As JSON; makes folders. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def read(path: Path, name: str | None = None) -> Document:
    """The document in a file; its ``file`` is ``name``, or the file's name.

    Raises ``ValueError`` that names file, field, what was expected and what was got.
    """
    try:
        found = printable(msgspec.json.decode(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file: {error.strerror or error}") from None
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    return parse(found, name or path.name)


def parse(found: Any, name: str) -> Document:
    """The document in a decoded JSON value. Raises ``ValueError`` as ``read`` does."""
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, got {_short(found)}")
    # The first suites did not write their kind.
    kind = found.get("kind", "suite" if "entries" in found else None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{name}: kind: expected one of {', '.join(KINDS)}, got {_short(kind)}")
    form = KINDS[kind]
    nested = {"profile": found} if form is ProfileDocument else {}
    whole = {**found, **nested, "kind": form.__struct_config__.tag, "file": name}
    try:
        return msgspec.convert(whole, form)
    except msgspec.ValidationError as error:
        got = _at(whole, str(error).rpartition("`$")[2].rstrip("`"))
        raise ValueError(f"{name}: {error}, got {_short(got)}") from None


def printable(value: Any) -> Any:
    r"""A JSON value whose strings hold no control characters or marks of direction; whitespace becomes a space.

    >>> printable({"a\n": ["b\x00", 1, None]})
    {'a ': ['b�', 1, None]}
    """
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else " " if letter.isspace() else "\ufffd" for letter in value)
    if isinstance(value, list):
        return [printable(each) for each in value]
    return {printable(name): printable(each) for name, each in value.items()} if isinstance(value, dict) else value


def _at(value: Any, path: str) -> Any:
    """What stands at a path of msgspec; the object around it where the path does not name a key."""
    for key, place in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        if place == "...":
            return value
        value = value[int(place)] if place else value[key]
    return value


def _short(value: object) -> str:
    short = Repr()
    short.maxstring = short.maxother = LETTERS_OF_VALUE
    return short.repr(value)


def _require(holds: bool, message: str) -> None:
    # msgspec turns it into an error that names the place.
    if not holds:
        raise ValueError(message)


def _require_distinct(found: Iterable[Hashable]) -> None:
    again: Sequence[Hashable] = [each for each, times in Counter(found).items() if times > 1]
    _require(not again, f"Expected every mode and pair once, got {again[:1]} again")
