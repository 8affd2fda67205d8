"""EPConfig: what it takes, what it refuses, and that it stays as it is."""

from dataclasses import FrozenInstanceError

import pytest

from sonic_ep import CombineMode, DispatchMode, EPConfig


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
