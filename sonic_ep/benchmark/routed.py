"""A layer whose routing is given: ``moe_routed``, held against the reference in the same dtype and in fp32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.arena import Arena, Work, agree
from sonic_ep.benchmark.beside import RoutedCall
from sonic_ep.benchmark.layer import Pass
from sonic_ep.config import EPConfig
from sonic_ep.testing.checks import assert_as_accurate, assert_bitwise, expect


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedUnderTest:
    """A call of this rank, and the backend and configuration whose answer counts."""

    arena: Arena
    call: RoutedCall
    backend: str
    config: EPConfig

    def over(self, backend: str, config: EPConfig) -> ExpertParallel:
        """The layer."""
        group, capacity = self.arena.group.process_group, max(1, self.call.shape.tokens)
        return ExpertParallel(group, backend=backend, config=config, max_tokens_per_rank=capacity)

    @cached_property
    def judged(self) -> tuple[list[Tensor], tuple[str, ...]]:
        """Collective: the output and the gradients of x, scores and experts, and what is wrong with them."""
        exact = replace(self.config, redispatch_x_in_backward=False, cpu_sync_on_runtime=True)
        with self.over(self.backend, self.config) as ep:
            found = self.call.run(ep, Pass.STEP)
        with self.over("reference", exact) as reference:
            plain = self.call.run(reference, Pass.STEP)
            truth = self.call.in_fp32().run(reference, Pass.STEP)
        faults = []
        for place, tensors in enumerate(zip(found, truth, plain, strict=True)):
            try:
                assert_as_accurate(*tensors, f"result {place}")
            except AssertionError as error:
                faults.append(str(error))
        return found, tuple(faults)

    @property
    def answer(self) -> list[Tensor]:
        """Collective. Raises ``WrongError`` on every rank if it is wrong on any."""
        found, faults = self.judged
        agree(self.arena.group, lambda: expect(not faults, "; ".join(faults)))
        return found

    def work(self, name: str, ep: ExpertParallel, which: Pass) -> Work:
        """A pass of it; every call has to give the answer's very bits."""
        answer = self.answer

        def check(got: list[Tensor]) -> None:
            for place, (tensor, right) in enumerate(zip(got, answer, strict=False)):
                assert_bitwise(tensor, right, f"result {place}")
            expect(len(got) == (len(answer) if which is Pass.STEP else 1), f"got {len(got)} results")

        call = self.call
        function = lambda: call.run(ep, which)  # noqa: E731
        return Work(name=name, shape=call.shape, function=function, check=check, inputs=(call.x, call.out_grad))
