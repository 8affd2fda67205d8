"""Triton compiles a kernel again for an integer that is 1, or a multiple of 16, for the first time.

A rank that compiles keeps all others waiting, for seconds. So what changes from call to call is not specialized.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from there_and_back import MODES, Modes, by_modes
from torch import Tensor

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import Rank, RankPool

pytestmark = pytest.mark.fast

# What stays the same as long as an ``ExpertParallel`` and the layers that use it, or a measurement of the link.
CONSTANTS_OF_AN_OBJECT = {
    *{"rank", "world_size", "peer", "pieces"},
    *{"num_experts", "experts", "experts_per_rank", "bins", "width"},
}

HIDDEN, INTERMEDIATE, TOP_K, HELD = 64, 32, 2, 2
# Tokens of the first step, and of those after it: of every class that Triton tells apart (1, multiples of 16, others),
# and none at all. Interpreted, each takes its time.
TOKENS = {"cuda": (64, (63, 48, 17, 16, 1, 0)), "cpu": (16, (5, 1, 0))}


def kernels() -> dict[str, Any]:
    """Every kernel of the fast backend, by its name: compiled functions that nobody calls but the host."""
    import sonic_ep.fast

    found = {}
    for module in pkgutil.walk_packages(sonic_ep.fast.__path__, "sonic_ep.fast."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and hasattr(value, "run"):
                found[name] = value
    return found


def unspecialized(kernel: Any) -> set[str]:
    """What a kernel's decorator says, whether it is to be compiled or to be interpreted."""
    named = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "rewrite") else kernel.do_not_specialize
    return set(named or ())


def numbers_of(kernel: Any) -> set[str]:
    """Parameters that are neither addresses nor constants of the compiler."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return {p.name for p in parameters if "constexpr" not in str(p.annotation) and not p.name.endswith("_ptr")}


def test_numbers_that_change_are_not_specialized() -> None:
    found = kernels()
    assert len(found) >= 25
    wrong = {name: numbers_of(found[name]) - unspecialized(found[name]) - CONSTANTS_OF_AN_OBJECT for name in found}
    assert {name: numbers for name, numbers in wrong.items() if numbers} == {}
    unknown = {name: unspecialized(found[name]) - numbers_of(found[name]) for name in found}
    assert {name: numbers for name, numbers in unknown.items() if numbers} == {}, "named, but no parameters"
    used = set().union(*(numbers_of(kernel) for kernel in found.values()))
    assert used >= CONSTANTS_OF_AN_OBJECT, "what no kernel takes is not listed"


def programs_of_kernels() -> set[str]:
    """Functions that ask which program they are."""
    import sonic_ep.fast

    asking = set()
    for module in pkgutil.walk_packages(sonic_ep.fast.__path__, "sonic_ep.fast."):
        for name, value in vars(importlib.import_module(module.name)).items():
            function = getattr(value, "fn", None)
            if inspect.isfunction(function) and "tl.program_id" in inspect.getsource(function):
                asking.add(name)
    return asking


def test_kernels_are_found_by_their_names() -> None:
    assert programs_of_kernels() == set(kernels())


def of_argument(argument: object, *, specialized: bool) -> object:
    """What Triton compiles for, of an argument: the least that it tells apart."""
    if isinstance(argument, Tensor):
        return str(argument.dtype), argument.data_ptr() % 16 == 0
    if not isinstance(argument, int) or isinstance(argument, bool):
        return repr(argument)
    wide = not -(2**31) <= argument < 2**31
    return (wide, argument == 1, argument % 16 == 0) if specialized else wide


@contextmanager
def variants(rank: Rank) -> Iterator[Callable[[], set[str]]]:
    """How many ways kernels have been compiled so far, by what Triton keeps them under.

    Interpreted they are not compiled at all: there it is what each launch would have been compiled for.
    """
    if rank.device.type == "cuda":

        def compiled() -> set[str]:
            # Of each device, Triton keeps first of all the compiled kernels by what they were compiled for.
            caches = [(name, cache[0]) for name, kernel in kernels().items() for cache in kernel.device_caches.values()]
            return {f"{name} {key}" for name, cache in caches for key in cache}

        yield compiled
        return

    from triton.runtime.interpreter import InterpretedFunction

    seen: set[str] = set()
    run = InterpretedFunction.run

    def recorded(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        free = unspecialized(kernel)
        classes = {
            name: of_argument(argument, specialized=name not in free)
            for name, argument in zip(kernel.arg_names, arguments, strict=False)
        }
        seen.add(f"{kernel.__name__} {classes} {sorted(constants.items())}")
        return run(kernel, *arguments, grid=grid, warmup=warmup, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", recorded)
        yield lambda: set(seen)


def train(ep: ExpertParallel, rank: Rank, tokens: int, *, biases: bool) -> None:
    """One training step of everything that there is, with ``tokens`` on this rank."""

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=rank.device).bfloat16().requires_grad_()

    experts = HELD * rank.world_size
    x, router_w = drawn(tokens, HIDDEN), drawn(experts, HIDDEN)
    w1, w2 = drawn(HELD, 2 * INTERMEDIATE, HIDDEN), drawn(HELD, HIDDEN, INTERMEDIATE)
    of_biases = {"b1": drawn(HELD, 2 * INTERMEDIATE), "b2": drawn(HELD, HIDDEN)} if biases else {}
    idx = torch.rand(tokens, experts, device=rank.device).argsort(dim=1)[:, :TOP_K]
    scores = torch.rand(tokens, TOP_K, device=rank.device, requires_grad=True)
    out = ep.moe(x, router_w, w1, w2, TOP_K, **of_biases)
    (out.y.square().sum() + out.router_logits.square().sum()).backward()
    ep.moe_routed(x, idx, scores, w1, w2, **of_biases).square().sum().backward()
    plan = ep.plan(idx, experts)
    ep.combine(ep.dispatch(x, plan).square(), scores, plan).square().sum().backward()


def compiled_by_other_tokens(rank: Rank, config: EPConfig) -> list[str]:
    """What is compiled after a training step of C tokens, by steps of fewer, which differ from rank to rank."""
    several = rank.world_size > 1
    most, fewer = TOKENS[rank.device.type]
    # On one rank C is T, and changes with it; so does the height of tiles there, where products end in a bias.
    max_tokens = most if several else None
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=max_tokens) as ep, variants(rank) as so_far:
        train(ep, rank, most, biases=several)
        before = so_far()
        assert before, "nothing was compiled at all"
        for number in reversed(fewer) if rank.rank % 2 else fewer:
            train(ep, rank, number, biases=several)
        return sorted(so_far() - before)


@by_modes
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_number_of_tokens_compiles_a_kernel(pool: RankPool, world_size: int, modes: Modes) -> None:
    config = EPConfig(dispatch=modes[0], combine=modes[1], max_rows=10_000)
    assert pool.run(compiled_by_other_tokens, config, world_size=world_size) == [[]] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_number_of_rows_compiles_a_kernel(pool: RankPool, world_size: int) -> None:
    """Rows are as many as there are, another number in each call and on each rank, and x travels in backward again."""
    config = EPConfig(
        dispatch=MODES[0][0], combine=MODES[0][1], cpu_sync_on_runtime=True, redispatch_x_in_backward=True
    )
    assert pool.run(compiled_by_other_tokens, config, world_size=world_size) == [[]] * world_size
