"""The layer in training: recompute with any policy, several forwards, frozen parts, autocast, and unequal ranks."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from layer_inputs import layer_inputs, routing_of
from matrix import by_backend_and_flags
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Rank, assert_bitwise
from sonic_ep.testing.oracle import leaf

SMALL = replace(CASES["uneven_tokens"], tokens=(4, 2), hidden=8, intermediate=4, num_experts=6, top_k=2)


def gradients(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


def every_other(tensor: Tensor) -> Tensor:
    """The same values in memory of twice the size, two apart."""
    return torch.stack((tensor, torch.zeros_like(tensor)), dim=-1)[..., 0]


@promise("unpacked")
@on_ranks(2)
@by_backend_and_flags
def test_a_layer_gives_the_same_bits_however_it_is_trained(rank: Rank, backend: str, flags: dict[str, bool]) -> None:
    """Without gradients, among other forwards, twice over one graph, and with what hooks unpack.

    Hooks that compress or offload may return what was saved in another layout.
    """
    x, weights, dy = layer_inputs(rank, SMALL)
    idx, scores = routing_of(rank, SMALL)
    scores = scores.clone().requires_grad_()
    other = leaf(x.detach()[rank.rank * len(x) :].flip(0) * 2)
    with ExpertParallel(backend=backend, config=EPConfig(**flags)) as ep:
        plan = ep.plan(idx, SMALL.num_experts)

        def layer(x: Tensor) -> Tensor:
            return ep.moe(x, *weights, SMALL.top_k).y

        def primitives() -> Tensor:
            return ep.combine(ep.dispatch(x, plan), scores, plan)

        expected, expected_other = (
            gradients(layer(given), dy[: len(given)], [given, *weights]) for given in (x, other)
        )
        first, second = layer(x), layer(other)
        for quiet in (torch.no_grad(), torch.inference_mode()):
            with quiet:
                y = layer(x)
            assert not y.requires_grad
            assert_bitwise(y, first.detach())
        # Twice over one graph: the second backward gathers again, too.
        for _ in range(2):
            assert_same_bits(torch.autograd.grad(first, [x, *weights], dy, retain_graph=True), expected)
        assert_same_bits(gradients(second, dy[: len(other)], [other, *weights]), expected_other)
        expected_primitives = gradients(primitives(), dy, [x, scores])
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, every_other):
            y, combined = layer(x), primitives()
        assert_same_bits(gradients(y, dy, [x, *weights]), expected)
        assert_same_bits(gradients(combined, dy, [x, scores]), expected_primitives)


@on_ranks(2)
@pytest.mark.parametrize("tokens", [SMALL.tokens, (0, 4)])
@by_backend_and_flags
def test_only_gradients_that_are_required(
    rank: Rank, backend: str, flags: dict[str, bool], tokens: tuple[int, int]
) -> None:
    """What is frozen has no gradient; the others' gradients are the same."""
    case = replace(SMALL, tokens=tokens)
    x, weights, dy = layer_inputs(rank, case)
    leaves = [x, *weights]
    with ExpertParallel(backend=backend, config=EPConfig(**flags)) as ep:
        expected = gradients(ep.moe(x, *weights, case.top_k).y, dy, leaves)
        for wanted in product((False, True), repeat=len(leaves)):
            # An x without tokens counts as trained where a weight is. Interpreted, twos are left out: they take long.
            refused = 0 in tokens and any(wanted[1:]) and not wanted[0]
            if refused or (backend == "fast" and rank.device.type == "cpu" and sum(wanted) == 2):
                continue
            held = [leaf(tensor).requires_grad_(wants) for tensor, wants in zip(leaves, wanted, strict=True)]
            y = ep.moe(*held, case.top_k).y
            # The fast backend takes part in every backward of its group.
            assert y.requires_grad == (any(wanted) or backend == "fast")
            if y.requires_grad:
                y.backward(dy)
            due = [grad if wants else None for wants, grad in zip(wanted, expected, strict=True)]
            assert_same_bits([tensor.grad for tensor in held], due)


@on_ranks(3)
@both_backends
def test_router_gradient_is_summed_unless_told_not_to(rank: Rank, backend: str) -> None:
    x, weights, dy = layer_inputs(rank, SMALL)
    with ExpertParallel(backend=backend) as ep:
        (total,) = gradients(ep.moe(x, *weights, SMALL.top_k).y, dy, weights[:1])
        (part,) = gradients(ep.moe(x, *weights, SMALL.top_k, reduce_router_grad=False).y, dy, weights[:1])
    parts = [torch.empty_like(part) for _ in range(rank.world_size)]
    dist.all_gather(parts, part)
    by_hand = (parts[0] + parts[1]) + parts[2]
    assert_bitwise(total, by_hand)
    assert not torch.equal(part, by_hand)


@on_ranks(2)
@by_backend_and_flags
def test_ranks_may_need_different_gradients(rank: Rank, backend: str, flags: dict[str, bool]) -> None:
    """Scores need a gradient on rank 0 alone, x on all ranks or none."""
    x, (_, w1, w2), dy = layer_inputs(rank, SMALL)
    idx, scores = routing_of(rank, SMALL)
    with ExpertParallel(backend=backend, config=EPConfig(**flags)) as ep:
        scores = scores.clone().requires_grad_()
        expected = torch.autograd.grad(ep.moe_routed(x, idx, scores, w1, w2), [x, scores], dy)
        for wanted in product((False, True), repeat=2):
            mine = [wanted[0], wanted[1] and rank.rank == 0]
            held = [t.detach().clone().requires_grad_(m) for t, m in zip((x, scores), mine, strict=True)]
            ep.moe_routed(held[0], idx, held[1], w1, w2).backward(dy)
            due = [grad if need else None for need, grad in zip(mine, expected, strict=True)]
            assert_same_bits([tensor.grad for tensor in held], due)


@on_ranks(2, pool="cpu_pool")
def test_a_rank_that_never_goes_backward_asks_no_other_to(rank: Rank) -> None:
    """The only x that requires a gradient is of a rank under no_grad."""
    with ExpertParallel(backend="reference") as ep:
        plan = ep.plan(torch.tensor([[0], [1]]), 2)
        x = torch.ones(2, 8, requires_grad=rank.rank == 0)
        with torch.set_grad_enabled(rank.rank != 0):
            assert not ep.dispatch(x, plan).requires_grad


@on_ranks(1)
@both_backends
def test_a_plan_of_inference_mode_may_be_trained_through(rank: Rank, backend: str) -> None:
    with ExpertParallel(backend=backend) as ep:
        with torch.inference_mode():
            plan = ep.plan(torch.tensor([[0], [1]], device=rank.device), 2)
        x = torch.ones(2, 8, device=rank.device, requires_grad=True)
        ep.combine(ep.dispatch(x, plan), torch.ones(2, 1, device=rank.device), plan).sum().backward()
        assert bool((x.grad == 1).all())


Policy = Callable[..., CheckpointPolicy]
SAVE, RUN_AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


def saving(wanted: Callable[[Any, tuple[Any, ...], dict[str, Any]], bool]) -> Policy:
    def policy(context: object, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return SAVE if wanted(operation, arguments, options) else RUN_AGAIN

    return policy


def every_second_product() -> Policy:
    """Saves the first, third, ... product."""
    seen: Counter[tuple[bool, str]] = Counter()

    def policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        key = context.is_recompute, str(operation)
        seen[key] += operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return SAVE if seen[key] % 2 else RUN_AGAIN

    return policy


POLICIES: dict[str, Callable[[], Policy]] = {
    "everything": lambda: saving(lambda *_: True),
    "nothing": lambda: saving(lambda *_: False),
    "collectives": lambda: saving(lambda operation, *_: "c10d" in str(operation)),
    # As torchtitan's policy has it, and so the products below.
    "copies to the host": lambda: saving(lambda op, _, kw: "_to_copy" in str(op) and str(kw.get("device")) == "cpu"),
    "products": lambda: saving(lambda operation, *_: "mm" in str(operation)),
    "every second product": every_second_product,
    "all but products": lambda: saving(lambda operation, *_: "mm" not in str(operation)),
    "copies": lambda: saving(lambda operation, *_: "copy" in str(operation)),
    "memory": lambda: saving(lambda operation, *_: any(w in str(operation) for w in ("empty", "zeros", "full"))),
}


# A policy sees no operation of the fast backend.
INTERPRETED = ["everything", "copies"]


@promise("selective-checkpoint")
@on_ranks(2)
@by_backend_and_flags
def test_gradients_are_the_same_whatever_a_policy_saves(rank: Rank, backend: str, flags: dict[str, bool]) -> None:
    x, weights, dy = layer_inputs(rank, SMALL)
    idx, scores = routing_of(rank, SMALL)
    scores = scores.clone().requires_grad_()
    with ExpertParallel(backend=backend, config=EPConfig(**flags), check_collective=True) as ep:

        def layer(x: Tensor, scores: Tensor) -> Tensor:
            y = ep.moe(x, *weights, SMALL.top_k).y
            y = y + ep.moe_routed(x * 2, idx, scores, *weights[1:])
            plan = ep.plan(idx, SMALL.num_experts)
            return y + ep.combine(ep.dispatch(x * 3, plan), scores, plan)

        leaves = [x, scores, *weights]
        expected = torch.autograd.grad(layer(x, scores), leaves, dy)
        for name in INTERPRETED if backend == "fast" and rank.device.type == "cpu" else POLICIES:
            context = partial(create_selective_checkpoint_contexts, POLICIES[name]())
            y = checkpoint(layer, x, scores, use_reentrant=False, context_fn=context)
            assert_same_bits(torch.autograd.grad(y, leaves, dy), expected, f"saving {name}")
