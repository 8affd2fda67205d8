"""EPConfig: what it takes, what it refuses, and that it stays as it is."""

from dataclasses import FrozenInstanceError

import pytest

from sonic_ep import CombineMode, DispatchMode, EPConfig


def test_modes_by_name_or_member() -> None:
    assert EPConfig(dispatch="rank_dedup").dispatch is DispatchMode.RANK_DEDUP
    assert EPConfig(combine=CombineMode.ALL_TO_ALL).combine is CombineMode.ALL_TO_ALL
    assert EPConfig().dispatch == EPConfig().combine == "auto"
    assert EPConfig(dispatch="all_gather") == EPConfig(dispatch=DispatchMode.ALL_GATHER)


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        EPConfig().max_rows = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dispatch": "a2a"}, "dispatch: got 'a2a', expected one of 'auto', 'all_gather', 'all_to_all', 'rank_dedup'"),
        (
            {"combine": "all_gather"},
            "combine: got 'all_gather', expected one of 'auto', 'all_to_all', 'reduce_scatter'",
        ),
        ({"combine": None}, "combine: got None"),
        ({"dispatch": CombineMode.REDUCE_SCATTER}, "dispatch: got "),
        ({"redispatch_x_in_backward": 1}, "redispatch_x_in_backward: got 1, expected True or False"),
        ({"cpu_sync_on_runtime": "yes"}, "cpu_sync_on_runtime: got 'yes', expected True or False"),
        ({"max_rows": 0}, "max_rows: got 0, expected a whole number of at least 1, or None"),
        ({"max_rows": 2.5}, "max_rows: got 2.5"),
        ({"max_rows": True}, "max_rows: got True"),
    ],
)
def test_wrong_values(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPConfig(**arguments)  # type: ignore[arg-type]
