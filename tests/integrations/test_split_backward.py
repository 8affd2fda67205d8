"""Backward in two halves, as zero-bubble pipelines run it: gradients of the inputs first, those of weights later."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from layer_inputs import layer_inputs
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from sonic_ep import ExpertParallel, MoE
from sonic_ep.testing import CASES, Rank, assert_bitwise

TOKENS, HIDDEN, EXPERTS = 6, 8, 4
CASE = replace(CASES["uniform"], tokens=(4, 2), hidden=8, intermediate=4, num_experts=6, top_k=3)
LOSS = nn.MSELoss(reduction="sum")


@promise("split-backward")
@on_ranks(1, 2)
@pytest.mark.parametrize(("top_k", "balanced"), [(3, False), (6, True)])
@both_backends
def test_backward_in_two_halves(rank: Rank, backend: str, top_k: int, balanced: bool) -> None:
    """With fewer choices than experts, and with all. balanced: whether the loss has a term of the logits."""
    x, weights, dy = layer_inputs(rank, CASE)
    with ExpertParallel(backend=backend) as ep:

        def loss() -> Tensor:
            out = ep.moe(x, *weights, top_k)
            return (out.y * dy).sum() + (out.router_logits.square().sum() if balanced else 0)

        expected = torch.autograd.grad(loss(), [x, *weights])
        outputs = [loss()]
        (dx,), groups = stage_backward_input(outputs, None, [x], iter(weights))
        assert_bitwise(dx, expected[0])
        stage_backward_weight(iter(weights), groups)
        assert_same_bits([weight.grad for weight in weights], expected[1:])


@promise("split-backward")
@on_ranks(1)
@both_backends
def test_a_graph_is_freed_with_its_result(rank: Rank, backend: str) -> None:
    """What a forward keeps is freed with its result, after half a backward, a whole one, or none."""
    x = torch.randn(TOKENS, HIDDEN, device=rank.device, requires_grad=True)
    dy = torch.ones_like(x).detach()
    with ExpertParallel(backend=backend) as ep:
        layer = MoE(HIDDEN, 4, EXPERTS, 2, ep=ep, device=rank.device)

        def first_half(y: Tensor) -> Any:
            return stage_backward_input([y.sum()], None, [x], layer.parameters())

        runs = {
            "none": lambda y: None,
            "first half": first_half,
            "both halves": lambda y: stage_backward_weight(layer.parameters(), first_half(y)[1]),
            "given and retained": lambda y: torch.autograd.grad(y, x, dy, retain_graph=True),
        }
        # Reference cycles of Python would be collected; those through nodes of autograd never are.
        gc.disable()
        try:
            for name, run in runs.items():
                freed: list[str] = []
                y, marker = layer(x).y, Marker()
                weakref.finalize(marker, freed.append, name)
                node_of_function(y).metadata["marker"] = marker
                del marker
                run(y)
                del y
                assert freed == [name]
        finally:
            gc.enable()


class Marker:
    """Its end can be seen."""


def node_of_function(y: Tensor) -> Any:
    """The node of the library's own function: of y itself, or the next one."""
    node: Any = y.grad_fn
    while not isinstance(node, torch._C._FunctionBase):
        node = node.next_functions[0][0]
    return node


class Block(nn.Module):
    """A layer with a residual."""

    def __init__(self, ep: ExpertParallel, device: torch.device) -> None:
        super().__init__()
        self.moe = MoE(HIDDEN, 4, EXPERTS, 2, ep=ep, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x).y


@promise("split-backward")
@on_ranks(2)
@both_backends
def test_an_interleaved_schedule_that_splits_backward(rank: Rank, backend: str) -> None:
    """Four stages on two ranks, each of which is an EP group of its own."""
    groups = [dist.new_group([other]) for other in range(rank.world_size)]
    count = 2 * rank.world_size
    mine = [rank.rank, rank.world_size + rank.rank]
    with ExpertParallel(groups[rank.rank], backend=backend) as ep:
        torch.manual_seed(5)
        blocks = [Block(ep, rank.device) for _ in range(count)]
        x = torch.randn(count * TOKENS, HIDDEN, device=rank.device)
        target = torch.randn_like(x)
        LOSS(nn.Sequential(*blocks)(x), target).backward()
        expected = {place: [p.grad for p in blocks[place].parameters()] for place in mine}
        for place in mine:
            blocks[place].zero_grad()
        stages = [PipelineStage(blocks[place], place, count, rank.device) for place in mine]
        schedule = ScheduleInterleavedZeroBubble(stages, n_microbatches=count, loss_fn=LOSS, scale_grads=False)
        given = (x,) if rank.rank == 0 else ()
        schedule.step(*given, target=target if rank.rank == rank.world_size - 1 else None)
        for place in mine:
            for parameter, want in zip(blocks[place].parameters(), expected[place], strict=True):
                # Sums over micro-batches, of which the whole is one product.
                error = (parameter.grad - want).norm() / want.norm()
                assert error < count * TOKENS * torch.finfo(torch.float32).eps, f"stage {place}: {error}"
