"""What is timed: the plan, every mode and every pair of modes, on random data, each with its right answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode, EPConfig
from sonic_ep.cost import RankCounts, rank_counts
from sonic_ep.plan import NO_ROW, ROUTING_FIELDS, RoutingPlan
from sonic_ep.profiler.times import COMBINE, DISPATCH, EVERY_PAIR, PLAN, ProfileShape
from sonic_ep.testing.checks import assert_bitwise, expect

REFERENCE = "reference"
# Of random numbers, by what they are for; ranks draw apart.
X_SEED, SCORES_SEED, ROWS_SEED = 1_000_003, 2_000_003, 3_000_017


@dataclass(frozen=True, kw_only=True, eq=False)
class Lanes:
    """An ``ExpertParallel`` for every dispatch and for every combine mode."""

    dispatch: Mapping[DispatchMode, ExpertParallel]
    combine: Mapping[CombineMode, ExpertParallel]

    @property
    def first(self) -> ExpertParallel:
        """One of them, for what does not depend on the mode."""
        return next(iter(self.dispatch.values()))


@contextmanager
def open_lanes(ep: ExpertParallel, backend: str, config: EPConfig, max_tokens: int) -> Iterator[Lanes]:
    """Collective: lanes over the group of ``ep``, closed at the end. Three serve, each a dispatch and a combine mode.

    config: the flags. Bounds of rows are left out: a profile must not fail where a layer would not.
    """
    group = ep.group.process_group
    dispatch: dict[DispatchMode, ExpertParallel] = {}
    combine: dict[CombineMode, ExpertParallel] = {}
    with ExitStack() as opened:
        for dispatch_mode, combine_mode in zip(DispatchMode, CombineMode, strict=True):
            modes = replace(config, dispatch=dispatch_mode, combine=combine_mode, max_rows=None)
            lane = opened.enter_context(ExpertParallel(group, backend, modes, max_tokens_per_rank=max_tokens))
            dispatch[dispatch_mode] = combine[combine_mode] = lane
        yield Lanes(dispatch=MappingProxyType(dispatch), combine=MappingProxyType(combine))


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Random inputs of this rank: ids (T, K) int64, x (T, H), scores (T, K) fp32."""

    ids_TK: Tensor
    x_TH: Tensor
    scores_TK: Tensor

    @staticmethod
    def of(ids_TK: Tensor, shape: ProfileShape, rank: int) -> Drawn:
        """Around ``ids_TK``, on its device."""
        device, tokens = ids_TK.device, ids_TK.shape[0]
        x_TH = torch.randn((tokens, shape.hidden), generator=_generator(device, X_SEED + rank), device=device)
        scores_TK = torch.rand(ids_TK.shape, generator=_generator(device, SCORES_SEED + rank), device=device)
        return Drawn(ids_TK=ids_TK, x_TH=x_TH.to(dtype_of(shape)), scores_TK=scores_TK + 0.05)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What the works are called with.

    num_experts: E. plan: of ``drawn``, by the lanes that are timed. rows (R, H): what experts give, of their own
    random numbers, so that rows of one token differ; NaN behind the valid ones.
    """

    drawn: Drawn
    num_experts: int
    plan: RoutingPlan
    rows_RH: Tensor

    def others(self) -> Inputs:
        """Of the same sizes, wrong everywhere: what comes of them is no answer to these."""
        ids_TK, x_TH, scores_TK = self.drawn.ids_TK, self.drawn.x_TH, self.drawn.scores_TK
        moved_TK = ((ids_TK + 1) % self.num_experts).where(ids_TK >= 0, NO_ROW)
        others = Drawn(ids_TK=moved_TK, x_TH=-x_TH.roll(1, 0), scores_TK=scores_TK.roll(1, 0))
        return replace(self, drawn=others, rows_RH=self.rows_RH.roll(1, 0).neg_())


def draw_rows(plan: RoutingPlan, shape: ProfileShape) -> Tensor:
    """Normally distributed rows (R, H) of this rank's experts, NaN behind the valid ones."""
    device = plan.slot_of_row.device
    rows_RH = torch.full((plan.row_capacity, shape.hidden), float("nan"), dtype=dtype_of(shape), device=device)
    rows_RH[: plan.rows()].normal_(generator=_generator(device, ROWS_SEED + plan.rank))
    return rows_RH


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The reference's: its plan, the valid rows of x, the sums of ``Inputs.rows_RH`` and those of the rows of x."""

    plan: RoutingPlan
    rows_of_x: Tensor
    sums: Mapping[CombineMode, Tensor]
    round_trips: Mapping[CombineMode, Tensor]

    @staticmethod
    def of(inputs: Inputs, lanes: Lanes) -> Answers:
        """Collective. lanes: of the reference, with exact sizes."""
        scores_TK = inputs.drawn.scores_TK
        lane = lanes.dispatch[DispatchMode.ALL_TO_ALL]
        plan = lane.plan(inputs.drawn.ids_TK, inputs.num_experts)
        rows_of_x = lane.dispatch(inputs.drawn.x_TH, plan)
        rows = inputs.rows_RH[: plan.rows()]
        return Answers(
            plan=plan,
            rows_of_x=rows_of_x,
            sums={mode: lane.combine(rows, scores_TK, plan) for mode, lane in lanes.combine.items()},
            round_trips={mode: lane.combine(rows_of_x, scores_TK, plan) for mode, lane in lanes.combine.items()},
        )

    def check_plan(self, got: RoutingPlan) -> None:
        """Every field, and no more of ``slot_of_row`` than is valid."""
        for name in ROUTING_FIELDS:
            right, found = getattr(self.plan, name), getattr(got, name)
            if isinstance(right, Tensor):
                valid = right.shape[0] if name == "slot_of_row" else None
                assert_bitwise(found[:valid], right, name)
            else:
                expect(found == right, f"{name}: got {found}, expected {right}")

    def check_rows(self, got: Tensor) -> None:
        """The valid rows."""
        assert_bitwise(got[: self.rows_of_x.shape[0]], self.rows_of_x, "rows")

    def counts(self, tokens: tuple[int, ...]) -> list[RankCounts]:
        """Of every rank, the same on each of them."""
        owner_WCK, ranks = self.plan.owner_of_slot(), range(len(tokens))
        pair_slots = [[int((owner_CK == owner).sum()) for owner in ranks] for owner_CK in owner_WCK]
        pair_tokens = self.plan.pair_tokens.tolist()
        return [
            rank_counts(
                rank, max_tokens=self.plan.max_tokens, tokens=held, pair_tokens=pair_tokens, pair_slots=pair_slots
            )
            for rank, held in enumerate(tokens)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One thing that is timed. last: what its last round gave."""

    name: str
    run: Callable[[Inputs], Any]
    check: Callable[[Any], None]
    last: list[Any] = field(default_factory=list)

    def keep_last(self, inputs: Inputs) -> None:
        """One round. What the round before gave is let go first: its memory is used again."""
        self.last.clear()
        self.last.append(self.run(inputs))


@dataclass(frozen=True, kw_only=True, eq=False)
class Works:
    """Everything that is timed: the plan, modes in the order of a report, pairs in the order of a report."""

    modes: list[Work]
    pairs: list[Work]

    @property
    def all(self) -> list[Work]:
        """In the order in which they take turns."""
        return [*self.modes, *self.pairs]


def works_of(lanes: Lanes, answers: Answers) -> Works:
    """The works that go through ``lanes``."""
    plan = Work(name=PLAN, run=partial(_plan, lanes.first), check=answers.check_plan)
    dispatches = [
        Work(name=f"{DISPATCH} by {mode.value}", run=partial(_dispatch, lane), check=answers.check_rows)
        for mode, lane in lanes.dispatch.items()
    ]
    combines = [
        Work(
            name=f"{COMBINE} by {mode.value}",
            run=partial(_combine, lane),
            check=partial(assert_bitwise, expected=answers.sums[mode], name="sums"),
        )
        for mode, lane in lanes.combine.items()
    ]
    pairs = [
        Work(
            name=f"{DISPATCH} by {dispatch.value} and {COMBINE} by {combine.value}",
            run=partial(_round_trip, lanes.dispatch[dispatch], lanes.combine[combine]),
            check=partial(assert_bitwise, expected=answers.round_trips[combine], name="sums"),
        )
        for dispatch, combine in EVERY_PAIR
    ]
    return Works(modes=[plan, *dispatches, *combines], pairs=pairs)


def dtype_of(shape: ProfileShape) -> torch.dtype:
    """The dtype of the rows."""
    dtype = getattr(torch, shape.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _plan(lane: ExpertParallel, inputs: Inputs) -> RoutingPlan:
    return lane.plan(inputs.drawn.ids_TK, inputs.num_experts)


def _dispatch(lane: ExpertParallel, inputs: Inputs) -> Tensor:
    return lane.dispatch(inputs.drawn.x_TH, inputs.plan)


def _combine(lane: ExpertParallel, inputs: Inputs) -> Tensor:
    return lane.combine(inputs.rows_RH, inputs.drawn.scores_TK, inputs.plan)


def _round_trip(dispatch: ExpertParallel, combine: ExpertParallel, inputs: Inputs) -> Tensor:
    plan = dispatch.plan(inputs.drawn.ids_TK, inputs.num_experts)
    rows_RH = dispatch.dispatch(inputs.drawn.x_TH, plan)
    return combine.combine(rows_RH, inputs.drawn.scores_TK, plan)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
