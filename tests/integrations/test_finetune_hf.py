"""The fine-tuning example: a Qwen3-MoE of transformers on two ranks, whose checkpoint four ranks and one go on from."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import HANG_SECONDS
from training_example import EXAMPLES, module_of_example, no_launcher

from sonic_ep.testing import Rank, RankPool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    # What ranks return is found by name.
    module_of_example("finetune_hf")
    with no_launcher():
        yield


def settings_of(folder: Path, implementation: str) -> Any:
    example = module_of_example("finetune_hf")
    return example.Settings(folder=folder, size=example.SIZES["seconds"], implementation=implementation)


def on_ranks(_rank: Rank, part: str, folder: Path, implementation: str) -> Any:
    return module_of_example("finetune_hf").finetune(part, settings_of(folder, implementation), CPU)


# transformers builds its meshes on the accelerator that it finds.
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs: ranks on the CPU")
@pytest.mark.parametrize("implementation", ["sonic_ep", pytest.param("sonic_ep_dispatch", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_restart_with_other_ranks_goes_on_where_one_process_would_be(
    cpu_pool: RankPool, tmp_path: Path, ranks: int, implementation: str
) -> None:
    """Losses and gradient norms; and what ``save_pretrained`` writes at the end is what one process has."""
    example, settings = module_of_example("finetune_hf"), settings_of(tmp_path, implementation)
    example.make_pretrained(settings)
    first = cpu_pool.run(on_ranks, "train", tmp_path, implementation, world_size=2)[0]
    if ranks == 1:
        second = example.finetune("resume", settings, CPU)
    else:
        second = cpu_pool.run(on_ranks, "resume", tmp_path, implementation, world_size=ranks)[0]
    uninterrupted = example.finetune("alone", settings, CPU)
    found = example.compare([first, second], uninterrupted, settings.tokens)
    assert found.ok, found
    # Rounding alone: so few steps have no near tie.
    assert found.bound < 1e-4 < settings.bound
    assert uninterrupted.losses[-1] < uninterrupted.losses[0]
    assert len(example.written(settings, CPU)) > len(example.PROMPT)


@pytest.mark.thorough
def test_the_program_as_a_user_runs_it(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLES / "finetune_hf.py"), "--size=seconds", "--folder=run"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": HANG_SECONDS}
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ranks and one process agree") == 2
    assert "it writes: 'import " in done.stdout
