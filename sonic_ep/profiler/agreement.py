"""How ranks stay in step: what one of them finds, all of them know, and raise alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sonic_ep.distributed.group import EPGroup

ValueT = TypeVar("ValueT")


class WrongResultError(AssertionError):
    """A primitive gave another result than the reference on some rank; every rank raises it, and nothing is timed."""


def gathered(group: EPGroup, value: ValueT) -> list[ValueT]:
    """Collective: ``value`` of every rank, in rank order. It is pickled: for a few words, never for rows."""
    if group.world_size == 1:
        return [value]
    values: list[Any] = [None] * group.world_size
    dist.all_gather_object(values, value, group=group.process_group)
    return values


def in_step(
    group: EPGroup, function: Callable[[], ValueT], *, expected: type[Exception], raised: type[Exception]
) -> ValueT:
    """Collective: what ``function`` returns; an error on one rank is one on every rank.

    The host must not wait for other ranks inside ``function``: what is queued on a GPU may.

    Raises ``raised`` with what each rank said if ``expected`` was raised, ``RuntimeError`` for any other error.
    """
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:
        failure = error
    said = gathered(group, None if failure is None else (_text(group, failure), isinstance(failure, expected)))
    failures = [words for words in said if words is not None]
    if not failures:
        return result
    kind = raised if all(foreseen for _, foreseen in failures) else RuntimeError
    raise kind("; ".join(text for text, _ in failures)) from failure


def require_alike(group: EPGroup, described: Sequence[Mapping[str, object]]) -> None:
    """Raise ``ValueError`` unless all ranks, in their order in ``described``, say the same of everything.

    All hold the same ``described``, so all raise alike. The message names the ranks that differ from most others.
    """
    for name in described[0]:
        values = [of_rank[name] for of_rank in described]
        usual, _ = Counter(map(repr, values)).most_common(1)[0]
        odd = [rank for rank, value in enumerate(values) if repr(value) != usual]
        if odd:
            got = ", ".join(f"{values[rank]!r} on rank {rank}" for rank in odd)
            raise ValueError(f"{group}: {name}: got {got}, expected {usual} as on the other ranks")


def _text(group: EPGroup, failure: Exception) -> str:
    text = str(failure) or type(failure).__name__
    return text if text.startswith(str(group)) else f"{group}: {text}"
