"""What a caller chooses, as frozen values, and the errors that the library raises.

Every choice is parsed once, at the public edge, into an enum or a frozen dataclass; inside the library nothing
compares strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

ChoiceT = TypeVar("ChoiceT", bound=Enum)


class DispatchMode(str, Enum):
    """How rows travel from the rank of their token to the ranks of its experts."""

    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    RANK_DEDUP = "rank_dedup"


class CombineMode(str, Enum):
    """How expert outputs travel home, and in which order they are summed and rounded."""

    ALL_TO_ALL = "all_to_all"
    REDUCE_SCATTER = "reduce_scatter"
    RANK_DEDUP = "rank_dedup"


class ScoreOrder(str, Enum):
    """Softmax over the K chosen logits, or softmax over all E logits and then the choice."""

    TOPK_THEN_SOFTMAX = "topk_then_softmax"
    SOFTMAX_THEN_TOPK = "softmax_then_topk"


AUTO = "auto"


def parse_choice(name: str, value: object, choices: type[ChoiceT], *, also: tuple[str, ...] = ()) -> ChoiceT:
    """The member of ``choices`` that ``value`` (a member or its string) names.

    Raises ``ValueError`` with what was got and what is expected; ``also`` names further words to list there.
    """
    try:
        return choices(value)
    except ValueError:
        expected = ", ".join(repr(word) for word in (*also, *(choice.value for choice in choices)))
        raise ValueError(f"{name}: got {value!r}, expected one of {expected}") from None


def _parse_mode(name: str, value: object, choices: type[ChoiceT]) -> ChoiceT | None:
    return None if value == AUTO else parse_choice(name, value, choices, also=(AUTO,))


@dataclass(frozen=True)
class EPConfig:
    """Modes and flags of one ``ExpertParallel``. The same on every rank of the group.

    dispatch, combine: a mode, its name, or ``"auto"``: the pair that ``sonic_ep.cost`` predicts cheapest.
    redispatch_x_in_backward: keep only x (T, H) for backward and gather it again there, instead of keeping the
        rows that dispatch received.
    cpu_sync_on_runtime: size the buffers of rows exactly, for one read on the host, instead of at their ceiling.
    max_rows: an upper bound of the rows that one rank receives, if the caller knows one below the ceiling. When it
        is passed, ``RowOverflowError`` names the rows needed.

    No flag changes a bit of any result.
    """

    dispatch: DispatchMode | str = AUTO
    combine: CombineMode | str = AUTO
    redispatch_x_in_backward: bool = False
    cpu_sync_on_runtime: bool = False
    max_rows: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dispatch", _parse_mode("dispatch", self.dispatch, DispatchMode) or AUTO)
        object.__setattr__(self, "combine", _parse_mode("combine", self.combine, CombineMode) or AUTO)
        for name in ("redispatch_x_in_backward", "cpu_sync_on_runtime"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        if self.max_rows is not None and not is_count(self.max_rows, least=1):
            raise ValueError(f"max_rows: got {self.max_rows!r}, expected a whole number of at least 1, or None")


def is_count(value: object, *, least: int = 0) -> bool:
    """Whether ``value`` is an int (no bool) of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, kw_only=True)
class ModePair:
    """The dispatch and the combine mode of one call, none of them ``"auto"`` any more."""

    dispatch: DispatchMode
    combine: CombineMode


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """How logits become choices and scores.

    norm_topk_probs: divide the K scores of a token by their sum. Scores of ``TOPK_THEN_SOFTMAX`` sum to one already,
        so it changes nothing there.
    reduce_router_grad: sum the gradient of the router's weight over the group.
    """

    top_k: int
    score_order: ScoreOrder = ScoreOrder.TOPK_THEN_SOFTMAX
    norm_topk_probs: bool = False
    reduce_router_grad: bool = True
