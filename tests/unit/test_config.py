"""EPConfig and RouterConfig: what they take, what they refuse, and that they stay as they are."""

from dataclasses import FrozenInstanceError, replace

import pytest

from sonic_ep import CombineMode, DispatchMode, EPConfig, RouterConfig, ScoreFunction, ScoreOrder
from sonic_ep.config import RouterOptions, settings_of


def test_modes_by_name_or_member_stay_as_they_are() -> None:
    assert EPConfig(dispatch="rank_dedup").dispatch is DispatchMode.RANK_DEDUP
    assert EPConfig(combine=CombineMode.ALL_TO_ALL).combine is CombineMode.ALL_TO_ALL
    assert EPConfig().dispatch == EPConfig().combine == "auto"
    assert EPConfig(dispatch="all_gather") == EPConfig(dispatch=DispatchMode.ALL_GATHER)
    with pytest.raises(FrozenInstanceError):
        EPConfig().max_rows = 3  # type: ignore[misc]


def test_wrong_values() -> None:
    for name, value, message in (
        ("dispatch", "a2a", "got 'a2a', expected one of 'auto', 'all_gather', 'all_to_all', 'rank_dedup'"),
        ("combine", "all_gather", "got 'all_gather', expected one of 'auto', 'all_to_all', 'reduce_scatter'"),
        ("combine", None, "got None"),
        ("dispatch", CombineMode.REDUCE_SCATTER, "got "),
        ("redispatch_x_in_backward", 1, "got 1, expected True or False"),
        ("cpu_sync_on_runtime", "yes", "got 'yes', expected True or False"),
        ("max_rows", 0, "got 0, expected a whole number of at least 1, or None"),
        ("max_rows", 2.5, "got 2.5"),
        ("max_rows", True, "got True"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            EPConfig(**{name: value})


def test_routers_by_name_or_member_are_one() -> None:
    by_name = RouterConfig(score_function="sigmoid", score_order="softmax_then_topk", scale=2)
    by_member = RouterConfig(score_function=ScoreFunction.SIGMOID, score_order=ScoreOrder.SOFTMAX_THEN_TOPK, scale=2.0)
    assert repr(by_name) == repr(by_member)
    assert by_name.score_order is ScoreOrder.SOFTMAX_THEN_TOPK
    assert settings_of(RouterOptions(**settings_of(by_name), top_k=3)) == settings_of(by_member)
    # Ranks compare what it is by its text.
    changes = {
        "top_k": 4,
        "reduce_router_grad": False,
        "score_function": "softmax",
        "norm_topk_probs": True,
        "scale": 1,
    }
    changes |= {"score_order": "topk_then_softmax", "num_groups": 3, "group_top": 3}
    one = RouterOptions(**settings_of(by_name), top_k=3)
    assert len({repr(replace(one, **{name: value})) for name, value in changes.items()} - {repr(one)}) == len(changes)
    assert [RouterConfig(num_groups=4, top_groups=top).limits_groups for top in (1, 3, 4)] == [True, True, False]
    with pytest.raises(FrozenInstanceError):
        RouterConfig().scale = 3.0  # type: ignore[misc]


def test_wrong_values_of_a_router() -> None:
    for name, value, message in (
        ("score_function", "softplus", "got 'softplus', expected one of 'softmax', 'sigmoid'"),
        ("score_order", "sigmoid", "got 'sigmoid', expected one of 'topk_then_softmax', 'softmax_then_topk'"),
        ("norm_topk_probs", 1, "got 1, expected True or False"),
        ("scale", 0, "got 0, expected a number from 1e-30 to 1e\\+30"),
        ("scale", float("inf"), "got inf"),
        ("scale", float("nan"), "got nan"),
        ("scale", True, "got True"),
        ("scale", "2", "got '2'"),
        ("num_groups", 0, "got 0, expected a whole number of at least 1"),
        ("group_top", 1.0, "got 1.0"),
        ("top_groups", 2, "got 2, expected at most num_groups=1"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            RouterConfig(**{name: value})
