"""How far times of the same thing differ from run to run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

from schema import Document, Layer, ProfileDocument, Suite, Sweep, Times

LARGE_US = 100.0
LARGE_PERCENT = 5.0
# An eager entry that takes so many times its time behind queued work waits for the host.
LEAST_OF_HOST = 1.5


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One time of one file. where: shape or setup. also: what else is equal for the same thing in another file.

    of_host: whether it is the host's time, and not the GPU's.
    """

    document: Document
    what: str
    where: str
    also: Hashable = None
    times: Times
    of_host: bool = False


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The same thing in two or more files, and its median in each. of_host: in any of them."""

    what: str
    where: str
    documents: list[Document]
    medians_us: list[float]
    of_host: bool

    @property
    def files(self) -> list[str]:
        """In the order of ``documents``."""
        return [document.file for document in self.documents]

    @property
    def difference_percent(self) -> float:
        """How much the largest median is above the smallest, in percent of that."""
        return 100 * (max(self.medians_us) / min(self.medians_us) - 1)

    @property
    def differs(self) -> bool:
        """Above 100 us, and by 5 percent or more."""
        return min(self.medians_us) > LARGE_US and self.difference_percent >= LARGE_PERCENT


def repeated(documents: Sequence[Document]) -> list[Repeated]:
    """What more than one file has, the largest difference first. Where a file has it twice, its first counts.

    Profiles within layers and sweeps are left out: the profiler's cache may give one measurement to several files.
    """
    found: dict[Hashable, dict[str, Measurement]] = {}
    for document in documents:
        machine = (document.kind, document.environment.gpu, document.environment.world_size)
        for one in measurements(document):
            found.setdefault((machine, one.what, one.where, one.also), {}).setdefault(document.file, one)
    several = [_compared(list(files.values())) for files in found.values() if len(files) > 1]
    return sorted(several, key=lambda again: again.difference_percent, reverse=True)


def _compared(measured: Sequence[Measurement]) -> Repeated:
    return Repeated(
        what=measured[0].what,
        where=measured[0].where,
        documents=[measurement.document for measurement in measured],
        medians_us=[measurement.times.median_us for measurement in measured],
        of_host=any(measurement.of_host for measurement in measured),
    )


def measurements(document: Document) -> Iterator[Measurement]:
    """Every time in a document."""
    one = partial(Measurement, document=document)
    if isinstance(document, Suite):
        queued = {(entry.name, entry.shape): entry.median_us for entry in document.entries if entry.how == "queued"}
        for entry in document.entries:
            behind_work = queued.get((entry.name, entry.shape), inf)
            of_host = entry.how == "eager" and entry.median_us > LEAST_OF_HOST * behind_work
            yield one(what=f"{entry.name}, {entry.how}", where=str(entry.shape), times=entry, of_host=of_host)
    if isinstance(document, ProfileDocument):
        found = document.profile
        here = partial(one, where=f"{found.shape}, {found.backend}", also=found.ranks_per_gpu)
        for mode in found.modes:
            yield here(what=str(mode), times=mode)
        for pair in found.pairs:
            yield here(what=f"{pair.pass_name}, {pair}", times=pair)
    if isinstance(document, Layer):
        where = f"{document.setup.rank_shape}, {document.config.named()}"
        for timed in document.times:
            yield one(what=f"{timed.what}, {timed.pass_name}", where=where, also=document.setup, times=timed)
    if isinstance(document, Sweep):
        for point in document.points:
            where = f"{point.shape}, {point.routing} routing, {point.profile.backend}"
            for pair in point.pairs:
                yield one(what=f"layer, {pair.pass_name}, {pair}", where=where, times=pair)


def between_words(again: Sequence[Repeated]) -> str:
    """How many medians differ, how many of these are the host's time, and whether the files are of one commit."""
    long = [found for found in again if min(found.medians_us) > LARGE_US]
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
    commits = {document.environment.commit for found in again for document in found.documents}
    return said + " The files are of different commits, so that their code differs as well." * (len(commits) > 1)
