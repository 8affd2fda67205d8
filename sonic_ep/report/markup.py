"""HTML that is escaped by construction: whatever is not ``Markup`` already is text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MOST_ROWS = 24
LONG_LETTERS = 30
VOID = ("br", "img", "link", "meta", "source")


class Markup(str):
    """HTML. Only ``element`` and ``join`` make it."""

    __slots__ = ()


def element(tag: str, *children: str | Markup, **attributes: str) -> Markup:
    """One element; children that are no Markup are escaped, attributes always. ``class_`` is the attribute class.

    >>> element("td", "<b>", element("br"), class_="n")
    '<td class="n">&lt;b&gt;<br></td>'
    """
    words = "".join(f' {_attribute(name)}="{escape(value)}"' for name, value in attributes.items())
    if tag in VOID:
        return Markup(f"<{tag}{words}>")
    return Markup(f"<{tag}{words}>{join(children)}</{tag}>")


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def join(children: Sequence[str | Markup]) -> Markup:
    """One after the other; those that are no Markup are escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a caption. The first cell of a row names it. Empty columns are left out.

    words: titles of the columns that hold words; all others hold numbers, to the right. flat: no cell wraps.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Markup, ...], ...]
    words: tuple[str, ...] = ()
    flat: bool = False

    def markup(self) -> Markup:
        """In a container of its own that scrolls where the table is wider than the page, or has more than 24 rows."""
        kept = [place for place in range(len(self.columns)) if place == 0 or any(row[place] for row in self.rows)]
        head = [
            element("th", self.columns[place], scope="col", class_=self._class(self.columns[place])) for place in kept
        ]
        body = [element("tr", *(self._cell(row, place) for place in kept)) for row in self.rows]
        tall = len(self.rows) > MOST_ROWS
        caption = f"{self.caption} ({len(self.rows)} rows)" if tall else self.caption
        table = element(
            "table",
            element("caption", element("span", caption)),
            element("thead", element("tr", *head)),
            element("tbody", *body),
        )
        kinds = ["scroll", *(["tall"] if tall else []), *(["flat"] if self.flat else [])]
        return element("div", table, class_=" ".join(kinds), role="region", aria_label=self.caption, tabindex="0")

    def _cell(self, row: Sequence[str | Markup], place: int) -> Markup:
        if place == 0:
            return element("th", row[place], scope="row")
        kind = self._class(self.columns[place])
        long = kind == "w" and len(row[place]) > LONG_LETTERS
        return element("td", row[place], class_="w long" if long else kind)

    def _class(self, column: str) -> str:
        return "w" if column in self.words or column == self.columns[0] else "n"


def number(value: float | None, places: int = 1) -> str:
    """With a comma between thousands; empty for None.

    >>> number(26182.42), number(None), number(0.974, 2)
    ('26,182.4', '', '0.97')
    """
    return "" if value is None else f"{value:,.{places}f}"


def verdict(good: bool, words: str) -> Markup:
    """Words with the colour of good or bad; the words alone have to say which."""
    return element("span", words, class_="good" if good else "bad")
