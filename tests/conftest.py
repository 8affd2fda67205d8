"""Fixtures: one pool of ranks for the whole run, on the CPU and, where there are GPUs, on them."""

from collections.abc import Iterator

import pytest
import torch

from sonic_ep.fast.availability import interpreter_reasons
from sonic_ep.testing import RankPool

GPUS_NEEDED = 2
DEVICE_TYPES = ["cpu", "cuda"] if torch.cuda.device_count() >= GPUS_NEEDED else ["cpu"]


def pytest_report_header() -> str:
    found = torch.cuda.device_count()
    gpus = "runs" if "cuda" in DEVICE_TYPES else f"not run: needs {GPUS_NEEDED} CUDA devices, found {found}"
    return f"sonic_ep levels: cpu runs, cuda {gpus}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """On the CPU the fast backend needs an interpreter that works, which not every machine has."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    fast = item.get_closest_marker("fast") is not None or params.get("backend") == "fast"
    on_gpus = "cuda_pool" in getattr(item, "fixturenames", ()) or params.get("pool") == "cuda"
    reasons = interpreter_reasons() if fast and not on_gpus else ()
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.fixture(scope="session", params=DEVICE_TYPES)
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Live ranks; every test that uses them runs on each kind of device that is here."""
    with RankPool(request.param) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def cpu_pool() -> Iterator[RankPool]:
    """Live ranks on the CPU, for what does not depend on the device."""
    with RankPool("cpu") as ranks:
        yield ranks


@pytest.fixture(scope="session")
def cuda_pool() -> Iterator[RankPool]:
    """Live ranks on GPUs, for what there is on GPUs only: streams, graphs, copy engines."""
    if "cuda" not in DEVICE_TYPES:
        pytest.skip(f"needs {GPUS_NEEDED} CUDA devices, found {torch.cuda.device_count()}")
    with RankPool("cuda") as ranks:
        yield ranks
