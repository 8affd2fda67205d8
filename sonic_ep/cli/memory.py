"""``sonic-ep memory``: whether a layer fits, from the formulas of ``sonic_ep.testing.memory_model``."""

from __future__ import annotations

import argparse
from itertools import product

from sonic_ep.cli.exit_codes import PASS
from sonic_ep.cli.options import DTYPES, Thiek, add_thiek, parse_count
from sonic_ep.config import EPConfig, ModePair
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.plan import row_ceiling
from sonic_ep.testing.memory_model import (
    LayerShape,
    backward_peak_bytes,
    forward_peak_bytes,
    saved_bytes,
    symmetric_bytes,
)

SHAPE = Thiek(tokens=131072, hidden=4096, intermediate=1536, num_experts=128, top_k=8)
RANKS = 8
BYTES_OF_GIB = 2**30
SETTINGS = tuple(product((False, True), (False, True)))


def add_memory(parser: argparse.ArgumentParser) -> None:
    """The options of ``sonic-ep memory``."""
    add_thiek(parser)
    parser.add_argument("--ranks", type=parse_count, default=RANKS, metavar="W", help="ranks of the group")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of tokens and weights")
    parser.set_defaults(command=_memory, thiek=SHAPE)


def _memory(options: argparse.Namespace) -> int:
    for line in memory_table(options.thiek, options.ranks, DTYPES[options.dtype].itemsize):
        print(line)
    return PASS


def memory_table(thiek: Thiek, ranks: int, itemsize: int) -> list[str]:
    """What one layer with a gated activation needs on a rank, a line for each setting of the two flags.

    Raises ``ValueError`` unless the ranks divide T and E.
    """
    of_rank = thiek.of_rank(ranks)
    modes = choose_modes(EPConfig(), Workload(world_size=ranks, top_k=thiek.top_k, num_experts=thiek.num_experts))
    weights = 3 * thiek.num_experts // ranks * thiek.hidden * thiek.intermediate * itemsize
    sizes = f"H={thiek.hidden}, I={thiek.intermediate}, E={thiek.num_experts}, K={thiek.top_k}"
    return [
        f"a layer on each of {ranks} ranks: T={of_rank.tokens}, {sizes}, gated activation, {itemsize} bytes an element",
        f"dispatch {modes.dispatch.value}, combine {modes.combine.value}; all numbers in GiB",
        f"weights {_gib(weights)}, their gradients as much again",
        "",
        f"{'flags':<46} {'rows R':>9} {'saved':>8} {'forward':>8} {'backward':>8} {'shared':>8}",
        *[_line(of_rank, ranks, itemsize, modes, redispatch, exact) for exact, redispatch in SETTINGS],
        "",
        "saved: by forward for backward. forward, backward: the most that lives at once besides x, weights and, in",
        "backward, saved tensors; gradients included. shared: once for all layers of an ExpertParallel.",
        "Without cpu_sync_on_runtime rows are for the worst routing. With it they are those that arrive: here T*K.",
    ]


def _line(of_rank: Thiek, ranks: int, itemsize: int, modes: ModePair, redispatch: bool, exact: bool) -> str:
    held = of_rank.num_experts // ranks
    tokens, top_k = of_rank.tokens, of_rank.top_k
    ceiling = row_ceiling(world_size=ranks, max_tokens=tokens, top_k=top_k, experts_per_rank=held, distinct=True)
    shape = LayerShape(
        world_size=ranks,
        max_tokens=tokens,
        tokens=tokens,
        top_k=top_k,
        num_experts=of_rank.num_experts,
        hidden=of_rank.hidden,
        intermediate=of_rank.intermediate,
        itemsize=itemsize,
        rows=tokens * top_k if exact else ceiling,
    )
    again = {"redispatch_x_in_backward": redispatch}
    found = (
        sum(saved_bytes(shape, modes.dispatch, **again).values()),
        forward_peak_bytes(shape, modes.dispatch, training=True, **again),
        backward_peak_bytes(shape, modes.dispatch, **again),
        sum(symmetric_bytes(shape, modes, **again).values()),
    )
    flags = ["cpu_sync_on_runtime"] * exact + ["redispatch_x_in_backward"] * redispatch
    return f"{', '.join(flags) or 'none':<46} {shape.rows:>9} " + " ".join(f"{_gib(nbytes):>8}" for nbytes in found)


def _gib(nbytes: int) -> str:
    """Three digits.

    >>> _gib(3 * 2**30), _gib(2**20)
    ('3.00', '0.000977')
    """
    gib = nbytes / BYTES_OF_GIB
    return f"{gib:#.3g}" if gib < 100 else f"{gib:.0f}"
