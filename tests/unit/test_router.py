"""The router of both backends: choices, ties, scores, and their gradients against fp64 formulas and over ranks."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import log
from typing import Any

import pytest
import torch
from backends import both_backends
from near import assert_near
from on_ranks import on_ranks
from routers import randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workspaces import new_workspace, workspace_of

from sonic_ep.backend import RouterWeights, Routing
from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.reference.router import choose_experts, route
from sonic_ep.testing import Rank, assert_as_accurate, assert_bitwise

NAN, INF = float("nan"), float("inf")
ALL_SCORES = list(product(ScoreOrder, (False, True)))
TOP_2 = RouterOptions(top_k=2)


def inputs(rank: Rank, dtype: torch.dtype = torch.float32, tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Leaves x (T, 16) and the weight (8, 16)."""
    x, weight = randn(rank, tokens, 16, seed=1).to(dtype), randn(rank, 8, 16, seed=2).to(dtype)
    return x.requires_grad_(), weight.requires_grad_()


def routed(rank: Rank, backend: str, x_TH: Tensor, weight_EH: Tensor, options: RouterOptions = TOP_2) -> Routing:
    """Collective, over the world."""
    group = resolve_group(None)
    weights = RouterWeights(weight=weight_EH)
    if backend == "reference":
        return route(x_TH, weights, options, BoundedCollectives(group))
    from sonic_ep.fast.router import route as fast_route

    return fast_route(x_TH, weights, options, new_workspace(rank))


def chosen(backend: str, logits_TE: Tensor, top_k: int) -> Tensor:
    if backend == "reference":
        return choose_experts(logits_TE, top_k)
    from sonic_ep.fast.choice import choose_experts as fast_choices

    return fast_choices(logits_TE, RouterOptions(top_k=top_k)).topk_idx


@on_ranks(1)
@both_backends
def test_choices_are_the_largest_logits_in_descending_order(rank: Rank, backend: str) -> None:
    for num_experts, top_k in ((5, 1), (5, 2), (5, 5), (64, 8), (7, 7), (24, 3), (300, 6)):
        logits = randn(rank, 50, num_experts)
        idx = chosen(backend, logits, top_k)
        assert idx.dtype == torch.int64
        assert_bitwise(logits.gather(1, idx), logits.topk(top_k).values)
    # Ties, NaN and infinities still yield distinct experts.
    cases = [
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]),
        ([1.0, 3.0, 1.0, 3.0, 1.0], [1, 3, 0]),
        ([0.5, -0.0, 0.0, -0.0], [0, 1, 2, 3]),
        ([-1e-40, 0.0, 1e-40, -0.0], [2, 1, 3, 0]),
        ([NAN, NAN, NAN, NAN], [0, 1]),
        ([INF, 1.0, NAN, -INF, NAN], [2, 4, 0, 1, 3]),
        ([-INF, -INF, -INF], [0, 1, 2]),
        ([-INF, -3e38, -INF, 3e38], [3, 1, 0, 2]),
        # The sign of a NaN does not count.
        ([1.0, -NAN, INF, NAN], [1, 3, 2]),
        ([0.0] * 300, list(range(300))),
    ]
    for logits, expected in cases:
        idx = chosen(backend, torch.tensor([logits], device=rank.device), len(expected))
        assert idx.tolist() == [expected], logits


def expected_scores(logits_TE: Tensor, idx_TK: Tensor, order: ScoreOrder, norm: bool) -> Tensor:
    """From fp64 logits, differentiable: shares of all experts, or of the chosen."""
    exp = logits_TE.exp()
    kept = exp.gather(1, idx_TK)
    total = exp if order is ScoreOrder.SOFTMAX_THEN_TOPK and not norm else kept
    return kept / total.sum(dim=1, keepdim=True)


@on_ranks(1)
@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_fp32_softmax(rank: Rank, backend: str, dtype: torch.dtype) -> None:
    x, weight = inputs(rank, dtype)
    logits, by_setting = x.double() @ weight.double().T, {}
    for order, norm in ALL_SCORES:
        options = RouterOptions(top_k=3, score_order=order, norm_topk_probs=norm)
        routing = routed(rank, backend, x, weight, options)
        assert routing.logits.dtype == routing.topk_scores.dtype == torch.float32
        assert not routing.topk_idx.requires_grad
        assert_near(routing.logits, logits, 4)
        assert_near(routing.topk_scores, expected_scores(logits, routing.topk_idx, order, norm), 100)
        by_setting[order, norm] = routing.topk_scores
    # The chosen already sum to one.
    normed, plain = (by_setting[ScoreOrder.TOPK_THEN_SOFTMAX, norm] for norm in (True, False))
    assert_near(plain, normed, 4)


@pytest.mark.fast
@on_ranks(1)
def test_scores_at_the_ends_of_the_range(rank: Rank) -> None:
    from sonic_ep.fast.choice import choose_experts as fast_choices

    rows = [[1e30, -1e30, 0.0], [200.0, 100.0, 99.0], [-INF, 1.0, -INF], [NAN, 0.0, 1.0], [INF, 0.0, 1.0], [-INF] * 3]
    logits = torch.tensor(rows, device=rank.device)
    for order, norm in ALL_SCORES:
        found = fast_choices(logits, replace(TOP_2, score_order=order, norm_topk_probs=norm))
        over_all = order is ScoreOrder.SOFTMAX_THEN_TOPK and not norm
        of_all = logits.softmax(dim=1).gather(1, found.topk_idx)
        expected = of_all if over_all else logits.gather(1, found.topk_idx).softmax(dim=1)
        assert torch.equal(found.topk_scores.isnan(), expected.isnan())
        assert_near(found.topk_scores.nan_to_num(7.0), expected.nan_to_num(7.0), 16)


@on_ranks(1)
@both_backends
@pytest.mark.parametrize(("order", "norm"), ALL_SCORES, ids=str)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16 float32"])
def test_gradients_of_logits_and_scores(rank: Rank, backend: str, order: ScoreOrder, norm: bool, dtypes: str) -> None:
    """Through logits, through scores, and through both, against fp64. dtypes: of x and the weight."""
    x_dtype, weight_dtype = (getattr(torch, name) for name in (dtypes.split()[0], dtypes.split()[-1]))
    x = randn(rank, 37, 48, seed=1).div(48**0.5).to(x_dtype).requires_grad_()
    weight = randn(rank, 24, 48, seed=2).to(weight_dtype).requires_grad_()
    options = RouterOptions(top_k=4, score_order=order, norm_topk_probs=norm)
    of_logits, of_scores = randn(rank, 37, 24, seed=3), randn(rank, 37, 4, seed=4)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in (x, weight))
    idx = routed(rank, backend, x.detach(), weight.detach(), options).topk_idx

    def gradients(logits: Tensor, scores: Tensor, through: str, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        parts = {"logits": (of_logits.to(logits) * logits).sum(), "scores": (of_scores.to(scores) * scores).sum()}
        return torch.autograd.grad(sum(parts[name] for name in through.split("+")), leaves)

    for through in ("logits", "scores", "logits+scores"):
        logits = exact[0] @ exact[1].T
        truths = gradients(logits, expected_scores(logits, idx, order, norm), through, exact)
        routings = [routed(rank, name, x, weight, options) for name in (backend, "reference")]
        found, plain = (gradients(r.logits, r.topk_scores, through, (x, weight)) for r in routings)
        for got, truth, comparison, leaf in zip(found, truths, plain, (x, weight), strict=True):
            assert got.dtype == leaf.dtype
            if got.dtype == torch.float32:
                assert_near(got, truth, 16)
            else:
                assert_as_accurate(got, truth, comparison)


@pytest.mark.fast
@on_ranks(1)
def test_bf16_parts_of_a_gradient_hold_all_its_bits(rank: Rank) -> None:
    """And the weight is repeated once a part."""
    from sonic_ep.fast.bf16_parts import bf16_parts

    given = randn(rank, 70, 300, seed=1) * torch.logspace(-20, 20, 300, device=rank.device)
    given[0, :4] = torch.tensor([INF, -INF, NAN, -0.0])
    weight = randn(rank, 300, 7).bfloat16()
    parts, repeated = bf16_parts(given, weight)
    assert parts.shape == (70, 3 * 300)
    assert_bitwise(repeated, torch.cat([weight] * 3))
    high, middle, low = parts.view(70, 3, 300).float().unbind(dim=1)
    sums = high + (middle + low)
    assert bool(sums[0, 2].isnan())
    assert torch.equal(sums.nan_to_num(7.0, INF, -INF), given.nan_to_num(7.0, INF, -INF))
    none, repeated = bf16_parts(given[:0], weight)
    assert none.shape == (0, 3 * 300)
    assert_bitwise(repeated, torch.cat([weight] * 3))
    parts, repeated = bf16_parts(torch.tensor([[1 + 2**-9 + 2**-20]], device=rank.device), None)
    assert repeated is None
    assert parts.flatten().tolist() == [1, 2**-9, 2**-20]


@pytest.mark.fast
@on_ranks(1)
def test_parts_are_summed_as_pytorch_sums_them(rank: Rank) -> None:
    """Of a size that no program ends with; -0 too; rounded once."""
    from sonic_ep.fast.all_reduce import Summand, sum_parts

    parts = randn(rank, 3, 11, 100, seed=1) * torch.logspace(-3, 3, 100, device=rank.device)
    parts[:, 0, :3] = torch.tensor([INF, NAN, -0.0])
    for count, dtype in ((3, torch.float32), (3, torch.bfloat16), (3, torch.float16), (1, torch.bfloat16)):
        given = parts[:count]
        found = sum_parts(Summand(parts=given.flatten(0, 1), shape=given.shape[1:], dtype=dtype))
        assert_bitwise(found.nan_to_num(7.0), given.sum(dim=0).to(dtype).nan_to_num(7.0))
        assert not bool(found[0, 2].signbit())


@pytest.mark.fast
@on_ranks(1)
def test_examples_of_the_docstrings(rank: Rank) -> None:
    from sonic_ep.fast.choice import choose_experts as fast_choices
    from sonic_ep.fast.choice_gradient import logits_gradient

    logits = torch.tensor([[0.0, log(2.0), 0.0]], device=rank.device)
    over_all = replace(TOP_2, score_order=ScoreOrder.SOFTMAX_THEN_TOPK)
    for options, expected in ((TOP_2, [2 / 3, 1 / 3]), (over_all, [2 / 4, 1 / 4])):
        found = fast_choices(logits, options)
        assert found.topk_idx.tolist() == [[1, 0]]
        assert_near(found.topk_scores, torch.tensor([expected], device=rank.device), 8)
    routing = Routing(logits=logits, topk_idx=found.topk_idx, topk_scores=found.topk_scores)
    grad = logits_gradient(routing, torch.tensor([[1.0, 0.0]], device=rank.device), over_all)
    assert_near(grad, torch.tensor([[-1 / 8, 1 / 4, -1 / 8]], device=rank.device), 8)


@on_ranks(1)
@both_backends
def test_only_required_gradients_are_computed_also_of_no_tokens(rank: Rank, backend: str) -> None:
    def backward(x: Tensor, weight: Tensor) -> None:
        routed(rank, backend, x, weight).topk_scores.square().sum().backward()

    free = inputs(rank, torch.bfloat16)
    backward(*free)
    for trained in (0, 1):
        leaves = inputs(rank, torch.bfloat16)
        leaves[1 - trained].requires_grad_(False)
        backward(*leaves)
        assert leaves[1 - trained].grad is None
        assert_bitwise(leaves[trained].grad, free[trained].grad)
    with torch.no_grad():
        assert not routed(rank, backend, *free).logits.requires_grad
    with torch.inference_mode():
        assert not routed(rank, backend, *free).logits.requires_grad
        x_of_inference = free[0].detach().clone()
    weight = free[1].detach().clone().requires_grad_()
    backward(x_of_inference, weight)
    assert_bitwise(weight.grad, free[1].grad)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = inputs(rank, dtype, tokens=0)
        routing = routed(rank, backend, x, weight)
        assert routing.logits.shape == (0, 8)
        assert routing.topk_idx.shape == routing.topk_scores.shape == (0, 2)
        (routing.logits.sum() + routing.topk_scores.sum()).backward()
        assert x.grad.shape == (0, 16)
        assert_bitwise(weight.grad, torch.zeros_like(weight))


@on_ranks(3)
@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_weight_gradient_is_summed_in_rank_order_or_not(rank: Rank, backend: str, dtype: torch.dtype) -> None:
    """The weight has more elements than one program sums. In fp32 one rank has no tokens."""
    weight = randn(rank, 8, 640)
    tokens = 0 if rank.rank == 1 and dtype == torch.float32 else 5
    x = randn(rank, tokens, 640, seed=rank.rank).to(dtype)

    def gradient(reduce: bool) -> Tensor:
        own = weight.clone().requires_grad_()
        routing = routed(rank, backend, x, own, RouterOptions(top_k=2, reduce_router_grad=reduce))
        (routing.topk_scores.square().sum() + routing.logits.square().sum()).backward()
        return own.grad

    own = gradient(reduce=False)
    first, second, third = BoundedCollectives(resolve_group(None)).all_gather(own)
    expected = (first + second) + third
    others = (first + (second + third), (first + third) + second)
    assert dtype == torch.float32 or not any(torch.equal(other, expected) for other in others)
    assert_bitwise(gradient(reduce=True), expected)
    assert not torch.equal(own, expected)


@pytest.mark.fast
@on_ranks(2)
def test_memory_of_a_frozen_router_and_of_one_that_a_backward_may_follow(rank: Rank) -> None:
    from sonic_ep.fast.router import route as fast_route

    x, weight, saved = randn(rank, 5, 16).requires_grad_(), randn(rank, 8, 16), []
    keep = lambda tensor: saved.append(tensor.data_ptr()) or tensor  # noqa: E731
    with workspace_of(rank) as workspace:
        buffers = set(workspace._buffers)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = fast_route(x, RouterWeights(weight=weight), TOP_2, workspace).logits
        logits.sum().backward()
        assert (weight.data_ptr() in saved, x.data_ptr() in saved) == (True, False)
        assert workspace._buffers.keys() == buffers, "a frozen router"
        # Under reentrant checkpointing forward runs without gradients, and a backward follows.
        with torch.no_grad():
            fast_route(x, RouterWeights(weight=weight.clone().requires_grad_()), TOP_2, workspace)
        assert len(workspace._buffers) == len(buffers) + 1
        fast_route(x, RouterWeights(weight=weight.requires_grad_()), TOP_2, workspace).logits.sum().backward()
        assert len(workspace._buffers) == len(buffers) + 1


class Counted(TorchDispatchMode):
    """Names of the kernels that are launched, and of the operations of PyTorch, with one for a whole product."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from sonic_ep.fast import router
        from sonic_ep.fast.launch import Launcher

        self.launched: list[str] = []
        self.operations: list[str] = []
        self._paused = False
        launch, product = Launcher.__call__, router.product

        def launched(launcher: Any, *arguments: Any) -> None:
            self.launched.append(launcher._kernel.fn.__name__)
            self._unseen(launch, launcher, *arguments)

        def multiplied(*arguments: Any) -> Any:
            self.operations.append("product")
            return self._unseen(product, *arguments)

        patch.setattr(Launcher, "__call__", launched)
        patch.setattr(router, "product", multiplied)

    def _unseen(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the interpreter of kernels does, and casts of a product on the CPU, do not count."""
        self._paused = True
        result = function(*arguments)
        self._paused = False
        return result

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if not self._paused:
            self.operations.append(operation.overloadpacket.__name__)
        return operation(*arguments, **named or {})


SUMMED = ["stage_sums_kernel", "barrier_kernel", "sum_ranks_kernel"]
LAUNCHED = {
    (torch.bfloat16, 1): ["parts_kernel", "sum_parts_kernel"],
    (torch.bfloat16, 2): ["parts_kernel", *SUMMED],
    (torch.float16, 1): ["sum_parts_kernel"],
    (torch.float16, 2): SUMMED,
    (torch.float32, 1): [],
    (torch.float32, 2): SUMMED,
}


@pytest.mark.fast
@on_ranks(1, 2)
def test_what_a_backward_launches(rank: Rank) -> None:
    """No operation of PyTorch clones, fills, casts, repeats or sums; memory and views are all that it makes."""
    from sonic_ep.fast.router import route as fast_route

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        leaves, given = inputs(rank, dtype), randn(rank, 6, 2, seed=3)
        with workspace_of(rank) as workspace, pytest.MonkeyPatch.context() as patch:
            scores = fast_route(leaves[0], RouterWeights(weight=leaves[1]), TOP_2, workspace).topk_scores
            with Counted(patch) as counted:
                torch.autograd.grad(scores, leaves, given)
        assert counted.launched == ["logits_gradient_kernel", *LAUNCHED[dtype, rank.world_size]], dtype
        # Before PyTorch 2.13 a view more, in a process that has imported pipelines: see ``apply_function``.
        operations = [name for name in counted.operations if name != "view"]
        assert operations.count("product") == 2
        assert set(operations) <= {"product", "t", "empty_like", "new_empty", "detach"}, operations
        assert len(operations) <= (8 if dtype == torch.bfloat16 else 6), operations
