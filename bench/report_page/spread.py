"""How far times of the same thing differ from run to run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from schema import Document, Layer, ProfileDocument, Suite, Sweep, Times

LARGE_US = 100.0
LARGE_PERCENT = 5.0
# An eager entry that takes so many times its time behind queued work waits for the host.
LEAST_OF_HOST = 1.5


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One time of one file. where: shape or setup. key: the same for the same thing in files of this kind.

    of_host: whether it is the host's time, and not the GPU's.
    """

    document: Document
    what: str
    where: str
    key: Hashable
    times: Times
    of_host: bool = False


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The same thing in two or more files."""

    measured: tuple[Measurement, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """In the order of ``measured``."""
        return tuple(measurement.document.file for measurement in self.measured)

    @property
    def what(self) -> str:
        """The thing."""
        return self.measured[0].what

    @property
    def where(self) -> str:
        """Its shape or setup."""
        return self.measured[0].where

    @property
    def least_us(self) -> float:
        """The smallest median."""
        return min(measurement.times.median_us for measurement in self.measured)

    @property
    def difference_percent(self) -> float:
        """How much the largest median is above the smallest, in percent of that."""
        return 100 * (max(measurement.times.median_us for measurement in self.measured) / self.least_us - 1)

    @property
    def differs(self) -> bool:
        """Above 100 us, and by 5 percent or more."""
        return self.least_us > LARGE_US and self.difference_percent >= LARGE_PERCENT

    @property
    def of_host(self) -> bool:
        """Whether it is the host's time in any of the files."""
        return any(measurement.of_host for measurement in self.measured)


def repeated(documents: Sequence[Document]) -> list[Repeated]:
    """What more than one file has, the largest difference first. Where a file has it twice, its first counts.

    Profiles within layers and sweeps are left out: the profiler's cache may give one measurement to several files.
    """
    found: dict[Hashable, dict[str, Measurement]] = {}
    for document in documents:
        machine = (document.kind, document.environment.gpu, document.environment.world_size)
        for measurement in measurements(document):
            found.setdefault((machine, measurement.key), {}).setdefault(document.file, measurement)
    several = [Repeated(measured=tuple(files.values())) for files in found.values() if len(files) > 1]
    return sorted(several, key=lambda again: again.difference_percent, reverse=True)


def measurements(document: Document) -> list[Measurement]:
    """Every time in a document."""
    return [
        Measurement(document=document, what=what, where=where, key=(what, where, key), times=times, of_host=of_host)
        for what, where, key, times, of_host in _times(document)
    ]


def _times(document: Document) -> Iterator[tuple[str, str, Hashable, Times, bool]]:
    """What, where, what else is the same for the same thing, its times, and whether they are the host's."""
    if isinstance(document, Suite):
        queued = {(entry.name, entry.shape): entry.median_us for entry in document.entries if entry.how == "queued"}
        for entry in document.entries:
            behind_work = queued.get((entry.name, entry.shape), inf)
            of_host = entry.how == "eager" and entry.median_us > LEAST_OF_HOST * behind_work
            yield f"{entry.name}, {entry.how}", str(entry.shape), None, entry, of_host
    if isinstance(document, ProfileDocument):
        where = f"{document.profile.shape}, {document.profile.backend}"
        for mode in document.profile.modes:
            yield f"{mode.kind} {mode.mode}".strip(), where, document.profile.ranks_per_gpu, mode, False
        for pair in document.profile.pairs:
            yield f"{pair.pass_name}, {pair}", where, document.profile.ranks_per_gpu, pair, False
    if isinstance(document, Layer):
        where = f"{document.setup.rank_shape}, {document.config.named()}"
        for timed in document.times:
            yield f"{timed.what}, {timed.pass_name}", where, document.setup, timed, False
    if isinstance(document, Sweep):
        for point in document.points:
            where = f"{point.shape}, {point.routing} routing, {point.profile.backend}"
            for pair in point.pairs:
                yield f"layer, {pair.pass_name}, {pair}", where, None, pair, False


def between_words(again: Sequence[Repeated]) -> str:
    """How many medians differ, how many of these are the host's time, and whether the files are of one commit."""
    long = [found for found in again if found.least_us > LARGE_US]
    differing = [found for found in long if found.differs]
    said = (
        f"{len(again)} medians are in more than one file. {LARGE_PERCENT:.0f}% or more apart: "
        f"{len(differing)} of the {len(long)} above {LARGE_US:.0f} µs."
    )
    of_host = sum(found.of_host for found in differing)
    if of_host:
        most = max((found.difference_percent for found in long if not found.of_host), default=0.0)
        said += (
            f" {of_host} of these are the host's time, eager and more than {LEAST_OF_HOST:g} times as long as behind "
            f"other work; all others above {LARGE_US:.0f} µs differ by {most:.1f}% at most."
        )
    commits = {measurement.document.environment.commit for found in again for measurement in found.measured}
    return said + " The files are of different commits, so that their code differs as well." * (len(commits) > 1)
