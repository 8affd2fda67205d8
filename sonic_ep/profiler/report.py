"""The report of a profile: times of every mode and of every pair of modes, and the config that follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler.machine import FLATTERED_WORLD_SIZE, TWO_GPUS_NOTE, Machine
from sonic_ep.profiler.record import IN_LINE, NAME, read, written
from sonic_ep.profiler.timing import Timing

REFERENCE = "reference"
PLAN, DISPATCH, COMBINE = "plan", "dispatch", "combine"
EVERY_MODE = [
    (PLAN, ""),
    *((DISPATCH, mode.value) for mode in DispatchMode),
    *((COMBINE, mode.value) for mode in CombineMode),
]
EVERY_PAIR = [(dispatch, combine) for dispatch in DispatchMode for combine in CombineMode]
KIND, ENVIRONMENT, RATES = "profile", "environment", "rates_gb_per_s"
BYTES_OF_GB = 1e9
MOST_TOKENS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class ProfileShape:
    """What was profiled. tokens: T of each rank. routing: its name, or "given" for the caller's own ids."""

    tokens: tuple[int, ...]
    hidden: int
    top_k: int
    num_experts: int
    dtype: str
    routing: str

    @property
    def world_size(self) -> int:
        """W."""
        return len(self.tokens)

    @property
    def max_tokens(self) -> int:
        """C."""
        return max(self.tokens)

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Quantiles over the rounds, in microseconds; a round takes as long as its slowest rank."""

    rounds: int
    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    max_us: float

    @staticmethod
    def of(timing: Timing) -> Spread:
        """Those of ``timing``, rounded to nanoseconds."""
        return Spread(**timing.as_json(digits=3))


@dataclass(frozen=True, kw_only=True)
class ModeTime:
    """One mode alone, its barriers and exchanges included.

    kind: "plan", "dispatch" or "combine". mode: its name, empty for the plan. link_bytes: into the busiest rank;
    gb_per_s: of that rank at the median, None if the median is 0. ceiling: the field of ``LinkBandwidth`` that limits
    it, None where none was measured. percent: ``gb_per_s`` of it, above 100 where only one direction is busy.
    """

    kind: str
    mode: str
    spread: Spread = field(metadata=IN_LINE)
    link_bytes: float
    gb_per_s: float | None
    ceiling: str | None
    percent: float | None


@dataclass(frozen=True, kw_only=True)
class PairTime:
    """Exchange of ids, plan, dispatch and combine in sequence, through two modes."""

    dispatch: DispatchMode
    combine: CombineMode
    spread: Spread = field(metadata=IN_LINE)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where and when a profile was made. process_group: "gloo" or "nccl"; commit: of the package, if there is git."""

    process_group: str | None
    commit: str | None
    command: str
    date: str


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """What ``NetworkProfiler.profile`` found, the same on every rank of the group.

    config: the caller's, with the fastest pair of modes. modes: the plan, then each dispatch and each combine mode.
    pairs: all nine. machine: that of rank 0. rates: the ceilings of the link in bytes/s, None where none was measured.
    ranks_per_gpu: None on the CPU. from_cache: nothing was measured now.
    """

    config: EPConfig
    modes: tuple[ModeTime, ...]
    pairs: tuple[PairTime, ...]
    shape: ProfileShape
    machine: Machine = field(metadata={NAME: ENVIRONMENT})
    rates: LinkBandwidth | None = field(metadata={NAME: RATES})
    backend: str
    ranks_per_gpu: int | None
    origin: Origin = field(metadata={NAME: ENVIRONMENT})
    from_cache: bool = False

    @property
    def picked(self) -> ModePair:
        """The modes of the config."""
        return ModePair(dispatch=DispatchMode(self.config.dispatch), combine=CombineMode(self.config.combine))

    @property
    def note(self) -> str | None:
        """What readers of the times have to know; None if nothing."""
        if self.machine.gpu is None:
            how = "under Triton's interpreter" if self.backend == "fast" else "in plain PyTorch"
            return f"on the CPU, {how}: the times mean nothing for GPUs"
        if self.ranks_per_gpu is not None and self.ranks_per_gpu > 1:
            return f"{self.ranks_per_gpu} ranks take turns on one GPU: the times mean nothing for a GPU each"
        return TWO_GPUS_NOTE if self.shape.world_size == FLATTERED_WORLD_SIZE else None

    def table(self) -> list[str]:
        """Modes, pairs and the pick as lines of aligned text."""
        return [
            *_heading(self),
            "",
            f"{'what':<9} {'mode':<15} {'ms':>10} {'p10..p90':>9} {'GB/s':>8} {'% of ceiling':>13}",
            *map(_mode_line, self.modes),
            "",
            "ids, plan, dispatch and combine together, in ms:",
            *_pair_lines(self),
            "",
            f"picked: dispatch {self.picked.dispatch.value}, combine {self.picked.combine.value}",
        ]

    def __str__(self) -> str:
        return "\n".join(self.table())

    def as_json(self) -> dict[str, Any]:
        """A document of kind "profile": times in microseconds, rates in GB/s, sizes in bytes."""
        machine, origin = asdict(self.machine), asdict(self.origin)
        rates = {} if self.rates is None else asdict(self.rates)
        names = ("shape", "backend", "ranks_per_gpu", "modes", "pairs", "config")
        return {
            "kind": KIND,
            ENVIRONMENT: {**machine, "world_size": self.shape.world_size, **origin, "note": self.note},
            RATES: {name: rate / BYTES_OF_GB for name, rate in rates.items()},
            **{name: written(getattr(self, name)) for name in names},
        }

    @staticmethod
    def from_json(document: object) -> ProfileReport:
        """From what ``as_json`` returned. Raises ``ValueError`` that names the field that is missing or wrong."""
        kind = document.get("kind") if isinstance(document, dict) else None
        if not isinstance(document, dict) or kind != KIND:
            raise ValueError(f"{KIND}.kind: got {kind!r}, expected {KIND!r}")
        no_rates = {RATES: None} if document.get(RATES) == {} else {}
        report: ProfileReport = read(ProfileReport, {**document, **no_rates, "from_cache": False}, KIND)
        names = [field.name for field in fields(LinkBandwidth)]
        for name, got, expected in (
            ("modes", [(mode.kind, mode.mode) for mode in report.modes], EVERY_MODE),
            ("pairs", [(pair.dispatch, pair.combine) for pair in report.pairs], EVERY_PAIR),
        ):
            if got != expected:
                raise ValueError(f"{KIND}.{name}: got {got!r}, expected {expected}")
        for place, mode in enumerate(report.modes):
            if mode.ceiling not in (None, *names):
                at = f"{KIND}.modes[{place}].ceiling"
                raise ValueError(f"{at}: got {mode.ceiling!r}, expected null or one of {', '.join(names)}")
        return report if report.rates is None else replace(report, rates=whole_numbers(report.rates, BYTES_OF_GB))


def whole_numbers(rates: LinkBandwidth, factor: float = 1.0) -> LinkBandwidth:
    """``rates`` times ``factor`` in whole bytes/s, so that they survive the way to GB/s and back."""
    return LinkBandwidth(**{name: float(round(rate * factor)) for name, rate in asdict(rates).items()})


def _heading(report: ProfileReport) -> list[str]:
    machine, shape, note = report.machine, report.shape, report.note
    linked = "" if machine.link is None else f", {machine.link}"
    sizes = f"H={shape.hidden}, E={shape.num_experts}, K={shape.top_k}, {shape.dtype}, {shape.routing} routing"
    rounds = f"{report.pairs[0].spread.rounds} alternating rounds; the median over them of the slowest rank"
    ranks = f"{shape.world_size} rank{'s' * (shape.world_size > 1)} on {machine.gpu or 'the CPU'}{linked}"
    cached = f"from the cache, measured {report.origin.date}: nothing was measured now"
    return [
        f"backend {report.backend}, {ranks}",
        f"{_tokens(shape)}, {sizes}",
        f"{rounds}; GB/s over the link into the busiest rank",
        _bandwidth(report),
        *([] if note is None else [f"note: {note}"]),
        *([cached] if report.from_cache else []),
    ]


def _tokens(shape: ProfileShape) -> str:
    """T of the ranks, short where they are many or alike."""
    if len(set(shape.tokens)) == 1:
        return f"T={shape.tokens[0]} on each rank"
    if shape.world_size <= MOST_TOKENS_SHOWN:
        return f"T={','.join(map(str, shape.tokens))} by rank"
    return f"T={min(shape.tokens)} to {max(shape.tokens)}"


def _bandwidth(report: ProfileReport) -> str:
    if (rates := report.rates) is not None:
        engine, reads, writes = (rate / 1e9 for rate in (rates.copy_engine_in, rates.read, rates.write))
        return f"ceilings of the link in GB/s: copy engine {engine:.1f}, reads {reads:.1f}, writes {writes:.1f}"
    why = "these GPUs cannot map each other's memory"
    if report.machine.gpu is None:
        why = "there is no link between GPUs here"
    elif report.shape.world_size == 1:
        why = "one rank uses no link"
    return f"no ceiling was measured: {why}"


def _mode_line(mode: ModeTime) -> str:
    rate = "-" if mode.gb_per_s is None else f"{mode.gb_per_s:.3g}" if mode.gb_per_s < 1 else f"{mode.gb_per_s:.1f}"
    percent, spread = "-" if mode.percent is None else f"{mode.percent:.1f}", mode.spread
    width = f"{(spread.p90_us - spread.p10_us) / spread.median_us:.1%}" if spread.median_us else "-"
    return f"{mode.kind:<9} {mode.mode:<15} {spread.median_us / 1e3:>10.4f} {width:>9} {rate:>8} {percent:>13}"


def _pair_lines(report: ProfileReport) -> list[str]:
    lines = {"dispatch / combine": [combine.value for combine in CombineMode]}
    for pair in report.pairs:
        picked = (pair.dispatch, pair.combine) == (report.picked.dispatch, report.picked.combine)
        # A mark or the space of one, so that the digits are aligned.
        cell = f"{pair.spread.median_us / 1e3:.4f} {'<' if picked else ' '}"
        lines.setdefault(pair.dispatch.value, []).append(cell)
    return [(f"{name:<20}" + "".join(f"{cell:>16}" for cell in cells)).rstrip() for name, cells in lines.items()]
