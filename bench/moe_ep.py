"""The layer end to end: verified, profiled, timed.

torchrun --nproc_per_node=8 --standalone bench/moe_ep.py --thiek 131072,4096,1536,128,8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
from harness.context import layer_context, run_script
from harness.end_to_end import Setup, run_end_to_end
from schema import Layer

from sonic_ep.activation import ACTIVATIONS
from sonic_ep.cli import CommandParser, run_command
from sonic_ep.cli.measured import Run, add_output, checked_ranks
from sonic_ep.cli.options import DTYPES, Thiek, add_call, add_config, add_nproc, config_of, spellings
from sonic_ep.config import ScoreOrder
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.routings import ROUTINGS
from sonic_ep.testing.layer_problem import LayerOptions

# Operations of a forward and backward that a CPU does in some seconds.
MOST_FLOPS_OF_CPU = 2e10
# Time of the Python loops over experts, as operations of the CPU for each expert.
FLOPS_OF_A_LOOP = 1e7
FLAGS = (
    ("add_bias", "experts have biases"),
    ("norm_topk_probs", "divide the scores of a token by their sum"),
    ("topk_over_softmax", "softmax over all experts, then the choice (otherwise the other way round)"),
    ("concat_layout", "rows of w1 are all gates, then all ups (otherwise they alternate)"),
    ("skip_bench_bwd", "time no backward; it is verified all the same"),
)


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    found = CommandParser(prog="moe_ep.py", description="The layer end to end: verified, profiled, then timed.")
    add_nproc(found)
    add_call(found, tuple(ROUTINGS))
    add_config(found)
    found.add_argument("--activation", choices=tuple(ACTIVATIONS), default="swiglu")
    for name, text in FLAGS:
        found.add_argument(*spellings(name), action="store_true", help=text)
    add_output(found)
    found.set_defaults(command=run, check=check)
    return found


def check(options: argparse.Namespace) -> None:
    """Raise once, before any rank is started, the errors that each of them would raise."""
    ranks = checked_ranks(options)
    shape = chosen_shape(options.thiek, ranks)[0]
    shape.require_experts_divide(ranks)
    shape.require_tokens_divide(ranks)
    shape.require_fits_one_rank(ranks, options.routing)


def run(options: argparse.Namespace) -> int:
    """Collective: verify, profile, time, tell, write."""

    def documents(run: Run) -> Iterator[Layer]:
        shape, note = chosen_shape(options.thiek, run.place.world_size)
        setup = setup_of(options, shape, run.place.world_size, run.backend)
        for line in [*([] if note is None else [note]), *setup.lines()]:
            run.say(line)
        with layer_context(run, options.commit) as context:
            yield run_end_to_end(setup, context, run.say)

    return run_script(options, "bench/moe_ep.py", documents)


def chosen_shape(asked: Thiek | None, world_size: int) -> tuple[Thiek, str | None]:
    """The shape that is run, and why it is not the one asked for."""
    if torch.cuda.is_available():
        default = Thiek(tokens=16384 * world_size, hidden=4096, intermediate=1536, num_experts=64, top_k=8)
        return asked or default, None
    small = Thiek(tokens=32 * world_size, hidden=64, intermediate=32, num_experts=4 * world_size, top_k=2)
    if asked is None:
        return small, f"no GPU: the small default {small} on the CPU, whose times mean nothing for GPUs"
    if operations(asked) <= MOST_FLOPS_OF_CPU:
        return asked, "no GPU: on the CPU, whose times mean nothing for GPUs"
    return small, (
        f"no GPU, and --thiek {asked} takes {operations(asked):.1e} operations, expected at most "
        f"{MOST_FLOPS_OF_CPU:.0e} on a CPU: the small default {small} instead, whose times mean nothing for GPUs"
    )


def operations(shape: Thiek) -> float:
    """Operations of a gated layer over the group, forward and backward: experts, router, and loops over experts."""
    rows = shape.tokens * shape.top_k + shape.num_experts
    router = 6.0 * shape.tokens * shape.num_experts * shape.hidden
    return 18.0 * rows * shape.hidden * shape.intermediate + router + shape.num_experts * FLOPS_OF_A_LOOP


def setup_of(options: argparse.Namespace, shape: Thiek, world_size: int, backend: str) -> Setup:
    """What the options ask for."""
    sizes = {**asdict(shape), "tokens": shape.tokens // world_size}
    return Setup(
        shape=Shape(**sizes, dtype=DTYPES[options.dtype]),
        world_size=world_size,
        options=LayerOptions(
            activation=options.activation,
            gate_layout="concat" if options.concat_layout else "interleaved",
            score_order=ScoreOrder.SOFTMAX_THEN_TOPK if options.topk_over_softmax else ScoreOrder.TOPK_THEN_SOFTMAX,
            norm_topk_probs=options.norm_topk_probs,
            biased=options.add_bias,
            routing=options.routing,
        ),
        backend=backend,
        config=config_of(options),
        backward=not options.skip_bench_bwd,
    )


if __name__ == "__main__":
    sys.exit(run_command(parser(), sys.argv[1:], [__file__]))
