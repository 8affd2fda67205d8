"""A JSON document read field by field: what is missing or of another kind is a ``ValueError`` that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import isfinite
from typing import Any, TypeVar

from sonic_ep.config import is_count, parse_choice

ChoiceT = TypeVar("ChoiceT", bound=Enum)


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The fields of one object. where: the way to it from the top, as messages show it."""

    where: str
    values: Mapping[str, Any]

    @staticmethod
    def of(where: str, value: object) -> Fields:
        """``value`` as an object with fields."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: got {value!r}, expected an object")
        return Fields(where=where, values=value)

    def value(self, name: str) -> Any:
        """Whatever stands there."""
        if name not in self.values:
            raise ValueError(f"{self.where}.{name}: got nothing, expected a value")
        return self.values[name]

    def number(self, name: str) -> float:
        """A finite number of at least 0."""
        value = self.value(name)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= 0
        self._require(fits, name, value, "a number of at least 0")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """A number, or null."""
        return None if self.value(name) is None else self.number(name)

    def count(self, name: str, *, least: int = 1) -> int:
        """A whole number of at least ``least``."""
        value = self.value(name)
        self._require(is_count(value, least=least), name, value, f"a whole number of at least {least}")
        return int(value)

    def count_or_none(self, name: str) -> int | None:
        """A whole number of at least 1, or null."""
        return None if self.value(name) is None else self.count(name)

    def text(self, name: str) -> str:
        """A string."""
        value = self.value(name)
        self._require(isinstance(value, str), name, value, "a string")
        return str(value)

    def text_or_none(self, name: str) -> str | None:
        """A string, or null."""
        return None if self.value(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.value(name)
        self._require(isinstance(value, bool), name, value, "true or false")
        return bool(value)

    def choice(self, name: str, choices: type[ChoiceT]) -> ChoiceT:
        """A member of ``choices``, by its value."""
        return parse_choice(f"{self.where}.{name}", self.value(name), choices)

    def part(self, name: str) -> Fields:
        """An object."""
        return Fields.of(f"{self.where}.{name}", self.value(name))

    def parts(self, name: str) -> list[Fields]:
        """A list of objects."""
        return [Fields.of(f"{self.where}.{name}[{place}]", value) for place, value in enumerate(self._list(name))]

    def counts(self, name: str) -> tuple[int, ...]:
        """A list, not empty, of whole numbers of at least 0."""
        values = self._list(name)
        fits = bool(values) and all(is_count(value) for value in values)
        self._require(fits, name, values, "a list of whole numbers of at least 0")
        return tuple(values)

    def _list(self, name: str) -> list[Any]:
        value = self.value(name)
        self._require(isinstance(value, list), name, value, "a list")
        return list(value)

    def _require(self, holds: bool, name: str, got: object, expected: str) -> None:
        if not holds:
            raise ValueError(f"{self.where}.{name}: got {got!r}, expected {expected}")
