"""A layer whose routing is given, under test: ``moe_routed`` over a group, held against the dense oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.arena import Arena, Work, agree
from sonic_ep.benchmark.layer import Pass
from sonic_ep.benchmark.oracle import MOST_SLOTS, accuracy_of_all, as_rows, dense_routed, wider
from sonic_ep.benchmark.routed_call import RoutedCall
from sonic_ep.config import EPConfig
from sonic_ep.group import EPGroup
from sonic_ep.testing.checks import Accuracy, Yardstick, assert_bitwise, expect


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedUnderTest:
    """A call of this rank over ``group``, and the backend and configuration whose answer counts.

    arena: of all ranks, which agree on what is right; group may be this rank alone.
    """

    arena: Arena
    group: EPGroup
    call: RoutedCall
    backend: str
    config: EPConfig

    def over(self) -> ExpertParallel:
        """The layer."""
        capacity = max(1, self.call.x.shape[0]) if self.group.world_size > 1 else None
        process_group = self.group.process_group
        return ExpertParallel(process_group, backend=self.backend, config=self.config, max_tokens_per_rank=capacity)

    @cached_property
    def answer(self) -> list[Tensor]:
        """Collective over the arena: the output and all gradients. Raises ``WrongError`` on all if one is wrong."""
        with self.over() as ep:
            found = self._run(ep, Pass.STEP)
        faults = [str(accuracy) for accuracy in self._accuracies(found) if not accuracy.ok]
        self.arena.give_back_memory()
        agree(self.arena.group, lambda: expect(not faults, "; ".join(faults)))
        return found

    def work(self, name: str, ep: ExpertParallel, which: Pass, flops: float | None = None) -> Work:
        """A pass of it; every call has to give the answer's very bits."""
        answer, call = self.answer, self.call

        def check(got: list[Tensor]) -> None:
            expect(len(got) == (len(answer) if which is Pass.STEP else 1), f"got {len(got)} results")
            for result, tensor, right in zip(self._names, got, answer, strict=False):
                assert_bitwise(tensor, right, f"{name}: {result}")

        return Work(
            name=name,
            shape=call.shape,
            function=lambda: self._run(ep, which),
            check=check,
            inputs=(call.x, call.out_grad, *call.experts.values()),
            flops=flops,
        )

    @property
    def _names(self) -> list[str]:
        return ["o", "dx", "dscores", *(f"d{name}" for name in self.call.experts)]

    def _run(self, ep: ExpertParallel, which: Pass) -> list[Tensor]:
        return self.call.run(ep, training=which is not Pass.INFERENCE, backward=which is Pass.STEP)

    def _accuracies(self, found: Sequence[Tensor]) -> list[Accuracy]:
        call, group, dtype = self.call, self.group, self.call.shape.dtype
        at_a_time = max(1, MOST_SLOTS // call.shape.top_k)
        truth = dense_routed(call, group, wider(dtype), at_a_time=at_a_time)
        plain = dense_routed(call, group, dtype, at_a_time=at_a_time)
        return [
            accuracy_of_all(name, got, Yardstick(as_rows(right), as_rows(yardstick)), group)
            for name, got, right, yardstick in zip(self._names, found, truth, plain, strict=True)
        ]
