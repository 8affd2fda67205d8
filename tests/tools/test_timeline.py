"""``bench/timeline.py``: which bytes it counts for which kernel, and what it refuses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import timeline
from end_to_end import TORCHRUN, context_on, python_in_root
from harness.context import Method, Rounds
from on_ranks import on_ranks
from schema import Entry
from timeline import KernelTime, Shape, kernels_of

from sonic_ep.cli.exit_codes import WRONG_ARGUMENTS
from sonic_ep.profiler.timing import Timing
from sonic_ep.testing import Rank

SHAPE = Shape(tokens=10, hidden=6, intermediate=4, num_experts=3, top_k=2)
# Of a step: products of any implementation, whose preparation is a kernel of its own.
PRODUCTS = ["hopper_rows_kernel", "void cutlass::device_kernel", "hopper_rows_kernel", "hopper_weights_kernel"]
PRODUCTS += ["rows_kernel", "weights_kernel"]


def listed(names: list[str]) -> dict[str, KernelTime]:
    return {kernel.name: kernel for kernel in timeline.timeline(names, [[1e-6] * len(names)] * 2, SHAPE)}


def test_each_kernel_has_its_bytes() -> None:
    """Of 10 tokens, 20 rows of 6, 4 wide inside; w2 is (3, 6, 4). Two bytes each."""
    found = listed(["prepare_grouped_gemm_data<cutlass", *PRODUCTS, "pull_to_rows_kernel", "activate_kernel", "memset"])
    weights = 3 * 6 * 4
    expected = {
        "h": 20 * 6 + 2 * weights + 20 * 8,
        "y": 20 * 4 + weights + 20 * 6,
        "dA": 20 * 6 + weights + 20 * 4,
        "dw2": 20 * 6 + 20 * 4 + weights,
        "dx of rows": 20 * 8 + 2 * weights + 20 * 6,
        "dw1": 20 * 8 + 20 * 6 + 2 * weights,
    }
    for what, numbers in expected.items():
        assert found[f"grouped product {what}"].nbytes == 2 * numbers, what
    assert found["pull_to_rows_kernel"].nbytes == 2 * (10 * 6 + 20 * 6)
    assert found["activate_kernel"].nbytes == 2 * 20 * (8 + 4)
    assert listed(["activate_backward_kernel"])["activate_backward_kernel"].nbytes == 2 * 20 * (8 + 4 + 8 + 4)
    assert [name for name, kernel in found.items() if kernel.nbytes is None] == [
        "prepare_grouped_gemm_data<cutlass",
        "memset",
    ]


def test_an_entry_says_how_long_the_bytes_take() -> None:
    timing = Timing(rounds=(2e-6, 4e-6))
    entry = KernelTime(name="pull", timing=timing, nbytes=6000).entry(3, "qwen3-30b", SHAPE, memory_rate=3e9)
    assert isinstance(entry, Entry)
    assert (entry.name, entry.median_us, entry.rounds) == ("qwen3-30b: kernel 03, pull", 3, 2)
    assert (entry.memory_bytes, entry.gb_per_s, entry.floor_us, entry.floor_by) == (6000, 2, 2, "memory")
    unknown = KernelTime(name="memset", timing=timing, nbytes=None).entry(0, "olmoe", SHAPE, memory_rate=3e9)
    assert (unknown.memory_bytes, unknown.floor_us) == (None, None)


def test_steps_that_are_not_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        device_type = type("CUDA", (), {"name": "CUDA"})
        time_range = type("Range", (), {"start": 0.0})
        device_time, name = 1.0, "kernel"

    class Profiled:
        def __init__(self, activities: object) -> None:
            """Of a GPU that is not there."""

        def __enter__(self) -> "Profiled":
            return self

        def __exit__(self, *error: object) -> None:
            """Nothing was begun."""

        def events(self) -> list[Event]:
            return [Event()] * 7

    monkeypatch.setattr(timeline, "profile", Profiled)
    monkeypatch.setattr(timeline.torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="got 7 kernels in 2 steps: they are not alike"):
        kernels_of(lambda: None, 2)


@pytest.mark.fast
@on_ranks(1, pool="cpu_pool")
def test_a_layer_and_its_kernels_are_recorded(rank: Rank) -> None:
    """Where a CPU has neither graphs nor kernels to list: eager calls, and kernels that are given."""
    with context_on(rank) as context, pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "Method", SimpleNamespace(GRAPH=Method.EAGER, EAGER=Method.EAGER))
        patch.setattr(timeline, "ROUNDS", Rounds(rounds=1, warmup=0))
        patch.setattr(timeline, "kernels_of", lambda step, steps: (step(), (["activate_kernel"], [[1e-6]]))[1])
        context = replace(context, results=replace(context.results, memory_rate=1e9))
        timeline.measure(context, "qwen3-30b", replace(SHAPE, hidden=8, intermediate=8))
        entries = {entry.name: entry for entry in context.results.entries}
    passes = ("forward, inference", "forward and backward")
    products, layers = (
        [f"qwen3-30b: {what}, {which}" for which in passes] for what in ("grouped products alone", "layer")
    )
    assert set(entries) == {*products, *layers, "qwen3-30b: kernel 00, activate_kernel"}


def test_it_needs_one_rank_on_a_gpu() -> None:
    done = python_in_root("bench/timeline.py")
    if not timeline.torch.cuda.is_available():
        assert (done.returncode, done.stderr.count("got no GPU, expected one rank on a GPU")) == (WRONG_ARGUMENTS, 1)
    done = python_in_root(*TORCHRUN, "bench/timeline.py")
    assert done.returncode != 0
    assert "got 2 ranks, expected one rank on a GPU" in done.stderr
