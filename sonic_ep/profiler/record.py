"""Dataclasses as JSON objects, and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from reprlib import repr as shortened
from types import MappingProxyType, NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

RecordT = TypeVar("RecordT")

# Metadata of a field: its dataclass is no object of its own, but part of the object around it; or it is not written.
IN_LINE = MappingProxyType({"json": "in line"})
OMITTED = MappingProxyType({"json": "omitted"})
# A larger number is no measurement.
MOST = 2**62


def named(name: str) -> MappingProxyType[str, str]:
    """Metadata of a field that has another name in JSON."""
    return MappingProxyType({"name": name})


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


def read(kind: type[RecordT], document: object, where: str) -> RecordT:
    """The dataclass ``kind`` from a JSON object; numbers are from 0 to 2^62, lists not empty, other keys are ignored.

    A union is read as its first member, or as null where it may be None. Raises ``ValueError`` that names the field.

    >>> from sonic_ep.config import EPConfig
    >>> read(EPConfig, {"dispatch": "none"}, "config")
    Traceback (most recent call last):
    ValueError: config.dispatch: got 'none', expected one of all_gather, all_to_all, rank_dedup
    """
    if not isinstance(document, dict):
        raise _error(where, document, "an object")
    hints, values = get_type_hints(kind), {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = field.metadata.get("name", field.name)
        if field.metadata == IN_LINE:
            values[field.name] = read(hints[field.name], document, where)
        elif field.metadata != OMITTED:
            if name not in document:
                raise ValueError(f"{where}.{name}: got nothing, expected a value")
            values[field.name] = _read_value(hints[field.name], document[name], f"{where}.{name}")
    return kind(**values)


def _read_value(hint: Any, value: Any, where: str) -> Any:
    options = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not value:
            raise _error(where, value, "a list that is not empty")
        return tuple(_read_value(options[0], entry, f"{where}[{place}]") for place, entry in enumerate(value))
    if options:
        return None if value is None and NoneType in options else _read_value(options[0], value, where)
    if is_dataclass(hint):
        return read(hint, value, where)  # type: ignore[arg-type]
    if issubclass(hint, Enum):
        choices = [choice.value for choice in hint]
        fits, expected = value in choices, f"one of {', '.join(choices)}"
    elif hint in (int, float):
        # Comparisons of Python's numbers are exact, whatever their size; NaN is in no range.
        fits = isinstance(value, int | hint) and not isinstance(value, bool) and 0 <= value <= MOST
        expected = f"{'a whole number' if hint is int else 'a number'} from 0 to {MOST}"
    else:
        fits, expected = isinstance(value, hint), f"a {hint.__name__}"
    if not fits:
        raise _error(where, value, expected)
    return hint(value)


def _error(where: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{where}: got {shortened(got)}, expected {expected}")
