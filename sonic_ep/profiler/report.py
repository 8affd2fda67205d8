"""What a profile found: times of every mode and of every pair of modes, and the config that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import LinkCeilings
from sonic_ep.machine import Machine
from sonic_ep.profiler.document import Fields
from sonic_ep.profiler.table import table_of
from sonic_ep.testing.timing import Timing

KIND = "profile"
PLAN, DISPATCH, COMBINE = "plan", "dispatch", "combine"
MODES_OF_KIND: Mapping[str, type[DispatchMode] | type[CombineMode]] = {DISPATCH: DispatchMode, COMBINE: CombineMode}
EVERY_MODE = [(PLAN, ""), *((kind, mode.value) for kind, modes in MODES_OF_KIND.items() for mode in modes)]
EVERY_PAIR = [(dispatch, combine) for dispatch in DispatchMode for combine in CombineMode]
QUANTILES = (("median_us", 0.5), ("p10_us", 0.1), ("p90_us", 0.9), ("min_us", 0.0), ("max_us", 1.0))
BYTES_OF_GB = 1e9
ROOT = "profile"


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
    def capacity(self) -> int:
        """C, the most tokens of a rank."""
        return max(self.tokens)

    @staticmethod
    def read(found: Fields) -> ProfileShape:
        """From JSON."""
        return ProfileShape(
            tokens=found.counts("tokens"),
            hidden=found.count("hidden"),
            top_k=found.count("top_k"),
            num_experts=found.count("num_experts"),
            dtype=found.text("dtype"),
            routing=found.text("routing"),
        )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Microseconds over the rounds, those of the slowest rank in each of them."""

    rounds: int
    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    max_us: float

    @staticmethod
    def of(timing: Timing) -> Spread:
        """Of what was timed, rounded to nanoseconds."""
        micros = {name: round(timing.quantile(share) * 1e6, 3) for name, share in QUANTILES}
        return Spread(rounds=len(timing.rounds), **micros)

    @staticmethod
    def read(found: Fields) -> Spread:
        """From JSON."""
        return Spread(rounds=found.count("rounds"), **{name: found.number(name) for name, _ in QUANTILES})


@dataclass(frozen=True, kw_only=True)
class ModeTime:
    """One mode alone, its barriers and exchanges included.

    kind: "plan", "dispatch" or "combine". mode: its name, empty for the plan. link_bytes: into a rank over the link,
    the mean over the ranks; gb_per_s: at the median. ceiling: of ``LinkCeilings``, the one that it is held against,
    and percent of it; None where none was measured.
    """

    kind: str
    mode: str
    spread: Spread
    link_bytes: float
    gb_per_s: float | None
    ceiling: str | None
    percent: float | None

    def as_json(self) -> dict[str, Any]:
        """One object, the spread in line."""
        found = asdict(self)
        return {"kind": found.pop("kind"), "mode": found.pop("mode"), **found.pop("spread"), **found}

    @staticmethod
    def read(found: Fields) -> ModeTime:
        """From JSON."""
        ceiling = found.text_or_none("ceiling")
        names = [field.name for field in fields(LinkCeilings)]
        if ceiling not in (None, *names):
            raise ValueError(f"{found.where}.ceiling: got {ceiling!r}, expected null or one of {', '.join(names)}")
        return ModeTime(
            kind=found.text("kind"),
            mode=found.text("mode"),
            spread=Spread.read(found),
            link_bytes=found.number("link_bytes"),
            gb_per_s=found.number_or_none("gb_per_s"),
            ceiling=ceiling,
            percent=found.number_or_none("percent"),
        )


@dataclass(frozen=True, kw_only=True)
class PairTime:
    """Ids, plan, dispatch, combine, one behind the other, through two modes."""

    dispatch: DispatchMode
    combine: CombineMode
    spread: Spread

    def as_json(self) -> dict[str, Any]:
        """One object, the spread in line."""
        return {"dispatch": self.dispatch.value, "combine": self.combine.value, **asdict(self.spread)}

    @staticmethod
    def read(found: Fields) -> PairTime:
        """From JSON."""
        return PairTime(
            dispatch=found.choice("dispatch", DispatchMode),
            combine=found.choice("combine", CombineMode),
            spread=Spread.read(found),
        )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where and when a profile was made. process_group: "gloo" or "nccl"; commit: of the package, if there is git."""

    process_group: str | None
    commit: str | None
    command: str
    date: str

    @staticmethod
    def read(found: Fields) -> Origin:
        """From JSON."""
        return Origin(
            process_group=found.text_or_none("process_group"),
            commit=found.text_or_none("commit"),
            command=found.text("command"),
            date=found.text("date"),
        )


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """What ``NetworkProfiler.profile`` found; the same on every rank of the group.

    config: the caller's, with the fastest pair of modes. modes: the plan, then each dispatch and each combine mode.
    pairs: all nine. machine: that of rank 0. rates: the ceilings of the link in bytes/s, None where none was measured.
    ranks_per_gpu: None on the CPU. from_cache: nothing was measured now.
    """

    config: EPConfig
    modes: tuple[ModeTime, ...]
    pairs: tuple[PairTime, ...]
    shape: ProfileShape
    machine: Machine
    rates: LinkCeilings | None
    backend: str
    ranks_per_gpu: int | None
    origin: Origin
    from_cache: bool = False

    @property
    def picked(self) -> ModePair:
        """The modes of the config."""
        assert isinstance(self.config.dispatch, DispatchMode)
        assert isinstance(self.config.combine, CombineMode)
        return ModePair(dispatch=self.config.dispatch, combine=self.config.combine)

    @property
    def note(self) -> str | None:
        """What has to be said of the times; None if nothing."""
        if self.machine.gpu is None:
            how = "under Triton's interpreter" if self.backend == "fast" else "in plain PyTorch"
            return f"on the CPU, {how}: the times mean nothing for GPUs"
        if self.ranks_per_gpu is not None and self.ranks_per_gpu > 1:
            return f"{self.ranks_per_gpu} ranks take turns on one GPU: the times mean nothing for a GPU each"
        return None

    def table(self) -> list[str]:
        """Modes, pairs and the pick as lines of aligned text."""
        return table_of(self)

    def __str__(self) -> str:
        return "\n".join(self.table())

    def as_json(self) -> dict[str, Any]:
        """A document of kind "profile": times in microseconds, rates in GB/s, sizes in bytes."""
        rates = {} if self.rates is None else asdict(self.rates)
        world_size = {"world_size": self.shape.world_size}
        return {
            "kind": KIND,
            "environment": {**asdict(self.machine), **world_size, **asdict(self.origin), "note": self.note},
            "rates_gb_per_s": {name: rate / BYTES_OF_GB for name, rate in rates.items()},
            "shape": {**asdict(self.shape), "tokens": list(self.shape.tokens)},
            "backend": self.backend,
            "ranks_per_gpu": self.ranks_per_gpu,
            "modes": [mode.as_json() for mode in self.modes],
            "pairs": [pair.as_json() for pair in self.pairs],
            "config": config_as_json(self.config),
        }

    def as_part(self) -> dict[str, Any]:
        """``as_json`` without the environment, for documents that have one of their own."""
        return {name: value for name, value in self.as_json().items() if name != "environment"}

    @staticmethod
    def from_json(document: object) -> ProfileReport:
        """What ``as_json`` gave. Raises ``ValueError`` that names the field that is missing or wrong."""
        found = Fields.of(ROOT, document)
        if found.value("kind") != KIND:
            raise ValueError(f"{ROOT}.kind: got {found.value('kind')!r}, expected {KIND!r}")
        return ProfileReport(
            config=_read_config(found.part("config")),
            modes=_read_modes(found),
            pairs=_read_pairs(found),
            shape=ProfileShape.read(found.part("shape")),
            machine=_read_machine(found.part("environment")),
            rates=_read_rates(found.part("rates_gb_per_s")),
            backend=found.text("backend"),
            ranks_per_gpu=found.count_or_none("ranks_per_gpu"),
            origin=Origin.read(found.part("environment")),
        )


def config_as_json(config: EPConfig) -> dict[str, Any]:
    """Modes by their names, and the flags."""
    names = {name: str(getattr(mode, "value", mode)) for name, mode in _modes(config).items()}
    return {**asdict(config), **names}


def _modes(config: EPConfig) -> dict[str, object]:
    return {"dispatch": config.dispatch, "combine": config.combine}


def _read_config(found: Fields) -> EPConfig:
    return EPConfig(
        dispatch=found.choice("dispatch", DispatchMode),
        combine=found.choice("combine", CombineMode),
        redispatch_x_in_backward=found.flag("redispatch_x_in_backward"),
        cpu_sync_on_runtime=found.flag("cpu_sync_on_runtime"),
        max_rows=found.count_or_none("max_rows"),
    )


def _read_modes(found: Fields) -> tuple[ModeTime, ...]:
    modes = tuple(ModeTime.read(mode) for mode in found.parts("modes"))
    got = [(mode.kind, mode.mode) for mode in modes]
    if got != EVERY_MODE:
        raise ValueError(f"{found.where}.modes: got {got}, expected {EVERY_MODE}")
    return modes


def _read_pairs(found: Fields) -> tuple[PairTime, ...]:
    pairs = tuple(PairTime.read(pair) for pair in found.parts("pairs"))
    got = [(pair.dispatch, pair.combine) for pair in pairs]
    if got != EVERY_PAIR:
        raise ValueError(f"{found.where}.pairs: got {got}, expected every dispatch with every combine mode")
    return pairs


def _read_machine(found: Fields) -> Machine:
    names = ("gpu", "link", "triton", "cuda", "nccl", "driver")
    return Machine(
        gpus=found.count("gpus", least=0),
        torch=found.text("torch"),
        code=found.text("code"),
        **{name: found.text_or_none(name) for name in names},
    )


def _read_rates(found: Fields) -> LinkCeilings | None:
    if not found.values:
        return None
    return whole_bytes(LinkCeilings(**{f.name: found.number(f.name) * BYTES_OF_GB for f in fields(LinkCeilings)}))


def whole_bytes(rates: LinkCeilings) -> LinkCeilings:
    """In whole bytes/s, so that GB/s lead back to them."""
    return LinkCeilings(**{name: float(round(rate)) for name, rate in asdict(rates).items()})
