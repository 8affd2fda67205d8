r"""Expert parallelism for Mixture-of-Experts layers: one API, two backends, one plan.

Forward, on each of W ranks (letters: ``sonic_ep.plan``)::

    x (T,H) --route--> ids, scores (T,K) --exchange--> plan
       \                                                 |
        '--dispatch--> rows (R,H) --w1, activation, w2--> rows (R,H) --combine--> y (T,H)

Backward::

    dy (T,H) --dispatch--> rows (R,H) --> dw2, dw1, d(scores) --> rows (R,H) --combine--> dx (T,H)

``backend="reference"`` is plain PyTorch over ``torch.distributed``, on any machine; it defines what is right.
``backend="fast"`` gives the same results near the speed of the link.
"""

from sonic_ep.api import ExpertParallel, MoEOutput, moe
from sonic_ep.config import (
    BackendUnavailableError,
    ClosedError,
    CombineMode,
    DispatchMode,
    EPConfig,
    RowOverflowError,
    ScoreOrder,
)
from sonic_ep.module import MoE
from sonic_ep.plan import PlanError, RoutingPlan

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "ClosedError",
    "CombineMode",
    "DispatchMode",
    "EPConfig",
    "ExpertParallel",
    "MoE",
    "MoEOutput",
    "PlanError",
    "RoutingPlan",
    "RowOverflowError",
    "ScoreOrder",
    "moe",
]
