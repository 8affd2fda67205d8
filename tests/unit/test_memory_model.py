"""Memory formulas against what is allocated: tensor by tensor under the interpreter, by PyTorch's allocator on GPUs."""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.config import ModePair
from sonic_ep.plan import row_ceiling
from sonic_ep.testing import CASES, Case, Rank, RankPool, draw
from sonic_ep.testing.differential import leaf, leaf_experts
from sonic_ep.testing.memory_model import (
    INDEX_BYTES,
    MOST_RECEIVED_BYTES,
    SHARED_BLOCK_BYTES,
    LayerShape,
    backward_peak_bytes,
    forward_peak_bytes,
    saved_bytes,
    symmetric_bytes,
)

pytestmark = pytest.mark.fast

FLAGS = [
    dict(zip(("redispatch_x_in_backward", "cpu_sync_on_runtime"), on, strict=True))
    for on in product((False, True), repeat=2)
]
by_flags = pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(k for k, v in flags.items() if v) or "-")
by_dispatch = pytest.mark.parametrize("dispatch", DispatchMode, ids=lambda mode: mode.value)

# In WIDE rows the peaks are where rows come and go, in NARROW ones at the activation.
SMALL = replace(CASES["uneven_tokens"], name="small", tokens=(7, 2), num_experts=8, top_k=2)
WIDE = replace(SMALL, name="wide", tokens=(13, 2), hidden=64, intermediate=4, num_experts=2, top_k=1, bias=False)
NARROW = replace(SMALL, name="narrow", hidden=16, intermediate=64, num_experts=2, bias=False)
# What no formula counts: addresses and wants, a few words for each rank, and where rows are bounded, ends of groups.
MOST_WORDS = 16


def two_of_each_rank(generator: torch.Generator, tokens: int, case: Case, world_size: int) -> Tensor:
    """K / W experts on every rank, so each has K / W rows for every token of the group."""
    held = case.num_experts // world_size
    each = torch.rand(tokens, world_size, held, generator=generator).argsort(dim=2)[:, :, : case.top_k // world_size]
    return (each + held * torch.arange(world_size)[:, None]).flatten(1)


# Every tensor of rows, tokens or weights is a multiple of 2 MiB, as are the allocator's segments: so of no block a rest
# stays that is too small to be split off, and only 512 bytes are ever rounded.
LARGE = replace(WIDE, name="large", tokens=(2048, 1024), hidden=1024, intermediate=512, num_experts=16, top_k=4)
LARGE = replace(LARGE, dtype=torch.bfloat16, choose=two_of_each_rank)
ALLOCATED_BYTES = 512
# Received rows, hidden, scores, seven fields of the plan, and y.
MOST_SAVED_TENSORS = 11
# What a grouped product takes for itself while it runs (sizes and pointers of each group, tensor maps of each
# multiprocessor: about 100 KB), the slots of the ceiling while rows are exact (64 KiB), and roundings: 2% of the least
# peak. Workspaces that stay are allocated in the first call.
PRODUCT_BYTES = 2**19


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A formula beside what was measured, in bytes; ``slack``: by how much the latter may be more. It is never less."""

    what: str
    formula: int
    found: int
    slack: int

    @property
    def holds(self) -> bool:
        return self.formula <= self.found <= self.formula + self.slack

    def __str__(self) -> str:
        more, mark = self.found - self.formula, "" if self.holds else "   <---"
        rise = f"{more:+} B, {more / self.formula:+.2%}, up to {self.slack:+} B admitted"
        return f"{self.what:>18}: formula {self.formula:>12} found {self.found:>12} ({rise}){mark}"


def assert_all_hold(measured_of_rank: list[list[Measured]]) -> None:
    table = [f"rank {rank} {line}" for rank, lines in enumerate(measured_of_rank) for line in lines]
    assert table
    assert all(line.holds for lines in measured_of_rank for line in lines), "\n" + "\n".join(table)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCall:
    """``ep.moe_routed`` of one rank's share of a case, and the shape that the formulas take."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    dy: Tensor
    shape: LayerShape

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy)


def layer_call(rank: Rank, case: Case, ep: ExpertParallel) -> LayerCall:
    inputs = draw(case, rank.world_size, rank.device)
    tokens, max_tokens = inputs.tokens_of(rank.rank), max(case.tokens_of_rank(r) for r in range(rank.world_size))
    experts = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    x, idx, scores = leaf(inputs.x[tokens]), inputs.topk_idx[tokens].clone(), leaf(inputs.topk_scores[tokens])
    weights = [weight for weight in (experts.w1, experts.w2, experts.b1, experts.b2) if weight is not None]
    held = case.num_experts // rank.world_size
    sizes = {"world_size": rank.world_size, "max_tokens": max_tokens, "top_k": case.top_k}
    ceiling = row_ceiling(**sizes, experts_per_rank=held, distinct=False)
    exact = int((inputs.topk_idx // held == rank.rank).sum())
    assert exact < ceiling or rank.world_size == 1
    shape = LayerShape(
        **sizes,
        tokens=x.shape[0],
        num_experts=case.num_experts,
        hidden=case.hidden,
        intermediate=case.intermediate,
        itemsize=case.dtype.itemsize,
        rows=exact if ep.config.cpu_sync_on_runtime else min(ceiling, ep.config.max_rows or ceiling),
        gated=experts.activation.gated,
        biases=case.bias,
    )
    names = {"activation": case.activation, "gate_layout": case.gate_layout}
    return LayerCall(
        forward=lambda: ep.moe_routed(x, idx, scores, *weights, **names),
        leaves=[x, scores, *weights],
        dy=inputs.dy[tokens].clone(),
        shape=shape,
    )


def storages_bytes(tensors: list[Any]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def saved_tensors(rank: Rank, case: Case, config: EPConfig) -> tuple[dict[str, int], dict[str, int]]:
    with ExpertParallel(backend="fast", config=config) as ep:
        call, saved = layer_call(rank, case, ep), []
        inputs = {tensor.untyped_storage().data_ptr() for tensor in call.leaves}

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = call.forward()
        # y is a view of what the layer returned.
        # Up to PyTorch 2.12 a node of its own stands before that of the layer.
        node = y.grad_fn if hasattr(y.grad_fn, "call") else y.grad_fn.next_functions[0][0]
        plan = node.call.exchange.plan
        of_plan = [v for f in fields(plan) if isinstance(v := getattr(plan, f.name), Tensor)]
        known = inputs | {tensor.untyped_storage().data_ptr() for tensor in of_plan}
        ours = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in known]
        found = {
            "all but the plan": storages_bytes(ours),
            "plan": storages_bytes(of_plan),
            "x": storages_bytes([tensor for tensor in saved if tensor.data_ptr() == call.leaves[0].data_ptr()]),
        }
        again = config.redispatch_x_in_backward
        formula = saved_bytes(call.shape, DispatchMode(config.dispatch), redispatch_x_in_backward=again)
        expected = {
            "all but the plan": formula.received + formula.hidden + formula.scores,
            "plan": formula.plan,
            "x": call.shape.tokens_TH if again else 0,
        }
        return found, expected


@by_dispatch
@by_flags
def test_saved_tensors_are_those_of_the_formula(
    cpu_pool: RankPool, dispatch: DispatchMode, flags: dict[str, bool]
) -> None:
    config = EPConfig(dispatch=dispatch, combine="rank_dedup", **flags)
    for found, expected in cpu_pool.run(saved_tensors, SMALL, config, world_size=2):
        assert found == expected


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there: now, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._live: list[tuple[StorageWeakRef, int]] = []
        self.most = 0

    def __enter__(self) -> Any:
        # Collecting is quick where it only looks at what is made from here on.
        gc.collect()
        gc.freeze()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.unfreeze()

    def now(self) -> int:
        # The interpreter leaves the arguments of every kernel in a cycle of references.
        gc.collect()
        self._live = [(storage, nbytes) for storage, nbytes in self._live if not storage.expired()]
        return sum(nbytes for _, nbytes in self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        # Views and what is written in place are nothing new, nor is what wraps memory that there was.
        made = () if func.overloadpacket is torch.ops.aten.set_ else tree_leaves(out)
        storages = [tensor.untyped_storage() for tensor in made if isinstance(tensor, Tensor)]
        fresh = [storage for storage in storages if storage.nbytes() and storage.data_ptr() not in before]
        if fresh:
            self._live += [(StorageWeakRef(storage), storage.nbytes()) for storage in fresh]
            self.most = max(self.most, self.now())
        return out


def live_peaks(rank: Rank, case: Case, config: EPConfig) -> list[Measured]:
    """With the products that a GPU has: on the CPU a plain loop widens its operands instead."""
    from sonic_ep.fast.gemm import LibraryGemm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sonic_ep.fast.backend.grouped_gemm", lambda operands, rows_per_group: LibraryGemm())
        return live_peaks_as_on_gpus(rank, case, config)


def live_peaks_as_on_gpus(rank: Rank, case: Case, config: EPConfig) -> list[Measured]:
    with ExpertParallel(backend="fast", config=config) as ep:
        call = layer_call(rank, case, ep)
        # The first call allocates what is shared.
        call.forward()
        # While rows are exact, the slots of the ceiling's rows are there until forward ends.
        queued = call.shape.slots_WCK if config.cpu_sync_on_runtime else 0
        with torch.no_grad(), LiveMemory() as inference:
            call.forward()
        with LiveMemory() as forward:
            y = call.forward()
        kept = forward.now()
        with LiveMemory() as backward:
            call.backward(y)
        words = MOST_WORDS * INDEX_BYTES
        found, slack = [inference.most, forward.most, kept, backward.most], [words + queued, words + queued, 0, words]
        return beside_formulas(call.shape, config, found, slack)


def beside_formulas(shape: LayerShape, config: EPConfig, found: list[int], slack: list[int]) -> list[Measured]:
    """found: bytes beyond those before, in the order of the formulas; the third is what forward leaves."""
    dispatch, again = DispatchMode(config.dispatch), {"redispatch_x_in_backward": config.redispatch_x_in_backward}
    formula = {
        "peak of inference": forward_peak_bytes(shape, dispatch, training=False, **again),
        "peak of forward": forward_peak_bytes(shape, dispatch, training=True, **again),
        "saved, and y": saved_bytes(shape, dispatch, **again).total + shape.tokens_TH,
        "peak of backward": backward_peak_bytes(shape, dispatch, **again),
    }
    return [
        Measured(what=what, formula=formula[what], found=got, slack=more)
        for what, got, more in zip(formula, found, slack, strict=True)
    ]


@by_dispatch
@pytest.mark.parametrize("on", [False, True], ids=["no flag", "both flags"])
def test_peaks_are_those_of_the_formulas(cpu_pool: RankPool, on: bool, dispatch: DispatchMode) -> None:
    config = EPConfig(dispatch=dispatch, combine="rank_dedup", redispatch_x_in_backward=on, cpu_sync_on_runtime=on)
    assert_all_hold(cpu_pool.run(live_peaks, WIDE, config, world_size=2))


# 9 tokens in all, so 18 rows at the most, where the ceiling is 28.
@pytest.mark.parametrize(
    ("bias", "flags"), [(True, {"cpu_sync_on_runtime": True}), (False, {}), (False, {"max_rows": 18})]
)
def test_peaks_at_the_activation(cpu_pool: RankPool, bias: bool, flags: dict[str, Any]) -> None:
    config = EPConfig(dispatch="all_to_all", combine="rank_dedup", **flags)
    assert_all_hold(cpu_pool.run(live_peaks, replace(NARROW, bias=bias), config, world_size=2))


def shared_buffers(rank: Rank, case: Case, config: EPConfig) -> tuple[dict[str, int], dict[str, int]]:
    """What the workspace holds, and what the formula says."""
    from sonic_ep.fast import symmetric_memory as workspace
    from sonic_ep.fast.combine import base as receiving

    assert (workspace.ALIGNMENT_BYTES, receiving.MOST_RECEIVED_BYTES) == (SHARED_BLOCK_BYTES, MOST_RECEIVED_BYTES)
    with ExpertParallel(backend="fast", config=config) as ep:
        call = layer_call(rank, case, ep)
        call.forward()
        held = ep._backend._context(rank.device).workspace
        found = {name: buffer.nbytes for name, buffer in held._buffers.items()}
    modes = ModePair(dispatch=DispatchMode(config.dispatch), combine=CombineMode(config.combine))
    formula = symmetric_bytes(call.shape, modes, redispatch_x_in_backward=config.redispatch_x_in_backward)
    return found, {name: nbytes for name, nbytes in asdict(formula).items() if nbytes}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize(("dispatch", "combine"), list(zip(DispatchMode, CombineMode, strict=True)))
@pytest.mark.parametrize("world_size", [1, 2])
def test_shared_buffers_are_those_of_the_formula(
    cpu_pool: RankPool, world_size: int, dispatch: DispatchMode, combine: CombineMode, again: bool
) -> None:
    # Longer than a block of shared memory, and no whole number of them.
    case = replace(SMALL, hidden=36)
    config = EPConfig(dispatch=dispatch, combine=combine, redispatch_x_in_backward=again)
    for found, formula in cpu_pool.run(shared_buffers, case, config, world_size=world_size):
        assert found == formula


def test_what_combine_receives_at_a_time_is_bounded() -> None:
    # A token's eight rows are 128 KiB, of which 2^29 bytes hold 4096.
    sizes = {"world_size": 4, "max_tokens": 8192, "tokens": 1, "top_k": 8, "num_experts": 64, "hidden": 8192}
    shape = LayerShape(**sizes, intermediate=8, itemsize=2, rows=8)
    pair = ModePair(dispatch=DispatchMode.ALL_TO_ALL, combine=CombineMode.ALL_TO_ALL)
    shared = symmetric_bytes(shape, pair)
    assert (shared.received, shared.received_flags) == (2**29, 3 * 4096 * 8)
    # Of its three partial sums, 48 KiB, there is room for all tokens.
    shared = symmetric_bytes(shape, replace(pair, combine=CombineMode.REDUCE_SCATTER))
    assert (shared.received, shared.received_flags) == (8192 * 3 * 2**14, 3 * 8192 * 8)


def allocator_peaks(rank: Rank, case: Case, config: EPConfig) -> list[Measured]:
    max_tokens = max(case.tokens)
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=max_tokens) as ep:
        call = layer_call(rank, case, ep)
        # Kernels are compiled, and what stays is allocated: shared memory, workspaces of libraries.
        for _ in range(2):
            call.backward(call.forward())
        with torch.no_grad():
            _, inference, _ = allocated(call.forward, rank)
        y, forward, kept = allocated(call.forward, rank)
        _, backward, _ = allocated(lambda: call.backward(y), rank)
        rounding = MOST_SAVED_TENSORS * ALLOCATED_BYTES
        slack = [PRODUCT_BYTES, PRODUCT_BYTES, rounding, PRODUCT_BYTES]
        return beside_formulas(call.shape, config, [inference, forward, kept, backward], slack)


def allocated(action: Callable[[], Any], rank: Rank) -> tuple[Any, int, int]:
    """What the action returns, and by how many bytes what is allocated rose: at the most, and in the end."""
    gc.collect()
    torch.cuda.synchronize(rank.device)
    # Large blocks that are left over would be used whole where less than 1 MiB of them stayed.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(rank.device)
    before = torch.cuda.memory_allocated(rank.device)
    result = action()
    most, after = torch.cuda.max_memory_allocated(rank.device), torch.cuda.memory_allocated(rank.device)
    return result, most - before, after - before


@by_dispatch
@by_flags
def test_the_allocator_of_a_gpu_says_the_same(
    cuda_pool: RankPool, dispatch: DispatchMode, flags: dict[str, bool]
) -> None:
    """Rows of rank 0 and 1: 6144 if exact, 16384 at the ceiling."""
    config = EPConfig(dispatch=dispatch, combine="rank_dedup", **flags)
    assert_all_hold(cuda_pool.run(allocator_peaks, LARGE, config, world_size=2))
