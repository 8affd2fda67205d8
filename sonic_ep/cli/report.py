"""What ``sonic-ep report`` runs: JSON results as one page of HTML."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sonic_ep.cli.exit_codes import GREEN, RED
from sonic_ep.report.load import file_names, load
from sonic_ep.report.page import write_report


def add_report(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSON results: suites, profiles, layers, sweeps"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="PATH", help="the page (default: report.html)"
    )
    parser.add_argument(
        "--png-folder", type=Path, metavar="PATH", help="where PNGs go (default: beside the page, its name and _png)"
    )
    parser.set_defaults(command=report, check=check_report)


def check_report(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for a file given twice, and for a page that cannot be where it is asked for."""
    file_names(options.files)
    output: Path = options.output
    if output.is_dir():
        raise ValueError(f"--output: got the folder {output}, expected the path of a file")
    if output.resolve() in [path.resolve() for path in options.files]:
        raise ValueError(f"--output: got {output}, one of the results, expected the path of a page")


def report(options: argparse.Namespace) -> int:
    """The page and its PNGs; an exit code. Raises ``ValueError`` for a document that is none."""
    output: Path = options.output
    folder: Path = options.png_folder or output.with_name(f"{output.stem}_png")
    documents = load(options.files)
    try:
        pngs = write_report(documents, output, folder)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        print("sonic-ep: the report draws with matplotlib: pip install 'sonic-ep[viz]'", file=sys.stderr)
        return RED
    except OSError as error:
        print(f"sonic-ep: {error}", file=sys.stderr)
        return RED
    for name in documents.passed_over:
        print(f"{name}: passed over, it records no times")
    print(f"{output}: {len(documents.everything)} files, {len(pngs)} figures, also as PNG in {folder}")
    return GREEN
