"""The layer against the dense oracle: every mode pair, flag, case and option, forward and every gradient."""

import gc
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.backend import DispatchPrimitive
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.layer import ReferenceBackend
from sonic_ep.testing import (
    CASES,
    Case,
    Rank,
    RankPool,
    assert_bitwise,
    draw,
    option_cases,
    verify_moe,
    verify_routed,
)
from sonic_ep.testing.differential import Outcome, leaf, leaf_experts, run_moe, run_routed

BACKENDS = ["reference"]
WORLD_SIZES = [1, 2, 3, 4, 8]
OPTION_CASES = {case.name: case for case in option_cases()}
PAIRS = [(dispatch, combine) for dispatch in DispatchMode for combine in CombineMode]
FLAGS = [
    dict(zip(("redispatch_x_in_backward", "cpu_sync_on_runtime"), on, strict=True))
    for on in product((False, True), repeat=2)
]

backends = pytest.mark.parametrize("backend", BACKENDS)


def pair_name(pair: tuple[DispatchMode, CombineMode]) -> str:
    return f"{pair[0].value}+{pair[1].value}"


def routed_reds(rank: Rank, case: Case, backend: str, config: EPConfig) -> list[str]:
    with ExpertParallel(backend=backend, config=config) as ep:
        return [str(finding) for finding in verify_routed(case, ep, rank.device) if not finding.ok]


def moe_reds(rank: Rank, case: Case, backend: str, config: EPConfig) -> list[str]:
    with ExpertParallel(backend=backend, config=config) as ep:
        return [str(finding) for finding in verify_moe(case, ep, rank.device) if not finding.ok]


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@backends
def test_routed_layer_matches_the_oracle(
    pool: RankPool, backend: str, world_size: int, case: Case, pair: tuple[DispatchMode, CombineMode]
) -> None:
    config = EPConfig(dispatch=pair[0], combine=pair[1])
    assert pool.run(routed_reds, case, backend, config, world_size=world_size) == [[]] * world_size


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@backends
def test_layer_with_its_router_matches_the_oracle(
    pool: RankPool, backend: str, world_size: int, pair: tuple[DispatchMode, CombineMode]
) -> None:
    config = EPConfig(dispatch=pair[0], combine=pair[1])
    case = CASES["uneven_tokens"]
    assert pool.run(moe_reds, case, backend, config, world_size=world_size) == [[]] * world_size


@pytest.mark.parametrize("case", OPTION_CASES.values(), ids=OPTION_CASES.keys())
@backends
def test_options_match_the_oracle(pool: RankPool, backend: str, case: Case) -> None:
    assert pool.run(moe_reds, case, backend, EPConfig(), world_size=3) == [[]] * 3


def outcomes_by_flags(rank: Rank, case: Case, backend: str, config: EPConfig) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    outcomes = []
    for flags in FLAGS:
        with ExpertParallel(backend=backend, config=replace(config, **flags)) as ep:
            outcomes.append({**run_routed(inputs, ep), **run_moe(inputs, ep)})
    for flags, outcome in zip(FLAGS, outcomes, strict=True):
        assert_same_bits(outcome, outcomes[0], str(flags))


def assert_same_bits(outcome: Outcome, expected: Outcome, what: str) -> None:
    assert outcome.keys() == expected.keys()
    for name, tensor in outcome.items():
        assert_bitwise(tensor, expected[name], f"{name} with {what}")


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("case", ["uneven_tokens", "zero_token_ranks", "uniform_bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@backends
def test_flags_change_no_bit(
    pool: RankPool, backend: str, world_size: int, case: str, pair: tuple[DispatchMode, CombineMode]
) -> None:
    config = EPConfig(dispatch=pair[0], combine=pair[1])
    pool.run(outcomes_by_flags, CASES[case], backend, config, world_size=world_size)


def outcomes_by_modes(rank: Rank, case: Case, backend: str) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    outcomes = {}
    for pair in PAIRS:
        with ExpertParallel(backend=backend, config=EPConfig(dispatch=pair[0], combine=pair[1])) as ep:
            outcomes[pair] = run_routed(inputs, ep)
    for combine, dispatch in product(CombineMode, DispatchMode):
        expected = outcomes[DispatchMode.ALL_TO_ALL, combine]
        assert_same_bits(outcomes[dispatch, combine], expected, f"{dispatch.value}+{combine.value}")
    for dispatch in DispatchMode:
        expected = outcomes[dispatch, CombineMode.REDUCE_SCATTER]
        assert_same_bits(outcomes[dispatch, CombineMode.RANK_DEDUP], expected, f"{dispatch.value}+rank_dedup")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("world_size", [1, 3, 4])
@backends
def test_modes_agree_bit_for_bit(pool: RankPool, backend: str, world_size: int, case: Case) -> None:
    pool.run(outcomes_by_modes, case, backend, world_size=world_size)


class Watched:
    """A dispatch primitive that remembers, without keeping alive, what it returned."""

    def __init__(self, primitive: DispatchPrimitive) -> None:
        self.primitive = primitive
        self.received: list[weakref.ref[torch.UntypedStorage]] = []

    def receive(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        rows = self.primitive.receive(x_TH, plan)
        self.received.append(weakref.ref(rows.untyped_storage()))
        return rows

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        return self.primitive.source_of_row(plan)

    def alive(self) -> int:
        gc.collect()
        return sum(storage() is not None for storage in self.received)


def rows_alive(rank: Rank, case: Case, redispatch: bool) -> tuple[int, int, int, int]:
    """Buffers of dispatched rows alive after forward and after backward, and dispatches made until then."""
    config = EPConfig(dispatch="all_to_all", redispatch_x_in_backward=redispatch)
    inputs = draw(case, rank.world_size, rank.device)
    with ExpertParallel(backend="reference", config=config) as ep:
        backend = ep._backend
        assert isinstance(backend, ReferenceBackend)
        watched = Watched(backend._dispatch[DispatchMode.ALL_TO_ALL])
        backend._dispatch = {DispatchMode.ALL_TO_ALL: watched}
        x = leaf(inputs.x[inputs.tokens_of(rank.rank)])
        experts = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
        tokens = inputs.tokens_of(rank.rank)
        y = ep.moe_routed(x, inputs.topk_idx[tokens], inputs.topk_scores[tokens], experts.w1, experts.w2)
        after_forward, calls_forward = watched.alive(), len(watched.received)
        y.backward(inputs.dy[tokens])
        return after_forward, calls_forward, watched.alive(), len(watched.received)


@pytest.mark.parametrize("case", ["uniform", "empty_experts", "zero_token_ranks", "one_rank"])
def test_redispatch_keeps_x_alone_and_gathers_it_again(pool: RankPool, case: str) -> None:
    biasless = replace(CASES[case], bias=False)
    # Forward's rows, kept for the gradient of w1, and in backward the dispatch of d(out).
    kept = pool.run(rows_alive, biasless, False, world_size=4)
    assert [(found[0], found[1], found[3]) for found in kept] == [(1, 1, 2)] * 4
    # Nothing survives forward, and backward dispatches d(out) and x; nothing survives backward either, although the
    # graph is still referenced.
    assert pool.run(rows_alive, biasless, True, world_size=4) == [(0, 1, 0, 3)] * 4


def rows_sized(rank: Rank, case: Case, exact: bool) -> tuple[int, int, int]:
    inputs = draw(case, rank.world_size, rank.device)
    with ExpertParallel(backend="reference", config=EPConfig(cpu_sync_on_runtime=exact)) as ep:
        tokens = inputs.tokens_of(rank.rank)
        plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
        rows = ep.dispatch(inputs.x[tokens], plan)
        assert rows.shape[0] == plan.row_capacity
        return plan.row_capacity, plan.rows(), plan.world_size * plan.capacity * plan.top_k


@pytest.mark.parametrize("case", ["uniform", "zero_token_ranks", "one_rank"])
def test_cpu_sync_sizes_rows_exactly(pool: RankPool, case: str) -> None:
    assert all(size == rows for size, rows, _ in pool.run(rows_sized, CASES[case], True, world_size=4))
    assert all(size == ceiling for size, _, ceiling in pool.run(rows_sized, CASES[case], False, world_size=4))


def in_subgroups(rank: Rank, case: Case, members: int) -> list[str]:
    """Two or more groups of ``members`` ranks side by side, each with a routing of its own."""
    reds: list[str] = []
    for first in range(0, rank.world_size, members):
        group = dist.new_group(list(range(first, first + members)))
        if first <= rank.rank < first + members:
            mine, config = group, EPConfig(dispatch="rank_dedup", redispatch_x_in_backward=True)
            own = replace(case, seed=case.seed + first)
    with ExpertParallel(mine, backend="reference", config=config) as ep:
        assert ep.rank == rank.rank % members
        assert ep.world_size == members
        reds += [str(finding) for finding in verify_routed(own, ep, rank.device) if not finding.ok]
        reds += [str(finding) for finding in verify_moe(own, ep, rank.device) if not finding.ok]
    return reds


@pytest.mark.parametrize("members", [1, 2, 4])
def test_subgroups_of_the_world(cpu_pool: RankPool, members: int) -> None:
    assert cpu_pool.run(in_subgroups, CASES["uneven_tokens"], members, world_size=4) == [[]] * 4


def layer_inputs(rank: Rank, case: Case) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, the weights, and the gradient of y, of this rank."""
    inputs = draw(case, rank.world_size, rank.device)
    experts = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    tokens = inputs.tokens_of(rank.rank)
    return leaf(inputs.x[tokens]), [leaf(inputs.router_w), experts.w1, experts.w2], inputs.dy[tokens]


def gradients(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


def recomputed(rank: Rank, case: Case, config: EPConfig) -> None:
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend="reference", config=config) as ep:

        def layer(x: Tensor) -> Tensor:
            return ep.moe(x, *weights, case.top_k).y

        expected = gradients(layer(x), dy, [x, *weights])
        for reentrant in (False, True):
            y = checkpoint(layer, x, use_reentrant=reentrant)
            y.backward(dy)
            for tensor, grad in zip([x, *weights], expected, strict=True):
                assert_bitwise(tensor.grad, grad)
                tensor.grad = None


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_activation_checkpointing_both_variants(cpu_pool: RankPool, flags: dict[str, bool]) -> None:
    cpu_pool.run(recomputed, CASES["uneven_tokens"], EPConfig(**flags), world_size=2)


def interleaved(rank: Rank, case: Case, config: EPConfig) -> None:
    """Two forwards before the backwards, in both orders, then both at once: always the same gradients."""
    x, weights, dy = layer_inputs(rank, case)
    other = leaf(x.detach().flip(0) * 2)
    with ExpertParallel(backend="reference", config=config) as ep:

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


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_two_forwards_before_the_backwards(cpu_pool: RankPool, flags: dict[str, bool]) -> None:
    cpu_pool.run(interleaved, CASES["zero_token_ranks"], EPConfig(**flags), world_size=4)


def partly_frozen(rank: Rank, case: Case, config: EPConfig) -> None:
    """Whatever is frozen has no gradient, and what is not has the same as ever."""
    x, weights, dy = layer_inputs(rank, case)
    leaves = [x, *weights]
    with ExpertParallel(backend="reference", config=config) as ep:
        expected = gradients(ep.moe(x, *weights, case.top_k).y, dy, leaves)
        for wanted in product((False, True), repeat=len(leaves)):
            held = [leaf(tensor).requires_grad_(wants) for tensor, wants in zip(leaves, wanted, strict=True)]
            y = ep.moe(held[0], *held[1:], case.top_k).y
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.backward(dy)
            for tensor, wants, grad in zip(held, wanted, expected, strict=True):
                assert (tensor.grad is not None) == wants
                if tensor.grad is not None:
                    assert_bitwise(tensor.grad, grad)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_only_gradients_that_are_required(cpu_pool: RankPool, flags: dict[str, bool]) -> None:
    cpu_pool.run(partly_frozen, CASES["zero_token_ranks"], EPConfig(**flags), world_size=2)


def under_autocast_and_no_grad(rank: Rank, case: Case) -> None:
    x, weights, _ = layer_inputs(rank, case)
    config = EPConfig(redispatch_x_in_backward=True)
    with ExpertParallel(backend="reference", config=config) as ep:
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


def test_autocast_and_inference_leave_the_bits_alone(cpu_pool: RankPool) -> None:
    cpu_pool.run(under_autocast_and_no_grad, CASES["uneven_tokens"], world_size=2)


def router_gradients(rank: Rank, case: Case) -> tuple[Tensor, Tensor]:
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend="reference") as ep:
        summed = ep.moe(x, *weights, case.top_k).y
        (total,) = torch.autograd.grad(summed, weights[:1], dy)
        own = ep.moe(x, *weights, case.top_k, reduce_router_grad=False).y
        (part,) = torch.autograd.grad(own, weights[:1], dy)
    return total, part


def test_router_gradient_is_summed_unless_told_not_to(cpu_pool: RankPool) -> None:
    found = cpu_pool.run(router_gradients, CASES["uneven_tokens"], world_size=3)
    by_hand = (found[0][1] + found[1][1]) + found[2][1]
    for total, _ in found:
        assert_bitwise(total, by_hand)
    assert not torch.equal(found[0][1], by_hand)


def non_finite_tokens(rank: Rank, case: Case) -> None:
    """A NaN stays in its token and in the gradients of what it touched; others keep their bits."""
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    experts = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    arguments = [inputs.topk_idx[tokens], inputs.topk_scores[tokens], experts.w1, experts.w2]
    for combine in CombineMode:
        with ExpertParallel(backend="reference", config=EPConfig(combine=combine)) as ep:
            x = inputs.x[tokens].clone()
            clean = ep.moe_routed(x, *arguments)
            x[1] = float("nan")
            y = ep.moe_routed(x, *arguments)
        assert y[1].isnan().all()
        y[1] = clean[1]
        assert_bitwise(y, clean)


def test_a_nan_stays_in_its_token(cpu_pool: RankPool) -> None:
    cpu_pool.run(non_finite_tokens, CASES["uniform"], world_size=2)


def dropped_tokens(rank: Rank, case: Case) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    nowhere = (inputs.topk_idx[tokens] < 0).all(dim=1)
    assert nowhere.any()
    for combine in CombineMode:
        with ExpertParallel(backend="reference", config=EPConfig(combine=combine)) as ep:
            outcome = run_routed(inputs, ep)
        for name in ("y", "dx", "dscores"):
            assert (outcome[name][nowhere] == 0).all()


def test_a_token_routed_nowhere_yields_exact_zeros(cpu_pool: RankPool) -> None:
    cpu_pool.run(dropped_tokens, CASES["dropped_slots"], world_size=2)
