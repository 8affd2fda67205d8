"""What a caller chooses: parsed once into enums and frozen dataclasses, so nothing inside compares strings."""

from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

AUTO = "auto"
ChoiceT = TypeVar("ChoiceT", bound=Enum)


class DispatchMode(str, Enum):
    """How rows travel from the rank of their token to the ranks of its experts."""

    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    RANK_DEDUP = "rank_dedup"


class CombineMode(str, Enum):
    """How expert outputs return to their tokens, and in which order they are summed and rounded."""

    ALL_TO_ALL = "all_to_all"
    REDUCE_SCATTER = "reduce_scatter"
    RANK_DEDUP = "rank_dedup"


class ScoreOrder(str, Enum):
    """Softmax over the K chosen logits, or over all E logits before the choice."""

    TOPK_THEN_SOFTMAX = "topk_then_softmax"
    SOFTMAX_THEN_TOPK = "softmax_then_topk"


def parse_choice(name: str, value: object, choices: type[ChoiceT], *, also: tuple[str, ...] = ()) -> ChoiceT:
    """The member of ``choices`` that ``value`` is or names; else ``ValueError``. also: other accepted words."""
    try:
        return choices(value)
    except ValueError:
        expected = ", ".join(repr(word) for word in (*also, *(choice.value for choice in choices)))
        raise ValueError(f"{name}: got {value!r}, expected one of {expected}") from None


def is_count(value: object, *, least: int = 0) -> bool:
    """Whether ``value`` is an int (not a bool) of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class EPConfig:
    """Modes and flags of one ``ExpertParallel``, the same on every rank. No flag changes a bit of any result.

    dispatch, combine: a mode, its name, or ``"auto"``: the modes that ``sonic_ep.cost`` predicts cheapest.
    redispatch_x_in_backward: save x (T, H) and dispatch it again in backward, instead of saving the received rows.
    cpu_sync_on_runtime: size row buffers exactly, at the price of one host read, instead of for the worst case.
    max_rows: the most rows that any rank receives, if known. Exceeding it raises ``RowOverflowError``.
    """

    dispatch: DispatchMode | str = AUTO
    combine: CombineMode | str = AUTO
    redispatch_x_in_backward: bool = False
    cpu_sync_on_runtime: bool = False
    max_rows: int | None = None

    def __post_init__(self) -> None:
        modes: dict[str, type[Enum]] = {"dispatch": DispatchMode, "combine": CombineMode}
        for name, choices in modes.items():
            value = getattr(self, name)
            if value != AUTO:
                object.__setattr__(self, name, parse_choice(name, value, choices, also=(AUTO,)))
        for name in ("redispatch_x_in_backward", "cpu_sync_on_runtime"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        if self.max_rows is not None and not is_count(self.max_rows, least=1):
            raise ValueError(f"max_rows: got {self.max_rows!r}, expected a whole number of at least 1, or None")


@dataclass(frozen=True, kw_only=True)
class ModePair:
    """The dispatch and the combine mode of a call, with ``"auto"`` resolved."""

    dispatch: DispatchMode
    combine: CombineMode


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """How logits become choices and scores.

    norm_topk_probs: divide the K scores of a token by their sum (``TOPK_THEN_SOFTMAX`` scores sum to 1 already).
    reduce_router_grad: sum the gradient of the router's weight over the group.
    """

    top_k: int
    score_order: ScoreOrder = ScoreOrder.TOPK_THEN_SOFTMAX
    norm_topk_probs: bool = False
    reduce_router_grad: bool = True


# STUB-BEGIN
@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    score_order: ScoreOrder = ScoreOrder.TOPK_THEN_SOFTMAX
    norm_topk_probs: bool = False


# STUB-END
