"""Dataclasses as JSON objects, and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from reprlib import repr as shortened
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

# Metadata of a field: its name in JSON, where that is another; IN_LINE: its own fields go into the object around it.
NAME = "name"
IN_LINE = {NAME: ""}
# A larger number is no measurement.
MOST = 2**62


def written(value: Any) -> Any:
    """``value`` as JSON: objects for dataclasses, lists for tuples, values for members of enums."""
    if is_dataclass(value):
        found: dict[str, Any] = {}
        for field in fields(value):
            inner = written(getattr(value, field.name))
            found |= inner if field.metadata == IN_LINE else {field.name: inner}
        return found
    if isinstance(value, Enum):
        return value.value
    return [written(entry) for entry in value] if isinstance(value, tuple | list) else value


def read(hint: Any, value: Any, where: str) -> Any:
    """A value of type ``hint``, a dataclass for one, from JSON. Raises ``ValueError`` that names the field.

    Numbers are from 0 to 2^62, lists not empty, other keys are ignored. Of a union, its first member or null is read.
    """
    options = get_args(hint)
    if get_origin(hint) is tuple:
        _require(isinstance(value, list) and value, where, value, "a list that is not empty")
        return tuple(read(options[0], entry, f"{where}[{place}]") for place, entry in enumerate(value))
    if options:
        return None if value is None and NoneType in options else read(options[0], value, where)
    if is_dataclass(hint):
        _require(isinstance(value, dict), where, value, "an object")
        return _object(hint, value, where)
    if issubclass(hint, Enum):
        choices = [choice.value for choice in hint]
        _require(value in choices, where, value, f"one of {', '.join(choices)}")
    elif hint in (int, float):
        # Comparisons of Python's numbers are exact, whatever their size; NaN is in no range.
        fits = isinstance(value, int | hint) and not isinstance(value, bool) and 0 <= value <= MOST
        _require(fits, where, value, f"{'a whole number' if hint is int else 'a number'} from 0 to {MOST}")
    else:
        _require(isinstance(value, hint), where, value, f"a {hint.__name__}")
    return hint(value)


def _object(kind: Any, document: dict[str, Any], where: str) -> Any:
    hints, found = get_type_hints(kind), {}
    for field in fields(kind):
        name = field.metadata.get(NAME, field.name)
        if name and name not in document:
            raise ValueError(f"{where}.{name}: got nothing, expected a value")
        inner = (document[name], f"{where}.{name}") if name else (document, where)
        found[field.name] = read(hints[field.name], *inner)
    return kind(**found)


def _require(holds: object, where: str, got: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{where}: got {shortened(got)}, expected {expected}")
