"""Triton compiles a kernel again for an integer that is 1, or a multiple of 16, for the first time.

The other ranks wait seconds for one that compiles. So no number is specialized, not even those that never change: on
two ranks, or in two objects, they differ.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fast_kernels import each_launch, jit_functions, kernels
from on_ranks import on_ranks
from promises import promise
from there_and_back import MODES, Modes
from torch import Tensor

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import Rank

pytestmark = pytest.mark.fast

HIDDEN, INTERMEDIATE, TOP_K, HELD = 64, 32, 2, 2
# Tokens of the first step, and of later ones: of every class that Triton tells apart (1, multiples of 16, others), and
# none at all. Fewer where they are interpreted.
TOKENS = {"cuda": (4096, (2047, 63, 48, 17, 16, 1, 0)), "cpu": (16, (5, 1, 0))}


def unspecialized(kernel: Any) -> set[str]:
    """What a kernel's decorator says, whether it is compiled or interpreted."""
    return set((kernel.kwargs["do_not_specialize"] if hasattr(kernel, "rewrite") else kernel.do_not_specialize) or ())


@promise("no-compile")
def test_no_number_is_specialized() -> None:
    found = kernels()
    sources = {name: inspect.getsource(value.fn) for name, value in jit_functions().items()}
    programs = {
        name
        for name, source in sources.items()
        if re.search(r"tl\.program_id|gl\.warp_specialize|(?<!def )take_ticket", source)
    }
    assert programs == set(found), "names of kernels, and no others, end in _kernel"
    assert len(found) >= 25
    for name, kernel in found.items():
        parameters = inspect.signature(kernel.fn).parameters.values()
        given = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
        numbers = {name for name in given if not name.endswith(("_ptr", "_desc"))}
        assert unspecialized(kernel) == numbers, name


def specialization(argument: object, *, specialized: bool) -> object:
    """What Triton tells apart of an argument when it compiles."""
    if isinstance(argument, Tensor):
        return str(argument.dtype), argument.data_ptr() % 16 == 0
    if not isinstance(argument, int) or isinstance(argument, bool):
        return repr(argument)
    wide = not -(2**31) <= argument < 2**31
    return (wide, argument == 1, argument % 16 == 0) if specialized else wide


@contextmanager
def variants(rank: Rank) -> Iterator[Callable[[], set[str]]]:
    """The variants of kernels that were compiled so far, or would have been where they are interpreted."""
    if rank.device.type == "cuda":
        # For each device, Triton holds first of all the compiled kernels by their specialization.
        found = [(name, kernel.device_caches.values()) for name, kernel in kernels().items()]
        yield lambda: {f"{name} {key}" for name, caches in found for cache in caches for key in cache[0]}
        return
    seen: set[str] = set()

    def record(kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
        free, given = unspecialized(kernel), zip(kernel.arg_names, arguments, strict=False)
        classes = {name: specialization(argument, specialized=name not in free) for name, argument in given}
        seen.add(f"{kernel.__name__} {classes} {sorted(constants.items())}")

    with each_launch(record):
        yield lambda: set(seen)


def train(ep: ExpertParallel, rank: Rank, tokens: int, *, biases: bool) -> None:
    """One training step through every entry point, with ``tokens`` on this rank."""

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


BOUNDED = {"max_rows": 10_000}
# Another number of rows in each call and on each rank.
EXACT = {"cpu_sync_on_runtime": True, "redispatch_x_in_backward": True}
KINDS = [(MODES[0], BOUNDED), (MODES[1], BOUNDED), (MODES[2], BOUNDED), (MODES[0], EXACT)]
# Every day every mode once, and each number of ranks.
STEPS = [(1, *KINDS[1]), (1, *KINDS[2]), (2, *KINDS[3])]
MORE_STEPS = [(size, *kind) for size, kind in product((1, 2), KINDS) if (size, *kind) not in STEPS]
STEPS += [pytest.param(*step, marks=pytest.mark.thorough) for step in MORE_STEPS]


def name_of(value: Any) -> str:
    return str(value) if isinstance(value, int) else "+".join(getattr(part, "value", part) for part in value)


@promise("no-compile")
@pytest.mark.parametrize(("world_size", "modes", "flags"), STEPS, ids=name_of)
@on_ranks()
def test_no_number_of_tokens_or_rows_compiles_a_kernel(
    rank: Rank, world_size: int, modes: Modes, flags: dict[str, Any]
) -> None:
    """After a step of C tokens, steps of fewer tokens, which differ from rank to rank. All ranks compile the same."""
    several = world_size > 1
    most, fewer = TOKENS[rank.device.type]
    # On one rank C is T, and changes with it; so does the height of tiles there, where products end in a bias.
    max_tokens = most if several else None
    config = EPConfig(dispatch=modes[0], combine=modes[1], **flags)
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=max_tokens) as ep, variants(rank) as so_far:
        train(ep, rank, most, biases=several)
        before = so_far()
        assert before, "nothing was compiled"
        for number in reversed(fewer) if rank.rank % 2 else fewer:
            train(ep, rank, number, biases=several)
        after = sorted(so_far() - before)
        assert after == [], after
        # Those of a GPU are all that the process has compiled, in other tests too, which not all ranks had.
        if several and rank.device.type == "cpu":
            of_ranks: list[Any] = [None] * rank.world_size
            dist.all_gather_object(of_ranks, so_far())
            assert [sorted(of_rank ^ so_far()) for of_rank in of_ranks] == [[]] * rank.world_size
