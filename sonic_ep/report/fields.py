"""One object of a JSON document, read field by field; what is wrong names file, field, what was got and expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import Repr

from sonic_ep.config import ChoiceT, is_count

MISSING = object()
REPLACEMENT = "\ufffd"
_SHORT = Repr()
_SHORT.maxstring = 60
_SHORT.maxother = 60


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A JSON object in ``file``, at ``path`` within it (empty: the whole document).

    Fields that may be null may also be absent. All methods raise ``ValueError``.

    >>> Fields(file="a.json", path="environment", values={"gpus": -1}).count("gpus")
    Traceback (most recent call last):
    ValueError: a.json: environment.gpus: got -1, expected a whole number of at least 0
    """

    file: str
    path: str
    values: Mapping[str, object]

    def error(self, name: str, got: object, expected: str) -> ValueError:
        """The error for one field; ``got`` is MISSING where there is none."""
        place = f"{self.path}.{name}" if self.path else name
        found = "nothing" if got is MISSING else _SHORT.repr(got)
        return ValueError(f"{self.file}: {place}: got {found}, expected {expected}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        """A string, with what cannot be printed replaced."""
        value = self._required(name)
        if not isinstance(value, str):
            raise self.error(name, value, "a string")
        return printable(value)

    def maybe_text(self, name: str) -> str | None:
        """A string or null."""
        return self.text(name) if self.has(name) else None

    def choice(self, name: str, words: Sequence[str]) -> str:
        """One of ``words``."""
        value = self._required(name)
        if not isinstance(value, str) or value not in words:
            raise self.error(name, value, f"one of {', '.join(map(repr, words))}")
        return value

    def member(self, name: str, choices: type[ChoiceT]) -> ChoiceT:
        """The member of an enum of strings."""
        return choices(self.choice(name, [choice.value for choice in choices]))

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._required(name)
        if not _is_number(value):
            raise self.error(name, value, "a finite number")
        return float(value)  # type: ignore[arg-type]

    def maybe_number(self, name: str) -> float | None:
        """A finite number or null."""
        return self.number(name) if self.has(name) else None

    def positive(self, name: str) -> float:
        """A finite number above zero."""
        value = self.number(name)
        if value <= 0:
            raise self.error(name, self.values[name], "a number above 0")
        return value

    def maybe_positive(self, name: str) -> float | None:
        """A finite number above zero, or null."""
        return self.positive(name) if self.has(name) else None

    def count(self, name: str, least: int = 0) -> int:
        """A whole number of at least ``least``."""
        value = self._required(name)
        if not is_count(value, least=least):
            raise self.error(name, value, f"a whole number of at least {least}")
        return int(value)  # type: ignore[call-overload,no-any-return]

    def maybe_count(self, name: str, least: int = 0) -> int | None:
        """A whole number of at least ``least``, or null."""
        return self.count(name, least) if self.has(name) else None

    def counts(self, name: str, *, length: int | None = None, least: int = 0) -> tuple[int, ...]:
        """A list of whole numbers of at least ``least``, ``length`` of them; None: one or more."""
        found = self._required(name)
        sized = isinstance(found, list) and (len(found) >= 1 if length is None else len(found) == length)
        if not (isinstance(found, list) and sized and all(is_count(value, least=least) for value in found)):
            raise self.error(name, found, f"a list of {length or 'some'} whole numbers of at least {least}")
        return tuple(found)

    def flag(self, name: str) -> bool:
        """Either of the two."""
        value = self._required(name)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def maybe_flag(self, name: str) -> bool | None:
        """Either of the two, or null."""
        return self.flag(name) if self.has(name) else None

    def inside(self, name: str) -> Fields:
        """The object in a field."""
        value = self._required(name)
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return self._at(name, value)

    def maybe_inside(self, name: str) -> Fields | None:
        """The object in a field, or None where it is null."""
        return self.inside(name) if self.has(name) else None

    def each(self, name: str) -> tuple[Fields, ...]:
        """The objects of a list."""
        found = self._required(name)
        if not isinstance(found, list):
            raise self.error(name, found, "a list of objects")
        for position, value in enumerate(found):
            if not isinstance(value, dict):
                raise self.error(f"{name}[{position}]", value, "an object")
        return tuple(self._at(f"{name}[{position}]", value) for position, value in enumerate(found))

    def maybe_each(self, name: str) -> tuple[Fields, ...]:
        """The objects of a list; none where it is null."""
        return self.each(name) if self.has(name) else ()

    def _required(self, name: str) -> object:
        value = self.values.get(name, MISSING)
        if value is MISSING:
            raise self.error(name, MISSING, "this field")
        return value

    def _at(self, name: str, values: Mapping[str, object]) -> Fields:
        return Fields(file=self.file, path=f"{self.path}.{name}" if self.path else name, values=values)


def printable(text: str) -> str:
    r"""Without control characters, lone surrogates and marks of direction; whitespace becomes a space.

    >>> printable("a\tb\x00c")
    'a b\ufffdc'
    """
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else REPLACEMENT for letter in text)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
