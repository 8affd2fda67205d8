r"""Expert parallelism for Mixture-of-Experts layers: one API, two backends, one plan.

Forward, on each of W ranks (letters: ``sonic_ep.plan``)::

    x (T,H) --route--> ids, scores (T,K) --exchange--> plan
       \                                                 |
        '--dispatch--> rows (R,H) --w1, activation, w2--> rows (R,H) --combine--> y (T,H)

Backward::

    dy (T,H) --dispatch--> rows (R,H) --> dw2, dw1, d(scores) --> rows (R,H) --combine--> dx (T,H)

``backend="reference"`` is plain PyTorch over ``torch.distributed``; it runs anywhere and defines what is right.
``backend="fast"`` gives the same results near the speed of the link and the GEMMs.
"""

import importlib
from typing import TYPE_CHECKING

from sonic_ep.activation import Activation, Swiglu
from sonic_ep.api import ExpertParallel, moe
from sonic_ep.backend import MoEOutput, RoutedOutput
from sonic_ep.config import CombineMode, DispatchMode, EPConfig, RouterConfig, ScoreFunction, ScoreOrder
from sonic_ep.errors import (
    BackendUnavailableError,
    ClosedError,
    CollectiveMismatchError,
    MissingRowsError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    PlanError,
    RecomputeError,
    RowOverflowError,
    SharedMemoryError,
)
from sonic_ep.experts import Experts
from sonic_ep.graphs import graphed
from sonic_ep.module import MoE
from sonic_ep.plan import RoutingPlan
from sonic_ep.sharing import shared
from sonic_ep.version import __version__

if TYPE_CHECKING:
    from sonic_ep.profiler import NetworkProfiler, ProfileReport

__all__ = [
    "Activation",
    "BackendUnavailableError",
    "ClosedError",
    "CollectiveMismatchError",
    "CombineMode",
    "DispatchMode",
    "EPConfig",
    "ExpertParallel",
    "Experts",
    "MissingRowsError",
    "MoE",
    "MoEOutput",
    "NetworkProfiler",
    "PeerError",
    "PeerLostError",
    "PeerTimeoutError",
    "PlanError",
    "ProfileReport",
    "RecomputeError",
    "RoutedOutput",
    "RouterConfig",
    "RoutingPlan",
    "RowOverflowError",
    "ScoreFunction",
    "ScoreOrder",
    "SharedMemoryError",
    "Swiglu",
    "__version__",
    "graphed",
    "moe",
    "shared",
]


def __getattr__(name: str) -> object:
    # Imported on first use: running a layer needs no profiler.
    if name not in ("NetworkProfiler", "ProfileReport"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("sonic_ep.profiler"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
