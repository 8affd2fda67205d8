"""What the end-to-end benchmark is made of: problems, the oracle, what a layer is held against."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from end_to_end import MODES, SHAPE, context_on, layer_on
from harness.context import SMOKE
from harness.layer import LayerUnderTest, Pass, ProvenCall, experts_of_rows, group_of_this_rank
from harness.products import Products
from near import assert_near
from on_ranks import on_ranks
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.compat import release_of
from sonic_ep.config import CombineMode, DispatchMode, ModePair, ScoreOrder
from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler.agreement import WrongResultError, gathered
from sonic_ep.profiler.problem import RoutingProblem, generator_of
from sonic_ep.profiler.routings import ROUTINGS
from sonic_ep.testing import Rank, assert_bitwise
from sonic_ep.testing.answer import faults_of, judge, oracle_of
from sonic_ep.testing.layer_problem import LayerOptions, LayerProblem, near_ties
from sonic_ep.testing.oracle import ALONE, LOGITS, LayerCall, Outcome, dense_outcome

CPU = torch.device("cpu")
BIASED = LayerOptions(biased=True)
UNITS = 16
DISPATCHES = (DispatchMode.RANK_DEDUP, DispatchMode.ALL_GATHER)
NAMES = ["y", "dx", "drouter_w", "dw1", "dw2", "db1", "db2"]
ROUTED = ["y", "dx", "dscores", "dw1", "dw2", "db1", "db2"]


def alone(**more: Any) -> LayerProblem:
    """A layer of one rank."""
    return LayerProblem(shape=replace(SHAPE, **more), group=ALONE, device=CPU)


@on_ranks(1, 2, 3, pool="cpu_pool")
def test_routers_choose_as_the_routing_says(rank: Rank) -> None:
    shape, slots = replace(SHAPE, tokens=400, hidden=64), {}
    total, experts, size = rank.world_size * 400 * shape.top_k, shape.num_experts, rank.world_size
    for kind in ROUTINGS:
        with layer_on(rank, shape, LayerOptions(routing=kind)) as layer:
            call, chosen = layer.problem.call, layer.choices.flatten().bincount(minlength=experts)
            of_ranks = gathered(layer.context.group, (chosen, call.router_w.sum().item(), call.x.sum().item()))
        counts, routers, tokens = zip(*of_ranks, strict=True)
        slots[kind] = sum(counts).tolist()
        assert (len(set(routers)), len(set(tokens)), sum(slots[kind])) == (1, size, total)
    uniform, skewed, one_rank = slots.values()
    assert total / experts / 2 < min(uniform) <= max(uniform) < 2 * total / experts
    # Expert j is chosen the less the larger j is: the first quarter has most of all slots, the last next to none.
    assert sum(skewed[:3]) > total / 2
    assert sum(skewed[-3:]) < total / 8
    held = one_rank[-(experts // size) :]
    assert (sum(held), min(held) > 0) == (total, True)


def test_a_router_that_cannot_tell_experts_apart_is_refused() -> None:
    """With H=1 all tokens are alike where they all go to one rank."""
    problem = replace(alone(hidden=1), options=LayerOptions(routing="one_rank"))
    with pytest.raises(ValueError, match="H: got 1, expected so many that the logits of 12 experts differ: 7 of 7"):
        problem.call  # noqa: B018


def test_routers_have_no_near_ties() -> None:
    call = alone(tokens=4000).call
    largest = (call.x.float() @ call.router_w.float().t()).detach().topk(3, dim=1).values
    assert float((largest[:, 1] - largest[:, 2]).min()) >= 1e-3
    # Drawn only once there are some.
    drawn = torch.randn(4000, SHAPE.hidden, generator=generator_of(CPU, 5, 0)).bfloat16()
    assert bool(near_ties(drawn.float() @ call.router_w.float().t(), 2).any())


def test_experts_of_rows_by_hand() -> None:
    """Ends [2, 3] and K=2: two tokens, one slot of them dropped."""

    def found(ends: list[int], top_k: int, seed: int = 0) -> Tensor:
        plan: Any = SimpleNamespace(group_ends=torch.tensor(ends, dtype=torch.int32), top_k=top_k)
        return experts_of_rows(plan, torch.Generator().manual_seed(seed))

    documented, large = found([2, 3], 2), found([5, 5, 12], 3, 1).flatten()
    assert documented.flatten().sort().values.tolist() == [-1, 0, 0, 1]
    assert (documented.shape, documented[1, 1], found([0, 0], 2).shape) == ((2, 2), -1, (0, 2))
    # With one expert a token has one slot, whatever K.
    assert found([3], 2).tolist() == [[0], [0], [0]]
    assert large.bincount().tolist() == [5, 0, 7]
    # In random order, or it would be local in a way that the rows of the group are not.
    assert large.tolist() != sorted(large.tolist())


@on_ranks(2, pool="cpu_pool")
def test_flops_and_bytes_by_hand(rank: Rank) -> None:
    """Both ranks choose alike: 5 tokens have experts of rank 0, and 2 of rank 1."""
    rates = LinkBandwidth(copy_engine_in=1.0, copy_engine_out=1.0, read=2.0, write=4.0)
    with context_on(rank, rates) as context:
        place = {"shape": SMOKE.layer, "group": context.group, "device": rank.device}
        layer = LayerUnderTest.of(context, LayerProblem(**place), "reference", MODES)
        chosen_TK = torch.tensor([[0, 1], [4, 5], [0, 4], [2, 3], [2, 3], [1, 2]])
        vars(layer)["routing"] = RoutingProblem(**place, routing=chosen_TK)
        passes = (Pass.INFERENCE, Pass.STEP)
        pairs = [ModePair(dispatch=mode, combine=CombineMode.RANK_DEDUP) for mode in DISPATCHES]
        seconds = [layer.link_seconds(pair, which) for pair in pairs for which in passes]
        assert sum(gathered(context.group, int(layer.routing.valid_rows))) / 2 == 12
        forward, row_bytes = 2 * 12 * 16 * (2 * 8 + 8), 16 * 2
        assert [layer.flops[which] for which in passes] == [forward, 3 * forward]
        # Rank 0 receives 5 tokens and sends back as many sums; rank 1 receives 2. The busier one counts.
        back = 5 * row_bytes / 4.0
        once = [5 * row_bytes / 2.0 + back, 6 * row_bytes / 1.0 + back]
        assert seconds == pytest.approx([once[0], 2 * once[0], once[1], 2 * once[1]])


@on_ranks(2, 3, pool="cpu_pool")
@pytest.mark.parametrize("kind", ["skewed", "one_rank"])
def test_same_rows_are_as_many(rank: Rank, kind: str) -> None:
    with layer_on(rank, options=LayerOptions(routing=kind)) as layer:
        call, ends = layer.same_rows(), layer.routing.plan.group_ends.tolist()
        with ExpertParallel(group_of_this_rank(layer.context.group).process_group, "reference", MODES) as alone:
            assert alone.world_size == 1
            assert ends == alone.plan(call.topk_idx, SHAPE.num_experts // rank.world_size).group_ends.tolist()
    assert call.x.shape[0] == -(-ends[-1] // SHAPE.top_k)
    assert kind == "skewed" or (ends[-1] > 0) == (rank.rank == rank.world_size - 1)


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("order", ScoreOrder)
@pytest.mark.parametrize("norm", [False, True])
def test_given_routing_is_the_layer(rank: Rank, order: ScoreOrder, norm: bool) -> None:
    options = LayerOptions(biased=True, score_order=order, norm_topk_probs=norm, routing="skewed")
    with layer_on(rank, options=options) as layer, layer.over() as ep:
        found, right = layer.given_routing().run(ep), layer.answer.outcome
        for name in ("y", "dw1", "dw2", "db1", "db2"):
            assert_bitwise(found[name], right[name], name)
        # The router has its own share of it.
        assert not torch.equal(found["dx"], right["dx"])


def prove(layer: LayerUnderTest, baseline: str) -> ProvenCall:
    """One of the three baselines."""
    if baseline == "given":
        return layer.prove_routed(layer.given_routing(), layer.context.group)
    alone = group_of_this_rank(layer.context.group)
    return layer.prove_one_gpu(alone) if baseline == "whole" else layer.prove_routed(layer.same_rows(), alone)


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("baseline", ["given", "local", "whole"])
def test_every_result_of_a_baseline_is_held_against_the_oracle(rank: Rank, baseline: str) -> None:
    """One result after the other is a tenth too large on rank 1."""
    names, prefix = (NAMES, "all experts on one rank: ") if baseline == "whole" else (ROUTED, "")
    honest = LayerCall.run
    with layer_on(rank, options=BIASED) as layer:
        assert prove(layer, baseline).outcome.keys() >= set(names)
        assert layer.judged.faults == []
        for name in names:

            def wrong(self: LayerCall, ep: Any, name: str = name) -> Outcome:
                found = honest(self, ep)
                return {**found, name: found[name] * 1.1} if rank.rank == 1 else found

            with patch.object(LayerCall, "run", wrong), pytest.raises(WrongResultError) as raised:
                prove(layer, baseline)
            message = str(raised.value)
            assert f"rank 1 of 2: {prefix}{name.replace('y', 'o')}: relative error" in message
            # Of a group both ranks know what all of them got; alone, each its own.
            assert ("rank 0" in message) == (baseline == "given")


def test_the_oracle_takes_as_many_tokens_at_a_time_as_it_is_told() -> None:
    call = replace(alone(), options=BIASED).call
    at_once, *chunked = (dense_outcome(call, ALONE, torch.float32, *tokens) for tokens in ((), (1,), (3,)))
    assert set(at_once) == {LOGITS, *NAMES}
    for name, got in (item for outcome in chunked for item in outcome.items()):
        assert_near(got, at_once[name], UNITS)


ERROR_OF_2_11 = (
    "the error of PyTorch 2.11's own gradient of the router is 0.46 %, so 1 % is within the bound of twice that"
)
needs_2_12 = pytest.mark.skipif(release_of(torch.__version__) < (2, 12), reason=ERROR_OF_2_11)
FAULTS = [
    pytest.param(torch.bfloat16, 1.01, (0, 1), marks=needs_2_12),
    *((dtype, 1.1, (1,)) for dtype in (torch.bfloat16, torch.float16)),
    (torch.float32, 1.0001, (1,)),
]


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize(("dtype", "factor", "wrong_ranks"), FAULTS)
def test_a_faulted_gradient_is_red(rank: Rank, dtype: torch.dtype, factor: float, wrong_ranks: tuple[int, ...]) -> None:
    """Also where the reference has the same wrong gradient, and where the truth of this rank alone is looked at."""
    with context_on(rank) as context:
        shape, wider = replace(SHAPE, dtype=dtype), torch.float64 if dtype is torch.float32 else torch.float32
        problem = LayerProblem(shape=shape, group=context.group, device=rank.device, options=BIASED)
        oracle = oracle_of(problem.call, context.group)
        plain, is_wrong = oracle.plain, rank.rank in wrong_ranks
        assert {out.dtype for out in oracle.truth.values()} == {wider}
        assert judge(oracle, plain).faults == judge(oracle, plain, plain).faults == []
        for name in NAMES:
            wrong, shown = {name: (plain[name].float() * factor).to(dtype)}, "o" if name == "y" else name
            bad = {**plain, **wrong} if is_wrong else plain
            for reference, prefix in ((None, ""), (bad, "reference's ")):
                found = judge(oracle, bad, reference).accuracies
                assert [each.name for each in found if not each.ok] == [prefix + shown]
            if factor == 1.1:
                faults = faults_of(bad, oracle.truth, plain)
                assert [fault.split(":")[0] for fault in faults] == ([shown] if is_wrong else [])


@on_ranks(2, pool="cpu_pool")
def test_a_router_that_chooses_otherwise_is_found(rank: Rank) -> None:
    """Rank 1's router sends its first token elsewhere, and the answer is right otherwise."""
    with layer_on(rank, options=BIASED) as layer:
        logits = layer.oracle.plain[LOGITS].clone()
        if rank.rank == 1:
            logits[0, logits[0].argmin()] = 100.0
        answer = judge(layer.oracle, {**layer.oracle.plain, LOGITS: logits})
    assert answer.same_choices == (rank.rank == 0)
    assert answer.faults == ([] if rank.rank == 0 else ["other experts are chosen"])


def test_products_of_plain_pytorch_are_those_of_the_library() -> None:
    # Experts without a row, at the start, in the middle and at the end.
    ends = torch.tensor([0, 3, 3, 9, 9, *[10] * 6, 10], dtype=torch.int32)
    products = Products(alone(), ends, 10)
    operands = products.operands(backward=True)
    by_library = products.all_of(operands)
    assert len(by_library) == 6
    for (left, right), found in zip(operands, by_library, strict=True):
        plain = products.one_by_one(left if right.ndim == 3 else left.t(), right)
        assert plain.shape == found.shape
        assert_near(found, plain, 1)
        products.expect_of_one_group(found, left, right, "product")
        with pytest.raises(AssertionError, match="product: relative error"):
            products.expect_of_one_group(found * 1.1, left, right, "product")
    # Of rows that the library refuses.
    products = Products(alone(hidden=10, intermediate=3), torch.arange(1, 13, dtype=torch.int32), 12)
    forward = products.all_of(products.operands(backward=False))
    assert [tuple(found.shape) for found in forward] == [(12, 6), (12, 10)]
    assert_near(forward[0][3], products.w1[3].float() @ products.rows[3].float(), 2)
    assert [found.ndim for found in products.all_of(products.operands(backward=True))] == [2, 2, 2, 2, 3, 3]
