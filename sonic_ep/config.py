"""What a caller chooses: parsed once into enums and frozen dataclasses, so nothing inside compares strings."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar

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


class ScoreFunction(str, Enum):
    """What makes scores of logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


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


# Added to the sum of a token's sigmoids before they are divided by it.
LEAST_SIGMOID_SUM = 1e-20
# Scores and their gradients, times a factor between these, stay within fp32.
LEAST_SCALE, MOST_SCALE = 1e-30, 1e30


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token's logits become its K experts and their scores. The same on every rank; all of it in fp32.

    score_function, score_order: what the base of an expert is. "softmax" and "topk_then_softmax": its logit; "softmax"
        and "softmax_then_topk": its share of the softmax over all E logits; "sigmoid": the sigmoid of its logit
        (score_order plays no part). Logits are ``x . router_w``, plus ``router_b`` where it is given.
    num_groups, top_groups, group_top: experts are in ``num_groups`` consecutive groups of equal size. A group's value
        is the sum of its ``group_top`` largest values, largest first. Experts outside of the ``top_groups`` groups with
        the largest values cannot be chosen. If each rank (or node) is a group, tokens go to ``top_groups`` at most.
    norm_topk_probs: divide the K scores of a token by their sum (softmax over the K logits sums to 1 already).
    scale: a factor of the scores, from 1e-30 to 1e30.

    The value of an expert is its base, plus its ``correction_bias`` where it is given. The K experts with the largest
    values are chosen, best first; NaN is above infinity, and of equal values the lower expert (or group) comes first.
    Without correction, and where all groups stay, the choice goes by the logits: bases ascend with them.

    Scores are the bases of those chosen, without correction; for "topk_then_softmax" the softmax over their K logits.
    ``norm_topk_probs`` divides them by their sum, sigmoids by their sum + 1e-20, since all of them may underflow.
    ``scale`` comes last.

    Four experts, bases 4 3 2 1, corrections 0 0 0 5, K=2: values 4 3 2 6, experts 3 0, of bases 1 4. In two groups, of
    which one stays, with group_top=1: the groups' values are 4 and 6, so experts 3 2, of bases 1 2.
    """

    score_function: ScoreFunction | str = ScoreFunction.SOFTMAX
    score_order: ScoreOrder | str = ScoreOrder.TOPK_THEN_SOFTMAX
    norm_topk_probs: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 2
    text: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices: dict[str, type[Enum]] = {"score_function": ScoreFunction, "score_order": ScoreOrder}
        for name, kind in choices.items():
            object.__setattr__(self, name, parse_choice(name, getattr(self, name), kind))
        if not isinstance(self.norm_topk_probs, bool):
            raise ValueError(f"norm_topk_probs: got {self.norm_topk_probs!r}, expected True or False")
        is_number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not is_number or not LEAST_SCALE <= self.scale <= MOST_SCALE:
            raise ValueError(f"scale: got {self.scale!r}, expected a number from {LEAST_SCALE} to {MOST_SCALE}")
        # One spelling for ranks to compare.
        object.__setattr__(self, "scale", float(self.scale))
        for name in ("num_groups", "top_groups", "group_top"):
            if not is_count(getattr(self, name), least=1):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a whole number of at least 1")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups: got {self.top_groups}, expected at most num_groups={self.num_groups}")
        # What ``router_config_of`` reads: operators take no Python objects.
        choice = f"{ScoreFunction(self.score_function).value} {ScoreOrder(self.score_order).value}"
        groups = f"{self.num_groups} {self.top_groups} {self.group_top}"
        object.__setattr__(self, "text", f"{choice} {self.norm_topk_probs} {self.scale!r} {groups}")

    @property
    def limits_groups(self) -> bool:
        """Whether groups of experts are left out."""
        return self.top_groups < self.num_groups


def router_config_of(text: str) -> RouterConfig:
    """The configuration with this ``text``.

    >>> router_config_of(RouterConfig(scale=2.5).text) == RouterConfig(scale=2.5)
    True
    """
    function, order, norm, scale, *groups = text.split()
    given: dict[str, Any] = dict(zip(("num_groups", "top_groups", "group_top"), map(int, groups), strict=True))
    given |= {"score_function": function, "score_order": order, "norm_topk_probs": norm == "True"}
    return RouterConfig(**given, scale=float(scale))


def settings_of(config: RouterConfig) -> dict[str, Any]:
    """The fields of a ``RouterConfig`` by name, without those of a subclass."""
    return {each.name: getattr(config, each.name) for each in fields(RouterConfig) if each.init}


@dataclass(frozen=True, kw_only=True, repr=False)
class RouterOptions(RouterConfig):
    """The router of a call: its ``RouterConfig``, and K.

    reduce_router_grad: sum the gradients of the router's weight and bias over the group.
    """

    top_k: int
    reduce_router_grad: bool = True

    def __repr__(self) -> str:
        own = {"top_k": self.top_k, "reduce_router_grad": self.reduce_router_grad, **settings_of(self)}
        settings = (f"{name}={getattr(value, 'value', value)}" for name, value in own.items())
        return f"RouterOptions({', '.join(settings)})"
