"""How far times differ from run to run, and within one run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from math import inf
from statistics import median

from sonic_ep.report.documents import Document, Documents, Layer, ProfileDocument, Suite, Sweep
from sonic_ep.report.measured import Profile, Times, pair_name
from sonic_ep.report.origin import Source

LARGE_US = 100.0
LARGE_PERCENT = 5.0
# Called as they are, works that take so many times what they take behind other work wait for the host.
LEAST_OF_HOST = 1.5


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One time of one file. where: shape or setup in words.

    identity: equal for what may be compared over files: the same thing on the same GPU with the same W.
    of_host: whether it is the host's time, and not the GPU's.
    """

    source: Source
    what: str
    where: str
    identity: Hashable
    times: Times
    of_host: bool = False


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The same thing in two or more files."""

    measured: tuple[Measurement, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """In the order of ``measured``."""
        return tuple(measurement.source.file for measurement in self.measured)

    @property
    def least_us(self) -> float:
        """The smallest median."""
        return min(measurement.times.median_us for measurement in self.measured)

    @property
    def difference_percent(self) -> float:
        """How much the largest median is above the smallest, in percent of that."""
        return 100 * (max(measurement.times.median_us for measurement in self.measured) / self.least_us - 1)

    @property
    def is_long(self) -> bool:
        """Whether every median is above 100 us."""
        return self.least_us > LARGE_US

    @property
    def differs(self) -> bool:
        """Above 100 us, and by 5 percent or more."""
        return self.is_long and self.difference_percent >= LARGE_PERCENT

    @property
    def of_host(self) -> bool:
        """Whether it is the host's time in any of the files."""
        return any(measurement.of_host for measurement in self.measured)


@dataclass(frozen=True, kw_only=True)
class WithinRun:
    """p10 to p90 in percent of the median, over the times of one file."""

    source: Source
    measured: tuple[Measurement, ...]

    @property
    def typical_percent(self) -> float:
        """The median over all times."""
        return median(measurement.times.spread_percent for measurement in self.measured)

    @property
    def widest(self) -> Measurement:
        """The one with the widest spread."""
        return max(self.measured, key=lambda measurement: measurement.times.spread_percent)


def within_runs(documents: Documents) -> tuple[WithinRun, ...]:
    """One for each file that has any times."""
    runs = [
        WithinRun(source=document.source, measured=tuple(measurements(document))) for document in documents.everything
    ]
    return tuple(run for run in runs if run.measured)


def repeated(documents: Documents) -> tuple[Repeated, ...]:
    """What more than one file has, the largest difference first. Where a file has it twice, its first counts.

    Profiles within layer documents and sweeps are left out: they may be one measurement, from the profiler's cache.
    """
    found: dict[Hashable, dict[str, Measurement]] = {}
    for document in documents.everything:
        for measurement in measurements(document):
            found.setdefault(measurement.identity, {}).setdefault(measurement.source.file, measurement)
    several = [Repeated(measured=tuple(files.values())) for files in found.values() if len(files) > 1]
    return tuple(sorted(several, key=lambda again: again.difference_percent, reverse=True))


def measurements(document: Document) -> Iterator[Measurement]:
    """Every time in a document."""
    if isinstance(document, Suite):
        return _of_suite(document)
    if isinstance(document, ProfileDocument):
        return _of_profile(document.source, document.profile)
    if isinstance(document, Layer):
        return _of_layer(document)
    return _of_sweep(document)


def _measurement(source: Source, what: str, where: str, key: Hashable, times: Times) -> Measurement:
    machine = (source.kind, source.environment.gpu, source.environment.world_size)
    return Measurement(source=source, what=what, where=where, identity=(machine, key), times=times)


def _of_suite(suite: Suite) -> Iterator[Measurement]:
    queued = {(entry.name, entry.shape): entry.times.median_us for entry in suite.entries if entry.how == "queued"}
    for entry in suite.entries:
        key = (entry.name, entry.how, entry.shape)
        found = _measurement(suite.source, f"{entry.name}, {entry.how}", str(entry.shape), key, entry.times)
        behind_work = queued.get((entry.name, entry.shape), inf)
        of_host = entry.how == "eager" and entry.times.median_us > LEAST_OF_HOST * behind_work
        yield replace(found, of_host=of_host)


def _of_profile(source: Source, profile: Profile) -> Iterator[Measurement]:
    setup = (profile.shape, profile.backend, profile.ranks_per_gpu)
    where = f"{profile.shape}, {profile.backend}"
    for mode in profile.modes:
        what = f"{mode.kind} {mode.mode}".strip()
        yield _measurement(source, what, where, (setup, mode.kind, mode.mode), mode.times)
    for pair in profile.pairs:
        yield _measurement(source, f"{pair.what}, {pair_name(pair.pair)}", where, (setup, pair.pair), pair.times)


def _of_layer(layer: Layer) -> Iterator[Measurement]:
    where = f"{layer.setup.rank_shape}, {layer.settings}"
    for timed in layer.times:
        key = (layer.setup, layer.settings, timed.pass_name, timed.what)
        yield _measurement(layer.source, f"{timed.what}, {timed.pass_name}", where, key, timed.times)


def _of_sweep(sweep: Sweep) -> Iterator[Measurement]:
    for point in sweep.points:
        where = f"{point.shape}, {point.routing} routing, {point.profile.backend}"
        for pair in point.pairs:
            key = (point.shape, point.routing, point.profile.backend, pair.pair, pair.what)
            yield _measurement(sweep.source, f"layer, {pair.what}, {pair_name(pair.pair)}", where, key, pair.times)
