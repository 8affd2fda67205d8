"""Reads the files of a report, and says where their numbers come from and what to beware of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import msgspec
from msgspec.structs import replace
from schema import KINDS, Document, Environment, Layer, Profile, ProfileDocument, RatesRecord, Untimed

from sonic_ep.profiler.machine import FLATTERED_WORLD_SIZE, TWO_GPUS_NOTE

DAY_LETTERS = len("2026-01-31")
HASH_LETTERS, FULL_HASH_LETTERS = 10, 40
SHARED = "Beware: ranks took turns on a GPU, these times say nothing about a GPU for each."
NO_GPU = "Beware: measured on the CPU, these times say nothing about a GPU."


def load(paths: Sequence[Path]) -> tuple[list[Document], list[str]]:
    """The documents with times, in the order given, and the names of the other files.

    Raises ``ValueError`` for the first thing wrong, and if no document has times.
    """
    found = [read(path, name) for path, name in zip(paths, file_names(paths), strict=True)]
    timed = [document for document in found if not isinstance(document, Untimed)]
    if not timed:
        names = ", ".join(document.file for document in found)
        raise ValueError(f"{names}: expected a document with times: suite, profile, layer or sweep")
    return timed, [document.file for document in found if isinstance(document, Untimed)]


def read(path: Path, name: str | None = None) -> Document:
    """The document in a file; its ``file`` is ``name``, or the file's name.

    Raises ``ValueError`` that names file, place, what was expected and what was got.
    """
    name = name or path.name
    try:
        found = printable(msgspec.json.decode(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, got {short(found)}")
    # The first suites did not write their kind.
    kind = found.get("kind", "suite" if "entries" in found else None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{name}: kind: expected one of {', '.join(KINDS)}, got {short(kind)}")
    whole = {"profile": found} if kind == "profile" else found
    whole = {**found, **whole, "kind": KINDS[kind].__struct_config__.tag, "file": name}
    try:
        return msgspec.convert(whole, KINDS[kind])
    except msgspec.ValidationError as error:
        got = _at(whole, str(error).rpartition("`$")[2].rstrip("`"))
        raise ValueError(f"{name}: {error}, got {short(got)}") from None


def printable(value: Any) -> Any:
    r"""A JSON value whose strings hold no control characters or marks of direction; whitespace becomes a space.

    >>> printable({"a\n": ["b\x00", 1, None]})
    {'a ': ['b�', 1, None]}
    """
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else " " if letter.isspace() else "\ufffd" for letter in value)
    if isinstance(value, list):
        return [printable(each) for each in value]
    return {printable(name): printable(each) for name, each in value.items()} if isinstance(value, dict) else value


def _at(value: Any, path: str) -> Any:
    """What stands at a path of msgspec; the object around it where the path does not name a key."""
    for key, place in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        if place == "...":
            return value
        value = value[int(place)] if place else value[key]
    return value


def file_names(paths: Sequence[Path]) -> list[str]:
    """Each path below the folder that all share. Raises ``ValueError`` for a file given twice.

    >>> file_names([Path("a/mine.json"), Path("b/mine.json")])
    ['a/mine.json', 'b/mine.json']
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path}: expected each file once, got it twice")
    folder = os.path.commonpath([place.parent for place in places])
    return [printable(str(place.relative_to(folder))) for place in places]


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


def summary(documents: Sequence[Document]) -> str:
    """How many files there are, of which machines and days."""
    environments = [document.environment for document in documents]
    machines = dict.fromkeys(f"{e.gpu or 'no GPU'}, W={e.world_size}" for e in environments)
    days = sorted({e.date[:DAY_LETTERS] for e in environments})
    files = "1 file" if len(documents) == 1 else f"{len(documents)} files"
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{files}; {'; '.join(machines)}; {span}. Times are medians over rounds of the slowest rank."


def profiles(documents: Sequence[Document]) -> dict[Profile, list[Document]]:
    """The documents with each profile of its own file or of a layer: the cache may give one profile to several runs."""
    found: dict[Profile, list[Document]] = {}
    for kind in (ProfileDocument, Layer):
        for document in documents:
            if isinstance(document, kind) and document.profile is not None:
                # A file of its own names its rates as the profile's.
                profile = replace(document.profile, rates_gb_per_s=RatesRecord())
                found.setdefault(profile, []).append(document)
    return found
