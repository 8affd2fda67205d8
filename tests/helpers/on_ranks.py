"""``@on_ranks(1, 2, 3)`` on ``def test_rows_arrive(rank: Rank, backend: str)``: the body runs on live ranks."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sonic_ep.testing import Rank

POOLS = ("pool", "cpu_pool", "cuda_pool")
SIZE = "world_size"
Test = Callable[..., None]


def on_ranks(*world_sizes: Any, pool: str = "pool") -> Callable[[Test], Test]:
    """Makes a test of a body that takes a ``Rank`` first: every rank calls it with the test's other arguments.

    world_sizes: numbers of ranks, or ``pytest.param`` of one; none where a parameter of the test is ``world_size``.
    pool: the fixture: "pool" (the CPU, and GPUs where there are any), "cpu_pool" or "cuda_pool".
    Arguments are pickled; the body is found by name, at the top level of its module, and returns nothing.
    """
    if pool not in POOLS:
        raise ValueError(f"pool: got {pool!r}, expected one of {', '.join(POOLS)}")

    def decorate(body: Test) -> Test:
        names = list(inspect.signature(body).parameters)
        if names[:1] != ["rank"] or set(names) & set(POOLS):
            raise TypeError(f"{body.__qualname__}: got parameters {names}, expected 'rank' first and no pool")

        @functools.wraps(body)
        def test(**given: Any) -> None:
            __tracebackhide__ = True
            arguments = {name: given[name] for name in names[1:]}
            given[pool].run(call_body, body.__module__, body.__qualname__, arguments, world_size=given[SIZE])

        asked = dict.fromkeys((pool, SIZE, *names[1:]))
        keyword = inspect.Parameter.KEYWORD_ONLY
        test.__signature__ = inspect.Signature([inspect.Parameter(name, keyword) for name in asked])  # type: ignore[attr-defined]
        test.body = body  # type: ignore[attr-defined]
        return pytest.mark.parametrize(SIZE, world_sizes)(test) if world_sizes else test

    return decorate


def call_body(rank: Rank, module: str, name: str, arguments: Mapping[str, Any]) -> None:
    """On a rank: the body of a test that ``on_ranks`` has decorated."""
    test = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    returned = test.body(rank, **arguments)  # type: ignore[attr-defined]
    if returned is not None:
        raise TypeError(f"{name}: got a body that returns {type(returned).__name__}, expected one that asserts")
