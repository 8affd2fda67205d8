"""What a profile times: the plan, every mode and every pair of modes, on random data, with the reference's results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode, EPConfig
from sonic_ep.cost import RankCounts, rank_counts
from sonic_ep.plan import NO_ROW, ROUTING_FIELDS, RoutingPlan
from sonic_ep.profiler.agreement import in_step
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
        """For what does not depend on the mode."""
        return self.dispatch[DispatchMode.ALL_GATHER]


@contextmanager
def open_lanes(ep: ExpertParallel, backend: str, config: EPConfig, capacity: int) -> Iterator[Lanes]:
    """Collective. Three lanes over the group of ``ep``, each for a dispatch and a combine mode, closed at the end.

    config: the flags. ``max_rows`` is left out: a profile must not fail where a layer would not.
    """
    with ExitStack() as opened:
        lanes = []
        for dispatch, combine in zip(DispatchMode, CombineMode, strict=True):
            modes = replace(config, dispatch=dispatch, combine=combine, max_rows=None)
            lane = ExpertParallel(ep.group.process_group, backend, modes, max_tokens_per_rank=capacity)
            lanes.append(opened.enter_context(lane))
        yield Lanes(
            dispatch=dict(zip(DispatchMode, lanes, strict=True)), combine=dict(zip(CombineMode, lanes, strict=True))
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfileInputs:
    """Random inputs of this rank: ids (T, K) int64, x (T, H), scores (T, K) fp32, the plan of the ids, rows (R, H).

    Rows are drawn apart, so that those of one token differ, and NaN after the valid ones.
    """

    num_experts: int
    ids_TK: Tensor
    x_TH: Tensor
    scores_TK: Tensor
    plan: RoutingPlan
    rows_RH: Tensor

    @staticmethod
    def drawn(draw_ids: Callable[[], Tensor], shape: ProfileShape, lane: ExpertParallel) -> ProfileInputs:
        """Collective. Around the ids of ``draw_ids``, on their device; an error in drawing is one on every rank."""
        dtype, rank = shape.row_dtype, lane.rank

        def tokens() -> tuple[Tensor, Tensor, Tensor]:
            ids_TK = draw_ids()
            device, sizes = ids_TK.device, (ids_TK.shape[0], shape.hidden)
            x_TH = torch.randn(sizes, generator=_generator(device, X_SEED + rank), device=device)
            scores_TK = torch.rand(ids_TK.shape, generator=_generator(device, SCORES_SEED + rank), device=device)
            return ids_TK, x_TH.to(dtype), scores_TK + 0.05

        ids_TK, x_TH, scores_TK = in_step(lane.group, tokens)
        plan = lane.plan(ids_TK, shape.num_experts)

        def rows() -> Tensor:
            rows_RH = torch.full((plan.row_capacity, shape.hidden), float("nan"), dtype=dtype, device=ids_TK.device)
            rows_RH[: plan.rows()].normal_(generator=_generator(ids_TK.device, ROWS_SEED + rank))
            return rows_RH

        return ProfileInputs(
            num_experts=shape.num_experts,
            ids_TK=ids_TK,
            x_TH=x_TH,
            scores_TK=scores_TK,
            plan=plan,
            rows_RH=in_step(lane.group, rows),
        )

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Other inputs in the same memory: each expert one further, x and rows negated, undone exactly at the end."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, step: int) -> None:
        self.ids_TK.copy_(((self.ids_TK + step) % self.num_experts).where(self.ids_TK >= 0, NO_ROW))
        self.x_TH.neg_()
        self.rows_RH.neg_()

    def round_trip(self, dispatch: ExpertParallel, combine: ExpertParallel) -> Tensor:
        """Collective. Plan, dispatch and combine of x."""
        plan = dispatch.plan(self.ids_TK, self.num_experts)
        return combine.combine(dispatch.dispatch(self.x_TH, plan), self.scores_TK, plan)


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
        lane = lanes.dispatch[DispatchMode.ALL_TO_ALL]
        plan = lane.plan(inputs.ids_TK, inputs.num_experts)
        rows_of_x = lane.dispatch(inputs.x_TH, plan)

        def sums(rows_RH: Tensor) -> Mapping[CombineMode, Tensor]:
            return {mode: lane.combine(rows_RH, inputs.scores_TK, plan) for mode, lane in lanes.combine.items()}

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

    plan = work(PLAN, partial(lanes.first.plan, inputs.ids_TK, inputs.num_experts), answers.check_plan)
    dispatches = [
        work(f"{DISPATCH} by {mode.value}", partial(lane.dispatch, inputs.x_TH, inputs.plan), answers.check_rows)
        for mode, lane in lanes.dispatch.items()
    ]
    combines = [
        work(
            f"{COMBINE} by {mode.value}",
            partial(lane.combine, inputs.rows_RH, inputs.scores_TK, inputs.plan),
            sums(answers.sums[mode]),
        )
        for mode, lane in lanes.combine.items()
    ]
    pairs = [
        work(
            f"{DISPATCH} by {dispatch.value} and {COMBINE} by {combine.value}",
            partial(inputs.round_trip, lanes.dispatch[dispatch], lanes.combine[combine]),
            sums(answers.round_trips[combine]),
        )
        for dispatch, combine in EVERY_PAIR
    ]
    return [plan, *dispatches, *combines, *pairs]


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
