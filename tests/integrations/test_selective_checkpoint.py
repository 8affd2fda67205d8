"""Selective activation checkpointing: whatever operations a policy saves, gradients are those without it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from layer_inputs import layer_inputs, routing_of
from matrix import by_backend_and_flags
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Rank

Policy = Callable[..., CheckpointPolicy]
CASE = replace(CASES["uneven_tokens"], tokens=(4, 2), hidden=8, intermediate=4, num_experts=6, top_k=2)
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
    x, weights, dy = layer_inputs(rank, CASE)
    idx, scores = routing_of(rank, CASE)
    scores = scores.clone().requires_grad_()
    with ExpertParallel(backend=backend, config=EPConfig(**flags), check_collective=True) as ep:

        def layer(x: Tensor, scores: Tensor) -> Tensor:
            y = ep.moe(x, *weights, CASE.top_k).y
            y = y + ep.moe_routed(x * 2, idx, scores, *weights[1:])
            plan = ep.plan(idx, CASE.num_experts)
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
    x, weights, dy = layer_inputs(rank, CASE)
    counts = []
    with ExpertParallel(backend="reference") as ep:

        def layer(x: Tensor) -> Tensor:
            return ep.moe(x, *weights, CASE.top_k).y

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
