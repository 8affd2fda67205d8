"""A random routing for this rank, with tokens, rows and scores, and the reference's answers to check against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sonic_ep.config import CombineMode, DispatchMode, EPConfig
from sonic_ep.cost import RankCounts, rank_counts
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.combine import combine_primitives
from sonic_ep.reference.dispatch import dispatch_primitives
from sonic_ep.reference.plan import exchange_plan, pad_tokens
from sonic_ep.testing.layer_problem import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingProblem:
    """One shape drawn for this rank, with the routing ``chosen_TK`` or a random one, and the reference's answers."""

    shape: Shape
    group: EPGroup
    device: torch.device
    chosen_TK: Tensor | None = None

    @cached_property
    def x_TH(self) -> Tensor:
        """Tokens, normally distributed."""
        return self._drawn(torch.randn, self.shape.hidden, 1).to(self.shape.dtype)

    @cached_property
    def topk_idx_TK(self) -> Tensor:
        """K distinct experts a token, uniformly drawn, int64 as a router's top-k gives them."""
        if self.chosen_TK is not None:
            return self.chosen_TK
        return self._drawn(torch.rand, self.shape.num_experts, 2).topk(self.shape.top_k, dim=1).indices

    @cached_property
    def scores_TK(self) -> Tensor:
        """Scores of the choices, fp32, each above zero."""
        return self._drawn(torch.rand, self.shape.top_k, 3) + 0.05

    @cached_property
    def plan(self) -> RoutingPlan:
        """The reference's plan."""
        return exchange_plan(
            self.topk_idx_TK,
            num_experts=self.shape.num_experts,
            max_tokens=self.shape.tokens,
            distinct=False,
            config=EPConfig(),
            collectives=self._collectives,
        )

    @cached_property
    def valid_rows(self) -> int:
        """Rows that this rank receives."""
        return self.plan.rows()

    @cached_property
    def received(self) -> Mapping[DispatchMode, Tensor]:
        """What each dispatch mode of the reference receives; by all_to_all the valid rows of x in canonical order."""
        primitives = dispatch_primitives(self._collectives)
        received = {mode: primitives[mode].receive(self.x_TH, self.plan) for mode in DispatchMode}
        return {**received, DispatchMode.ALL_TO_ALL: received[DispatchMode.ALL_TO_ALL][: self.valid_rows].clone()}

    @cached_property
    def rows_RH(self) -> Tensor:
        """Rows of experts, normally distributed, NaN behind the valid ones."""
        size = (self.plan.row_capacity, self.shape.hidden)
        rows_RH = torch.full(size, float("nan"), dtype=self.shape.dtype, device=self.device)
        rows_RH[: self.valid_rows].normal_(generator=self._generator(4))
        return rows_RH

    @cached_property
    def scores_WCK(self) -> Tensor:
        """The scores of all ranks' slots."""
        return self._collectives.all_gather(pad_tokens(self.scores_TK, self.plan.max_tokens, 0))

    @cached_property
    def sums(self) -> Mapping[tuple[CombineMode, bool], Tensor]:
        """What each combine mode of the reference gives for ``rows_RH``, with scores and without."""
        primitives = combine_primitives(self._collectives)
        return {
            (mode, weighted): primitives[mode].combine(self.rows_RH, self.scores_WCK if weighted else None, self.plan)
            for mode, weighted in product(CombineMode, (True, False))
        }

    @cached_property
    def round_trips(self) -> Mapping[CombineMode, Tensor]:
        """What each combine mode of the reference gives for the rows of x, with scores."""
        primitives, rows_of_x = combine_primitives(self._collectives), self.received[DispatchMode.ALL_TO_ALL]
        return {mode: primitives[mode].combine(rows_of_x, self.scores_WCK, self.plan) for mode in CombineMode}

    @cached_property
    def counts(self) -> list[RankCounts]:
        """Of every rank, the same on each of them."""
        ranks = range(self.group.world_size)
        pair_slots = [[int((owner_CK == owner).sum()) for owner in ranks] for owner_CK in self.plan.owner_of_slot()]
        pairs: Any = {"pair_tokens": self.plan.pair_tokens.tolist(), "pair_slots": pair_slots}
        return [rank_counts(rank, max_tokens=self.shape.tokens, tokens=self.shape.tokens, **pairs) for rank in ranks]

    def mean(self, count: Callable[[RankCounts], int]) -> float:
        """The mean over the ranks of what ``count`` makes of each one's counts."""
        return fmean(map(count, self.counts))

    @cached_property
    def _collectives(self) -> BoundedCollectives:
        return BoundedCollectives(self.group)

    def _drawn(self, draw: Callable[..., Tensor], width: int, stream: int) -> Tensor:
        return draw((self.shape.tokens, width), generator=self._generator(stream), device=self.device)

    def _generator(self, stream: int) -> torch.Generator:
        """Random numbers of this rank for one of its tensors."""
        return torch.Generator(self.device).manual_seed(1000 * stream + self.group.rank)
