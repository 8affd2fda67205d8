"""The fast layer at its edges: no token or one, odd views, equal order of sums, first calls."""

from dataclasses import replace

import pytest
import torch
from on_ranks import on_ranks
from same import assert_same_bits
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.profiler.routings import uniform
from sonic_ep.testing import CASES, Case, Rank, draw
from sonic_ep.testing.oracle import leaf, leaf_experts, run_routed

pytestmark = pytest.mark.fast
HIDDEN = 8
AGAIN = EPConfig(redispatch_x_in_backward=True)


def small_layer(rank: Rank, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """router_w, w1, w2 of two experts a rank, leaves that require gradients; router_w is the same on every rank."""
    shared, own = (torch.Generator().manual_seed(seed) for seed in (0, 1 + rank.rank))
    shapes = ((2 * rank.world_size, HIDDEN), (2, 2 * 4, HIDDEN), (2, HIDDEN, 4))
    weights = [torch.randn(shape, generator=g) for shape, g in zip(shapes, (shared, own, own), strict=True)]
    return [weight.to(rank.device, dtype).requires_grad_() for weight in weights]


def numbers(rank: Rank, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(rank.device, torch.bfloat16)


@on_ranks(1, 2)
def test_one_row_or_none_and_odd_views(rank: Rank) -> None:
    """Of one row or none any strides count as contiguous, and a view may begin at any element."""
    weights = small_layer(rank)
    nothing = torch.zeros((), dtype=torch.bfloat16, device=rank.device)
    for make in (
        lambda: nothing.expand(0, HIDDEN) if rank.rank == 1 else numbers(rank, 3, HIDDEN),
        lambda: numbers(rank, 1, HIDDEN + 1)[:, :HIDDEN],
        lambda: numbers(rank, 3 * HIDDEN + 1)[1:].view(3, HIDDEN),
    ):
        with ExpertParallel(backend="fast", config=AGAIN) as ep:
            x = make().requires_grad_()
            plain = leaf(x.detach().clone(memory_format=torch.contiguous_format))
            # The gradient of a sum is one number in all places.
            found = torch.autograd.grad(ep.moe(x, *weights, 2).y.sum(), [x, *weights])
            expected = torch.autograd.grad(ep.moe(plain, *weights, 2).y.sum(), [plain, *weights])
            assert_same_bits(found, expected)


@on_ranks(2)
def test_counts_are_the_callers(rank: Rank) -> None:
    """What the layer returns is the caller's: counts summed over replicas in place are no overflow of the plan."""
    weights, x = small_layer(rank), numbers(rank, 3, HIDDEN).requires_grad_()
    with ExpertParallel(backend="fast", config=EPConfig(max_rows=6 * rank.world_size)) as ep:
        expected = torch.autograd.grad(ep.moe(x, *weights, 2).y.sum(), [x, *weights])
        out = ep.moe(x, *weights, 2)
        out.tokens_per_expert.mul_(100)
        assert_same_bits(torch.autograd.grad(out.y.sum(), [x, *weights]), expected)


@on_ranks(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_exact_sizes_change_no_bit_of_long_sums(rank: Rank, dtype: torch.dtype) -> None:
    """Where own kernels multiply, exact sizes cut no sum up differently: one expert has most rows, with ample room."""
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
    weights, x = small_layer(rank), numbers(rank, 3, HIDDEN).requires_grad_()
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


@on_ranks(1, 2)
def test_tokens_made_in_inference_mode_train_experts(rank: Rank) -> None:
    weights = small_layer(rank)
    with torch.inference_mode():
        x = numbers(rank, 3, HIDDEN)
    with ExpertParallel(backend="fast", config=AGAIN) as ep:
        found = torch.autograd.grad(ep.moe(x, *weights, 2).y.sum(), weights)
        expected = torch.autograd.grad(ep.moe(x.clone(), *weights, 2).y.sum(), weights)
    assert_same_bits(found, expected)


@on_ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_read_no_row_past_the_bound(rank: Rank, dtype: torch.dtype) -> None:
    """PyTorch's products would read past the end."""
    from sonic_ep.fast import gemm

    case = replace(CASES["uniform"], hidden=64, intermediate=32, bias=False, dtype=dtype)
    inputs = draw(case, rank.world_size, rank.device)
    tokens, experts = inputs.tokens_of(rank.rank), leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    told = []

    def noted(product: object, self: object, a: Tensor, b: Tensor, ends: Tensor, *more: Tensor) -> Tensor:
        told.append((int(ends[-1]), a.shape[0]))
        return product(self, a, b, ends, *more)

    with pytest.MonkeyPatch.context() as patch:
        for kind in (gemm.LibraryGemm, gemm.LoopGemm, gemm.TritonGemm):
            for name in ("rows", "weights"):
                product = getattr(kind, name)
                patch.setattr(kind, name, lambda self, *a, product=product: noted(product, self, *a))
        with ExpertParallel(backend="fast", config=EPConfig(max_rows=9)) as ep:
            x = leaf(inputs.x[tokens])
            y = ep.moe_routed(x, inputs.topk_idx[tokens], inputs.topk_scores[tokens], experts.w1, experts.w2)
            assert y.isnan().all()
            y.backward(inputs.dy[tokens])
            with pytest.raises(RuntimeError, match="max_rows: got 9"):
                ep.check()
    assert len(told) == 6
    assert all(ends <= rows == 9 for ends, rows in told)
