"""How far times differ from run to run, and within one run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from math import inf
from statistics import median

from schema import Document, Layer, ProfileDocument, Suite, Sweep, Times

from report_page.load import Documents

LARGE_US = 100.0
LARGE_PERCENT = 5.0
# An eager entry that takes so many times its time behind queued work waits for the host.
LEAST_OF_HOST = 1.5


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One time of one file. where: shape or setup. key: equal for the same thing in files of the same kind.

    of_host: whether it is the host's time, and not the GPU's.
    """

    document: Document
    what: str
    where: str
    key: Hashable
    times: Times
    of_host: bool = False

    @property
    def identity(self) -> Hashable:
        """Equal for what may be compared: the same thing on the same GPU with the same W."""
        environment = self.document.environment
        return self.document.kind, environment.gpu, environment.world_size, self.key


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The same thing in two or more files."""

    measured: tuple[Measurement, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """In the order of ``measured``."""
        return tuple(measurement.document.file for measurement in self.measured)

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


@dataclass(frozen=True, kw_only=True)
class WithinRun:
    """p10 to p90 in percent of the median, over the times of one file."""

    document: Document
    measured: tuple[Measurement, ...]

    @property
    def typical_percent(self) -> float:
        """The median over all times."""
        return median(measurement.times.spread_percent for measurement in self.measured)

    @property
    def widest(self) -> Measurement:
        """The one with the widest spread."""
        return max(self.measured, key=lambda measurement: measurement.times.spread_percent)


def within_runs(documents: Documents) -> list[WithinRun]:
    """One for each file that has any times."""
    runs = [WithinRun(document=document, measured=tuple(measurements(document))) for document in documents.everything]
    return [run for run in runs if run.measured]


def repeated(documents: Documents) -> list[Repeated]:
    """What more than one file has, the largest difference first. Where a file has it twice, its first counts.

    Profiles within layers and sweeps are left out: the profiler's cache may give one measurement to several files.
    """
    found: dict[Hashable, dict[str, Measurement]] = {}
    for document in documents.everything:
        for measurement in measurements(document):
            found.setdefault(measurement.identity, {}).setdefault(document.file, measurement)
    several = [Repeated(measured=tuple(files.values())) for files in found.values() if len(files) > 1]
    return sorted(several, key=lambda again: again.difference_percent, reverse=True)


def measurements(document: Document) -> Iterator[Measurement]:
    """Every time in a document."""
    found = _times(document)
    for what, where, key, times, of_host in found:
        yield Measurement(document=document, what=what, where=where, key=key, times=times, of_host=of_host)


def _times(document: Document) -> Iterator[tuple[str, str, Hashable, Times, bool]]:
    if isinstance(document, Suite):
        queued = {(entry.name, entry.shape): entry.median_us for entry in document.entries if entry.how == "queued"}
        for entry in document.entries:
            of_host = entry.how == "eager" and entry.median_us > LEAST_OF_HOST * queued.get(
                (entry.name, entry.shape), inf
            )
            key = (entry.name, entry.how, entry.shape)
            yield f"{entry.name}, {entry.how}", str(entry.shape), key, entry, of_host
    if isinstance(document, ProfileDocument):
        profile = document.profile
        setup, where = (profile.shape, profile.backend, profile.ranks_per_gpu), f"{profile.shape}, {profile.backend}"
        for mode in profile.modes:
            yield f"{mode.kind} {mode.mode}".strip(), where, (setup, mode.kind, mode.mode), mode, False
        for pair in profile.pairs:
            yield f"{pair.pass_name}, {pair}", where, (setup, pair.pair), pair, False
    if isinstance(document, Layer):
        for timed in document.times:
            key_of_layer = (document.setup, document.config, timed.pass_name, timed.what)
            where = f"{document.setup.rank_shape}, {document.config.named()}"
            yield f"{timed.what}, {timed.pass_name}", where, key_of_layer, timed, False
    if isinstance(document, Sweep):
        for point in document.points:
            setup_of_point = (point.shape, point.routing, point.profile.backend)
            where = f"{point.shape}, {point.routing} routing, {point.profile.backend}"
            for pair in point.pairs:
                key_of_pair = (setup_of_point, pair.pair, pair.pass_name)
                yield f"layer, {pair.pass_name}, {pair}", where, key_of_pair, pair, False
