"""The layer beyond the matrix: memory for backward, exact row counts, subgroups, products in fp32."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from layer_inputs import layer_inputs, plan_of, routing_of
from on_ranks import on_ranks
from torch import Tensor

from sonic_ep import DispatchMode, EPConfig, ExpertParallel
from sonic_ep.plan import RoutingPlan
from sonic_ep.testing import CASES, Rank, draw, verify_moe, verify_routed


@on_ranks(2)
@pytest.mark.parametrize("case", ["uniform", "empty_experts", "zero_token_ranks", "one_rank"])
@pytest.mark.parametrize("redispatch", [False, True])
def test_redispatch_keeps_x_alone_and_gathers_it_again(rank: Rank, case: str, redispatch: bool) -> None:
    """Without it forward's rows are kept for the gradient of w1; backward dispatches d(out), and with it x again."""
    config = EPConfig(dispatch="all_to_all", redispatch_x_in_backward=redispatch)
    x, (_, w1, w2), dy = layer_inputs(rank, CASES[case])
    with ExpertParallel(backend="reference", config=config) as ep:
        primitive = ep._backend._dispatch[DispatchMode.ALL_TO_ALL]
        receive, received = primitive.receive, []

        def noted(x_TH: Tensor, plan: RoutingPlan) -> Tensor:
            rows = receive(x_TH, plan)
            received.append(weakref.ref(rows.untyped_storage()))
            return rows

        def alive_and_made() -> tuple[int, int]:
            gc.collect()
            return sum(storage() is not None for storage in received), len(received)

        primitive.receive = noted
        y = ep.moe_routed(x, *routing_of(rank, CASES[case]), w1, w2)
        assert alive_and_made() == ((0, 1) if redispatch else (1, 1))
        y.backward(dy)
        alive, made = alive_and_made()
        assert made == (3 if redispatch else 2)
        # Nothing outlives backward, although the graph is still referenced.
        assert alive == 0 or not redispatch


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("train_scores", [False, True])
@pytest.mark.parametrize("redispatch", [False, True])
def test_what_backward_keeps(rank: Rank, redispatch: bool, train_scores: bool) -> None:
    """With the flag x, without it the rows; and the experts' outputs only if the scores need a gradient.

    Hooks, as checkpointing and offloading have them, see all of it.
    """
    # No other width is H here, so that only x, rows and outputs are counted.
    case = replace(CASES["uniform"], hidden=40)
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
        rows = ep.plan(idx, case.num_experts).row_capacity * case.hidden
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ep.moe_routed(x, idx, scores.requires_grad_(train_scores), w1, w2)
    assert sum(kept.values()) == (x.numel() if redispatch else rows) + train_scores * rows


@on_ranks(2)
@pytest.mark.parametrize("case", ["uniform", "zero_token_ranks", "one_rank"])
@both_backends
def test_cpu_sync_sizes_rows_exactly(rank: Rank, backend: str, case: str) -> None:
    inputs = draw(CASES[case], rank.world_size, rank.device)
    for exact in (True, False):
        with ExpertParallel(backend=backend, config=EPConfig(cpu_sync_on_runtime=exact)) as ep:
            plan = plan_of(ep, inputs)
            assert ep.dispatch(inputs.x[inputs.tokens_of(rank.rank)], plan).shape[0] == plan.row_capacity
            most = plan.world_size * plan.max_tokens * plan.top_k
            assert plan.row_capacity == (plan.rows() if exact else most)


@on_ranks(4)
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.thorough)])
def test_subgroups_of_the_world(rank: Rank, backend: str, members: int) -> None:
    """Groups of ``members`` ranks side by side, each with a routing of its own."""
    first = rank.rank // members * members
    groups = {start: dist.new_group(list(range(start, start + members))) for start in range(0, 4, members)}
    case = replace(CASES["uneven_tokens"], seed=CASES["uneven_tokens"].seed + first)
    config = EPConfig(dispatch="rank_dedup", redispatch_x_in_backward=True)
    with ExpertParallel(groups[first], backend=backend, config=config) as ep:
        assert (ep.rank, ep.world_size) == (rank.rank % members, members)
        for verify in (verify_routed, verify_moe):
            assert not (wrong := [str(found) for found in verify(case, ep, rank.device) if not found.ok]), wrong
