"""Fixtures: one pool of ranks for the run of this process, on the CPU and, where there are GPUs, on them."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from sonic_ep.fast.capabilities import interpreter_reasons
from sonic_ep.testing import RankPool, ranks

# For a server that finds the same package in its folder, where it looks first.
PRELOADED = [*ranks.IMPORTED_ONCE, "pytest", "sonic_ep.testing", "sonic_ep.fast.backend"]
SAME_PACKAGE = Path("sonic_ep").resolve() in Path(ranks.__file__).parents
# Of one GPU, or of two, more ranks share them.
DEVICE_TYPES = ["cpu", "cuda"] if torch.cuda.device_count() > 0 else ["cpu"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run tests marked thorough on the CPU, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what would take minutes, unless it is asked for."""
    if config.getoption("--thorough"):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough") and not on_gpus(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def parameters_of(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def on_gpus(item: pytest.Item) -> bool:
    """Whether a test's ranks run on GPUs."""
    params = parameters_of(item)
    return "cuda" in (params.get("pool"), params.get("device_type")) or "cuda_pool" in getattr(item, "fixturenames", ())


def pytest_report_header() -> str:
    gpus = torch.cuda.device_count()
    return f"sonic_ep levels: cpu runs, cuda {f'runs, GPUs: {gpus}' if gpus else 'not run: needs a GPU, found none'}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """On the CPU the fast backend needs an interpreter that works, which not every machine has; see ``own_gpus``."""
    ranks_of, gpus = parameters_of(item).get("world_size", 1), torch.cuda.device_count()
    if item.get_closest_marker("own_gpus") and on_gpus(item) and isinstance(ranks_of, int) and 0 < gpus < ranks_of:
        pytest.skip(f"needs a GPU for each of {ranks_of} ranks, found {gpus}")
    fast = item.get_closest_marker("fast") is not None or parameters_of(item).get("backend") == "fast"
    reasons = interpreter_reasons() if fast and not on_gpus(item) else ()
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.fixture(scope="session", autouse=True)
def _interpreter_imported_once() -> None:
    """Without GPUs all ranks interpret kernels: the server that they are forked from imports what that takes, too."""
    if "cuda" not in DEVICE_TYPES and ranks.START_METHOD == "forkserver" and SAME_PACKAGE and not interpreter_reasons():
        with patch.dict(os.environ, ranks.SETTINGS["cpu"]), patch.object(ranks, "IMPORTED_ONCE", PRELOADED):
            ranks.starting_context()
            forkserver.ensure_running()


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[str], RankPool]]:
    """The pool of ranks on one type of device; it starts when it is first asked for, and stays for the whole run."""
    with ExitStack() as open_pools:
        yield cache(lambda device_type: open_pools.enter_context(RankPool(device_type)))


@pytest.fixture(scope="session", params=DEVICE_TYPES)
def pool(pools: Callable[[str], RankPool], request: pytest.FixtureRequest) -> RankPool:
    """Live ranks; every test that uses them runs on each kind of device that is here."""
    return pools(request.param)


@pytest.fixture(scope="session")
def cpu_pool(pools: Callable[[str], RankPool]) -> RankPool:
    """Live ranks on the CPU, for what does not depend on the device."""
    return pools("cpu")


@pytest.fixture(scope="session")
def cuda_pool(pools: Callable[[str], RankPool]) -> RankPool:
    """Live ranks on GPUs, for what there is on GPUs only: streams, graphs, copy engines."""
    if "cuda" not in DEVICE_TYPES:
        pytest.skip("needs a GPU, found none")
    return pools("cuda")
