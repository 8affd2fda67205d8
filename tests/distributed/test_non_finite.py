"""NaN and infinity change no other token or expert, and no result holds unwritten memory, which reads as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from backends import BACKENDS, both_backends
from layer_inputs import routing_of
from matrix import DIAGONAL
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Case, Inputs, Rank, assert_bitwise, draw
from sonic_ep.testing.cases import dropping
from sonic_ep.testing.oracle import Outcome, leaf, leaf_experts, run_moe, run_routed, weights_of

VALUES = (float("nan"), float("inf"), -float("inf"))
SMALL = Case(name="non-finite", tokens=(2, 5), hidden=8, intermediate=8, num_experts=12, top_k=2, seed=30)
DROPPED = replace(SMALL, tokens=(7, 7), num_experts=6, choose=dropping, seed=31)
OF_TOKENS = ("y", "dx", "dscores", "router_logits")
OF_EXPERTS = ("dw1", "dw2", "db1", "db2")


def parallels(backend: str) -> Iterator[ExpertParallel]:
    """One for each combine mode, each with another dispatch mode."""
    for dispatch, combine in DIAGONAL:
        with ExpertParallel(backend=backend, config=EPConfig(dispatch=dispatch, combine=combine)) as ep:
            yield ep


# The last rank's.
POISONED = slice(-len(VALUES), None)


def poisoned(inputs: Inputs, name: str) -> Inputs:
    """The inputs with one value in each poisoned token: in one feature of x, or as one score."""
    tensor = getattr(inputs, name).clone()
    tensor[POISONED, 1] = torch.tensor(VALUES, device=tensor.device)
    return replace(inputs, **{name: tensor})


def others_of(inputs: Inputs, rank: int) -> Tensor:
    """Which of this rank's tokens are not poisoned."""
    others = torch.ones(len(inputs.x), dtype=torch.bool, device=inputs.x.device)
    others[POISONED] = False
    return others[inputs.tokens_of(rank)]


def assert_others_keep_their_bits(found: Outcome, clean: Outcome, inputs: Inputs, rank: int) -> None:
    others = others_of(inputs, rank)
    for name in set(OF_TOKENS) & set(found):
        assert_bitwise(found[name][others], clean[name][others], name)
    assert not found["y"][~others].isfinite().any()


@promise("non-finite")
@on_ranks(2)
@both_backends
def test_a_poisoned_token_or_score_touches_its_own_experts_alone(rank: Rank, backend: str) -> None:
    inputs = draw(SMALL, rank.world_size, rank.device)
    touched = set(inputs.topk_idx[POISONED].flatten().tolist())
    hits = [expert in touched for expert in range(SMALL.num_experts)[inputs.experts_of(rank.rank)]]
    assert not all(hits)
    for ep in parallels(backend):
        clean = run_routed(inputs, ep)
        for name in ("x", "topk_scores"):
            found = run_routed(poisoned(inputs, name), ep)
            assert_others_keep_their_bits(found, clean, inputs, rank.rank)
            for weight in OF_EXPERTS:
                for expert in (expert for expert, hit in enumerate(hits) if not hit):
                    assert_bitwise(found[weight][expert], clean[weight][expert], weight)
            # Every expert of its token learns from x.
            finite = [bool(grad.isfinite().all()) for grad in found["dw1"]]
            assert name != "x" or finite == [not hit for hit in hits]


def whole_numbers(inputs: Inputs) -> Inputs:
    """Nothing is rounded, so that the number of rows of a product changes none of its bits."""
    names = ("x", "dy", "router_w", "dlogits")
    weights = {name: getattr(inputs.experts, name).mul(3).round() for name in ("w1", "w2", "b1", "b2")}
    rounded = {name: getattr(inputs, name).mul(2).round() for name in names}
    return replace(inputs, **rounded, experts=replace(inputs.experts, **weights))


@promise("non-finite")
@on_ranks(2)
@pytest.mark.parametrize(
    ("backend", "top_k"),
    [("reference", 1), ("reference", 2), ("fast", 1), pytest.param("fast", 2, marks=pytest.mark.thorough)],
)
def test_poisoned_tokens_before_the_router_change_no_other(rank: Rank, backend: str, top_k: int) -> None:
    """The tokens may go to any K experts, each once, and none is lost."""
    # Of one expert the score is 1, so that whole numbers stay whole.
    case = replace(SMALL, top_k=1, activation="relu") if top_k == 1 else SMALL
    inputs = whole_numbers(draw(case, rank.world_size, rank.device))
    for ep in parallels(backend):
        clean, found = run_moe(inputs, ep), run_moe(poisoned(inputs, "x"), ep)
        ep.check()
        others = others_of(inputs, rank.rank)
        assert_bitwise(found["router_logits"][others], clean["router_logits"][others], "router_logits")
        assert found["y"][others].isfinite().all()
        assert found["dx"][others].isfinite().all()
        if top_k == 1:
            assert_others_keep_their_bits(found, clean, inputs, rank.rank)
        counts = found["tokens_per_expert"]
        assert int(counts.sum()) == inputs.topk_idx.numel()
        assert int((counts - clean["tokens_per_expert"]).abs().max()) <= len(VALUES)


@promise("nowhere")
@on_ranks(2)
@both_backends
def test_what_is_routed_nowhere_yields_exact_zeros_whatever_it_is(rank: Rank, backend: str) -> None:
    """Also where the incoming gradients of what is dropped are not finite."""
    inputs = draw(DROPPED, rank.world_size, rank.device)
    dropped = inputs.topk_idx < 0
    gone = dropped.all(dim=1)
    mine = inputs.tokens_of(rank.rank)
    assert gone[mine].any()
    assert (dropped & ~gone[:, None]).any()
    values = torch.tensor(VALUES, device=rank.device).repeat(len(gone))[: len(gone), None]
    x, dy = (torch.where(gone[:, None], values, tensor) for tensor in (inputs.x, inputs.dy))
    filled = replace(inputs, x=x, dy=dy, topk_scores=torch.where(dropped, values, inputs.topk_scores))
    for ep in parallels(backend):
        clean, found = run_routed(inputs, ep), run_routed(filled, ep)
        assert_same_bits(found, clean)
        nowhere = {name: clean[name][gone[mine]] for name in ("y", "dx", "dscores")}
        for name, tensor in [*nowhere.items(), ("dscores", clean["dscores"][dropped[mine]])]:
            assert_bitwise(tensor, torch.zeros_like(tensor), name)


FLAGS = [{}, {"redispatch_x_in_backward": True}, {"cpu_sync_on_runtime": True}, {"max_rows": 1000}]


def small(case: Case) -> Case:
    """The same kind of routing in few rows."""
    tokens = tuple(min(count, most) for count, most in zip((*case.tokens, *case.tokens), (4, 2), strict=False))
    return replace(case, tokens=tokens, hidden=8, intermediate=4, num_experts=8, top_k=2)


def assert_written(tensors: dict[str, Tensor | None], what: str) -> None:
    for name, tensor in tensors.items():
        assert tensor is None or bool(tensor.isfinite().all()), f"{what}: {name} holds unwritten memory"


@promise("written")
@on_ranks(2)
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, marks=pytest.mark.thorough if backend == "fast" and place != 2 else ())
        for backend in BACKENDS
        for place, case in enumerate(["dropped_slots_bf16", "empty_experts", "zero_token_ranks", "no_tokens_at_all"])
    ],
)
def test_everything_handed_out_is_written(rank: Rank, backend: str, case: str) -> None:
    for number, flags in enumerate(FLAGS):
        dispatch, combine = DIAGONAL[number % len(DIAGONAL)]
        everything(rank, small(CASES[case]), backend, EPConfig(dispatch=dispatch, combine=combine, **flags))


def everything(rank: Rank, case: Case, backend: str, config: EPConfig) -> None:
    """Every tensor of calls and their backwards, but for rows of dispatch past the valid ones."""
    inputs = draw(case, rank.world_size, rank.device)
    idx, scores = routing_of(rank, case)
    held = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    x, router_w, scores = leaf(inputs.x[inputs.tokens_of(rank.rank)]), leaf(inputs.router_w), leaf(scores)
    experts = weights_of(held)
    options = {"activation": case.activation, "gate_layout": case.gate_layout}

    def check(what: str, outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
        assert_written(outputs, what)
        loss = sum(tensor.float().sum() for tensor in outputs.values() if tensor.requires_grad)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        assert_written(dict(zip(leaves, found, strict=True)), what)

    with ExpertParallel(backend=backend, config=config) as ep:
        out = ep.moe(x, router_w, top_k=case.top_k, **experts, **options)
        check("moe", out._asdict(), {"x": x, "router_w": router_w, **experts})
        y = ep.moe_routed(x, idx, scores, **experts, **options)
        check("moe_routed", {"y": y}, {"x": x, "scores": scores, **experts})
        plan = ep.plan(idx, case.num_experts)
        plan.check()
        rows = ep.dispatch(x, plan)
        check("dispatch", {"rows": rows[: plan.rows()]}, {"x": x})
        given = torch.zeros_like(rows).requires_grad_()
        check("combine", {"y": ep.combine(given, scores, plan)}, {"rows": given, "scores": scores})
