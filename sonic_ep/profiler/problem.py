"""The random problem: inputs of one rank, and the reference's results for them; and the works of a profile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode, EPConfig
from sonic_ep.cost import RankCounts, rank_counts
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.plan import NO_ROW, ROUTING_FIELDS, RoutingPlan
from sonic_ep.profiler.agreement import in_step
from sonic_ep.profiler.measuring import TimedWork
from sonic_ep.profiler.report import COMBINE, DISPATCH, PLAN
from sonic_ep.profiler.routings import ROUTINGS
from sonic_ep.profiler.verification import assert_bitwise, expect
from sonic_ep.reference.combine import combine_primitives
from sonic_ep.reference.dispatch import dispatch_primitives
from sonic_ep.reference.plan import exchange_plan, pad_tokens

KeyT = TypeVar("KeyT")


def generator_of(device: torch.device | str, stream: int, rank: int) -> torch.Generator:
    """A generator seeded by ``stream`` and ``rank``."""
    return torch.Generator(device).manual_seed(100_000 * stream + rank)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """T of this rank, H, E and K, the dtype of the rows, and I where there are experts."""

    tokens: int
    hidden: int
    num_experts: int
    top_k: int
    intermediate: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.hidden * self.dtype.itemsize

    @property
    def expert_width(self) -> int:
        """I, of a shape with experts."""
        assert self.intermediate is not None, "a shape without experts"
        return self.intermediate


class _Computed(dict[KeyT, Tensor]):
    """Tensors of a problem, computed when they are first asked for."""

    def __init__(self, problem: RoutingProblem, compute: Callable[[RoutingProblem, KeyT], Tensor]) -> None:
        super().__init__()
        # The problem holds this: a strong reference would keep its tensors until the garbage collector runs.
        self._problem = weakref.ref(problem)
        self._compute = compute

    def __missing__(self, key: KeyT) -> Tensor:
        problem = self._problem()
        assert problem is not None
        self[key] = self._compute(problem, key)
        return self[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingProblem:
    """Inputs of this rank and the reference's results, each drawn or computed once, when first asked for.

    routing: a name of ``ROUTINGS``, or this rank's ids (T, K), which are copied. tokens: T of every rank, where it is
    not the shape's. config: ``cpu_sync_on_runtime`` says for how many rows the plan has room.
    """

    shape: Shape
    group: EPGroup
    device: torch.device
    routing: str | Tensor = "uniform"
    tokens: tuple[int, ...] = ()
    config: EPConfig = field(default_factory=EPConfig)

    def draw(self) -> None:
        """Collective. All inputs; an error in drawing is one on every rank."""
        in_step(self.group, lambda: (self.topk_idx_TK, self.x_TH, self.scores_TK))
        # Rows are as many as the plan says, and a plan is collective.
        self.plan  # noqa: B018
        in_step(self.group, lambda: self.rows_RH)

    @cached_property
    def topk_idx_TK(self) -> Tensor:
        """The experts of each token, int64 as a router's top-k gives them."""
        if isinstance(self.routing, Tensor):
            return self.routing.to(self.device, torch.int64, copy=True).contiguous()
        generator = generator_of("cpu", 0, self.group.rank)
        ids_TK = ROUTINGS[self.routing](generator, self.shape.tokens, self.shape, self.group.world_size)
        return ids_TK.to(self.device)

    @cached_property
    def x_TH(self) -> Tensor:
        """Tokens, normally distributed."""
        return self._drawn(torch.randn, self.shape.hidden, 1).to(self.shape.dtype)

    @cached_property
    def scores_TK(self) -> Tensor:
        """Scores of the choices, fp32, each above zero."""
        return self._drawn(torch.rand, self.shape.top_k, 2) + 0.05

    @cached_property
    def rows_RH(self) -> Tensor:
        """Rows of experts, normally distributed, so that those of one token differ; NaN behind the valid ones."""
        size = (self.plan.row_capacity, self.shape.hidden)
        rows_RH = torch.full(size, float("nan"), dtype=self.shape.dtype, device=self.device)
        rows_RH[: self.valid_rows].normal_(generator=generator_of(self.device, 3, self.group.rank))
        return rows_RH

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Other inputs in the same memory: each expert one further, x and rows negated, undone exactly at the end."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    @cached_property
    def plan(self) -> RoutingPlan:
        """The reference's plan."""
        return exchange_plan(
            self.topk_idx_TK,
            num_experts=self.shape.num_experts,
            max_tokens=max(self._tokens_of_ranks),
            distinct=False,
            config=self.config,
            collectives=self._collectives,
        )

    @cached_property
    def valid_rows(self) -> int:
        """Rows that this rank receives."""
        return self.plan.rows()

    @cached_property
    def received(self) -> dict[DispatchMode, Tensor]:
        """What each dispatch mode of the reference receives; by all_to_all the valid rows of x in canonical order."""
        modes = dispatch_primitives(self._collectives)
        return _Computed(self, lambda problem, mode: modes[mode].receive(problem.x_TH, problem._exact_plan))

    @cached_property
    def scores_WCK(self) -> Tensor:
        """The scores of all ranks' slots."""
        return self._collectives.all_gather(pad_tokens(self.scores_TK, self.plan.max_tokens, 0))

    @cached_property
    def sums(self) -> dict[tuple[CombineMode, bool], Tensor]:
        """What each combine mode of the reference gives for ``rows_RH``, with scores or without."""
        return _Computed(self, lambda problem, key: problem._combined(key[0], problem.rows_RH, weighted=key[1]))

    @cached_property
    def round_trips(self) -> dict[CombineMode, Tensor]:
        """What each combine mode of the reference gives for the rows of x, with scores."""
        return _Computed(self, lambda problem, mode: problem._combined(mode, problem.received[DispatchMode.ALL_TO_ALL]))

    def check_plan(self, got: RoutingPlan) -> None:
        """Raise ``AssertionError`` unless every field is the reference's."""
        for name in ROUTING_FIELDS:
            found, expected = getattr(got, name), getattr(self.plan, name)
            if isinstance(expected, Tensor):
                assert_bitwise(found, expected, name)
            else:
                expect(found == expected, f"{name}: got {found}, expected {expected}")

    @cached_property
    def counts(self) -> list[RankCounts]:
        """Of every rank, the same on each of them."""
        ranks = range(self.group.world_size)
        slots = [[int((owner_CK == owner).sum()) for owner in ranks] for owner_CK in self.plan.owner_of_slot()]
        pairs: Any = {"pair_tokens": self.plan.pair_tokens.tolist(), "pair_slots": slots}
        of_ranks = enumerate(self._tokens_of_ranks)
        return [rank_counts(rank, max_tokens=self.plan.max_tokens, tokens=n, **pairs) for rank, n in of_ranks]

    def mean(self, count: Callable[[RankCounts], int]) -> float:
        """The mean of ``count`` over the ranks' counts."""
        return fmean(map(count, self.counts))

    @cached_property
    def _collectives(self) -> BoundedCollectives:
        return BoundedCollectives(self.group)

    @property
    def _tokens_of_ranks(self) -> tuple[int, ...]:
        return self.tokens or (self.shape.tokens,) * self.group.world_size

    @property
    def _exact_plan(self) -> RoutingPlan:
        """With room for the valid rows alone: the rest of what the reference makes of a plan is large."""
        return replace(self.plan, slot_of_row=self.plan.slot_of_row[: self.valid_rows])

    def _combined(self, mode: CombineMode, rows_RH: Tensor, *, weighted: bool = True) -> Tensor:
        scores_WCK = self.scores_WCK if weighted else None
        return combine_primitives(self._collectives)[mode].combine(rows_RH, scores_WCK, self.plan)

    def _drawn(self, draw: Callable[..., Tensor], width: int, stream: int) -> Tensor:
        generator = generator_of(self.device, stream, self.group.rank)
        return draw((self.shape.tokens, width), generator=generator, device=self.device)

    def _change(self, step: int) -> None:
        ids_TK = self.topk_idx_TK
        ids_TK.copy_(((ids_TK + step) % self.shape.num_experts).where(ids_TK >= 0, NO_ROW))
        self.x_TH.neg_()
        self.rows_RH.neg_()


@contextmanager
def open_lanes(ep: ExpertParallel, max_tokens: int) -> Iterator[list[ExpertParallel]]:
    """Collective. Three objects like ``ep``, with its group, backend and flags; lane i has mode i of both kinds.

    ``max_rows`` is left out: a profile must not fail where a layer would not.
    """
    with ExitStack() as opened:
        lanes = []
        for dispatch, combine in zip(DispatchMode, CombineMode, strict=True):
            modes = replace(ep.config, dispatch=dispatch, combine=combine, max_rows=None)
            lane = ExpertParallel(ep.group.process_group, ep.backend, modes, max_tokens_per_rank=max_tokens)
            lanes.append(opened.enter_context(lane))
        yield lanes


def works_of(problem: RoutingProblem, lanes: Sequence[ExpertParallel]) -> list[TimedWork]:
    """Collective. The plan, modes in the order of a report, pairs in the order of a report."""
    x_TH, ids_TK, scores_TK = problem.x_TH, problem.topk_idx_TK, problem.scores_TK
    num_experts = problem.shape.num_experts
    plan, rows_of_x = lanes[0].plan(ids_TK, num_experts), problem.received[DispatchMode.ALL_TO_ALL]
    works: list[TimedWork] = []

    def add(name: str, check: Callable[[Any], None], run: Callable[[], Any]) -> None:
        works.append(TimedWork(name=name, run=run, check=check, other_inputs=problem.changed))

    def check_rows(got: Tensor) -> None:
        # Behind the valid rows there may be room for more.
        assert_bitwise(got[: len(rows_of_x)], rows_of_x, "rows")

    def sums(expected: Tensor) -> Callable[[Tensor], None]:
        return partial(assert_bitwise, expected=expected, name="sums")

    def round_trip(dispatch: ExpertParallel, combine: ExpertParallel) -> Tensor:
        made = dispatch.plan(ids_TK, num_experts)
        return combine.combine(dispatch.dispatch(x_TH, made), scores_TK, made)

    dispatches = [(f"{DISPATCH} by {mode.value}", lane) for mode, lane in zip(DispatchMode, lanes, strict=True)]
    combines = [(f"{COMBINE} by {mode.value}", mode, lane) for mode, lane in zip(CombineMode, lanes, strict=True)]
    add(PLAN, problem.check_plan, partial(lanes[0].plan, ids_TK, num_experts))
    for name, lane in dispatches:
        add(name, check_rows, partial(lane.dispatch, x_TH, plan))
    for name, mode, lane in combines:
        add(name, sums(problem.sums[mode, True]), partial(lane.combine, problem.rows_RH, scores_TK, plan))
    for name, first in dispatches:
        for other, mode, second in combines:
            add(f"{name} and {other}", sums(problem.round_trips[mode]), partial(round_trip, first, second))
    return works
