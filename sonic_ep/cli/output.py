"""What commands that measure leave behind: lines of rank 0, and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sonic_ep.cli.exit_codes import GREEN, RED
from sonic_ep.cli.launch import Place

# Their names are no options.
COMMANDS = ("profile",)


def teller(place: Place) -> Callable[[str], None]:
    """Prints on rank 0, and nothing elsewhere."""

    def say(line: str) -> None:
        if place.rank == 0:
            print(line, flush=True)

    return say


def words_without_paths(arguments: list[str]) -> list[str]:
    """What the command was given, but for its own name: paths are somebody's own, and so is the name of a commit."""
    words, dropped = [], False
    for word in arguments[1:]:
        if dropped:
            dropped = False
        elif word in ("--json", "--commit"):
            dropped = True
        elif not word.startswith(("--json=", "--commit=")) and word not in COMMANDS:
            words.append(word)
    return words


def require_writable(path: Path | None) -> None:
    """Raise ``ValueError`` if nothing can be written to ``path``: before a run, not behind it. Folders are made."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--json: got {str(path)!r}, expected the path of a file that can be written: {error}"
        ) from None


def write_json(path: Path, document: Mapping[str, Any]) -> int:
    """Write ``document``, its folders made; an exit code, and a line that says why if it could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        print(f"sonic-ep: --json: {error}", file=sys.stderr)
        return RED
    return GREEN
