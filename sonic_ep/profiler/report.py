"""What a profile found: times of every mode and of every pair of modes, and the config that follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from sonic_ep.config import CombineMode, DispatchMode, EPConfig
from sonic_ep.cost import LinkCeilings
from sonic_ep.fields import Fields
from sonic_ep.machine import Machine
from sonic_ep.profiler.table import table_of
from sonic_ep.profiler.times import EVERY_MODE, EVERY_PAIR, Findings, ModeTime, Origin, PairTime, ProfileShape

KIND = "profile"
BYTES_OF_GB = 1e9
ROOT = "profile"


@dataclass(frozen=True, kw_only=True)
class ProfileReport(Findings):
    """What ``NetworkProfiler.profile`` found, as text and as JSON."""

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
