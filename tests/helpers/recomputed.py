"""Graphs of ``sonic_ep.graphed`` without a GPU: what a replay would compute, functions compute again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sonic_ep import compat, graphs
from sonic_ep.capture_conditions import CaptureConditions
from sonic_ep.checks import ArgumentChecker
from sonic_ep.distributed.group import EPGroup


class RecomputedGraph:
    """replay: writes results where those of capture are."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


class Recomputed(graphs.GraphMemory):
    """Keeps no activations: backward computes them from the static inputs, as the last forward has left them."""

    def __init__(self) -> None:
        self.device, self.order = torch.device("cpu"), graphs.ReplayOrder()

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        yield

    def begin(self, number: int) -> None:
        self.order.overwrite(number)

    def captured(self, work: Any) -> tuple[Any, Any]:
        result, recording = work(), work.__self__
        is_forward = work.__name__ == "_outputs"
        again = partial(forward_again if is_forward else backward_again, recording, result)
        return RecomputedGraph(again), result


def forward_again(recording: Any, result: Any) -> None:
    for static, output in zip(result[0], recording._outputs()[0], strict=True):
        static.data.copy_(output.data)


def backward_again(recording: Any, result: Any) -> None:
    held = recording._outputs_held
    with torch.enable_grad():
        recording._outputs_held = recording._outputs()[0]
        for static, gradient in zip(result, recording._captured_gradients(), strict=True):
            if static is not None:
                static._memory.copy_(gradient._memory)
    recording._outputs_held = held


def recomputed(patch: pytest.MonkeyPatch, memory: Recomputed, function: Any, *samples: Tensor) -> graphs.Graphed[Any]:
    """``sonic_ep.graphed`` on the CPU, and with the reference."""
    patch.setattr(graphs, "check_captures", lambda ep: None)
    # Nothing else is written where gradients were.
    patch.setattr(compat, "unowned", lambda tensor: tensor)
    checker = ArgumentChecker(group=EPGroup(rank=0, world_size=1))
    conditions = CaptureConditions.of(checker, function, samples)
    return graphs.Graphed(graphs.Recording(function, samples, conditions, memory))
