"""The files of one report: their names there, where their numbers come from, and what to beware of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from schema import Document, Environment, Untimed, printable, read

from sonic_ep.profiler.machine import FLATTERED_WORLD_SIZE, TWO_GPUS_NOTE

DocumentT = TypeVar("DocumentT", bound=Document)
DAY_LETTERS = len("2026-01-31")
HASH_LETTERS, FULL_HASH_LETTERS = 10, 40
SHARED = "Beware: ranks took turns on a GPU, these times say nothing about a GPU for each."
NO_GPU = "Beware: measured on the CPU, these times say nothing about a GPU."


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents with times, in the order given. passed_over: names of the other files."""

    everything: tuple[Document, ...]
    passed_over: tuple[str, ...] = ()

    def of(self, kind: type[DocumentT]) -> list[DocumentT]:
        """Those of one kind."""
        return [document for document in self.everything if isinstance(document, kind)]


def load(paths: Sequence[Path]) -> Documents:
    """Reads the files. Raises ``ValueError`` for the first thing wrong, and if no document has times."""
    found = [read(path, name) for path, name in zip(paths, file_names(paths), strict=True)]
    timed = tuple(document for document in found if not isinstance(document, Untimed))
    if not timed:
        names = ", ".join(document.file for document in found)
        raise ValueError(f"{names}: expected a document with times: suite, profile, layer or sweep")
    return Documents(everything=timed, passed_over=tuple(d.file for d in found if isinstance(d, Untimed)))


def file_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell the files apart. Raises ``ValueError`` for a file given twice.

    >>> file_names([Path("a/mine.json"), Path("b/mine.json"), Path("b/other.json")])
    ['a/mine.json', 'b/mine.json', 'other.json']
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path}: expected each file once, got it twice")
    return [printable(_shortest(path, paths)) for path in paths]


def _shortest(path: Path, paths: Sequence[Path]) -> str:
    for length in range(1, len(path.parts)):
        if sum(other.parts[-length:] == path.parts[-length:] for other in paths) == 1:
            return str(Path(*path.parts[-length:]))
    return str(path)


def short_commit(environment: Environment) -> str:
    """The first letters of a full hash, and what stands behind it."""
    name, *more = (environment.commit or "unknown").split(" ", 1)
    return " ".join([name[:HASH_LETTERS] if len(name) == FULL_HASH_LETTERS else name, *more])


def origin(documents: Iterable[Document]) -> str:
    """The files, those of equal machine, W, commit and date together."""
    files: dict[str, dict[str, None]] = {}
    for document in documents:
        e = document.environment
        run = f"{e.gpu or 'no GPU'}, W={e.world_size}, commit {short_commit(e)}, {e.date[:DAY_LETTERS]}"
        files.setdefault(run, {})[document.file] = None
    return "; ".join(f"{', '.join(names)}: {run}" for run, names in files.items()) + "."


def caveats(documents: Iterable[Document]) -> list[str]:
    """What a reader has to know about the machines."""
    environments = [document.environment for document in documents]
    on_gpus = [environment for environment in environments if environment.gpu is not None]
    applies = {
        f"Beware: {TWO_GPUS_NOTE}.": any(environment.world_size == FLATTERED_WORLD_SIZE for environment in on_gpus),
        SHARED: any(environment.shares_gpus for environment in on_gpus),
        NO_GPU: len(on_gpus) < len(environments),
    }
    return [text for text, so in applies.items() if so]
