"""The page: one HTML file that asks for nothing else, and a PNG of every figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from schema import Document

from report_page.drawing import Picture
from report_page.load import DAY_LETTERS, Documents
from report_page.sections import sections

TEMPLATES = Path(__file__).parent


def write_report(documents: Documents, output: Path, png_folder: Path) -> list[str]:
    """Writes the page and the PNGs, making their folders; returns the names of the figures. Raises ``OSError``."""
    found = sections(documents)
    output.parent.mkdir(parents=True, exist_ok=True)
    png_folder.mkdir(parents=True, exist_ok=True)
    pictures = [part for section in found for part in section.parts if isinstance(part, Picture)]
    drawings = {picture.name: picture.save(png_folder) for picture in pictures}
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html.j2")
    words = {"summary": summary(documents.everything), "sections": found, "drawings": drawings}
    output.write_text(page.render(words), encoding="utf-8")
    return list(drawings)


def summary(documents: Sequence[Document]) -> str:
    """How many files there are, of which machines and days."""
    environments = [document.environment for document in documents]
    machines = dict.fromkeys(f"{e.gpu or 'no GPU'}, W={e.world_size}" for e in environments)
    days = sorted({e.date[:DAY_LETTERS] for e in environments})
    files = "1 file" if len(documents) == 1 else f"{len(documents)} files"
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{files}; {'; '.join(machines)}; {span}. Times are medians over rounds of the slowest rank."
