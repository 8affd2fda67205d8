"""What a profile times: the plan, every mode and every pair of modes, on random data, with the reference's results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode, EPConfig
from sonic_ep.cost import RankCounts, rank_counts
from sonic_ep.plan import NO_ROW, ROUTING_FIELDS, RoutingPlan
from sonic_ep.profiler.measuring import TimedWork
from sonic_ep.profiler.report import COMBINE, DISPATCH, EVERY_PAIR, PLAN, ProfileShape
from sonic_ep.profiler.verification import assert_bitwise, expect

# Seeds of x, scores and rows, to which ranks add their number.
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
def open_lanes(ep: ExpertParallel, backend: str, config: EPConfig, capacity: int) -> Iterator[Lanes]:
    """Collective. Three lanes over the group of ``ep``, each for a dispatch and a combine mode, closed at the end.

    config: the flags. ``max_rows`` is left out: a profile must not fail where a layer would not.
    """
    group = ep.group.process_group
    dispatch: dict[DispatchMode, ExpertParallel] = {}
    combine: dict[CombineMode, ExpertParallel] = {}
    with ExitStack() as opened:
        for dispatch_mode, combine_mode in zip(DispatchMode, CombineMode, strict=True):
            modes = replace(config, dispatch=dispatch_mode, combine=combine_mode, max_rows=None)
            lane = opened.enter_context(ExpertParallel(group, backend, modes, max_tokens_per_rank=capacity))
            dispatch[dispatch_mode] = combine[combine_mode] = lane
        yield Lanes(dispatch=MappingProxyType(dispatch), combine=MappingProxyType(combine))


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfileTokens:
    """Random tokens of this rank: ids (T, K) int64, x (T, H), scores (T, K) fp32."""

    ids_TK: Tensor
    x_TH: Tensor
    scores_TK: Tensor

    @staticmethod
    def of(ids_TK: Tensor, shape: ProfileShape, rank: int) -> ProfileTokens:
        """Around ``ids_TK``, on its device."""
        device, sizes = ids_TK.device, (ids_TK.shape[0], shape.hidden)
        x_TH = torch.randn(sizes, generator=_generator(device, X_SEED + rank), device=device)
        scores_TK = torch.rand(ids_TK.shape, generator=_generator(device, SCORES_SEED + rank), device=device)
        return ProfileTokens(ids_TK=ids_TK, x_TH=x_TH.to(shape.row_dtype), scores_TK=scores_TK + 0.05)


def draw_rows(plan: RoutingPlan, shape: ProfileShape) -> Tensor:
    """Normally distributed rows (R, H) of this rank's experts, NaN after the valid ones."""
    device = plan.slot_of_row.device
    rows_RH = torch.full((plan.row_capacity, shape.hidden), float("nan"), dtype=shape.row_dtype, device=device)
    rows_RH[: plan.rows()].normal_(generator=_generator(device, ROWS_SEED + plan.rank))
    return rows_RH


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfileInputs:
    """What works read. plan: of ``tokens``. rows (R, H): of experts, drawn apart so that a token's rows differ."""

    tokens: ProfileTokens
    num_experts: int
    plan: RoutingPlan
    rows_RH: Tensor

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Other inputs in the same memory: each expert one further, x and rows negated, undone exactly at the end."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, step: int) -> None:
        ids_TK = self.tokens.ids_TK
        ids_TK.copy_(((ids_TK + step) % self.num_experts).where(ids_TK >= 0, NO_ROW))
        self.tokens.x_TH.neg_()
        self.rows_RH.neg_()

    def plan_by(self, lane: ExpertParallel) -> RoutingPlan:
        """Collective. The plan of the ids."""
        return lane.plan(self.tokens.ids_TK, self.num_experts)

    def dispatch_by(self, lane: ExpertParallel) -> Tensor:
        """Collective. x, dispatched."""
        return lane.dispatch(self.tokens.x_TH, self.plan)

    def combine_by(self, lane: ExpertParallel) -> Tensor:
        """Collective. ``rows_RH``, combined."""
        return lane.combine(self.rows_RH, self.tokens.scores_TK, self.plan)

    def round_trip_by(self, dispatch: ExpertParallel, combine: ExpertParallel) -> Tensor:
        """Collective. Plan, dispatch and combine of x."""
        plan = self.plan_by(dispatch)
        rows_RH = dispatch.dispatch(self.tokens.x_TH, plan)
        return combine.combine(rows_RH, self.tokens.scores_TK, plan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The reference's plan, valid rows of x, sums of ``ProfileInputs.rows_RH``, and sums of the rows of x."""

    plan: RoutingPlan
    rows_of_x: Tensor
    sums: Mapping[CombineMode, Tensor]
    round_trips: Mapping[CombineMode, Tensor]

    @staticmethod
    def of(inputs: ProfileInputs, lanes: Lanes) -> Answers:
        """Collective. lanes: of the reference, with exact sizes."""
        tokens, lane = inputs.tokens, lanes.dispatch[DispatchMode.ALL_TO_ALL]
        plan = inputs.plan_by(lane)
        rows_of_x = lane.dispatch(tokens.x_TH, plan)

        def sums(rows_RH: Tensor) -> Mapping[CombineMode, Tensor]:
            return {mode: lane.combine(rows_RH, tokens.scores_TK, plan) for mode, lane in lanes.combine.items()}

        rows_RH = inputs.rows_RH[: plan.rows()]
        return Answers(plan=plan, rows_of_x=rows_of_x, sums=sums(rows_RH), round_trips=sums(rows_of_x))

    def check_plan(self, got: RoutingPlan) -> None:
        """Every field, and of ``slot_of_row`` the valid part."""
        for name in ROUTING_FIELDS:
            expected, found = getattr(self.plan, name), getattr(got, name)
            if isinstance(expected, Tensor):
                valid = expected.shape[0] if name == "slot_of_row" else None
                assert_bitwise(found[:valid], expected, name)
            else:
                expect(found == expected, f"{name}: got {found}, expected {expected}")

    def check_rows(self, got: Tensor) -> None:
        """The valid rows."""
        assert_bitwise(got[: self.rows_of_x.shape[0]], self.rows_of_x, "rows")

    def counts(self, tokens: tuple[int, ...]) -> list[RankCounts]:
        """Of every rank, the same on each of them."""
        owner_WCK, ranks = self.plan.owner_of_slot(), range(len(tokens))
        pair_slots = [[int((owner_CK == owner).sum()) for owner in ranks] for owner_CK in owner_WCK]
        pair_tokens = self.plan.pair_tokens.tolist()
        return [
            rank_counts(rank, capacity=self.plan.capacity, tokens=held, pair_tokens=pair_tokens, pair_slots=pair_slots)
            for rank, held in enumerate(tokens)
        ]


def works_of(inputs: ProfileInputs, lanes: Lanes, answers: Answers) -> list[TimedWork]:
    """The plan, modes in the order of a report, pairs in the order of a report."""

    def work(name: str, run: Callable[[], Any], check: Callable[[Any], None]) -> TimedWork:
        return TimedWork(name=name, run=run, check=check, other_inputs=inputs.changed)

    def sums(expected: Tensor) -> Callable[[Tensor], None]:
        return partial(assert_bitwise, expected=expected, name="sums")

    plan = work(PLAN, partial(inputs.plan_by, lanes.first), answers.check_plan)
    dispatches = [
        work(f"{DISPATCH} by {mode.value}", partial(inputs.dispatch_by, lane), answers.check_rows)
        for mode, lane in lanes.dispatch.items()
    ]
    combines = [
        work(f"{COMBINE} by {mode.value}", partial(inputs.combine_by, lane), sums(answers.sums[mode]))
        for mode, lane in lanes.combine.items()
    ]
    pairs = [
        work(
            f"{DISPATCH} by {dispatch.value} and {COMBINE} by {combine.value}",
            partial(inputs.round_trip_by, lanes.dispatch[dispatch], lanes.combine[combine]),
            sums(answers.round_trips[combine]),
        )
        for dispatch, combine in EVERY_PAIR
    ]
    return [plan, *dispatches, *combines, *pairs]


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
