"""What a profile times: the plan, every mode and every pair of modes, on random data, with the reference's results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from sonic_ep.profiler.report import COMBINE, DISPATCH, PLAN, ProfileShape
from sonic_ep.profiler.verification import assert_bitwise, expect

# Seeds of x, scores and rows, to which ranks add their number.
X_SEED, SCORES_SEED, ROWS_SEED = 1_000_003, 2_000_003, 3_000_017


@contextmanager
def open_lanes(ep: ExpertParallel, backend: str, config: EPConfig, max_tokens: int) -> Iterator[list[ExpertParallel]]:
    """Collective. Three lanes over the group of ``ep``, lane i for dispatch mode i and for combine mode i.

    config: the flags. ``max_rows`` is left out: a profile must not fail where a layer would not.
    """
    with ExitStack() as opened:
        lanes = []
        for dispatch, combine in zip(DispatchMode, CombineMode, strict=True):
            modes = replace(config, dispatch=dispatch, combine=combine, max_rows=None)
            lane = ExpertParallel(ep.group.process_group, backend, modes, max_tokens_per_rank=max_tokens)
            lanes.append(opened.enter_context(lane))
        yield lanes


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
        dtype, rank, hidden, num_experts = shape.row_dtype, lane.rank, shape.hidden, shape.num_experts

        def tokens() -> dict[str, Tensor]:
            ids_TK = draw_ids()
            device = ids_TK.device
            x_TH = torch.randn((len(ids_TK), hidden), generator=_generator(device, X_SEED + rank), device=device)
            scores_TK = torch.rand(ids_TK.shape, generator=_generator(device, SCORES_SEED + rank), device=device)
            return {"ids_TK": ids_TK, "x_TH": x_TH.to(dtype), "scores_TK": scores_TK + 0.05}

        drawn = in_step(lane.group, tokens)
        device, plan = drawn["ids_TK"].device, lane.plan(drawn["ids_TK"], num_experts)

        def rows() -> Tensor:
            rows_RH = torch.full((plan.row_capacity, hidden), float("nan"), dtype=dtype, device=device)
            rows_RH[: plan.rows()].normal_(generator=_generator(device, ROWS_SEED + rank))
            return rows_RH

        return ProfileInputs(num_experts=num_experts, plan=plan, rows_RH=in_step(lane.group, rows), **drawn)

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
    """The reference's plan, valid rows of x, and sums by each combine mode of the inputs' rows and of the rows of x."""

    plan: RoutingPlan
    rows_of_x: Tensor
    sums: Sequence[Tensor]
    round_trips: Sequence[Tensor]

    @staticmethod
    def of(inputs: ProfileInputs, lanes: Sequence[ExpertParallel]) -> Answers:
        """Collective. lanes: of the reference, with exact sizes."""
        plan = lanes[0].plan(inputs.ids_TK, inputs.num_experts)
        rows_of_x = lanes[0].dispatch(inputs.x_TH, plan)
        sums, round_trips = (
            [lane.combine(rows_RH, inputs.scores_TK, plan) for lane in lanes]
            for rows_RH in (inputs.rows_RH[: plan.rows()], rows_of_x)
        )
        return Answers(plan=plan, rows_of_x=rows_of_x, sums=sums, round_trips=round_trips)

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
        slots = [[int((owner_CK == owner).sum()) for owner in ranks] for owner_CK in owner_WCK]
        count = partial(rank_counts, max_tokens=self.plan.max_tokens, pair_slots=slots)
        return [count(rank, tokens=n, pair_tokens=self.plan.pair_tokens.tolist()) for rank, n in enumerate(tokens)]


def works_of(inputs: ProfileInputs, lanes: Sequence[ExpertParallel], answers: Answers) -> list[TimedWork]:
    """The plan, modes in the order of a report, pairs in the order of a report."""
    x_TH, rows_RH, scores_TK, plan = inputs.x_TH, inputs.rows_RH, inputs.scores_TK, inputs.plan
    works: list[TimedWork] = []

    def add(name: str, check: Callable[[Any], None], run: Callable[..., Any], *arguments: object) -> None:
        run = partial(run, *arguments)
        works.append(TimedWork(name=name, run=run, check=check, other_inputs=inputs.changed))

    def sums(expected: Tensor) -> Callable[[Tensor], None]:
        return partial(assert_bitwise, expected=expected, name="sums")

    dispatches = [(f"{DISPATCH} by {mode.value}", lane) for mode, lane in zip(DispatchMode, lanes, strict=True)]
    combines = [(f"{COMBINE} by {mode.value}", lane) for mode, lane in zip(CombineMode, lanes, strict=True)]
    add(PLAN, answers.check_plan, lanes[0].plan, inputs.ids_TK, inputs.num_experts)
    for name, lane in dispatches:
        add(name, answers.check_rows, lane.dispatch, x_TH, plan)
    for (name, lane), expected in zip(combines, answers.sums, strict=True):
        add(name, sums(expected), lane.combine, rows_RH, scores_TK, plan)
    for dispatch, first in dispatches:
        for (combine, second), expected in zip(combines, answers.round_trips, strict=True):
            add(f"{dispatch} and {combine}", sums(expected), inputs.round_trip, first, second)
    return works


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
