"""Reads what documents of several kinds hold; ``load`` reads the rest of them. All of it raises ``ValueError``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise

from sonic_ep.config import AUTO, CombineMode, DispatchMode, ModePair
from sonic_ep.fields import MOST, Fields
from sonic_ep.report import measured

ROUTINGS = ("uniform", "skewed", "one_rank", "given")
IDS_TO_ROWS = "ids to combined rows"
# As much as two measurements of one link differ by. What is further above a ceiling was measured wrongly.
MOST_PERCENT = 102.0
# Binomial coefficients of larger E and K take long.
MOST_EXPERTS = 2**16
ASCENDING = ("min_us", "p10_us", "median_us", "p90_us", "max_us")


def read_times(fields: Fields) -> measured.Times:
    """Quantiles, none of them below the one before it."""
    found = {name: fields.positive(name) for name in ASCENDING}
    for lower, upper in pairwise(ASCENDING):
        if found[upper] < found[lower]:
            raise fields.error(upper, found[upper], f"at least {lower}, {found[lower]:g}")
    return measured.Times(rounds=fields.count("rounds"), **found)


def read_percent(fields: Fields, most: float = MOST_PERCENT) -> float | None:
    """The share of a ceiling, or null."""
    found = fields.number_or_none("percent")
    if found is not None and found > most:
        raise fields.error("percent", found, f"at most {most:g}: nothing is faster than its ceiling")
    return found


def read_shape(fields: Fields) -> measured.Shape:
    """T, H, I, E, K and dtype."""
    found = measured.Shape(
        tokens=fields.count("T", least=0),
        hidden=fields.count("H"),
        intermediate=fields.count_or_none("I"),
        num_experts=fields.count("E", most=MOST_EXPERTS),
        top_k=fields.count("K", most=MOST_EXPERTS),
        dtype=fields.word("dtype", tuple(measured.BYTES_OF)),
    )
    if found.rank_bytes > MOST:
        raise fields.error("T", found.tokens, f"T*H elements of at most {MOST} bytes, with H={found.hidden}")
    return found


def read_pair(fields: Fields) -> ModePair:
    """Both modes."""
    return ModePair(dispatch=fields.choice("dispatch", DispatchMode), combine=fields.choice("combine", CombineMode))


def read_pairs(fields: Fields, *, by_pass: bool) -> tuple[measured.PairTimes, ...]:
    """Times of pairs, at least one and none of them twice; by_pass: each names its pass."""
    found = tuple(
        measured.PairTimes(
            pair=read_pair(each), what=each.text("pass") if by_pass else IDS_TO_ROWS, times=read_times(each)
        )
        for each in fields.parts("pairs")
    )
    _require_distinct(fields, "pairs", [(measured.pair_name(each.pair), each.what) for each in found])
    return found


def read_settings(fields: Fields) -> measured.Settings:
    """Modes and flags."""
    return measured.Settings(
        dispatch=fields.word("dispatch", (AUTO, *(mode.value for mode in DispatchMode))),
        combine=fields.word("combine", (AUTO, *(mode.value for mode in CombineMode))),
        redispatch_x_in_backward=fields.flag("redispatch_x_in_backward"),
        cpu_sync_on_runtime=fields.flag("cpu_sync_on_runtime"),
        max_rows=fields.count_or_none("max_rows"),
    )


def read_profile(fields: Fields) -> measured.Profile:
    """A profile, in a file of its own or in another document."""
    shape = fields.part("shape")
    modes = tuple(map(_mode, fields.parts("modes")))
    _require_distinct(fields, "modes", [(mode.kind, mode.mode) for mode in modes])
    return measured.Profile(
        shape=measured.ProfileShape(
            tokens=shape.counts("tokens"),
            hidden=shape.count("hidden"),
            top_k=shape.count("top_k"),
            num_experts=shape.count("num_experts"),
            dtype=shape.word("dtype", tuple(measured.BYTES_OF)),
            routing=shape.word("routing", ROUTINGS),
        ),
        backend=fields.text("backend"),
        ranks_per_gpu=fields.count_or_none("ranks_per_gpu"),
        modes=modes,
        pairs=read_pairs(fields, by_pass=False),
        settings=read_settings(fields.part("config")),
    )


def _mode(fields: Fields) -> measured.ModeTimes:
    kind = fields.word("kind", ("plan", "dispatch", "combine"))
    modes = {
        "plan": ("",),
        "dispatch": tuple(mode.value for mode in DispatchMode),
        "combine": tuple(mode.value for mode in CombineMode),
    }
    return measured.ModeTimes(
        kind=kind,
        mode=fields.word("mode", modes[kind]),
        times=read_times(fields),
        link_bytes=fields.number("link_bytes"),
        gb_per_s=fields.number_or_none("gb_per_s"),
        ceiling=fields.text_or_none("ceiling"),
        # Of the busiest rank: what goes one way alone may pass a ceiling that was measured both ways.
        percent=read_percent(fields, 2 * MOST_PERCENT),
    )


def _require_distinct(fields: Fields, name: str, found: Sequence[Hashable]) -> None:
    """At least one, and each of them once."""
    if not found:
        raise fields.error(name, [], "at least one")
    again = [each for each, times in Counter(found).items() if times > 1]
    if again:
        raise fields.error(name, again[0], "each of them once")
