"""Routers in calls of the layer: through y, through what comes with it, and over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import both_backends
from on_ranks import on_ranks
from promises import promise
from routers import plain_router, randn
from same import assert_same_bits
from torch import Tensor

from sonic_ep import CollectiveMismatchError, ExpertParallel, MoEOutput, RoutedOutput, RouterConfig
from sonic_ep.reference.dense import dense_moe
from sonic_ep.testing import CASES, Rank, assert_as_accurate, assert_bitwise, draw
from sonic_ep.testing.oracle import ALL, leaf, leaf_experts, weights_of

CASE = replace(CASES["uneven_tokens"], tokens=(24, 16), num_experts=12, top_k=3)
# With all that a router may have.
CONFIG = RouterConfig(
    score_function="sigmoid", norm_topk_probs=True, scale=2.5, num_groups=4, top_groups=2, group_top=2
)
OUTPUTS = ("y", "router_logits", "topk_scores")
LOSSES = [("y",), ("topk_scores",), OUTPUTS]


def call_of(rank: Rank, share: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of ``moe`` with new leaves; with all tokens and experts unless they are this rank's share."""
    inputs = draw(CASE, rank.world_size, rank.device)
    tokens, experts = (inputs.tokens_of(rank.rank), inputs.experts_of(rank.rank)) if share else (ALL, ALL)
    weights = weights_of(leaf_experts(inputs.experts, experts, dtype))
    of_router = {"router_w": inputs.router_w, "router_b": randn(rank, CASE.num_experts, seed=1)}
    correction = randn(rank, CASE.num_experts, seed=2)
    leaves = {"x": leaf(inputs.x[tokens].to(dtype)), **{name: leaf(w.to(dtype)) for name, w in of_router.items()}}
    return {**leaves, **weights, "correction_bias": correction.to(dtype)}


def probes(rank: Rank) -> dict[str, Tensor]:
    """Gradients of the outputs of all tokens."""
    tokens = sum(CASE.tokens_of_rank(each) for each in range(rank.world_size))
    widths = dict(zip(OUTPUTS, (CASE.hidden, CASE.num_experts, CASE.top_k), strict=True))
    return {name: randn(rank, tokens, width, seed=3) for name, width in widths.items()}


def gradients(out: Any, arguments: dict[str, Any], of_outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: value for name, value in arguments.items() if value.requires_grad}
    given = [of_outputs[name].to(getattr(out, name).dtype) for name in of_outputs]
    outputs = [getattr(out, name) for name in of_outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), given, retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def dense(rank: Rank, dtype: torch.dtype) -> tuple[MoEOutput, dict[str, Any]]:
    """The layer of all tokens by plain PyTorch, and its arguments."""
    given = call_of(rank, share=False, dtype=dtype)
    routing = plain_router(*(given[n] for n in ("x", "router_w", "router_b", "correction_bias")), CONFIG, CASE.top_k)
    experts = draw(CASE, rank.world_size, rank.device).experts
    experts = replace(experts, **{name: given[name] for name in ("w1", "w2", "b1", "b2")})
    y = dense_moe(given["x"], routing.topk_idx, routing.topk_scores, experts)
    counts = routing.topk_idx.flatten().bincount(minlength=CASE.num_experts).int()
    return MoEOutput(y, routing.logits, counts, routing.topk_idx, routing.topk_scores), given


@on_ranks(1, 2)
@both_backends
def test_the_layer_is_that_of_plain_pytorch_through_every_output(rank: Rank, backend: str) -> None:
    inputs = draw(CASE, rank.world_size, rank.device)
    shares = dict.fromkeys(("x", *OUTPUTS), inputs.tokens_of(rank.rank))
    shares |= dict.fromkeys(("w1", "w2", "b1", "b2"), inputs.experts_of(rank.rank))
    (truth, of_truth), (plain, of_plain) = dense(rank, torch.float64), dense(rank, torch.float32)
    given = call_of(rank)
    with ExpertParallel(backend=backend) as ep:
        out = ep.moe(**given, top_k=CASE.top_k, router=CONFIG)
        assert torch.equal(out.topk_idx, truth.topk_idx[shares["y"]])
        assert torch.equal(out.tokens_per_expert, truth.tokens_per_expert)
        assert not any(tensor.requires_grad for tensor in (out.topk_idx, out.tokens_per_expert))
        for name in OUTPUTS:
            expected = (getattr(which, name)[shares[name]] for which in (truth, plain))
            assert_as_accurate(getattr(out, name), *expected, name)
        for through in LOSSES:
            whole = {name: probe for name, probe in probes(rank).items() if name in through}
            found = gradients(out, given, {name: probe[shares[name]] for name, probe in whole.items()})
            exact, usual = gradients(truth, of_truth, whole), gradients(plain, of_plain, whole)
            assert found.keys() == exact.keys()
            for name, grad in found.items():
                of_rank = shares.get(name, ALL)
                assert_as_accurate(grad, exact[name][of_rank], usual[name][of_rank], f"d{name} through {through}")


@on_ranks(2)
@both_backends
def test_the_routing_that_is_returned_is_the_one_used(rank: Rank, backend: str) -> None:
    given = call_of(rank)
    experts = {name: given[name] for name in ("w1", "w2", "b1", "b2")}
    with ExpertParallel(backend=backend) as ep:
        out = ep.moe(**given, top_k=CASE.top_k, router=CONFIG)
        routing = {"topk_idx": out.topk_idx, "topk_scores": out.topk_scores.detach()}
        again = ep.moe_routed(given["x"], **routing, **experts, return_routing=True)
        assert isinstance(again, RoutedOutput)
        assert_same_bits(again, [out.y, out.tokens_per_expert, out.topk_idx, out.topk_scores])
        # Scores of half precision, and dropped slots.
        idx = out.topk_idx.int().masked_fill(out.topk_idx == 1, -1)
        scores = leaf(out.topk_scores.bfloat16())
        y = ep.moe_routed(given["x"], idx, scores, **experts)
        found = ep.moe_routed(given["x"], idx, scores, **experts, return_routing=True)
        assert_same_bits([found.y, found.topk_idx, found.topk_scores], [y, idx, scores.float()])
        assert found.tokens_per_expert[1] == 0
        of_y, of_same = (torch.autograd.grad(each.square().sum(), scores) for each in (y, found.y))
        assert_same_bits(of_same, of_y)
        (of_scores,) = torch.autograd.grad(found.topk_scores.sum(), scores)
        assert_bitwise(of_scores, torch.ones_like(scores))


@promise("outputs")
@on_ranks(1)
@both_backends
def test_a_routing_that_is_written_in_place_is_refused_in_backward_or_changes_nothing(rank: Rank, backend: str) -> None:
    with ExpertParallel(backend=backend) as ep:
        for config in (CONFIG, RouterConfig(), RouterConfig(score_order="softmax_then_topk")):
            given = call_of(rank)

            def gradient(name: str | None, given: dict[str, Any] = given, config: RouterConfig = config) -> Tensor:
                out = ep.moe(**given, top_k=CASE.top_k, router=config)
                with torch.no_grad():
                    None if name is None else getattr(out, name).zero_()
                return torch.autograd.grad(out.y.square().sum(), given["x"])[0]

            expected = gradient(None)
            assert_bitwise(gradient("tokens_per_expert"), expected)
            for name in ("router_logits", "topk_idx", "topk_scores"):
                with suppress_only("modified by an inplace operation"):
                    assert_bitwise(gradient(name), expected, f"after writing {name}")


@contextmanager
def suppress_only(words: str) -> Iterator[None]:
    """A ``RuntimeError`` with these words is right, too."""
    try:
        yield
    except RuntimeError as error:
        if words not in str(error):
            raise


@promise("compared-calls")
@pytest.mark.parametrize("name", ["router_b", "correction_bias", "router_b trained"])
@on_ranks(2, pool="cpu_pool")
def test_biases_of_a_router_are_given_on_every_rank_or_on_none(rank: Rank, name: str) -> None:
    given = call_of(rank)
    if rank.rank == 1 and name == "router_b trained":
        given["router_b"].requires_grad_(False)
    elif rank.rank == 1:
        del given[name]
    with ExpertParallel(backend="reference", check_collective=True) as ep:
        with pytest.raises(CollectiveMismatchError, match=f"{name}: True on rank 0, False on rank 1"):
            ep.moe(**given, top_k=CASE.top_k, router=CONFIG)
        # A bias whose gradient is not summed may be trained anywhere.
        if name == "router_b trained":
            ep.moe(**given, top_k=CASE.top_k, router=CONFIG, reduce_router_grad=False)
        assert_bitwise(given["router_w"], call_of(rank)["router_w"])
