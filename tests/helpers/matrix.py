"""The settings of a test: the product of its axes, of which ``make test`` runs a part on the CPU."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import pytest
from backends import BACKENDS, WORLD_SIZES

from sonic_ep import CombineMode, DispatchMode
from sonic_ep.testing import pairwise

Cell = Mapping[str, Any]
Axes = Mapping[str, Sequence[Any]]

SIZES = (1, 2, 3, 4, 8)
DIAGONAL = tuple(zip(DispatchMode, CombineMode, strict=True))
FLAGS = [
    {"redispatch_x_in_backward": again, "cpu_sync_on_runtime": exact}
    for again, exact in product((False, True), repeat=2)
]
NO_FLAGS, BOTH_FLAGS = FLAGS[0], FLAGS[-1]
# No flag changes a bit (test_matrix); interpreted, the setting with both runs every day.
by_backend_and_flags = pytest.mark.parametrize(
    ("backend", "flags"),
    [
        pytest.param(
            backend,
            flags,
            marks=pytest.mark.thorough if backend == "fast" and flags != BOTH_FLAGS else (),
            id="-".join([backend, *(name for name, on in flags.items() if on)]),
        )
        for backend, flags in product(BACKENDS, FLAGS)
    ],
)


def matrix(everyday: Callable[[Cell], bool] | None = None, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with every combination of both backends and the values of ``axes``.

    Combinations for which ``everyday`` is false are marked ``thorough``. Its default: on two ranks (or the first number
    of ranks) every pair of values, and on one and three ranks every mode.
    """
    values: Axes = {"backend": BACKENDS, **{name: tuple(axis) for name, axis in axes.items()}}
    chosen = {tuple(cell[name] for name in values) for cell in _everyday(values)}
    parameters = []
    for place in product(*values.values()):
        cell = dict(zip(values, place, strict=True))
        if cell["backend"] == "reference" or cell["world_size"] in WORLD_SIZES:
            daily = everyday(cell) if everyday else place in chosen
            marks = () if daily else pytest.mark.thorough
            parameters.append(pytest.param(*place, marks=marks, id="-".join(map(_name, place))))
    return pytest.mark.parametrize(tuple(values), parameters)


def _everyday(axes: Axes) -> Iterator[Cell]:
    sizes = axes["world_size"]
    yield from pairwise({**axes, "world_size": (2 if 2 in sizes else sizes[0],)})
    for size, modes in product({1, 3} & set(sizes), {"dispatch", "combine"} & set(axes)):
        # Every mode on both backends; the values of the other axes take turns.
        for place, (backend, mode) in enumerate(product(axes["backend"], axes[modes])):
            others = {name: axis[place % len(axis)] for name, axis in axes.items()}
            yield {**others, "backend": backend, modes: mode, "world_size": size}


def _name(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_name, value))
    return str(getattr(value, "value", value)).removeprefix("torch.")
