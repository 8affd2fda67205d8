"""Where a number comes from: machine, versions, rates of the same run, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sonic_ep.cost import Rates
from sonic_ep.machine import FLATTERED_WORLD_SIZE, TWO_GPUS_NOTE, Machine

GIGA = 1e9
DAY_LETTERS = len("2026-01-31")
HASH_LETTERS, FULL_HASH_LETTERS = 10, 40
SHARED = "Beware: ranks took turns on a GPU, these times say nothing about a GPU for each."
NO_GPU = "Beware: measured on the CPU, these times say nothing about a GPU."


@dataclass(frozen=True, kw_only=True)
class Environment(Machine):
    """What a run depended on. code: empty where a document of an older form does not tell."""

    world_size: int
    process_group: str | None
    commit: str | None
    command: str
    date: str
    note: str | None

    @property
    def shares_gpus(self) -> bool:
        """Whether there were more ranks than GPUs."""
        return self.gpu is not None and self.world_size > self.gpus

    @property
    def short_commit(self) -> str:
        """As much of a commit's hash as tells it apart, and what stands behind it."""
        if self.commit is None:
            return "unknown"
        name, *more = self.commit.split(" ", 1)
        return " ".join([name[:HASH_LETTERS] if len(name) == FULL_HASH_LETTERS else name, *more])


@dataclass(frozen=True, kw_only=True)
class MeasuredRates:
    """Rates of the same run, in GB/s; None where nothing was measured."""

    copy_engine_in: float | None
    copy_engine_out: float | None
    read: float | None
    write: float | None
    memory: float | None

    def ceiling(self, name: str | None) -> float | None:
        """The rate that a mode's ``ceiling`` names."""
        named = {
            "copy_engine_in": self.copy_engine_in,
            "copy_engine_out": self.copy_engine_out,
            "read": self.read,
            "write": self.write,
        }
        return None if name is None else named.get(name)

    def for_costs(self) -> Rates | None:
        """In bytes/s, as ``sonic_ep.cost`` takes them; None unless all that it takes were measured."""
        engine, read, write, memory = self.copy_engine_in, self.read, self.write, self.memory
        if engine is None or read is None or write is None or memory is None:
            return None
        return Rates(copy_engine=engine * GIGA, link_read=read * GIGA, link_write=write * GIGA, memory=memory * GIGA)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a document came from. file: its name, unique in the report."""

    file: str
    kind: str
    environment: Environment
    rates: MeasuredRates


def origin_sentence(sources: Sequence[Source]) -> str:
    """The files, and for those of one run alike: machine, W, commit and date."""
    alike: dict[str, list[str]] = {}
    for source in sources:
        files = alike.setdefault(_run(source.environment), [])
        if source.file not in files:
            files.append(source.file)
    return "; ".join(f"{', '.join(files)}: {run}" for run, files in alike.items()) + "."


def caveats(sources: Sequence[Source]) -> tuple[str, ...]:
    """What a reader of measured numbers has to know about the machines."""
    environments = [source.environment for source in sources]
    on_gpus = [environment for environment in environments if environment.gpu is not None]
    applies = {
        f"Beware: {TWO_GPUS_NOTE}.": any(environment.world_size == FLATTERED_WORLD_SIZE for environment in on_gpus),
        SHARED: any(environment.shares_gpus for environment in on_gpus),
        NO_GPU: len(on_gpus) < len(environments),
    }
    return tuple(text for text, so in applies.items() if so)


def _run(environment: Environment) -> str:
    machine = environment.gpu or "no GPU"
    commit = f"commit {environment.short_commit}"
    return f"{machine}, W={environment.world_size}, {commit}, {environment.date[:DAY_LETTERS]}"
