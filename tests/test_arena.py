"""How a work is launched and proven: other inputs, and the result of the last of its rounds."""

import weakref

import pytest
import torch

from sonic_ep.benchmark.arena import KeepLast, Rounds, other_inputs
from sonic_ep.testing import assert_bitwise

ROUNDS = Rounds(timed=3, warmup=2)
LARGEST_NUMBER = torch.finfo(torch.bfloat16).max


def test_the_last_round_alone_is_kept() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        alive = [made_before() for made_before in made if made_before() is not None]
        assert alive == [], "a result of an earlier round takes memory"
        result = torch.tensor([float(len(made))])
        made.append(weakref.ref(result))
        return result

    keep = KeepLast(make, ROUNDS.count)
    for _ in range(ROUNDS.timed + ROUNDS.warmup):
        keep()
    last = keep.take()
    assert last.tolist() == [4.0]
    assert made[-1]() is last


@pytest.mark.parametrize("rounds", [0, ROUNDS.count - 1])
def test_without_a_last_round_there_is_nothing_to_check(rounds: int) -> None:
    keep = KeepLast(lambda: 0, ROUNDS.count)
    for _ in range(rounds):
        keep()
    with pytest.raises(IndexError):
        keep.take()


def test_other_inputs_are_others_and_then_the_very_same() -> None:
    floats = torch.tensor([[0.0, -0.0], [float("nan"), float("inf")], [LARGEST_NUMBER, 1e-40]], dtype=torch.bfloat16)
    inputs = [floats, torch.tensor([3, 5, -1]), torch.ones(0, 4), torch.tensor([2.0])]
    before, places = [tensor.clone() for tensor in inputs], [tensor.data_ptr() for tensor in inputs]
    with other_inputs(inputs):
        assert_bitwise(inputs[0], -before[0][[2, 0, 1]], "rows one further, with the other sign")
        assert inputs[1].tolist() == [-1, 3, 5]
        assert inputs[3].tolist() == [-2.0]
    for tensor, right, place in zip(inputs, before, places, strict=True):
        assert_bitwise(tensor, right, "an input")
        assert tensor.data_ptr() == place


def test_inputs_come_back_after_an_error() -> None:
    given = torch.tensor([1.0, 2.0])
    with pytest.raises(ZeroDivisionError), other_inputs([given]):
        _ = 1 / 0
    assert given.tolist() == [1.0, 2.0]
