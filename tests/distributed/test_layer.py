"""The layer against the dense oracle: every mode pair, flag, case and option, forward and every gradient."""

import gc
import weakref
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from _pytest.mark.structures import ParameterSet
from backends import BACKENDS, both_backends
from layer_inputs import layer_inputs, routing_of
from promises import promise
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.backend import DispatchPrimitive
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.backend import ReferenceBackend
from sonic_ep.testing import (
    CASES,
    Case,
    OptionTrial,
    Rank,
    RankPool,
    assert_bitwise,
    draw,
    option_trials,
    verify_moe,
    verify_routed,
)
from sonic_ep.testing.oracle import Outcome, run_moe, run_routed

WORLD_SIZES = [1, 2, 3, 4, 8]
OPTION_TRIALS = {trial.case.name: trial for trial in option_trials()}
PAIRS = [(dispatch, combine) for dispatch in DispatchMode for combine in CombineMode]
FLAGS = [
    dict(zip(("redispatch_x_in_backward", "cpu_sync_on_runtime"), on, strict=True))
    for on in product((False, True), repeat=2)
]

# Every mode of either kind, each once.
DIAGONAL = list(zip(DispatchMode, CombineMode, strict=True))
FEW_RANKS = 2


def thorough(backend: str, *, everyday: bool) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a setting: on the fast backend, what is not for every day runs on GPUs, or if asked for."""
    return () if everyday or backend == "reference" else (pytest.mark.thorough,)


def settings(world_sizes: list[int], cases: Iterable[str]) -> list[ParameterSet]:
    """(backend, world_size, case, pair), all of them.

    For every day on the fast backend: one pair of modes, another for each case and number of ranks, and on two ranks
    for every third case each mode; on three ranks a third of the cases, on four a quarter.
    """
    found = []
    for backend, world_size, (place, case), pair in product(BACKENDS, world_sizes, enumerate(cases), PAIRS):
        call_lock = PAIRS[(place + world_size) % len(PAIRS)]
        # The more ranks, the fewer cases.
        some = world_size <= FEW_RANKS or place % world_size == 1
        sampled = world_size < max(WORLD_SIZES) and pair == call_lock and some
        everyday = sampled or (world_size == FEW_RANKS and place % 3 == 0 and pair in DIAGONAL)
        marks = thorough(backend, everyday=everyday)
        name = f"{backend}-{world_size}-{case}-{pair_name(pair)}"
        found.append(pytest.param(backend, world_size, CASES[case], pair, marks=marks, id=name))
    return found


def pair_name(pair: tuple[DispatchMode, CombineMode]) -> str:
    return f"{pair[0].value}+{pair[1].value}"


def routed_reds(rank: Rank, case: Case, backend: str, config: EPConfig) -> list[str]:
    with ExpertParallel(backend=backend, config=config) as ep:
        return [str(finding) for finding in verify_routed(case, ep, rank.device) if not finding.ok]


def moe_reds(rank: Rank, case: Case, backend: str, config: EPConfig) -> list[str]:
    with ExpertParallel(backend=backend, config=config) as ep:
        return [str(finding) for finding in verify_moe(case, ep, rank.device) if not finding.ok]


@promise("accuracy")
@pytest.mark.parametrize(("backend", "world_size", "case", "pair"), settings(WORLD_SIZES, CASES))
def test_routed_layer_matches_the_oracle(
    pool: RankPool, backend: str, world_size: int, case: Case, pair: tuple[DispatchMode, CombineMode]
) -> None:
    config = EPConfig(dispatch=pair[0], combine=pair[1])
    assert pool.run(routed_reds, case, backend, config, world_size=world_size) == [[]] * world_size


@promise("accuracy")
@pytest.mark.parametrize(
    ("backend", "world_size", "case", "pair"), settings(WORLD_SIZES, ["uneven_tokens", "uniform_bf16"])
)
def test_layer_with_its_router_matches_the_oracle(
    pool: RankPool, backend: str, world_size: int, case: Case, pair: tuple[DispatchMode, CombineMode]
) -> None:
    config = EPConfig(dispatch=pair[0], combine=pair[1])
    assert pool.run(moe_reds, case, backend, config, world_size=world_size) == [[]] * world_size


@pytest.mark.parametrize("trial", OPTION_TRIALS.values(), ids=OPTION_TRIALS.keys())
@both_backends
def test_options_modes_and_flags_together_match_the_oracle(pool: RankPool, backend: str, trial: OptionTrial) -> None:
    # Interpreted, three ranks take half as long again as two.
    ranks = FEW_RANKS if backend == "fast" else 3
    for reds in (moe_reds, routed_reds):
        assert pool.run(reds, trial.case, backend, trial.config, world_size=ranks) == [[]] * ranks


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


@promise("flags")
@pytest.mark.parametrize(
    ("backend", "world_size", "case", "pair"),
    [
        pytest.param(
            backend,
            world_size,
            CASES[case],
            pair,
            marks=thorough(
                backend, everyday=world_size == FEW_RANKS and case == "zero_token_ranks" and pair in DIAGONAL
            ),
            id=f"{backend}-{world_size}-{case}-{pair_name(pair)}",
        )
        for backend, world_size, case, pair in product(
            BACKENDS, [1, 2, 4], ["uneven_tokens", "zero_token_ranks", "uniform_bf16"], PAIRS
        )
    ],
)
def test_flags_change_no_bit(
    pool: RankPool, backend: str, world_size: int, case: Case, pair: tuple[DispatchMode, CombineMode]
) -> None:
    config = EPConfig(dispatch=pair[0], combine=pair[1])
    pool.run(outcomes_by_flags, case, backend, config, world_size=world_size)


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


@promise("modes")
@pytest.mark.parametrize(
    ("backend", "world_size", "case"),
    [
        pytest.param(
            backend,
            world_size,
            case,
            marks=thorough(backend, everyday=world_size == 3 and name == "dropped_slots"),
            id=f"{backend}-{world_size}-{name}",
        )
        for backend, world_size, (name, case) in product(BACKENDS, [1, 3, 4], CASES.items())
    ],
)
def test_modes_agree_bit_for_bit(pool: RankPool, backend: str, world_size: int, case: Case) -> None:
    pool.run(outcomes_by_modes, case, backend, world_size=world_size)


class Watched:
    """A dispatch primitive that counts its calls and remembers, without keeping alive, what it returned."""

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
    """Buffers of dispatched rows alive, and dispatches made, after forward and after backward."""
    config = EPConfig(dispatch="all_to_all", redispatch_x_in_backward=redispatch)
    x, (_, w1, w2), dy = layer_inputs(rank, case)
    with ExpertParallel(backend="reference", config=config) as ep:
        backend = ep._backend
        assert isinstance(backend, ReferenceBackend)
        watched = Watched(backend._dispatch[DispatchMode.ALL_TO_ALL])
        backend._dispatch = {DispatchMode.ALL_TO_ALL: watched}
        y = ep.moe_routed(x, *routing_of(rank, case), w1, w2)
        after_forward, calls_forward = watched.alive(), len(watched.received)
        y.backward(dy)
        return after_forward, calls_forward, watched.alive(), len(watched.received)


@pytest.mark.parametrize("case", ["uniform", "empty_experts", "zero_token_ranks", "one_rank"])
def test_redispatch_keeps_x_alone_and_gathers_it_again(pool: RankPool, case: str) -> None:
    # Forward's rows, kept for the gradient of w1, and in backward the dispatch of d(out).
    kept = pool.run(rows_alive, CASES[case], False, world_size=4)
    assert [(found[0], found[1], found[3]) for found in kept] == [(1, 1, 2)] * 4
    # Nothing survives forward, and backward dispatches d(out) and x; nothing survives backward either, although the
    # graph is still referenced.
    assert pool.run(rows_alive, CASES[case], True, world_size=4) == [(0, 1, 0, 3)] * 4


def elements_saved(rank: Rank, case: Case, redispatch: bool, train_scores: bool) -> tuple[int, int, int]:
    """Elements that autograd keeps of tensors as wide as x but for weights, and the sizes of x and of the rows."""
    x, (_, w1, w2), _ = layer_inputs(rank, case)
    weights = {weight.untyped_storage().data_ptr() for weight in (w1, w2)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.shape[1:] == (case.hidden,) and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    idx, scores = routing_of(rank, case)
    with ExpertParallel(backend="reference", config=EPConfig(redispatch_x_in_backward=redispatch)) as ep:
        rows = ep.plan(idx, case.num_experts).row_capacity
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ep.moe_routed(x, idx, scores.requires_grad_(train_scores), w1, w2)
    return sum(kept.values()), x.numel(), rows * case.hidden


@pytest.mark.parametrize("train_scores", [False, True])
def test_what_backward_keeps(cpu_pool: RankPool, train_scores: bool) -> None:
    """With the flag x, without it the rows; and the experts' outputs only if the scores need a gradient.

    Counted by a hook from outside, which also shows that such hooks (activation checkpointing, offloading) see it all.
    """
    # No other width is H here, so that only x, rows and outputs are counted.
    case = replace(CASES["uniform"], hidden=40)
    for kept, x, rows in cpu_pool.run(elements_saved, case, True, train_scores, world_size=2):
        assert kept == x + train_scores * rows
    for kept, _, rows in cpu_pool.run(elements_saved, case, False, train_scores, world_size=2):
        assert kept == rows + train_scores * rows


def rows_sized(rank: Rank, case: Case, backend: str, exact: bool) -> tuple[int, int, int]:
    inputs = draw(case, rank.world_size, rank.device)
    with ExpertParallel(backend=backend, config=EPConfig(cpu_sync_on_runtime=exact)) as ep:
        tokens = inputs.tokens_of(rank.rank)
        plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
        rows = ep.dispatch(inputs.x[tokens], plan)
        assert rows.shape[0] == plan.row_capacity
        return plan.row_capacity, plan.rows(), plan.world_size * plan.max_tokens * plan.top_k


@pytest.mark.parametrize("case", ["uniform", "zero_token_ranks", "one_rank"])
@both_backends
def test_cpu_sync_sizes_rows_exactly(pool: RankPool, backend: str, case: str) -> None:
    assert all(size == rows for size, rows, _ in pool.run(rows_sized, CASES[case], backend, True, world_size=4))
    assert all(size == most for size, _, most in pool.run(rows_sized, CASES[case], backend, False, world_size=4))


def in_subgroups(rank: Rank, case: Case, members: int, backend: str) -> list[str]:
    """Two or more groups of ``members`` ranks side by side, each with a routing of its own."""
    reds: list[str] = []
    for first in range(0, rank.world_size, members):
        group = dist.new_group(list(range(first, first + members)))
        if first <= rank.rank < first + members:
            mine, config = group, EPConfig(dispatch="rank_dedup", redispatch_x_in_backward=True)
            own = replace(case, seed=case.seed + first)
    with ExpertParallel(mine, backend=backend, config=config) as ep:
        assert ep.rank == rank.rank % members
        assert ep.world_size == members
        reds += [str(finding) for finding in verify_routed(own, ep, rank.device) if not finding.ok]
        reds += [str(finding) for finding in verify_moe(own, ep, rank.device) if not finding.ok]
    return reds


@pytest.mark.parametrize("members", [1, 2, 4])
@both_backends
def test_subgroups_of_the_world(pool: RankPool, backend: str, members: int) -> None:
    assert pool.run(in_subgroups, CASES["uneven_tokens"], members, backend, world_size=4) == [[]] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_in_the_backward_of_combine_are_in_fp32(dtype: torch.dtype) -> None:
    """d(row) is rounded once, and d(score) a sum in fp32 of what is not rounded before; a dropped slot has none."""
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.tensor([[0, 2], [1, -1], [2, 1], [0, 1]])
    scores_TK = torch.rand((4, 2), generator=generator).requires_grad_()
    with ExpertParallel(backend="reference") as ep:
        plan = ep.plan(ids_TK, 3)
        rows_RH = torch.randn((plan.row_capacity, 64), generator=generator).to(dtype).requires_grad_()
        out_grad_TH = torch.randn((4, 64), generator=generator).to(dtype)
        kept_TH = out_grad_TH.clone()
        found = torch.autograd.grad(ep.combine(rows_RH, scores_TK, plan), [rows_RH, scores_TK], out_grad_TH)
    slot_of_row_N = plan.slot_of_row[: plan.rows()].long()
    wide_NH = out_grad_TH[slot_of_row_N // 2].float()
    rows_grad_RH, scores_grad_F = torch.zeros_like(rows_RH), torch.zeros(8)
    rows_grad_RH[: plan.rows()] = (wide_NH * scores_TK.detach().flatten()[slot_of_row_N, None]).to(dtype)
    scores_grad_F[slot_of_row_N] = (wide_NH * rows_RH.detach()[: plan.rows()].float()).sum(dim=1)
    assert plan.rows() == 7
    assert_bitwise(found[0], rows_grad_RH, "rows")
    assert_bitwise(found[1], scores_grad_F.view(4, 2), "scores")
    assert_bitwise(out_grad_TH, kept_TH, "the gradient that came in")
