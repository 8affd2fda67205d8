"""The modules of ``examples/train_lm.py``, for tests in this process and on live ranks."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sonic_ep.testing import Rank

EXAMPLES = Path(__file__).parents[2] / "examples"


def module_of_example(name: str) -> ModuleType:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


@contextmanager
def no_launcher() -> Iterator[None]:
    """Without torchrun's environment, and with one thread: on a busy processor two are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        yield
    torch.set_num_threads(threads)


def train(rank: Rank, backend: str, arguments: list[str]) -> object:
    """On a rank: the command line's run by ``backend``. Returns what it recorded, None but on rank 0."""
    options, runs = module_of_example("lm_options"), module_of_example("lm_runs")
    settings = options.parse_settings([f"--nproc={rank.world_size}", "--backend=reference", *arguments], None)
    return runs.train_with(backend, settings, rank.device, readers={0})
