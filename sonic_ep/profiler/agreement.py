"""Errors that ranks agree on: what one of them raises, all of them raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sonic_ep.distributed.group import EPGroup

ValueT = TypeVar("ValueT")


class WrongResultError(AssertionError):
    """A result differs from the reference on some rank; every rank raises it."""


def gathered(group: EPGroup, value: ValueT) -> list[ValueT]:
    """Collective. ``value`` of every rank, pickled, in rank order."""
    values: list[Any] = [value] * group.world_size
    if group.world_size > 1:
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
    failure, text = None, ""
    try:
        result = function()
    except Exception as error:
        failure, text = error, str(error) or type(error).__name__
        text = text if text.startswith(str(group)) else f"{group}: {text}"
    failures = [found for found in gathered(group, (text, isinstance(failure, expected))) if found[0]]
    if not failures:
        return result
    kind = (raised or expected) if all(as_expected for _, as_expected in failures) else RuntimeError
    try:
        raise kind("; ".join(text for text, _ in failures)) from failure
    finally:
        # Its traceback holds this frame, which would hold it for good.
        del failure


def require_alike(group: EPGroup, described: Sequence[Mapping[str, object]]) -> None:
    """Raise ``ValueError``, naming the ranks that differ from most others, unless all of ``described`` are equal."""
    for name in described[0]:
        values = [repr(of_rank[name]) for of_rank in described]
        ((expected, _),) = Counter(values).most_common(1)
        got = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values) if value != expected)
        if got:
            raise ValueError(f"{group}: {name}: got {got}, expected {expected} as on the other ranks")
