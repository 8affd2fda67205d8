"""Dispatch by all-gather: every rank receives every token, by copy engine."""

from torch import Tensor

from sonic_ep.fast.collectives import COPIED_TOKENS
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.dispatch.base import PulledDispatch
from sonic_ep.fast.permute import token_of_row
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan


class AllGatherDispatch(PulledDispatch):
    """Every rank receives the C tokens of every rank."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self._gather = CopyEngineGather(workspace, COPIED_TOKENS)

    def reserve(self, max_tokens: int, row_bytes: int) -> Staging:
        """Collective. Shared memory for C tokens of ``row_bytes`` on each rank."""
        return self._gather.reserve(max_tokens, row_bytes)

    def before_staging(self) -> None:
        """Collective. Wait until the copies of all ranks have ended."""
        self._gather.before_staging()

    def stage(self, x_TH: Tensor, max_tokens: int) -> Staging:
        """Collective. x (T, H) to shared memory, once the copies of the last gather have ended."""
        return self._gather.stage(x_TH, max_tokens)

    def pull(self, x_TH: Tensor, staged: Staging, plan: RoutingPlan, rows: int) -> Tensor:
        """(W*C, H): tokens by source rank; unspecified past the T tokens of each."""
        return self._gather.bring(x_TH, staged, plan.max_tokens).wait()

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """Token f // K of each row's slot f: with K=2, slots 5 and 9 are of tokens 2 and 4."""
        return token_of_row(plan)
