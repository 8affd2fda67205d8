"""The common half of every dispatch: tokens in shared memory, where peers read them."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from sonic_ep.fast.collectives import reserve_tokens, stage_tokens
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan


class PulledDispatch(ABC):
    """A dispatch mode: every rank stages its tokens, then pulls those that it needs.

    Staging needs no plan, so it can be queued before the plan's size is known.
    sized_by_rows: whether ``pull`` returns R rows, so that R has to be known first.
    """

    sized_by_rows: ClassVar[bool] = False

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def reserve(self, max_tokens: int, row_bytes: int) -> Staging:
        """Collective. Shared memory for C tokens of ``row_bytes`` on each rank."""
        return reserve_tokens(self._workspace, max_tokens, row_bytes)

    def before_staging(self) -> None:
        """Collective. Wait for the readers of what will be overwritten: none, where halves take turns."""
        return

    def stage(self, x_TH: Tensor, max_tokens: int) -> Staging:
        """Collective. The first half of ``receive``: x (T, H), contiguous, of every rank to shared memory."""
        return stage_tokens(x_TH, max_tokens, self._workspace)

    @abstractmethod
    def pull(self, x_TH: Tensor, staged: Staging, plan: RoutingPlan, rows: int) -> Tensor:
        """The second half of ``receive``; own tokens come from x. rows: R, from the valid rows up to row_capacity."""

    @abstractmethod
    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """(R,) int32: the received row of each canonical row; None if ``pull`` returns canonical order."""

    def receive(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """Collective. The rows that this rank receives, in the mode's own layout; see ``pull``."""
        return self.pull(x_TH, self.stage(x_TH, plan.max_tokens), plan, plan.row_capacity)
