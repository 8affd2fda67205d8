"""Outputs are the caller's: written in place, taken apart by pytree, given to hooks and to checkpointing."""

from collections.abc import Callable
from dataclasses import replace

import torch
from backends import both_backends
from layer_inputs import layer_inputs, routing_of
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from shards import local
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from sonic_ep import ExpertParallel, MoE, MoEOutput
from sonic_ep.testing import CASES, Rank, assert_bitwise

SIZES = (8, 4, 4, 2)
CASE = replace(CASES["uneven_tokens"], tokens=(4, 2), hidden=8, intermediate=4, num_experts=6, top_k=2)


def outputs(ep: ExpertParallel, rank: Rank) -> dict[str, Callable[[Tensor, list[Tensor]], Tensor]]:
    """Every call that returns a tensor to train through, as a function of x and the weights."""
    idx, scores = routing_of(rank, CASE)
    plan = ep.plan(idx, CASE.num_experts)
    return {
        "moe": lambda x, weights: ep.moe(x, *weights, CASE.top_k).y,
        "moe of 3 dimensions": lambda x, weights: ep.moe(x.unsqueeze(0), *weights, CASE.top_k).y,
        "moe_routed": lambda x, weights: ep.moe_routed(x, idx, scores, *weights[1:]),
        "dispatch": lambda x, weights: ep.dispatch(x, plan),
        "combine": lambda x, weights: ep.combine(ep.dispatch(x, plan), scores, plan),
    }


@promise("outputs")
@on_ranks(2)
@both_backends
def test_an_output_may_be_written_in_place(rank: Rank, backend: str) -> None:
    """Gradients are those of operations out of place, and hooks are called."""
    x, weights, _ = layer_inputs(rank, CASE)
    leaves = [x, *weights]
    with ExpertParallel(backend=backend) as ep:
        valid = ep.plan(routing_of(rank, CASE)[0], CASE.num_experts).rows()
        for name, call in outputs(ep, rank).items():
            kept = slice(valid) if name == "dispatch" else slice(None)

            def loss(y: Tensor, kept: slice = kept) -> Tensor:
                return y[kept].square().sum()

            expected = torch.autograd.grad(loss(call(x, weights) * 3), leaves, allow_unused=True)
            y = call(x, weights)
            assert not y._is_view(), f"{name} returns a view"
            seen: list[Tensor] = []
            y.register_hook(seen.append)
            y *= 3
            found = torch.autograd.grad(loss(y), leaves, allow_unused=True)
            assert len(seen) == 1, f"hook of {name}"
            assert_same_bits(found, expected, f"of {name}")


@promise("outputs")
@on_ranks(2)
@both_backends
def test_pytree_checkpointing_and_module_hooks_find_the_tensors_of_an_output(rank: Rank, backend: str) -> None:
    torch.manual_seed(rank.rank)
    with ExpertParallel(backend=backend) as ep:
        layer = MoE(*SIZES, ep=ep, device=rank.device)
        x = torch.randn(5, 8, device=rank.device, requires_grad=True)
        leaves = [x, *layer.parameters()]
        out = layer(x)
        y, router_logits, tokens_per_expert, topk_idx, topk_scores = out
        assert y is out.y
        assert [leaf is field for leaf, field in zip(tree_leaves(out), out, strict=True)] == [True] * 5
        assert isinstance(tree_map(torch.clone, out), MoEOutput)
        assert router_logits.shape == (5, 4)
        assert int(tokens_per_expert.sum()) == 5 * 2 * rank.world_size

        def gradients(y: Tensor, router_logits: Tensor, topk_scores: Tensor) -> tuple[Tensor, ...]:
            for leaf in leaves:
                leaf.grad = None
            (y.square().sum() + router_logits.square().sum() + topk_scores.square().sum()).backward()
            return tuple(local(leaf.grad) for leaf in leaves)

        expected = gradients(y, router_logits, topk_scores)
        for reentrant in (True, False):
            # Reentrant, it returns the fields without their names.
            y, router_logits, *again, topk_scores = checkpoint(layer, x, use_reentrant=reentrant)
            assert_same_bits(again, [tokens_per_expert, topk_idx])
            assert_same_bits(gradients(y, router_logits, topk_scores), expected)
        seen: list[tuple[Tensor, Tensor]] = []
        before: list[Tensor] = []
        layer.register_full_backward_hook(lambda module, into, out: seen.append((into[0], out[0])))
        layer.register_full_backward_pre_hook(lambda module, out: before.append(out[0]))
        out = layer(x)
        assert_same_bits(gradients(out.y, out.router_logits, out.topk_scores), expected)
        ((into, of_y),), (before_y,) = seen, before
        assert_bitwise(of_y, 2 * out.y.detach())
        assert_bitwise(before_y, of_y)
        assert_bitwise(into, expected[0])
