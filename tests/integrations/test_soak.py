"""The soak of the language model example: T and routing change, growth is red, and so is a loss that is off."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import both_backends
from promises import promise
from training_example import module_of_example, no_launcher, train

from sonic_ep.testing import RankPool

CPU = torch.device("cpu")
STEPS = 6
SOAK = ["--soak", f"--steps={STEPS}", "--context=2"]
EQUAL = ["descriptors", "threads", "tensors", "allocated", "reserved"]
BOUNDED = ["anonymous", "used"]
Judge = Callable[[Any], tuple[int, dict[str, Any], str]]


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with no_launcher():
        yield


def settings_of(*arguments: str) -> Any:
    return module_of_example("lm_options").parse_settings(["--backend=reference", *arguments], None)


def layouts(ranks: int, seed: int = 0) -> Any:
    return settings_of(f"--nproc={ranks}", "--steps=2000", f"--seed={seed}", "--soak").course.layouts


def samples(**changed: list[int]) -> list[Any]:
    """Four samples of a rank on a GPU, after as many steps, the same but for what is changed."""
    columns = {**dict.fromkeys(["resident", *EQUAL, "peak", *BOUNDED], [7] * 4), "step": [1, 2, 3, 4], **changed}
    rows = zip(*columns.values(), strict=True)
    return [module_of_example("lm_memory").Sample(**dict(zip(columns, row, strict=True))) for row in rows]


def held(found: list[Any], tokens: int = 1, warm_up: int = 2, rank: int = 0) -> Any:
    return module_of_example("lm_memory").held(rank, found, [tokens] * len(found), warm_up)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tokens_change_from_step_to_step_and_are_the_whole_batch(ranks: int) -> None:
    found = layouts(ranks)
    for layout in found:
        assert sum(layout.sequences) == 16
        assert sum(layout.tokens) == 16 * layout.context
    assert {layout.context for layout in found} == set(range(1, 65))
    for rank in range(ranks):
        by_rank = [layout.tokens[rank] for layout in found]
        assert max(by_rank) == 16 * 64
        assert (0 in by_rank[ranks:]) == (ranks > 1)
        # In its first step a rank has the whole batch.
        assert found[rank].tokens == tuple(16 * 64 * (other == rank) for other in range(ranks))
    assert sum(layout.one_byte for layout in found) == 2000 // 8 - (ranks > 0)
    assert found == layouts(ranks) != layouts(ranks, seed=1)


@pytest.fixture(scope="module")
def recorded(cpu_pool: RankPool) -> Any:
    """Two ranks in a soak."""
    # Unpickling the result needs its modules.
    module_of_example("lm_runs")
    return cpu_pool.run(train, "reference", SOAK, world_size=2)[0]


@pytest.fixture
def judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Judge:
    """What the example says of a recorded soak: exit code, document, stdout."""
    path = tmp_path / "soak.json"
    settings = settings_of("--nproc=2", *SOAK, f"--json={path}", f"--output={tmp_path / 'soak.png'}")

    def judged(run: Any) -> tuple[int, dict[str, Any], str]:
        outcome = module_of_example("lm_runs").train_densely(settings, run, CPU)
        code = module_of_example("train_lm").judge([outcome], [run], settings, CPU)
        return code, json.loads(path.read_text()), capsys.readouterr().out

    return judged


@promise("steady-steps")
def test_a_soak_of_two_ranks(recorded: Any, judge: Judge) -> None:
    settings = settings_of("--nproc=2", *SOAK)
    tokens = [logits.shape[1] for logits in recorded.logits]
    assert tokens == [16 * layout.context for layout in settings.course.layouts]
    assert [len(rank.samples) for rank in recorded.held] == [STEPS, STEPS]
    assert all(level.flat for rank in recorded.held for level in rank.levels if level.name in EQUAL)
    # In so few steps Python itself has not settled.
    code, document, said = judge(replace(recorded, held=(held(samples()), held(samples(), rank=1))))
    assert (code, document["kind"], document["ok"]) == (0, "soak", True)
    assert document["environment"]["process_group"] == "gloo"
    assert (document["settings"]["capacity"], document["settings"]["learning_rate"]) == (32, 0.01)
    assert [part["most"] for part in document["tokens"]] == [32, 32]
    assert document["steps_without_tokens"] == [1, 1]
    run = document["runs"]["reference"]
    assert run["losses"]["step"] == list(range(1, STEPS + 1))
    assert run["loss_distance"]["most_of_bound"] <= 1
    assert run["routing"]["busiest_rank"]["least"] >= 0.5
    assert "memory of rank 1 flat" in said


@promise("steady-steps")
@pytest.mark.thorough
@both_backends
def test_nothing_is_left_between_steps(pool: RankPool, backend: str) -> None:
    """On a GPU its memory too, to the byte."""
    module_of_example("lm_runs")
    found = pool.run(train, backend, ["--soak", "--steps=6", "--context=4"], world_size=2)[0]
    levels = [level for rank in found.held for level in rank.levels if level.name in EQUAL]
    assert [str(level) for level in levels if not level.flat] == []
    assert len(levels) >= 2 * 3


@promise("steady-steps")
def test_a_loss_that_is_off_and_memory_that_grows_are_red(recorded: Any, judge: Judge) -> None:
    off = recorded.losses.clone()
    off[-1] += 1e-4
    code, document, said = judge(replace(recorded, losses=off, held=()))
    assert (code, document["ok"], document["runs"]["reference"]["agree"]) == (1, False, False)
    assert "losses DIFFER" in said
    # And so are tokens in another order.
    turned = replace(recorded, logits=[logits.flip(1) for logits in recorded.logits])
    assert not module_of_example("lm_runs").train_densely(settings_of("--nproc=2", *SOAK), turned, CPU).logits.ok
    growing = (held(samples()), held(samples(allocated=[7, 7, 8, 9]), rank=1))
    code, document, said = judge(replace(recorded, held=growing))
    run = document["runs"]["reference"]
    assert (code, document["ok"], run["agree"], run["flat"]) == (1, False, True, False)
    assert run["memory"][1]["levels"]["allocated"] == {"flat": False, "rise": 2, "most": 0}
    assert "rank 1, allocated: got 7 after the warm-up, then 7 to 9, expected no change" in said


def grown(name: str, *values: int, tokens: int = 1) -> list[str]:
    """What is not flat where these are the values of ``name``."""
    return [level.name for level in held(samples(**{name: list(values)}), tokens).levels if not level.flat]


def test_what_has_to_stay_equal_and_what_may_grow() -> None:
    """By an allocation, or by a number for each token. The warm-up may, and needs samples behind it."""
    for name, values in product(EQUAL, ([7, 7, 7, 8], [7, 7, 8, 7], [7, 7, 7, 6])):
        assert grown(name, *values) == [name]
    tokens, most = 10**6, 4 * 2 * 10**6
    # Python takes a MiB, and the C library 128 KiB in each of 7 threads; a page of a device are two MiB.
    for name, unit in (("anonymous", 2**20 + 7 * 2**17), ("used", 2**21)):
        assert grown(name, 7, 7, 7, 7 + unit) == []
        assert grown(name, 7, 7, 7, 7 + unit + 1) == [name]
        assert grown(name, 7, 7, 7, 7 + most, tokens=tokens) == []
        assert grown(name, 7, 7, 7, 0, tokens=tokens) == []
        assert grown(name, 7, 7, 7 + most + 1, 7, tokens=tokens) == [name]
    assert held(samples(**{name: [1, 7, 7, 7] for name in [*EQUAL, *BOUNDED]}), tokens=0).flat
    with pytest.raises(ValueError, match="got 1 samples behind a warm-up of 4 steps"):
        held(samples(), warm_up=4)


@pytest.mark.parametrize("leak", ["nothing", "tensors", "descriptors", "threads"])
def test_a_step_that_leaves_something_behind_is_red(leak: str, tmp_path: Path) -> None:
    settings, runs = settings_of("--nproc=1", "--soak", "--steps=3"), module_of_example("lm_runs")
    watch, kept, over = runs.Watch(CPU, settings.course.samples_at), [], threading.Event()
    leaks = {
        "nothing": lambda: None,
        "tensors": lambda: torch.zeros(1),
        "descriptors": lambda: (tmp_path / str(len(kept))).open("w"),
        "threads": lambda: threading.Thread(target=over.wait),
    }
    for done in range(1, 4):
        kept.append(leaks[leak]())
        getattr(kept[-1], "start", over.clear)()
        watch.look(done)
    over.set()
    for thing in kept:
        getattr(thing, "join", getattr(thing, "close", over.set))()
    (found,) = runs.held_by_ranks([watch.samples], settings.course)
    changed = [level.name for level in found.levels if level.name in EQUAL and not level.flat]
    assert changed == ([] if leak == "nothing" else [leak])
