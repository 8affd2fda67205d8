"""What is timed of a profile and how it is described: shape, modes, pairs, and where they were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import LinkCeilings
from sonic_ep.fields import Fields
from sonic_ep.machine import FLATTERED_WORLD_SIZE, TWO_GPUS_NOTE, Machine
from sonic_ep.testing.timing import QUANTILES, Timing

PLAN, DISPATCH, COMBINE = "plan", "dispatch", "combine"
MODES_OF_KIND: Mapping[str, type[DispatchMode] | type[CombineMode]] = {DISPATCH: DispatchMode, COMBINE: CombineMode}
EVERY_MODE = [(PLAN, ""), *((kind, mode.value) for kind, modes in MODES_OF_KIND.items() for mode in modes)]
EVERY_PAIR = [(dispatch, combine) for dispatch in DispatchMode for combine in CombineMode]


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
        micros = timing.as_json(digits=3)
        return Spread(rounds=int(micros.pop("rounds")), **micros)

    @staticmethod
    def read(found: Fields) -> Spread:
        """From JSON."""
        return Spread(rounds=found.count("rounds"), **{name: found.number(name) for name, _ in QUANTILES})


@dataclass(frozen=True, kw_only=True)
class ModeTime:
    """One mode alone, its barriers and exchanges included.

    kind: "plan", "dispatch" or "combine". mode: its name, empty for the plan. link_bytes: into the busiest rank over
    the link; gb_per_s: of that rank, at the median, None if the median is 0. ceiling: of ``LinkCeilings``, the one that
    it is held against, None where none was measured. percent: ``gb_per_s`` of it. Where traffic is not balanced that
    may honestly be above 100: ceilings are measured with both directions busy.
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
class Findings:
    """What was profiled, where, and what came of it; the same on every rank of the group.

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
        return TWO_GPUS_NOTE if self.shape.world_size == FLATTERED_WORLD_SIZE else None
