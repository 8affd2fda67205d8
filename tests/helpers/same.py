"""Many tensors that have to be the same bits."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from sonic_ep.testing import assert_bitwise

Tensors = Mapping[str, Tensor] | Iterable[Tensor | None]


def assert_same_bits(found: Tensors, expected: Tensors, what: str = "") -> None:
    """``assert_bitwise`` for each of both; None, as of a gradient that does not exist, equals None alone."""
    found, expected = by_name(found), by_name(expected)
    assert found.keys() == expected.keys(), f"got {list(found)}, expected {list(expected)} {what}"
    for name, want in expected.items():
        got = found[name]
        assert (got is None) == (want is None), f"{name} {what}: got {got}, expected {want}"
        if got is not None and want is not None:
            assert_bitwise(got, want, f"{name} {what}")


def by_name(tensors: Tensors) -> dict[str, Tensor | None]:
    return dict(tensors) if isinstance(tensors, Mapping) else {f"tensor {n}": t for n, t in enumerate(tensors)}
