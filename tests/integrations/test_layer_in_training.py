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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sonic_ep import EPConfig, ExpertParallel, MoE
from sonic_ep.testing import CASES, Rank, assert_bitwise
from sonic_ep.testing.oracle import leaf

CASE = CASES["uneven_tokens"]


def gradients(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


def layer_of(ep: ExpertParallel, weights: list[Tensor], top_k: int) -> Callable[[Tensor], Tensor]:
    return lambda x: ep.moe(x, *weights, top_k).y


@on_ranks(2)
@by_backend_and_flags
def test_activation_checkpointing_both_variants(rank: Rank, backend: str, flags: dict[str, bool]) -> None:
    x, weights, dy = layer_inputs(rank, CASE)
    with ExpertParallel(backend=backend, config=EPConfig(**flags)) as ep:
        layer = layer_of(ep, weights, CASE.top_k)
        expected = gradients(layer(x), dy, [x, *weights])
        for reentrant in (False, True):
            checkpoint(layer, x, use_reentrant=reentrant).backward(dy)
            assert_same_bits([tensor.grad for tensor in (x, *weights)], expected)
            for tensor in (x, *weights):
                tensor.grad = None


@on_ranks(4)
@by_backend_and_flags
def test_two_forwards_before_the_backwards(rank: Rank, backend: str, flags: dict[str, bool]) -> None:
    case = CASES["zero_token_ranks"]
    x, weights, dy = layer_inputs(rank, case)
    other = leaf(x.detach().flip(0) * 2)
    with ExpertParallel(backend=backend, config=EPConfig(**flags)) as ep:
        layer = layer_of(ep, weights, case.top_k)
        expected = gradients(layer(x), dy, [x, *weights])
        expected_other = gradients(layer(other), dy, [other, *weights])
        first, second = layer(x), layer(other)
        # Twice over one graph: the second backward gathers again, too.
        for _ in range(2):
            assert_same_bits(torch.autograd.grad(first, [x, *weights], dy, retain_graph=True), expected)
        assert_same_bits(gradients(second, dy, [other, *weights]), expected_other)


@on_ranks(2)
@pytest.mark.parametrize("case", ["uneven_tokens", "zero_token_ranks"])
@by_backend_and_flags
def test_only_gradients_that_are_required(rank: Rank, backend: str, flags: dict[str, bool], case: str) -> None:
    """What is frozen has no gradient; the others' gradients are the same."""
    x, weights, dy = layer_inputs(rank, CASES[case])
    leaves, top_k = [x, *weights], CASES[case].top_k
    with ExpertParallel(backend=backend, config=EPConfig(**flags)) as ep:
        expected = gradients(ep.moe(x, *weights, top_k).y, dy, leaves)
        for wanted in product((False, True), repeat=len(leaves)):
            # An x without tokens counts as trained where a weight is.
            if 0 in CASES[case].tokens and any(wanted[1:]) and not wanted[0]:
                continue
            held = [leaf(tensor).requires_grad_(wants) for tensor, wants in zip(leaves, wanted, strict=True)]
            y = ep.moe(*held, top_k).y
            # The fast backend takes part in every backward of its group.
            assert y.requires_grad == (any(wanted) or backend == "fast")
            if y.requires_grad:
                y.backward(dy)
            due = [grad if wants else None for wants, grad in zip(wanted, expected, strict=True)]
            assert_same_bits([tensor.grad for tensor in held], due)


@on_ranks(2)
@both_backends
def test_autocast_and_inference_leave_the_bits_alone(rank: Rank, backend: str) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=True)) as ep:
        expected = ep.moe(x, *weights, CASE.top_k)
        with torch.autocast(rank.device.type, dtype=torch.bfloat16):
            out = ep.moe(x, *weights, CASE.top_k)
        assert_bitwise(out.y, expected.y)
        assert_bitwise(out.router_logits, expected.router_logits)
        for quiet in (torch.no_grad(), torch.inference_mode()):
            with quiet:
                out = ep.moe(x, *weights, CASE.top_k)
            assert not out.y.requires_grad
            assert_bitwise(out.y, expected.y)


@on_ranks(3)
@both_backends
def test_router_gradient_is_summed_unless_told_not_to(rank: Rank, backend: str) -> None:
    x, weights, dy = layer_inputs(rank, CASE)
    with ExpertParallel(backend=backend) as ep:
        (total,) = gradients(ep.moe(x, *weights, CASE.top_k).y, dy, weights[:1])
        (part,) = gradients(ep.moe(x, *weights, CASE.top_k, reduce_router_grad=False).y, dy, weights[:1])
    parts = [torch.empty_like(part) for _ in range(rank.world_size)]
    dist.all_gather(parts, part)
    by_hand = (parts[0] + parts[1]) + parts[2]
    assert_bitwise(total, by_hand)
    assert not torch.equal(part, by_hand)


def every_other(tensor: Tensor) -> Tensor:
    """The same values in memory of twice the size, two apart."""
    return torch.stack((tensor, torch.zeros_like(tensor)), dim=-1)[..., 0]


@promise("unpacked")
@on_ranks(2)
@by_backend_and_flags
def test_what_is_saved_may_come_back_in_another_layout(rank: Rank, backend: str, flags: dict[str, bool]) -> None:
    """As hooks that compress or offload may return it."""
    x, weights, dy = layer_inputs(rank, CASE)
    idx, scores = routing_of(rank, CASE)
    scores = scores.clone().requires_grad_()
    with ExpertParallel(backend=backend, config=EPConfig(**flags)) as ep:
        plan = ep.plan(idx, weights[0].shape[0])
        works = [
            (lambda: ep.moe(x, *weights, CASE.top_k).y, [x, *weights]),
            (lambda: ep.combine(ep.dispatch(x, plan), scores, plan), [x, scores]),
        ]
        for forward, leaves in works:
            expected = gradients(forward(), dy, leaves)
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, every_other):
                y = forward()
            assert_same_bits(gradients(y, dy, leaves), expected)


@on_ranks(3)
@by_backend_and_flags
def test_ranks_may_need_different_gradients(rank: Rank, backend: str, flags: dict[str, bool]) -> None:
    """Scores need a gradient on rank 0 alone, x on all ranks or none."""
    x, (_, w1, w2), dy = layer_inputs(rank, CASE)
    idx, scores = routing_of(rank, CASE)
    with ExpertParallel(backend=backend, config=EPConfig(**flags)) as ep:
        scores = scores.clone().requires_grad_()
        expected = torch.autograd.grad(ep.moe_routed(x, idx, scores, w1, w2), [x, scores], dy)
        for wanted in product((False, True), repeat=2):
            mine = [wanted[0], wanted[1] and rank.rank == 0]
            held = [t.detach().clone().requires_grad_(m) for t, m in zip((x, scores), mine, strict=True)]
            ep.moe_routed(held[0], idx, held[1], w1, w2).backward(dy)
            due = [grad if need else None for need, grad in zip(mine, expected, strict=True)]
            assert_same_bits([tensor.grad for tensor in held], due)


@on_ranks(3)
@both_backends
def test_a_rank_without_tokens_needs_no_gradient_of_x(rank: Rank, backend: str) -> None:
    """A rank without tokens has an x without a graph; the others train a layer in front."""
    torch.manual_seed(0)
    with ExpertParallel(backend=backend) as ep:
        front = torch.nn.Linear(8, 8, device=rank.device)
        layer = MoE(8, 4, num_experts=6, top_k=2, ep=ep, device=rank.device)
        tokens = torch.randn(5, 8, device=rank.device)
        x = tokens[:0] if rank.rank == 1 else front(tokens)
        layer(layer(x).y).y.sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert (front.weight.grad is not None) == (rank.rank != 1)


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
SMALL = replace(CASES["uneven_tokens"], tokens=(4, 2), hidden=8, intermediate=4, num_experts=6, top_k=2)
SAVE, RUN_AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


def saving(wanted: Callable[[Any, tuple[Any, ...], dict[str, Any]], bool]) -> Policy:
    def policy(context: object, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return SAVE if wanted(operation, arguments, options) else RUN_AGAIN

    return policy


def is_copy_to_host(operation: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """As torchtitan's policy has it."""
    return operation is torch.ops.aten._to_copy.default and torch.device(options.get("device", "meta")).type == "cpu"


def every_second_product() -> Policy:
    """Saves the first, third, ... product, as torchtitan's policy does."""
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
    "copies to the host": lambda: saving(is_copy_to_host),
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


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mm" in str(func)
        return func(*args, **(kwargs or {}))


@promise("selective-checkpoint")
@on_ranks(2, pool="cpu_pool")
def test_products_of_the_reference_are_saved_where_a_policy_says_so(rank: Rank) -> None:
    """The reference's products are ordinary operations."""
    x, weights, dy = layer_inputs(rank, SMALL)
    counts = []
    with ExpertParallel(backend="reference") as ep:

        def layer(x: Tensor) -> Tensor:
            return ep.moe(x, *weights, SMALL.top_k).y

        with Products() as products:
            layer(x)
        counts.append(products.count)
        for name in ("products", "nothing"):
            context = partial(create_selective_checkpoint_contexts, POLICIES[name]())
            y = checkpoint(layer, x, use_reentrant=False, context_fn=context)
            with Products() as products:
                y.backward(dy)
            counts.append(products.count)
    forward, saved, run_again = counts
    assert forward > 0
    assert run_again == saved + forward
