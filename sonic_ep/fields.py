"""A JSON document read field by field: what is wrong is a ``ValueError`` that names field, got and expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import Repr
from typing import Any

from sonic_ep.config import ChoiceT, is_count

# Whatever is larger is no measurement, and would not fit into what counts and draws later on.
MOST = 2**62
# Stands in for "above 0", so that quotients of two numbers are finite.
LEAST_POSITIVE = 1e-9
LETTERS_OF_GOT = 60


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A JSON object. All methods raise ``ValueError``.

    path: the way to it from the top, empty for the whole document. file: where the document stands, empty if messages
    need not say it. sparse: fields that may be null may also be absent.

    >>> Fields(file="a.json", path="environment", values={"gpus": -1}).count("gpus", most=8)
    Traceback (most recent call last):
    ValueError: a.json: environment.gpus: got -1, expected a whole number from 1 to 8
    """

    path: str
    values: Mapping[str, Any]
    file: str = ""
    sparse: bool = False

    @staticmethod
    def of(where: str, value: object) -> Fields:
        """``value`` as an object with fields, at ``where``."""
        if not isinstance(value, dict):
            raise ValueError(f"{where}: got {shortened(value)}, expected an object")
        return Fields(path=where, values=value)

    @property
    def where(self) -> str:
        """File and path, as messages show them."""
        return ": ".join(word for word in (self.file, self.path) if word)

    def error(self, name: str, got: object, expected: str) -> ValueError:
        """The error for one field."""
        return self._error(name, shortened(got), expected)

    def value(self, name: str) -> Any:
        """Whatever stands there."""
        if name not in self.values:
            raise self._error(name, "nothing", "a value")
        return self.values[name]

    def number(self, name: str, *, least: float = 0.0) -> float:
        """A number from ``least`` to 2^62."""
        value = self.value(name)
        # Comparisons of Python's numbers are exact, whatever their size; NaN is in no range.
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= MOST
        self._require(fits, name, f"a number from {least:g} to {MOST:g}")
        return float(value)

    def number_or_none(self, name: str, *, least: float = 0.0) -> float | None:
        """A number, or null."""
        return None if self._is_null(name) else self.number(name, least=least)

    def positive(self, name: str) -> float:
        """A number above zero."""
        return self.number(name, least=LEAST_POSITIVE)

    def positive_or_none(self, name: str) -> float | None:
        """A number above zero, or null."""
        return self.number_or_none(name, least=LEAST_POSITIVE)

    def count(self, name: str, *, least: int = 1, most: int = MOST) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self.value(name)
        self._require(_is_count(value, least, most), name, f"a whole number from {least} to {most}")
        return int(value)

    def count_or_none(self, name: str, *, least: int = 1) -> int | None:
        """A whole number of at least ``least``, or null."""
        return None if self._is_null(name) else self.count(name, least=least)

    def counts(self, name: str, *, least: int = 0, length: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers of at least ``least``, ``length`` of them; None: one or more."""
        values = self.value(name)
        sized = isinstance(values, list) and (bool(values) if length is None else len(values) == length)
        fits = sized and all(_is_count(value, least, MOST) for value in values)
        self._require(fits, name, f"a list of {length or 'some'} whole numbers from {least} to {MOST}")
        return tuple(values)

    def text(self, name: str) -> str:
        """A string."""
        value = self.value(name)
        self._require(isinstance(value, str), name, "a string")
        return str(value)

    def text_or_none(self, name: str) -> str | None:
        """A string, or null."""
        return None if self._is_null(name) else self.text(name)

    def word(self, name: str, words: Sequence[str]) -> str:
        """One of ``words``."""
        value = self.value(name)
        fits = isinstance(value, str) and value in words
        self._require(fits, name, f"one of {', '.join(map(repr, words))}")
        return str(value)

    def choice(self, name: str, choices: type[ChoiceT]) -> ChoiceT:
        """A member of an enum of strings, by its value."""
        return choices(self.word(name, [choice.value for choice in choices]))

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.value(name)
        self._require(isinstance(value, bool), name, "true or false")
        return bool(value)

    def flag_or_none(self, name: str) -> bool | None:
        """True or false, or null."""
        return None if self._is_null(name) else self.flag(name)

    def part(self, name: str) -> Fields:
        """An object."""
        return self._inside(name, self.value(name))

    def part_or_none(self, name: str) -> Fields | None:
        """An object, or null."""
        return None if self._is_null(name) else self.part(name)

    def parts(self, name: str) -> list[Fields]:
        """A list of objects."""
        values = self.value(name)
        self._require(isinstance(values, list), name, "a list of objects")
        return [self._inside(f"{name}[{place}]", value) for place, value in enumerate(values)]

    def parts_or_none(self, name: str) -> list[Fields]:
        """A list of objects; null is an empty one."""
        return [] if self._is_null(name) else self.parts(name)

    def _is_null(self, name: str) -> bool:
        return (self.values.get(name) if self.sparse else self.value(name)) is None

    def _inside(self, name: str, value: object) -> Fields:
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return replace(self, path=self._path(name), values=value)

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise self.error(name, self.values[name], expected)

    def _error(self, name: str, got: str, expected: str) -> ValueError:
        where = ": ".join(word for word in (self.file, self._path(name)) if word)
        return ValueError(f"{where}: got {got}, expected {expected}")

    def _path(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def shortened(value: object) -> str:
    """As Python writes it, with the middle of what is long left out."""
    short = Repr()
    short.maxstring = short.maxother = LETTERS_OF_GOT
    return short.repr(value)


def _is_count(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and is_count(value, least=least) and value <= most
