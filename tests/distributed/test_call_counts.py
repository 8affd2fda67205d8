"""What a call like an earlier one costs its host, counted: launches, barriers, calls of ATen, and Python frames.

On GPUs each of them takes microseconds, at any number of tokens. Their time is measured by ``bench/host_time.py``.
"""

import gc
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from layer_inputs import layer_inputs, routing_of
from on_ranks import on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sonic_ep import ExpertParallel
from sonic_ep.testing import Case, Rank

pytestmark = pytest.mark.fast
CASE = Case(
    name="counted", dtype=torch.bfloat16, tokens=(5, 3), hidden=16, intermediate=8, num_experts=4, top_k=2, bias=False
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """launches: of this library's kernels, barriers among them. What happens inside of a launch, or inside of a product
    of matrices by experts, does not count: both are others on GPUs.
    """

    launches: int
    barriers: int
    aten: int
    frames: int


# The most of each. By design a forward has at most 8 launches with 2 barriers, a backward 10 with 3.
MOST = {
    "forward": Work(launches=7, barriers=1, aten=22, frames=177),
    "forward, with gradients": Work(launches=7, barriers=1, aten=23, frames=204),
    # One frame compares the router's options with those of an object before, if there was one.
    "backward": Work(launches=10, barriers=2, aten=25, frames=190),
    "plan and dispatch": Work(launches=7, barriers=2, aten=10, frames=156),
    "combine": Work(launches=3, barriers=1, aten=3, frames=74),
}


@dataclass
class Counter:
    """What has been counted. paused: inside of what does not count."""

    kernels: list[str] = field(default_factory=list)
    aten: list[str] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)
    paused: int = 0

    def frame(self, frame: FrameType, event: str, argument: object) -> None:
        """For ``sys.setprofile``."""
        if event == "call":
            self.frames.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}")

    def uncounted(self, function: Callable[..., Any], note: Callable[..., object] = id) -> Callable[..., Any]:
        """``function`` as one frame: what it calls is not counted. note: gets its arguments before."""

        def called(*arguments: Any, **options: Any) -> Any:
            held = sys.getprofile()
            sys.setprofile(None)
            note(arguments)
            self.paused += 1
            try:
                return function(*arguments, **options)
            finally:
                self.paused -= 1
                sys.setprofile(held)

        return called

    def launch(self, arguments: tuple[Any, ...]) -> None:
        """Of a ``Launcher``, its grid, and what follows."""
        if 0 not in arguments[1]:
            self.kernels.append(arguments[0]._kernel.fn.__name__)

    def work(self) -> Work:
        barriers = self.kernels.count("barrier_kernel")
        sizes = {"aten": len(self.aten), "frames": len(self.frames)}
        return Work(launches=len(self.kernels), barriers=barriers, **sizes)


class CountedCalls(TorchDispatchMode):
    """Notes the calls of ATen, and changes none."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._counter.paused:
            self._counter.aten.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def paused_inside(counter: Counter) -> Iterator[None]:
    """Launches and grouped products count as one frame each, launches also as kernels."""
    from sonic_ep.fast import gemm, hopper_gemm
    from sonic_ep.fast.launch import Launcher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "__call__", counter.uncounted(Launcher.__call__, counter.launch))
        for kind in (hopper_gemm.HopperGemm, gemm.LibraryGemm, gemm.LoopGemm, gemm.TritonGemm):
            for name in ("rows", "weights"):
                patch.setattr(kind, name, counter.uncounted(getattr(kind, name)))
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


def counted(prepare: Callable[[], Callable[[], object]]) -> Counter:
    """Collective. What ``prepare()`` returns, called twice, then counted, once for its frames and once for the rest."""
    for _ in range(2):
        prepare()()
    frames, rest = Counter(), Counter()
    call = prepare()
    with paused_inside(frames):
        sys.setprofile(frames.frame)
        call()
        sys.setprofile(None)
    call = prepare()
    with paused_inside(rest), CountedCalls(rest):
        call()
    assert rest.kernels == frames.kernels, "the counter changes what it counts"
    rest.frames = frames.frames
    return rest


def calls_of(ep: ExpertParallel, rank: Rank) -> dict[str, Callable[[], Callable[[], object]]]:
    """What prepares each of ``MOST``."""
    x, weights, dy = layer_inputs(rank, CASE)
    idx, scores = (tensor.contiguous() for tensor in routing_of(rank, CASE))

    def backward() -> Callable[[], object]:
        for leaf in (x, *weights):
            leaf.grad = None
        return partial(ep.moe(x, *weights, CASE.top_k).y.backward, dy)

    def plan_and_dispatch() -> Tensor:
        return ep.dispatch(x, ep.plan(idx, CASE.num_experts))

    def combine() -> Callable[[], object]:
        plan = ep.plan(idx, CASE.num_experts)
        return partial(ep.combine, ep.dispatch(x, plan), scores, plan)

    return {
        "forward": lambda: partial(ep.moe, x, *weights, CASE.top_k),
        "forward, with gradients": lambda: partial(ep.moe, x, *weights, CASE.top_k),
        "backward": backward,
        "plan and dispatch": lambda: plan_and_dispatch,
        "combine": combine,
    }


ALLOCATIONS = ("aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default")


@on_ranks(1, pool="cpu_pool")
def test_a_step_of_one_rank_is_made_of_what_the_benchmarks_say(rank: Rank) -> None:
    """Tensors, launches and products, whose times ``bench/host_time.py`` takes alone."""
    from sonic_ep.fast import gemm, router

    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    words = r"make (\d+) tensors, (\d+) launches, (\d+) products of the router and (\d+) grouped ones"
    x, weights, dy = layer_inputs(rank, CASE)
    called = {"step": 0, "router": 0, "grouped": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            called[name] += 1
            return function(*given)

        return call

    with ExpertParallel(backend="fast", max_tokens_per_rank=8) as ep, pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "product", counting("router", router.product))
        for name in ("rows", "weights"):
            patch.setattr(gemm.LoopGemm, name, counting("grouped", getattr(gemm.LoopGemm, name)))
        step = counting("step", lambda: ep.moe(x, *weights, CASE.top_k).y.backward(dy))
        found = counted(lambda: step)
    made = sum(found.aten.count(name) for name in ALLOCATIONS)
    products = (called["router"] / called["step"], called["grouped"] / called["step"])
    assert [tuple(map(int, quoted)) for quoted in re.findall(words, page)] == [(made, len(found.kernels), *products)]


@on_ranks(2, pool="cpu_pool")
def test_host_work_of_a_call(rank: Rank) -> None:
    with ExpertParallel(backend="fast", max_tokens_per_rank=8) as ep:
        calls, found = calls_of(ep, rank), dict[str, Counter]()
        for name in MOST:
            with torch.set_grad_enabled("grad" in name or name == "backward"):
                found[name] = counted(calls[name])
    over = []
    for name, counter in found.items():
        pairs = zip(astuple(counter.work()), astuple(MOST[name]), strict=True)
        if any(number > most for number, most in pairs):
            over.append(f"{name}: {counter.work()}, expected at most {MOST[name]}:\n{counter}")
    assert not over, "\n".join(over)
