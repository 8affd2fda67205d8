"""The page: one HTML file that asks for nothing else, and a PNG of every figure."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from sonic_ep.report.documents import Document, Documents
from sonic_ep.report.figures import NARROW, WIDE, Layout, Picture, svg, write_png
from sonic_ep.report.markup import Markup, Table, element
from sonic_ep.report.origin import DAY_LETTERS
from sonic_ep.report.sections import Part, Section, sections
from sonic_ep.report.style import ICON, PHONE, STYLE

TITLE = "sonic_ep: measurements"


def write_report(documents: Documents, output: Path, png_folder: Path) -> tuple[Path, ...]:
    """Writes the page and the PNGs, making their folders; returns the paths of the PNGs.

    Raises ``ModuleNotFoundError`` without matplotlib, ``OSError`` where a file cannot be written.
    """
    found = sections(documents)
    text = page(documents, found)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    png_folder.mkdir(parents=True, exist_ok=True)
    return tuple(write_png(picture, png_folder) for picture in pictures(found))


def pictures(found: Sequence[Section]) -> tuple[Picture, ...]:
    """Every figure of the page."""
    return tuple(part for section in found for part in section.parts if isinstance(part, Picture))


def page(documents: Documents, found: Sequence[Section]) -> str:
    """The HTML."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", TITLE),
        element("link", rel="icon", href=_data("image/svg+xml", ICON)),
        element("style", Markup(STYLE)),
    )
    header = element("header", element("h1", TITLE), element("p", summary(documents.everything)))
    body = element("body", header, contents(found), element("main", *map(_section, found)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def summary(documents: Sequence[Document]) -> str:
    """How many files there are, of which machines and days."""
    environments = [document.source.environment for document in documents]
    machines = dict.fromkeys(f"{e.gpu or 'no GPU'}, W={e.world_size}" for e in environments)
    days = sorted({e.date[:DAY_LETTERS] for e in environments})
    files = "1 file" if len(documents) == 1 else f"{len(documents)} files"
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{files}; {'; '.join(machines)}; {span}. Times are medians over rounds of the slowest rank."


def contents(found: Sequence[Section]) -> Markup:
    """A link to each section."""
    links = [element("li", element("a", section.title, href=f"#{section.anchor}")) for section in found]
    return element("nav", element("ol", *links), aria_label="Contents")


def _section(section: Section) -> Markup:
    return element("section", element("h2", section.title), *map(_part, section.parts), id=section.anchor)


def _part(part: Part) -> Markup:
    if isinstance(part, Picture):
        return _figure(part)
    return part.markup() if isinstance(part, Table) else part


def _figure(picture: Picture) -> Markup:
    """Both drawings; the browser shows the one for its width."""
    narrow = element("source", media=f"screen and {PHONE}", srcset=_drawing(picture, NARROW))
    shown = element("picture", narrow, element("img", src=_drawing(picture, WIDE), alt=picture.alt))
    notes = [element("span", note) for note in picture.notes]
    caption = element("figcaption", element("strong", picture.title), *notes)
    return element("figure", caption, shown, id=picture.name)


def _drawing(picture: Picture, layout: Layout) -> str:
    return _data("image/svg+xml", svg(picture, layout))


def _data(kind: str, text: str) -> str:
    return f"data:{kind};base64,{b64encode(text.encode()).decode()}"
