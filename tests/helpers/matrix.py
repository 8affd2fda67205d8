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
# No flag changes a bit (test_matrix): every day both flags run, and on the reference no flag.
EVERYDAY = {"reference": (NO_FLAGS, BOTH_FLAGS), "fast": (BOTH_FLAGS,)}
by_backend_and_flags = pytest.mark.parametrize(
    ("backend", "flags"),
    [
        pytest.param(
            backend,
            flags,
            marks=() if flags in EVERYDAY[backend] else pytest.mark.thorough,
            id="-".join([backend, *(name for name, on in flags.items() if on)]),
        )
        for backend, flags in product(BACKENDS, FLAGS)
    ],
)


def matrix(everyday: Callable[[Cell], bool] | None = None, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with every combination of both backends and the values of ``axes``.

    Combinations for which ``everyday`` is false are marked ``thorough``. Its default, on both backends: on two ranks
    (or the first number of ranks) every case, and every pair of values of the other axes; on one and three, every mode.
    """
    values: Axes = {"backend": BACKENDS, **{name: tuple(axis) for name, axis in axes.items()}}
    chosen = () if everyday else {tuple(cell[name] for name in values) for cell in _everyday(values)}
    parameters = []
    for place in product(*values.values()):
        cell = dict(zip(values, place, strict=True))
        if cell["backend"] == "reference" or cell["world_size"] in WORLD_SIZES:
            daily = everyday(cell) if everyday else place in chosen
            marks = () if daily else pytest.mark.thorough
            parameters.append(pytest.param(*place, marks=marks, id="-".join(map(_name, place))))
    return pytest.mark.parametrize(tuple(values), parameters)


def _everyday(axes: Axes) -> Iterator[Cell]:
    sizes, cases = axes["world_size"], axes.get("case", (None,))
    pairs = pairwise({name: axis for name, axis in axes.items() if name not in ("backend", "world_size", "case")})
    for place, backend in product(range(max(len(pairs), len(cases))), axes["backend"]):
        size = 2 if 2 in sizes else sizes[0]
        yield {"backend": backend, "world_size": size, "case": cases[place % len(cases)], **pairs[place % len(pairs)]}
    # Among the cases from the tenth on are those with other numbers of tokens on every rank.
    for size, backend, place in product({1, 3} & set(sizes), axes["backend"], range(9, 9 + len(DispatchMode))):
        yield {name: axis[place % len(axis)] for name, axis in axes.items()} | {"backend": backend, "world_size": size}


def _name(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_name, value))
    return str(getattr(value, "value", value)).removeprefix("torch.")
