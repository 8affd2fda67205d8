"""How a work is launched and proven: other inputs, and the result of the last of its rounds."""

import weakref

import pytest
import torch

from sonic_ep.benchmark.arena import (
    ROUNDS_OF_LARGE,
    ROUNDS_OF_SMALL,
    Arena,
    How,
    KeepLast,
    Rounds,
    Work,
    WrongError,
    other_inputs,
)
from sonic_ep.benchmark.results import Results
from sonic_ep.benchmark.workload import Shape
from sonic_ep.distributed.group import EPGroup
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
    with pytest.raises(IndexError):
        keep.take()


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


def test_inputs_that_overlap_come_back_and_one_given_twice_is_turned_once() -> None:
    given = torch.arange(1.0, 7.0).view(3, 2).requires_grad_()
    before, part = given.detach().clone(), given.detach()[1:]
    with other_inputs([given, given, part]):
        assert given.tolist() == [[-5.0, -6.0], [3.0, 4.0], [1.0, 2.0]]
    assert_bitwise(given.detach(), before, "overlapping inputs")


def test_inputs_come_back_where_one_cannot_be_turned() -> None:
    given, repeated = torch.tensor([1.0, 2.0]), torch.tensor([3.0]).expand(2)
    with pytest.raises(RuntimeError), other_inputs([given, repeated]):
        pytest.fail("a tensor whose elements share memory was turned")
    assert given.tolist() == [1.0, 2.0]


def test_inputs_come_back_after_an_error() -> None:
    given = torch.tensor([1.0, 2.0])
    with pytest.raises(ZeroDivisionError), other_inputs([given]):
        _ = 1 / 0
    assert given.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("tokens", "how", "expected"),
    [
        (2**20, How.EAGER, ROUNDS_OF_SMALL),
        (2**20, How.QUEUED, ROUNDS_OF_LARGE),
        (2**20, How.GRAPH, ROUNDS_OF_LARGE),
        (16, How.QUEUED, ROUNDS_OF_SMALL),
    ],
)
def test_what_the_host_may_take_longer_for_has_more_rounds(
    tokens: int, how: How, expected: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Rounds] = []

    def alternate(self: Arena, works: list[Work], how: How, rounds: Rounds) -> dict[str, WrongError]:
        asked.append(rounds)
        return {"a work": WrongError("not run")}

    monkeypatch.setattr(Arena, "alternate", alternate)
    shape = Shape(tokens=tokens, hidden=64, num_experts=8, top_k=2)
    work = Work(name="a work", shape=shape, function=lambda: None, check=lambda result: None)
    group = EPGroup(rank=0, world_size=1)
    arena = Arena(
        group=group,
        device=torch.device("cuda"),
        barrier_before_write=lambda: None,
        results=Results(environment={}, ceilings=None),
    )
    with pytest.raises(WrongError, match="not run"):
        arena.run(work, how)
    assert asked == [expected]
