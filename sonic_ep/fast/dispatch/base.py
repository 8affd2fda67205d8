"""Tokens in shared memory, where peers can read them: the first half of every dispatch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from sonic_ep.fast.collectives import reserve_tokens, stage_tokens
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan


class PulledDispatch(ABC):
    """A dispatch mode: every rank stages its tokens, then pulls what it needs of all.

    The two halves may be apart, so that what does not need the plan, or its size, is queued before that is known.
    sized_by_rows: whether what is received has R rows, so that R has to be known first.
    """

    sized_by_rows: ClassVar[bool] = False

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def reserve(self, max_tokens: int, row_bytes: int) -> None:
        """Collective. Allocate what ``receive`` needs for C tokens of ``row_bytes`` on each rank."""
        reserve_tokens(self._workspace, max_tokens, row_bytes)

    def stage(self, x_TH: Tensor, max_tokens: int) -> SharedBuffer:
        """Collective. The first half of ``receive``: x (T, H) of every rank where all can read it."""
        return stage_tokens(x_TH, max_tokens, self._workspace)

    @abstractmethod
    def pull(self, x_TH: Tensor, staged: SharedBuffer, plan: RoutingPlan, rows: int) -> Tensor:
        """The second half of ``receive``: what this rank needs of ``staged``, its own tokens from x.

        rows: R, which may be less than the plan has room for, but not less than there are.
        """

    def receive(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """Collective. What this rank receives, in the mode's own layout; see ``pull``."""
        return self.pull(x_TH, self.stage(x_TH, plan.max_tokens), plan, plan.row_capacity)
