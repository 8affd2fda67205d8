"""The page: one HTML file that asks for nothing else, and a PNG of every figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from schema import Document, pair_name

from report_page import computed, figures, load, selection
from sonic_ep.profiler.machine import TWO_GPUS_NOTE

# A prediction so close to the best is as good.
WITHIN = 0.01
LOADER = FileSystemLoader(Path(__file__).parent)
TEMPLATES = Environment(loader=LOADER, autoescape=True, undefined=StrictUndefined, extensions=["jinja2.ext.do"])
TEMPLATES.trim_blocks = TEMPLATES.lstrip_blocks = True


class Cell(NamedTuple):
    """Text of a table's cell. kind: w for text, n for a number, good, bad or differs for a judgement."""

    text: str
    kind: str


def write_report(documents: Sequence[Document], output: Path, png_folder: Path) -> int:
    """Writes the page and the PNGs, making the folder of PNGs; returns how many figures. Raises ``OSError``."""
    png_folder.mkdir(parents=True, exist_ok=True)
    page = render(documents, partial(figures.save, folder=png_folder))
    output.write_text(page, encoding="utf-8")
    return page.count("<figure ")


def render(documents: Sequence[Document], save: Callable[..., str]) -> str:
    """The page. save: takes drawing function, data, name, title and notes; returns the address of the image."""
    modules = {"computed": computed, "figures": figures, "load": load, "selection": selection}
    of_kind = {kind: [d for d in documents if d.kind == kind] for kind in ("suite", "profile", "layer", "sweep")}
    TEMPLATES.filters |= {"places": number, "median": median, "pair": pair_name, "columns": columns}
    TEMPLATES.filters |= {"measurements": selection.measurements}
    TEMPLATES.globals |= {"Cell": Cell, "laid_out": laid_out, "judgement": judgement, "compared": compared}
    TEMPLATES.globals |= {"two_gpus": TWO_GPUS_NOTE}
    template = TEMPLATES.get_template("page.html.j2")
    return template.render(**modules, **of_kind, documents=documents, save=save)


def laid_out(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[tuple[Cell, ...]]:
    """Titles and rows of a table; of the columns behind the first, empty ones are left out."""
    columns = [[_cell(value) for value in values] for values in zip(*rows, strict=True)]
    kept: list[list[Cell]] = []
    for title, cells in zip(titles, columns, strict=True):
        if not kept or any(cell.text for cell in cells):
            kept.append([Cell(text=title, kind="n" if any(cell.kind == "n" for cell in cells) else "w"), *cells])
    return list(zip(*kept, strict=True))


def columns(items: Iterable[object], names: str) -> list[list[object]]:
    """A row for each item: its attributes, and itself for "-"; ``name:format`` formats a number."""
    return [[_attribute(item, *name.split(":", 1)) for name in names.split()] for item in items]


def _attribute(item: object, name: str, form: str = "") -> object:
    value = item if name == "-" else getattr(item, name)
    return Cell(text="" if value is None else format(value, form), kind="n") if form else value


def _cell(value: object) -> Cell:
    if isinstance(value, Cell):
        return value
    if isinstance(value, float):
        return number(value)
    return Cell(text="" if value is None else str(value), kind="n" if isinstance(value, int) else "w")


def judgement(good: bool, text: str) -> Cell:
    """With the colour of good or bad; the text alone has to say which."""
    return Cell(text=text, kind="good" if good else "bad")


def compared(name: str, over_best: float | None) -> Cell:
    """A prediction: the best, within 1 % of it, or so many times as long. None: it was not timed.

    >>> compared("a", 1.0), compared("a", 1.004), compared("a", 1.25).kind
    (Cell(text='the same', kind='good'), Cell(text='a, within 1 %', kind='good'), 'differs')
    """
    if over_best is None:
        return Cell(text=name, kind="differs")
    if over_best == 1:
        return Cell(text="the same", kind="good")
    if over_best <= 1 + WITHIN:
        return Cell(text=f"{name}, within 1 %", kind="good")
    return Cell(text=f"{name}, {over_best:.3f} times", kind="differs")


def number(value: float | None, places: int = 1, times: float = 1) -> Cell:
    """``times`` the value with a comma between thousands; empty for None.

    >>> number(26182.42).text, number(None).text, number(974, 2, 1e-3).text
    ('26,182.4', '', '0.97')
    """
    return Cell(text="" if value is None else f"{times * value:,.{places}f}", kind="n")
