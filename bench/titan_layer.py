"""Routed experts of torchtitan with its own token dispatchers and with sonic_ep's two overrides, forward and backward.

One layer with one set of weights and tokens; its variants take turns in one run. Each answer is first compared with the
dense layer in a wider dtype: a wrong answer of sonic_ep is an error, a wrong one of torchtitan is printed and recorded.

python bench/titan_layer.py --nproc 2 --json titan.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from harness.context import BenchCase, BenchContext, Comparison, Method, Rounds, layer_context, other_inputs, run_script
from harness.layer import expect_everywhere
from schema import AccuracyRecord, Suite
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import BACKEND_PACKAGES
from sonic_ep.cli import CommandParser, run_command
from sonic_ep.cli.measured import Run, add_output, checked_ranks
from sonic_ep.cli.options import Thiek, add_nproc, add_thiek, parse_count
from sonic_ep.config import AUTO
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler.problem import RoutingProblem, Shape
from sonic_ep.profiler.verification import assert_bitwise, expect
from sonic_ep.testing.answer import Answer, judge, oracle_of
from sonic_ep.testing.cases import with_split_weights
from sonic_ep.testing.layer_problem import LayerProblem
from sonic_ep.testing.oracle import Outcome, RoutedCall, leaf

if TYPE_CHECKING:
    from torch import nn

# Of the 30B model of Qwen3, for each rank 4 sequences of 2048 tokens.
QWEN3_30B: Mapping[str, int] = {"hidden": 2048, "intermediate": 768, "num_experts": 128, "top_k": 8}
TOKENS_OF_RANK = 4 * 2048
SMALL: Mapping[str, int] = {"hidden": 32, "intermediate": 16, "num_experts": 8, "top_k": 2}
TOKENS_OF_SMALL = 16

STANDARD, MINIMAL = "torchtitan, standard all-to-all", "torchtitan, minimal_async_ep"
DISPATCHER, REGION = "sonic_ep, token_dispatcher", "sonic_ep, routed_experts"
REGION_SIZED = f"{REGION}, cpu_sync_on_runtime"
SKIPPABLE: Mapping[str, str] = {"standard": STANDARD, "minimal_async_ep": MINIMAL}
OURS = (DISPATCHER, REGION, REGION_SIZED)
# The output of torchtitan's kernels may differ from call to call by their order of summation, relative norm.
SAME_BUT_FOR_ORDER = 1e-2
ROUNDS = Rounds(rounds=50, warmup=5)


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    text = "A layer of torchtitan: its dispatchers and sonic_ep's overrides, checked, then timed in turn."
    found = CommandParser(prog="titan_layer.py", description=text)
    add_nproc(found)
    add_thiek(found)
    found.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="of sonic_ep")
    text = "leave out one of torchtitan's dispatchers; may be repeated"
    found.add_argument("--skip", action="append", choices=tuple(SKIPPABLE), help=text)
    found.add_argument("--rounds", type=parse_count, default=None, metavar="N", help="rounds that are timed")
    add_output(found)
    found.set_defaults(command=run, check=lambda options: shape_of(options.thiek, checked_ranks(options)))
    return found


def shape_of(asked: Thiek | None, world_size: int) -> Shape:
    """T of a rank, H, I, E, K. Raises ``ValueError`` for what the ranks cannot divide."""
    if asked is None:
        on_gpu = torch.cuda.is_available()
        tokens, sizes = (TOKENS_OF_RANK, QWEN3_30B) if on_gpu else (TOKENS_OF_SMALL, SMALL)
        asked = Thiek(tokens=tokens * world_size, **sizes)
    return Shape(**asdict(asked.of_rank(world_size)), dtype=torch.bfloat16)


def run(options: argparse.Namespace) -> int:
    """Collective: check, time, tell, write."""

    def documents(run: Run) -> Iterator[Suite]:
        with layer_context(run, options.commit) as context:
            shape = shape_of(options.thiek, context.group.world_size)
            bench = TitanBench.of(context, shape, run, skipped=frozenset(options.skip or ()))
            default = ROUNDS if context.on_gpu else Rounds(rounds=1, warmup=0)
            rounds = default if options.rounds is None else Rounds(rounds=options.rounds, warmup=default.warmup)
            yield bench.document(rounds)
            for line in context.results.table():
                run.say(line)

    return run_script(options, "bench/titan_layer.py", documents)


@dataclass(frozen=True, kw_only=True, eq=False)
class TitanCall(RoutedCall):
    """The call by torchtitan's ``RoutedExperts``, whose parameters are the leaves of the experts.

    counts_E: this rank's slots of each expert, which torchtitan's MoE has counted by then.
    """

    region: nn.Module
    counts_E: Tensor

    def forward(self, ep: ExpertParallel | None = None) -> Outcome:
        """The sums; ``ep`` plays no part."""
        return {"y": self.region(self.x[None], self.topk_scores[None], self.topk_idx[None], self.counts_E)[0]}


@dataclass(frozen=True, kw_only=True, eq=False)
class TitanBench:
    """A routed layer, and each way of torchtitan to run it with the answer that it gave when it was checked."""

    context: BenchContext
    shape: Shape
    answers: Mapping[str, tuple[TitanCall, Answer]]

    @staticmethod
    def of(context: BenchContext, shape: Shape, run: Run, skipped: frozenset[str] = frozenset()) -> TitanBench:
        """Collective. Raises ``WrongResultError`` if an answer of sonic_ep is wrong; says which of torchtitan's are."""
        call, answers = routed_call(context, shape), {}
        oracle = oracle_of(call, context.group)
        found = configs(shape, context.device, run.backend)
        for name, config in found.items():
            if name in {SKIPPABLE[word] for word in skipped}:
                continue
            # A process group, so an ``ExpertParallel``, for each: their options differ.
            mesh = DeviceMesh.from_group(dist.new_group(), context.device.type)
            try:
                titan = titan_call(call, config, mesh)
                outcome = titan.run(None)  # type: ignore[arg-type]
            except Exception as error:
                if name in OURS:
                    raise
                run.say(f"not run: {name}: {error}")
                continue
            answer = judge(oracle, outcome)
            if name in OURS:
                expect_everywhere(context, answer, f"{name}: ")
            run.say(f"{name}: {'; '.join(answer.faults) or 'right'}")
            answers[name] = titan, answer
        return TitanBench(context=context, shape=shape, answers=answers)

    def document(self, rounds: Rounds) -> Suite:
        """Collective: all in turn, as called, and on GPUs behind work that lets the host get ahead."""
        methods = (Method.EAGER, Method.QUEUED) if self.context.on_gpu else (Method.EAGER,)
        for method in methods:
            cases = [self.case(name, *found) for name, found in self.answers.items()]
            for found in self.context.alternate(cases, method, rounds).values():
                self.context.record(found)
        accuracy = [
            AccuracyRecord(
                name=f"{name}: {each.name}",
                error=each.got.norm,
                bound=each.bound.norm,
                worst_row=each.got.worst_row,
                worst_row_bound=each.bound.worst_row,
                ok=each.ok,
            )
            for name, (_, answer) in self.answers.items()
            for each in answer.accuracies
        ]
        return self.context.results.document(
            Suite, entries=tuple(self.context.results.entries), accuracy=tuple(accuracy)
        )

    def case(self, name: str, call: TitanCall, answer: Answer) -> BenchCase:
        """Forward and backward, compared with torchtitan's standard dispatcher."""
        ours = name in OURS
        return BenchCase(
            name=f"{name}: forward and backward",
            shape=self.shape,
            run=partial(call.run, None),  # type: ignore[arg-type]
            check=partial(check_bits if ours else check_same_but_for_order, answer.outcome),
            other_inputs=lambda: other_inputs(*call.leaves.values(), call.dy),
            compared_with=(Comparison(name=f"{STANDARD}: forward and backward", text=STANDARD),) * (name != STANDARD),
        )


def check_bits(expected: Outcome, got: Outcome) -> None:
    """The bits of the answer that was found right."""
    for name, right in expected.items():
        assert_bitwise(got[name], right, name)


def check_same_but_for_order(expected: Outcome, got: Outcome) -> None:
    """The same output up to the order of sums. Its gradients were compared once, before the timing."""
    before = expected["y"].float()
    distance, size = (got["y"].float() - before).norm(), before.norm()
    expect(bool(distance <= SAME_BUT_FOR_ORDER * size), f"y is {float(distance / size):.2e} from the first")


def routed_call(context: BenchContext, shape: Shape) -> RoutedCall:
    """Collective. Tokens, uniform routing and split weights of this rank."""
    group: EPGroup = context.group
    layer = LayerProblem(shape=shape, group=group, device=context.device).call
    routing = RoutingProblem(shape=shape, group=group, device=context.device)
    experts = with_split_weights(layer.experts)
    leaves = {name: leaf(weight.contiguous()) for name, weight in experts.tensors.items()}
    return RoutedCall(
        x=leaf(layer.x),
        dy=layer.dy,
        experts=experts.with_tensors(leaves),
        topk_idx=routing.topk_idx_TK.contiguous(),
        topk_scores=leaf(routing.scores_TK),
    )


def configs(shape: Shape, device: torch.device, backend: str) -> dict[str, Any]:
    """By name, ``RoutedExperts.Config`` of torchtitan for each way; ours are what its overrides make of the first."""
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, MinimalAsyncEPTokenDispatcher

    from sonic_ep.integrations import torchtitan as overrides

    sizes = {"num_experts": shape.num_experts, "top_k": shape.top_k}
    widths = {"hidden_dim": shape.intermediate, "num_experts": shape.num_experts}
    experts = GroupedExperts.Config(dim=shape.hidden, **widths)
    standard = AllToAllTokenDispatcher.Config(**sizes)
    whole = RoutedExperts.Config(inner_experts=experts, token_dispatcher=standard)
    options: dict[str, Any] = {"backend": backend, "max_tokens_per_rank": shape.tokens}
    room = {"hidden_dim": shape.hidden, "num_max_tokens_per_rank": shape.tokens, "dtype": shape.dtype}
    minimal = MinimalAsyncEPTokenDispatcher.Config(**sizes, **room, device=device)
    dispatchers = {STANDARD: standard, MINIMAL: minimal, DISPATCHER: overrides.token_dispatcher(standard, **options)}
    found = {
        name: RoutedExperts.Config(inner_experts=experts, token_dispatcher=each) for name, each in dispatchers.items()
    }
    sized = overrides.routed_experts(whole, **options, cpu_sync_on_runtime=True)
    return {**found, REGION: overrides.routed_experts(whole, **options), REGION_SIZED: sized}


def titan_call(call: RoutedCall, config: Any, mesh: DeviceMesh) -> TitanCall:
    """Collective. The call by the module of ``config``, over ``mesh``, on the weights of the call."""
    from torchtitan.distributed.utils import set_spmd_backend

    if not hasattr(torch.compiler, "_is_non_strict_tracing"):
        # PyTorch 2.11 traces nothing of the kind that torchtitan's standard dispatcher asks about.
        torch.compiler._is_non_strict_tracing = lambda: False
    # The one whose standard dispatcher runs over gloo, too.
    set_spmd_backend("partial_dtensor")
    with torch.device("meta"):
        region = config.build()
    names = {"w1[0]": "w1_EFD", "w1[1]": "w3_EFD", "w2": "w2_EDF"}
    parameters = {ours: torch.nn.Parameter(call.experts.tensors[ours].detach()) for ours in names}
    for ours, theirs in names.items():
        setattr(region.inner_experts, theirs, parameters[ours])
    region.token_dispatcher.wire_meshes(ep_mesh=mesh)
    counts_E = torch.bincount(call.topk_idx.flatten(), minlength=config.inner_experts.num_experts)
    return TitanCall(
        x=call.x,
        dy=call.dy,
        experts=call.experts.with_tensors(parameters),
        topk_idx=call.topk_idx,
        topk_scores=call.topk_scores,
        region=region,
        counts_E=counts_E,
    )


if __name__ == "__main__":
    sys.exit(run_command(parser(), sys.argv[1:], [__file__]))
