"""The table of cases: every case is what its name says, and trials cover every pair of options."""

from itertools import combinations, product

import torch

from sonic_ep.testing import CASES, Inputs, draw, option_trials, pairwise
from sonic_ep.testing.cases import CONFIG_OPTIONS, OPTIONS


def drawn(name: str) -> Inputs:
    return draw(CASES[name], 4)


def test_cases_are_what_their_names_say() -> None:
    assert set(drawn("one_expert").topk_idx.unique().tolist()) == {0}
    assert set((drawn("one_rank").topk_idx // 6).unique().tolist()) == {3}
    assert (drawn("empty_experts").topk_idx % 2).eq(0).all()
    assert (drawn("dropped_slots").topk_idx == -1).any(dim=1).any()
    assert (drawn("dropped_slots").topk_idx == -1).all(dim=1).any()
    repeated = drawn("repeated_experts").topk_idx
    assert (repeated.sort(dim=1).values.diff(dim=1) == 0).any()
    assert (repeated == repeated[:, :1]).all(dim=1).any()
    counts = torch.bincount(drawn("skewed").topk_idx.flatten(), minlength=24)
    assert counts[:6].sum() > 2 * counts[-12:].sum()
    assert drawn("no_tokens_at_all").x.shape[0] == 0
    assert drawn("top_all").topk_idx.sort(dim=1).values.eq(torch.arange(24)).all()


def test_trials_cover_every_pair_of_values_and_are_the_same_in_every_process() -> None:
    options = {**OPTIONS, **CONFIG_OPTIONS}
    settings = pairwise(options)
    assert len(settings) < 40
    for a, b in combinations(options, 2):
        assert {(setting[a], setting[b]) for setting in settings} == set(product(options[a], options[b]))
    # Strings have other hashes in every process.
    settings = pairwise({"letter": ("a", "b"), "digit": (1, 2, 3), "sign": ("+", "-")})
    found = [(setting["letter"], setting["digit"], setting["sign"]) for setting in settings]
    assert found == [("a", 1, "+"), ("a", 2, "-"), ("a", 3, "+"), ("b", 1, "-"), ("b", 2, "+"), ("b", 3, "-")]
    trials = option_trials()
    assert len({trial.case.name for trial in trials}) == len(trials) == len(pairwise(options))
    for names, of_trial in ((OPTIONS, "case"), (CONFIG_OPTIONS, "config")):
        for name, values in names.items():
            assert {getattr(getattr(trial, of_trial), name) for trial in trials} == set(values)
