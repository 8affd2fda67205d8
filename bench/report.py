"""Results as one page of HTML with figures, and the figures as PNGs: ``python bench/report.py FILE... -o report.html``.

Exit codes: 0; 1 where something cannot be written or a library is missing; 2 for wrong files and arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from report_page.load import load
    from report_page.page import write_report
except ModuleNotFoundError as error:
    sys.exit(f"report: {error}: pip install msgspec jinja2 matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """The page and its PNGs; an exit code."""
    parser = argparse.ArgumentParser(prog="report.py", description="Results as one page of HTML.", allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="suites, profiles, layers, sweeps")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (%(default)s)")
    parser.add_argument("--png-folder", type=Path, help="where PNGs go (beside the page, its name and _png)")
    options = parser.parse_args(arguments)
    output = options.output
    try:
        documents, passed_over = load(options.files)
        if output.is_dir():
            raise ValueError(f"--output: expected the path of a file, got the folder {output}")
        if output.resolve() in [path.resolve() for path in options.files]:
            raise ValueError(f"--output: expected the path of a page, got {output}, one of the results")
        if not output.parent.is_dir():
            raise ValueError(f"--output: there is no folder {output.parent}, make it first")
        folder = options.png_folder or output.with_name(f"{output.stem}_png")
        figures = write_report(documents, output, folder)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    for name in passed_over:
        print(f"{name}: passed over, it records no times")
    print(f"wrote {output}: {len(documents)} files, {figures} figures, also as PNG in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
