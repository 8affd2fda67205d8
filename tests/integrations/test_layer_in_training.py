"""The layer as training uses it: recompute, several forwards, frozen parts, autocast, and unequal ranks."""

from itertools import product

import pytest
import torch
from backends import BACKENDS, both_backends
from layer_inputs import layer_inputs, routing_of
from promises import promise
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sonic_ep import EPConfig, ExpertParallel, MoE
from sonic_ep.testing import CASES, Case, Rank, RankPool, assert_bitwise
from sonic_ep.testing.oracle import leaf

FLAGS = [
    {"redispatch_x_in_backward": again, "cpu_sync_on_runtime": exact}
    for again, exact in product((False, True), repeat=2)
]

# Interpreted, the setting with both flags; that no flag changes a bit is shown in test_layer.
by_backend_and_flags = pytest.mark.parametrize(
    ("backend", "flags"),
    [
        pytest.param(
            backend,
            flags,
            marks=pytest.mark.thorough if backend == "fast" and not all(flags.values()) else (),
            id=f"{backend}-{flags}",
        )
        for backend, flags in product(BACKENDS, FLAGS)
    ],
)


def gradients(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


def recomputed(rank: Rank, case: Case, backend: str, config: EPConfig) -> None:
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend=backend, config=config) as ep:

        def layer(x: Tensor) -> Tensor:
            return ep.moe(x, *weights, case.top_k).y

        expected = gradients(layer(x), dy, [x, *weights])
        for reentrant in (False, True):
            y = checkpoint(layer, x, use_reentrant=reentrant)
            y.backward(dy)
            for tensor, grad in zip([x, *weights], expected, strict=True):
                assert_bitwise(tensor.grad, grad)
                tensor.grad = None


@by_backend_and_flags
def test_activation_checkpointing_both_variants(pool: RankPool, backend: str, flags: dict[str, bool]) -> None:
    pool.run(recomputed, CASES["uneven_tokens"], backend, EPConfig(**flags), world_size=2)


def interleaved(rank: Rank, case: Case, backend: str, config: EPConfig) -> None:
    """Two forwards before the backwards, in both orders, then both at once: always the same gradients."""
    x, weights, dy = layer_inputs(rank, case)
    other = leaf(x.detach().flip(0) * 2)
    with ExpertParallel(backend=backend, config=config) as ep:

        def layer(x: Tensor) -> Tensor:
            return ep.moe(x, *weights, case.top_k).y

        expected = gradients(layer(x), dy, [x, *weights])
        expected_other = gradients(layer(other), dy, [other, *weights])
        first, second = layer(x), layer(other)
        # Run twice over one graph: what was gathered again must be gathered again once more.
        for _ in range(2):
            found = torch.autograd.grad(first, [x, *weights], dy, retain_graph=True)
            for got, want in zip(found, expected, strict=True):
                assert_bitwise(got, want)
        for got, want in zip(gradients(second, dy, [other, *weights]), expected_other, strict=True):
            assert_bitwise(got, want)


@by_backend_and_flags
def test_two_forwards_before_the_backwards(pool: RankPool, backend: str, flags: dict[str, bool]) -> None:
    pool.run(interleaved, CASES["zero_token_ranks"], backend, EPConfig(**flags), world_size=4)


def partly_frozen(rank: Rank, case: Case, backend: str, config: EPConfig) -> None:
    """Whatever is frozen has no gradient, and what is not has the same as ever."""
    x, weights, dy = layer_inputs(rank, case)
    leaves = [x, *weights]
    with ExpertParallel(backend=backend, config=config) as ep:
        expected = gradients(ep.moe(x, *weights, case.top_k).y, dy, leaves)
        for wanted in product((False, True), repeat=len(leaves)):
            held = [leaf(tensor).requires_grad_(wants) for tensor, wants in zip(leaves, wanted, strict=True)]
            y = ep.moe(held[0], *held[1:], case.top_k).y
            # The fast backend takes part in every backward of its group, also where it wants nothing of it.
            assert y.requires_grad == (any(wanted) or backend == "fast")
            if y.requires_grad:
                y.backward(dy)
            for tensor, wants, grad in zip(held, wanted, expected, strict=True):
                assert (tensor.grad is not None) == wants
                if tensor.grad is not None:
                    assert_bitwise(tensor.grad, grad)


@by_backend_and_flags
def test_only_gradients_that_are_required(pool: RankPool, backend: str, flags: dict[str, bool]) -> None:
    pool.run(partly_frozen, CASES["zero_token_ranks"], backend, EPConfig(**flags), world_size=2)


def under_autocast_and_no_grad(rank: Rank, case: Case, backend: str) -> None:
    x, weights, _ = layer_inputs(rank, case)
    config = EPConfig(redispatch_x_in_backward=True)
    with ExpertParallel(backend=backend, config=config) as ep:
        expected = ep.moe(x, *weights, case.top_k)
        with torch.autocast(rank.device.type, dtype=torch.bfloat16):
            out = ep.moe(x, *weights, case.top_k)
        assert_bitwise(out.y, expected.y)
        assert_bitwise(out.router_logits, expected.router_logits)
        for quiet in (torch.no_grad(), torch.inference_mode()):
            with quiet:
                out = ep.moe(x, *weights, case.top_k)
            assert not out.y.requires_grad
            assert_bitwise(out.y, expected.y)


@both_backends
def test_autocast_and_inference_leave_the_bits_alone(pool: RankPool, backend: str) -> None:
    pool.run(under_autocast_and_no_grad, CASES["uneven_tokens"], backend, world_size=2)


def router_gradients(rank: Rank, case: Case, backend: str) -> tuple[Tensor, Tensor]:
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend=backend) as ep:
        summed = ep.moe(x, *weights, case.top_k).y
        (total,) = torch.autograd.grad(summed, weights[:1], dy)
        own = ep.moe(x, *weights, case.top_k, reduce_router_grad=False).y
        (part,) = torch.autograd.grad(own, weights[:1], dy)
    return total.cpu(), part.cpu()


@both_backends
def test_router_gradient_is_summed_unless_told_not_to(pool: RankPool, backend: str) -> None:
    found = pool.run(router_gradients, CASES["uneven_tokens"], backend, world_size=3)
    by_hand = (found[0][1] + found[1][1]) + found[2][1]
    for total, _ in found:
        assert_bitwise(total, by_hand)
    assert not torch.equal(found[0][1], by_hand)


def every_other(tensor: Tensor) -> Tensor:
    """The same values in memory of twice the size, two apart."""
    return torch.stack((tensor, torch.zeros_like(tensor)), dim=-1)[..., 0]


def unpacked_otherwise(rank: Rank, case: Case, backend: str, config: EPConfig) -> None:
    """Hooks give back what was saved in another layout, as those that compress or offload it may."""
    x, weights, dy = layer_inputs(rank, case)
    idx, scores = routing_of(rank, case)
    scores = scores.clone().requires_grad_()
    with ExpertParallel(backend=backend, config=config) as ep:
        plan = ep.plan(idx, weights[0].shape[0])
        works = [
            (lambda: ep.moe(x, *weights, case.top_k).y, [x, *weights]),
            (lambda: ep.combine(ep.dispatch(x, plan), scores, plan), [x, scores]),
        ]
        for forward, leaves in works:
            expected = gradients(forward(), dy, leaves)
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, every_other):
                y = forward()
            for grad, wanted in zip(gradients(y, dy, leaves), expected, strict=True):
                assert_bitwise(grad, wanted)


@promise("unpacked")
@by_backend_and_flags
def test_what_is_saved_may_come_back_in_another_layout(pool: RankPool, backend: str, flags: dict[str, bool]) -> None:
    pool.run(unpacked_otherwise, CASES["uneven_tokens"], backend, EPConfig(**flags), world_size=2)


def unequal_needs(rank: Rank, case: Case, backend: str, config: EPConfig) -> None:
    """x, scores or both need a gradient on rank 0 alone: backward still finds all ranks, and rank 0's is right."""
    x, (_, w1, w2), dy = layer_inputs(rank, case)
    idx, scores = routing_of(rank, case)
    with ExpertParallel(backend=backend, config=config) as ep:
        scores = scores.clone().requires_grad_()
        expected = torch.autograd.grad(ep.moe_routed(x, idx, scores, w1, w2), [x, scores], dy)
        for wanted in product((False, True), repeat=2):
            mine = [want and rank.rank == 0 for want in wanted]
            held = [t.detach().clone().requires_grad_(m) for t, m in zip((x, scores), mine, strict=True)]
            ep.moe_routed(held[0], idx, held[1], w1, w2).backward(dy)
            for tensor, need, grad in zip(held, mine, expected, strict=True):
                assert (tensor.grad is not None) == need
                if tensor.grad is not None:
                    assert_bitwise(tensor.grad, grad)


@by_backend_and_flags
def test_ranks_may_need_different_gradients(pool: RankPool, backend: str, flags: dict[str, bool]) -> None:
    pool.run(unequal_needs, CASES["uneven_tokens"], backend, EPConfig(**flags), world_size=3)


def empty_share(rank: Rank, backend: str) -> None:
    """A rank without tokens brings an x that came from nowhere; the others train a layer in front."""
    torch.manual_seed(0)
    with ExpertParallel(backend=backend) as ep:
        front = torch.nn.Linear(8, 8, device=rank.device)
        layer = MoE(8, 4, num_experts=6, top_k=2, ep=ep, device=rank.device)
        tokens = torch.randn(5, 8, device=rank.device)
        x = tokens[:0] if rank.rank == 1 else front(tokens)
        layer(layer(x).y).y.sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert (front.weight.grad is not None) == (rank.rank != 1)


@both_backends
def test_a_rank_without_tokens_needs_no_gradient_of_x(pool: RankPool, backend: str) -> None:
    pool.run(empty_share, backend, world_size=3)


def one_without_gradients(rank: Rank) -> bool:
    """Only a rank that will never go backward has an x that requires a gradient."""
    with ExpertParallel(backend="reference") as ep:
        plan = ep.plan(torch.tensor([[0], [1]]), 2)
        x = torch.ones(2, 8, requires_grad=rank.rank == 0)
        with torch.set_grad_enabled(rank.rank != 0):
            return ep.dispatch(x, plan).requires_grad


def test_who_goes_not_backward_asks_nobody_to(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(one_without_gradients, world_size=2) == [False, False]


def planned_in_inference_mode(rank: Rank, backend: str) -> None:
    """A plan of inference mode serves a dispatch and a combine that are trained through."""
    with ExpertParallel(backend=backend) as ep:
        with torch.inference_mode():
            plan = ep.plan(torch.tensor([[0], [1]], device=rank.device), 2)
        x = torch.ones(2, 8, device=rank.device, requires_grad=True)
        ep.combine(ep.dispatch(x, plan), torch.ones(2, 1, device=rank.device), plan).sum().backward()
        assert bool((x.grad == 1).all())


@both_backends
def test_a_plan_of_inference_mode_may_be_trained_through(pool: RankPool, backend: str) -> None:
    pool.run(planned_in_inference_mode, backend, world_size=1)
