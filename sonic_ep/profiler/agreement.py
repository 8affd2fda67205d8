"""Errors that ranks agree on: what one of them raises, all of them raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sonic_ep.group import EPGroup

ValueT = TypeVar("ValueT")


class WrongResultError(AssertionError):
    """A result differs from the reference on some rank; every rank raises it."""


def gathered(group: EPGroup, value: ValueT) -> list[ValueT]:
    """Collective. ``value`` of every rank, pickled, in rank order."""
    if group.world_size == 1:
        return [value]
    values: list[Any] = [None] * group.world_size
    dist.all_gather_object(values, value, group=group.process_group)
    return values


def in_step(
    group: EPGroup,
    function: Callable[[], ValueT],
    expected: type[Exception] = RuntimeError,
    raised: type[Exception] | None = None,
) -> ValueT:
    """Collective. The result of ``function``, inside which the host must not wait for other ranks.

    Raises on every rank what any rank raised: ``raised`` (default: ``expected``) if all errors are ``expected``, else
    ``RuntimeError``.
    """
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:
        failure = error
    of_ranks = gathered(group, None if failure is None else (_text(group, failure), isinstance(failure, expected)))
    failures = [of_rank for of_rank in of_ranks if of_rank is not None]
    if not failures:
        return result
    kind = (raised or expected) if all(as_expected for _, as_expected in failures) else RuntimeError
    raise kind("; ".join(text for text, _ in failures)) from failure


def require_alike(group: EPGroup, described: Sequence[Mapping[str, object]]) -> None:
    """Raise ``ValueError``, naming the ranks that differ from most others, unless all of ``described`` are equal."""
    for name in described[0]:
        values = [of_rank[name] for of_rank in described]
        usual, _ = Counter(map(repr, values)).most_common(1)[0]
        got = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values) if repr(value) != usual)
        if got:
            raise ValueError(f"{group}: {name}: got {got}, expected {usual} as on the other ranks")


def _text(group: EPGroup, failure: Exception) -> str:
    text = str(failure) or type(failure).__name__
    return text if text.startswith(str(group)) else f"{group}: {text}"
