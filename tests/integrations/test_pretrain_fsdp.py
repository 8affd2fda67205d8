"""The pretraining example: FSDP2 over efsdp x ep, AdamW, clipping, and a checkpoint of four ranks on two and on one."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from limits import HANG_SECONDS
from near import assert_near
from promises import promise
from same import assert_same_bits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training_example import EXAMPLES, module_of_example, no_launcher

from sonic_ep.testing import Rank, RankPool

STEPS = 4
CPU = torch.device("cpu")
PNG_SIGNATURE = b"\x89PNG\r\n"
# Its own errors: two products and a sum of a weight, beside which those of the step are small.
ROUNDINGS_OF_ADAMW = 3


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    # What ranks return is found by name.
    module_of_example("pretrain_fsdp")
    with no_launcher():
        yield


def settings_of(folder: Path) -> Any:
    return module_of_example("pretrain_fsdp").Settings(folder=folder, steps=STEPS)


def whole(state: Any, path: str = "") -> dict[str, Tensor]:
    """Collective. All tensors by their paths, DTensors gathered; of anything else the path tells the value."""
    if isinstance(state, dict | list):
        places = state.items() if isinstance(state, dict) else enumerate(state)
        return {name: tensor for key, value in places for name, tensor in whole(value, f"{path}/{key}").items()}
    if not isinstance(state, Tensor):
        return {f"{path}={state}": torch.empty(0)}
    # A copy, of which the rest of the training does not change anything.
    return {path: (state.full_tensor() if isinstance(state, DTensor) else state).detach().clone()}


def loaded(folder: Path, again: Path | None = None) -> dict[str, Tensor]:
    """Collective. What a checkpoint gives to a new model and optimizer; they save it ``again``."""
    example = module_of_example("pretrain_fsdp")
    model = example.build(replace(settings_of(folder), seed=1), CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    step = example.load(folder, model, optimizer)
    if again is not None:
        example.save(again, model, optimizer, step)
    return whole(example.state_of(model, optimizer, step))


def train_and_save(_rank: Rank, folder: Path) -> Any:
    settings = settings_of(folder)
    return module_of_example("pretrain_fsdp").pretrain("train", settings, CPU), loaded(settings.checkpoint)


def load_save_and_resume(_rank: Rank, folder: Path) -> Any:
    settings = settings_of(folder)
    found = loaded(settings.checkpoint, again=folder / "again")
    return module_of_example("pretrain_fsdp").pretrain("resume", settings, CPU), found


@promise("checkpoints")
def test_a_restart_with_fewer_ranks_goes_on_where_one_process_would_be(cpu_pool: RankPool, tmp_path: Path) -> None:
    """Its checkpoint of four ranks is bit-equal on two, and saved by them on one: weights, moments and step counts."""
    first, at_four = cpu_pool.run(train_and_save, tmp_path, world_size=4)[0]
    second, at_two = cpu_pool.run(load_save_and_resume, tmp_path, world_size=2)[0]
    assert_same_bits(at_two, at_four, "on two ranks")
    assert_same_bits(loaded(tmp_path / "again"), at_four, "in one process")
    counts = {tensor.item() for path, tensor in at_four.items() if path.endswith("step")}
    assert counts == {STEPS // 2}
    assert any(path.endswith("exp_avg_sq") and tensor.any() for path, tensor in at_four.items())
    example, settings = module_of_example("pretrain_fsdp"), settings_of(tmp_path)
    uninterrupted = example.pretrain("alone", settings, CPU)
    found = module_of_example("pretrain_report").compare([first, second], uninterrupted, settings.tokens)
    assert found.ok, found
    assert found.bound < 1e-4


def test_a_restart_without_the_optimizer_s_state_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a number that is no number, and steps that are missing."""
    example, report, settings = (
        module_of_example("pretrain_fsdp"),
        module_of_example("pretrain_report"),
        settings_of(tmp_path),
    )
    uninterrupted = example.pretrain("alone", settings, CPU)
    first, right = (example.pretrain(part, settings, CPU) for part in ("train", "resume"))
    assert report.compare([first, right], uninterrupted, settings.tokens).ok
    load = example.load

    def load_model(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        step = load(folder, model, optimizer)
        optimizer.state.clear()
        return step

    monkeypatch.setattr(example, "load", load_model)
    forgetful = example.pretrain("resume", settings, CPU)
    nan = replace(right, norms=[*right.norms[1:], math.nan])
    for wrong in (forgetful, nan):
        found = report.compare([first, wrong], uninterrupted, settings.tokens)
        assert not found.ok
        assert "DIFFER" in str(found)
    with pytest.raises(ValueError, match="steps: got"):
        report.compare([first], uninterrupted, settings.tokens)


def gradients_and_steps(rank: Rank, folder: Path) -> Any:
    """Collective. Gathered: all gradients of the first batch, clipped, and the weights after a step of each AdamW."""
    example, settings = module_of_example("pretrain_fsdp"), settings_of(folder)
    model = example.build(settings, rank.device)
    layouts = example.even_layouts(1, settings.context, rank.world_size)
    batch = next(example.batches(example.standard_library_text(), layouts, settings.seed)).of_rank(rank.rank)
    logits = model(batch[:, :-1]).flatten(0, 1)
    (F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum") / settings.tokens).backward()
    example.clip_grad_norm_(model.parameters(), example.MAX_NORM)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    stepped = {}
    for option in ("foreach", "fused"):
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        stepped[option] = whole(after_a_step(weights, grads, **{option: True}))
    return whole(grads), stepped


def after_a_step(weights: dict[str, Tensor], grads: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
    """Weights after a step of AdamW with these gradients."""
    for name, weight in weights.items():
        weight.grad = grads[name]
    torch.optim.AdamW(weights.values(), lr=1e-2, **options).step()
    return weights


def test_gradients_and_each_implementation_of_adamw(cpu_pool: RankPool, tmp_path: Path) -> None:
    """Gradients of four ranks are those of one process, and a step with them is that of one process."""
    grads, stepped = cpu_pool.run(gradients_and_steps, tmp_path, world_size=4)[0]
    expected, _ = gradients_and_steps(Rank(rank=0, world_size=1, device=CPU), tmp_path)
    assert grads.keys() == expected.keys()
    settings = settings_of(tmp_path)
    for name, grad in expected.items():
        assert grad.any(), name
        assert_near(grads[name], grad, units=settings.tokens)
    model = module_of_example("pretrain_fsdp").build(settings, CPU)
    first = {f"/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for option, found in stepped.items():
        want = after_a_step({name: weight.clone() for name, weight in first.items()}, grads, foreach=False)
        for name, weight in want.items():
            assert not torch.equal(weight, first[name]), f"{option}: {name}"
            assert_near(found[name], weight, units=ROUNDINGS_OF_ADAMW)


@pytest.mark.thorough
def test_the_program_as_a_user_runs_it(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(EXAMPLES / "pretrain_fsdp.py"), f"--steps={STEPS}", "--folder=run"]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": HANG_SECONDS}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ranks and one process agree" in done.stdout
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install matplotlib")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(PNG_SIGNATURE)
