"""``sonic-ep bench``, which ``bench/moe_ep.py`` is as well: the layer end to end, verified and then timed."""

from __future__ import annotations

import argparse

import torch

from sonic_ep.activation import ACTIVATIONS
from sonic_ep.benchmark.end_to_end import run_end_to_end
from sonic_ep.benchmark.layer_problem import LayerOptions, RoutingKind
from sonic_ep.benchmark.place import arena_at
from sonic_ep.benchmark.setup import Setup
from sonic_ep.benchmark.workload import Shape
from sonic_ep.cli.exit_codes import GREEN
from sonic_ep.cli.measured import Run, add_output, checked_ranks, run_measured, write_json
from sonic_ep.cli.options import DTYPES, Thiek, add_call, add_config, add_nproc, config_of, spellings
from sonic_ep.cli.output import say_note
from sonic_ep.config import ScoreOrder

# Operations of a forward and backward that a CPU does in some seconds.
MOST_FLOPS_OF_CPU = 2e10
# What a CPU does while Python goes once around a loop over experts, in all that loops here.
FLOPS_OF_A_LOOP = 1e7
FLAGS = (
    ("add_bias", "experts have biases"),
    ("norm_topk_probs", "divide the scores of a token by their sum"),
    ("topk_over_softmax", "softmax over all experts, then the choice (otherwise the other way round)"),
    ("concat_layout", "rows of w1 are all gates, then all ups (otherwise they alternate)"),
    ("skip_bench_bwd", "time no backward; it is verified all the same"),
)


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_nproc(parser)
    add_call(parser, tuple(kind.value for kind in RoutingKind))
    add_config(parser)
    parser.add_argument("--activation", choices=tuple(ACTIVATIONS), default="swiglu")
    for name, text in FLAGS:
        parser.add_argument(*spellings(name), action="store_true", help=text)
    add_output(parser)
    parser.set_defaults(command=run_bench, check=check_bench)


def check_bench(options: argparse.Namespace) -> None:
    """What would fail alike on every rank fails here, once, before any is started."""
    ranks = checked_ranks(options)
    shape = chosen_shape(options.thiek, ranks)[0]
    shape.require_experts_divide(ranks)
    shape.require_tokens_divide(ranks)
    shape.require_fits_one_rank(ranks, options.routing)


def run_bench(options: argparse.Namespace) -> int:
    """Collective: verify, profile, time, tell, write."""

    def measure(run: Run) -> int:
        world_size = run.place.world_size
        shape, note = chosen_shape(options.thiek, world_size)
        setup = setup_of(options, shape, world_size, run.backend)
        for line in [*([] if note is None else [note]), *setup.lines()]:
            run.say(line)
        with arena_at(run.place.device, run.backend, options.commit, run.command) as arena:
            say_note(arena.results, run.say)
            report = run_end_to_end(setup, arena, run.say)
        if options.json is not None and run.place.rank == 0:
            return write_json(options.json, report.as_json())
        return GREEN

    return run_measured(options, "bench/moe_ep.py", measure)


def chosen_shape(asked: Thiek | None, world_size: int) -> tuple[Thiek, str | None]:
    """The shape that is run, and why it is not the one asked for."""
    if torch.cuda.is_available():
        usual = Thiek(tokens=16384 * world_size, hidden=4096, intermediate=1536, num_experts=64, top_k=8)
        return asked or usual, None
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
    """Of a gated layer's forward and backward over the group, as many for each weight, of its router and loops."""
    rows = shape.tokens * shape.top_k + shape.num_experts
    router = 6.0 * shape.tokens * shape.num_experts * shape.hidden
    return 18.0 * rows * shape.hidden * shape.intermediate + router + shape.num_experts * FLOPS_OF_A_LOOP


def setup_of(options: argparse.Namespace, shape: Thiek, world_size: int, backend: str) -> Setup:
    """What the words ask for."""
    order = ScoreOrder.SOFTMAX_THEN_TOPK if options.topk_over_softmax else ScoreOrder.TOPK_THEN_SOFTMAX
    return Setup(
        shape=Shape(
            tokens=shape.tokens // world_size,
            hidden=shape.hidden,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            intermediate=shape.intermediate,
            dtype=DTYPES[options.dtype],
        ),
        world_size=world_size,
        options=LayerOptions(
            activation=options.activation,
            gate_layout="concat" if options.concat_layout else "interleaved",
            score_order=order,
            norm_topk_probs=options.norm_topk_probs,
            biased=options.add_bias,
            routing=RoutingKind(options.routing),
        ),
        backend=backend,
        config=config_of(options),
        backward=not options.skip_bench_bwd,
    )
