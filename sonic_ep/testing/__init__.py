"""Tools for tests of this layer, ours and yours: named cases, derived tolerances, the oracle, live ranks.

The library itself never imports this package.
"""

from sonic_ep.profiler.verification import assert_bitwise
from sonic_ep.testing.cases import CASES, Case, Inputs, OptionTrial, draw, option_trials, pairwise
from sonic_ep.testing.checks import Accuracy, Errors, Yardstick, assert_as_accurate
from sonic_ep.testing.interpreted import install_interpreter
from sonic_ep.testing.oracle import verify_moe, verify_routed
from sonic_ep.testing.ranks import Rank, RankError, RankPool

__all__ = [
    "CASES",
    "Accuracy",
    "Case",
    "Errors",
    "Inputs",
    "OptionTrial",
    "Rank",
    "RankError",
    "RankPool",
    "Yardstick",
    "assert_as_accurate",
    "assert_bitwise",
    "draw",
    "install_interpreter",
    "option_trials",
    "pairwise",
    "verify_moe",
    "verify_routed",
]

install_interpreter()
