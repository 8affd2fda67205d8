"""The fast backend at its edges: no token, odd views, inference mode, past the bound, at the end and after it."""

import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from layer_inputs import layer_inputs, plan_of
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from there_and_back import assert_same, outcome_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sonic_ep import ClosedError, EPConfig, ExpertParallel, RowOverflowError
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler.routings import uniform
from sonic_ep.testing import CASES, Case, Rank, assert_bitwise, draw
from sonic_ep.testing.oracle import leaf, leaf_experts, run_routed

pytestmark = pytest.mark.fast
AGAIN = EPConfig(redispatch_x_in_backward=True)
# Of two ranks.
CASE = Case(name="edges", dtype=torch.bfloat16, tokens=(3,), hidden=8, intermediate=4, num_experts=4, top_k=2)
TOKENS, HIDDEN = 3, CASE.hidden


def numbers(rank: Rank, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(rank.device, torch.bfloat16)


@on_ranks(2)
def test_odd_views_and_tokens_made_in_inference_mode(rank: Rank) -> None:
    """Of one row or none any strides count as contiguous, and a view may begin at any element."""
    _, weights, _ = layer_inputs(rank, CASE)
    nothing = torch.zeros((), dtype=torch.bfloat16, device=rank.device)
    views = (
        nothing.expand(0, HIDDEN) if rank.rank == 1 else numbers(rank, 3, HIDDEN),
        numbers(rank, 1, HIDDEN + 1)[:, :HIDDEN],
        numbers(rank, 3 * HIDDEN + 1)[1:].view(3, HIDDEN),
    )
    for view in views:
        with ExpertParallel(backend="fast", config=AGAIN) as ep:
            x, plain = view.requires_grad_(), leaf(view.detach().clone(memory_format=torch.contiguous_format))
            # The gradient of a sum is one number in all places.
            found = torch.autograd.grad(ep.moe(x, *weights, 2).y.sum(), [x, *weights])
            expected = torch.autograd.grad(ep.moe(plain, *weights, 2).y.sum(), [plain, *weights])
            assert_same_bits(found, expected)
    with torch.inference_mode():
        x = numbers(rank, 3, HIDDEN)
    with ExpertParallel(backend="fast", config=AGAIN) as ep:
        found, expected = (torch.autograd.grad(ep.moe(t, *weights, 2).y.sum(), weights) for t in (x, x.clone()))
        assert_same_bits(found, expected)


@on_ranks(2)
def test_counts_are_the_callers(rank: Rank) -> None:
    """Counts changed in place are no overflow of the plan."""
    x, weights, _ = layer_inputs(rank, CASE)
    with ExpertParallel(backend="fast", config=EPConfig(max_rows=6 * rank.world_size)) as ep:
        expected = torch.autograd.grad(ep.moe(x, *weights, 2).y.sum(), [x, *weights])
        out = ep.moe(x, *weights, 2)
        out.tokens_per_expert.mul_(100)
        assert_same_bits(torch.autograd.grad(out.y.sum(), [x, *weights]), expected)


@on_ranks(1)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.thorough)], ids=str)
def test_exact_sizes_change_no_bit_of_long_sums(rank: Rank, dtype: torch.dtype) -> None:
    """Exact sizes do not change the order of sums in own kernels: one expert has most rows, with ample room."""
    sizes = {"tokens": (150,), "hidden": 9, "intermediate": 5, "num_experts": 4, "top_k": 2}
    case = Case(name="many", dtype=dtype, choose=uniform, **sizes)
    inputs = draw(case, rank.world_size, rank.device)
    inputs.topk_idx[20:] = torch.tensor([1, -1])
    outcomes = []
    for exact in (False, True):
        with ExpertParallel(backend="fast", config=EPConfig(cpu_sync_on_runtime=exact)) as ep:
            outcomes.append(run_routed(inputs, ep))
    assert_same_bits(outcomes[1], outcomes[0])


@on_ranks(2)
def test_a_first_call_that_is_checkpointed_allocates_nothing_in_backward(rank: Rank) -> None:
    """Backward allocates no shared memory, also if forward ran without gradients."""
    x, weights, _ = layer_inputs(rank, CASE)
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch, ExpertParallel(backend="fast", config=AGAIN) as ep:
        transport = ep._backend._context(rank.device).workspace._transport
        allocate = transport.allocate
        patch.setattr(transport, "allocate", lambda n, byte: sizes.append(n) or allocate(n, byte))
        y = checkpoint(lambda x: ep.moe(x, *weights, 2).y, x, use_reentrant=True)
        before = len(sizes)
        y.sum().backward()
        assert before > 0
        assert len(sizes) == before


def drawn(rank: Rank) -> list[Tensor]:
    """This rank's x (T, H), ids (T, 2) and scores (T, 2)."""
    inputs = draw(CASE, rank.world_size, rank.device)
    return [tensor[inputs.tokens_of(rank.rank)] for tensor in (inputs.x, inputs.topk_idx, inputs.topk_scores)]


def there_and_back(ep: ExpertParallel, x: Tensor, idx: Tensor, scores: Tensor) -> Tensor:
    plan = ep.plan(idx, CASE.num_experts)
    return ep.combine(ep.dispatch(x, plan), scores, plan)


def on_both(call: Callable[[ExpertParallel], Tensor], **flags: Any) -> None:
    """``call`` gives the same bits on both backends."""
    found = []
    for backend in ("fast", "reference"):
        with ExpertParallel(backend=backend, config=EPConfig(**flags), max_tokens_per_rank=TOKENS) as ep:
            found.append(call(ep).detach())
    assert_bitwise(*found)


@on_ranks(2)
def test_inference_before_training(rank: Rank) -> None:
    """Also of tensors that were made in inference mode."""
    with torch.inference_mode():
        inferred = drawn(rank)
    on_both(lambda ep: there_and_back(ep, *inferred))
    x, idx, scores = drawn(rank)
    wide = x.repeat(1, 200)

    def call(ep: ExpertParallel) -> Tensor:
        with torch.inference_mode():
            there_and_back(ep, x, idx, scores)
        y = there_and_back(ep, x.clone().requires_grad_(), idx, scores)
        y.sum().backward()
        with torch.inference_mode():
            # Wider rows: shared memory grows.
            there_and_back(ep, wide, idx, scores)
        return torch.cat([y, there_and_back(ep, wide, idx, scores)], dim=1)

    on_both(call)
    with ExpertParallel(backend="fast", max_tokens_per_rank=TOKENS) as ep:
        with torch.inference_mode():
            there_and_back(ep, x, idx, scores)
        ep.plan(torch.full_like(idx, 77), CASE.num_experts)
        with pytest.raises(ValueError, match="out of range"):
            ep.check()
        ep.check()


@on_ranks(2)
def test_nothing_finite_comes_back_past_the_bound(rank: Rank) -> None:
    """All gradients are NaN, also those of scores whose rows had room; the step before leaves nothing."""
    inputs = draw(CASES["uniform"], rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    x, scores = (tensor[tokens].clone().requires_grad_() for tensor in (inputs.x, inputs.topk_scores))
    experts = inputs.case.num_experts
    crowded = torch.zeros_like(inputs.topk_idx[tokens]) + torch.arange(inputs.case.top_k, device=rank.device)
    most = sum(inputs.case.tokens_of_rank(r) for r in range(rank.world_size)) * inputs.case.top_k - 1
    ep = ExpertParallel(backend="fast", config=EPConfig(dispatch="all_to_all", combine="all_to_all", max_rows=most))
    for idx, fits in ((inputs.topk_idx[tokens], True), (crowded, False)):
        x.grad = scores.grad = None
        plan = ep.plan(idx, experts)
        y = ep.combine(ep.dispatch(x, plan), scores, plan)
        y.backward(inputs.dy[tokens])
        for tensor in (y, x.grad, scores.grad):
            assert not tensor.isnan().any() if fits else tensor.isnan().all()
    with pytest.raises(RowOverflowError, match="max_rows"):
        ep.close()
    with pytest.raises(ClosedError):
        ep.plan(crowded, experts)


@promise("device-flags")
@on_ranks(2)
@pytest.mark.parametrize("exact", [True, False])
def test_wrong_ids_do_not_pass(rank: Rank, exact: bool) -> None:
    """They are found where the host reads sizes, or at the end, unless the caller's own error ends the block."""
    x, idx, scores = drawn(rank)
    size = rank.world_size
    if rank.rank == size - 1:
        idx[1, 1] = 77
    said = f"rank {rank.rank} of {size}: topk_idx: got expert ids out of range on rank {size - 1}"
    options = {"config": EPConfig(cpu_sync_on_runtime=exact), "max_tokens_per_rank": TOKENS}
    if exact:
        with ExpertParallel(backend="fast", **options) as ep, pytest.raises(ValueError, match=said):
            ep.plan(idx, CASE.num_experts)
        return
    with pytest.raises(ValueError, match=said), ExpertParallel(backend="fast", **options) as ep:
        there_and_back(ep, x, idx, scores)

    def fail(ep: ExpertParallel) -> None:
        ep.plan(idx, CASE.num_experts)
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"), ExpertParallel(backend="fast", **options) as ep:
        fail(ep)
    with pytest.raises(ClosedError):
        ep.check()


@on_ranks(2)
def test_a_default_device_changes_nothing(rank: Rank) -> None:
    inputs = draw(CASES["uniform"], rank.world_size, rank.device)
    found = []
    for backend in ("fast", "reference"):
        # Tensors made on meta by mistake fail at once.
        with torch.device("meta"):
            ep = ExpertParallel(backend=backend)
            if backend == "fast":
                plan_of(ep, inputs)
        found.append(outcome_of(ep, inputs))
        ep.close()
    assert_same(*found, "with another default device")


@on_ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)], ids=str)
def test_products_read_no_row_past_the_bound(rank: Rank, dtype: torch.dtype) -> None:
    """PyTorch's products would read past the end."""
    from sonic_ep.fast import gemm, hopper_gemm

    case = replace(CASES["uniform"], hidden=64, intermediate=32, bias=False, dtype=dtype)
    inputs = draw(case, rank.world_size, rank.device)
    tokens, experts = inputs.tokens_of(rank.rank), leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    told = []

    def noting(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(self: object, a: Tensor, b: Tensor, ends: Tensor, *more: Tensor) -> Tensor:
            told.append((int(ends[-1]), a.shape[0]))
            return method(self, a, b, ends, *more)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in product(
            (hopper_gemm.HopperGemm, gemm.LibraryGemm, gemm.LoopGemm, gemm.TritonGemm), ("rows", "weights")
        ):
            patch.setattr(kind, name, noting(getattr(kind, name)))
        with ExpertParallel(backend="fast", config=EPConfig(max_rows=9)) as ep:
            x = leaf(inputs.x[tokens])
            y = ep.moe_routed(x, inputs.topk_idx[tokens], inputs.topk_scores[tokens], experts.w1, experts.w2)
            assert y.isnan().all()
            y.backward(inputs.dy[tokens])
            with pytest.raises(RuntimeError, match="max_rows: got 9"):
                ep.check()
    assert len(told) == 6
    assert all(ends <= rows == 9 for ends, rows in told)


@on_ranks(2)
def test_a_huge_bound_is_none(rank: Rank) -> None:
    inputs = drawn(rank)
    for exact in (False, True):
        on_both(lambda ep: there_and_back(ep, *inputs), max_rows=2**70, cpu_sync_on_runtime=exact)


@on_ranks(2)
def test_what_was_gathered_is_the_callers_to_drop(rank: Rank) -> None:
    """No tensor of the size of a gathered x outlives its user."""
    x, idx, _ = drawn(rank)
    size = (TOKENS * rank.world_size, HIDDEN)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, Tensor) and thing.shape == size for thing in gc.get_objects())

    before = alive()
    with ExpertParallel(backend="fast", config=EPConfig(dispatch="all_gather")) as ep, torch.no_grad():
        ep.dispatch(x, ep.plan(idx, CASE.num_experts))
        assert alive() == before


@on_ranks(2, pool="cuda_pool")
def test_a_gather_can_be_awaited_on_several_streams(rank: Rank) -> None:
    from sonic_ep.fast.copy_engine import CopyEngineGather
    from sonic_ep.fast.workspace import Workspace

    max_tokens, hidden = 2048, 4096
    workspace = Workspace(resolve_group(None), rank.device)
    gather = CopyEngineGather(workspace, "gathered")
    streams = [torch.cuda.Stream() for _ in range(2)]
    expected = torch.arange(1, rank.world_size + 1, device=rank.device).repeat_interleave(max_tokens).double()
    for round_number in range(3):
        x = torch.full((max_tokens, hidden), float(rank.rank + 1), device=rank.device)
        workspace.enter()
        handle = gather.start(x, max_tokens)
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(handle.wait().mean(dim=1).double())
        torch.cuda.synchronize()
        for means in found:
            assert_bitwise(means, expected, f"in round {round_number}")
    workspace.close()
