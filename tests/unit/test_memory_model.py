"""Memory formulas against allocations: tensor by tensor under the interpreter, by PyTorch's allocator on GPUs."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.memory_use import BACKWARD, FORWARD, INFERENCE, SAVED, measured
from on_ranks import on_ranks
from promises import promise
from there_and_back import Modes, by_modes
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.config import ModePair
from sonic_ep.plan import row_ceiling
from sonic_ep.testing import CASES, Case, Rank, draw, memory_model
from sonic_ep.testing.cases import GPT_OSS
from sonic_ep.testing.memory_model import (
    LayerShape,
    backward_peak_bytes,
    forward_peak_bytes,
    saved_bytes,
    saved_bytes_of_reference,
)
from sonic_ep.testing.oracle import Outcome, RoutedCall, gradients, routed_call

pytest.importorskip("triton")
from sonic_ep.fast.combine.base import MOST_RECEIVED_BYTES
from sonic_ep.fast.gemm import LibraryGemm
from sonic_ep.fast.symmetric_memory import ALIGNMENT_BYTES

pytestmark = pytest.mark.fast

by_again = pytest.mark.parametrize("again", [False, True], ids=["x kept", "x dispatched again"])
by_exact = pytest.mark.parametrize("exact", [False, True], ids=["ceiling", "exact rows"])
by_dispatch = pytest.mark.parametrize("dispatch", DispatchMode, ids=lambda mode: mode.value)

# With WIDE rows the peaks are where rows are allocated and freed, with NARROW ones at the activation.
SMALL = replace(CASES["uneven_tokens"], name="small", tokens=(7, 2), num_experts=8, top_k=2)
WIDE = replace(SMALL, name="wide", tokens=(13, 2), hidden=64, intermediate=4, num_experts=2, top_k=1, bias=False)
NARROW = replace(SMALL, name="narrow", hidden=16, intermediate=64, num_experts=2, bias=False)
# No formula counts a few integers for each rank: addresses, wants, and where rows are bounded, ends of groups.
UNCOUNTED_BYTES = 16 * memory_model.INDEX_BYTES


def config_of(dispatch: str = "all_to_all", *, again: bool = False, exact: bool = False) -> EPConfig:
    return EPConfig(dispatch, "rank_dedup", redispatch_x_in_backward=again, cpu_sync_on_runtime=exact)


def equal_share_of_each_rank(generator: torch.Generator, tokens: int, case: Case, world_size: int) -> Tensor:
    """K / W experts on every rank, so each has K / W rows for every token of the group."""
    held = case.num_experts // world_size
    each = torch.rand(tokens, world_size, held, generator=generator).argsort(dim=2)[:, :, : case.top_k // world_size]
    return (each + held * torch.arange(world_size)[:, None]).flatten(1)


# Every tensor of rows, tokens or weights is a multiple of 2 MiB, as are the allocator's segments: no block leaves a
# rest that is too small to be split off, and only 512 bytes are ever rounded.
LARGE = replace(WIDE, name="large", tokens=(2048, 1024), hidden=1024, intermediate=512, num_experts=16, top_k=4)
LARGE = replace(LARGE, dtype=torch.bfloat16, choose=equal_share_of_each_rank)
# Of 512 bytes each: received rows, hidden, scores, seven fields of the plan, and y.
ROUNDINGS = 11 * 512
# A grouped product's own memory while it runs (sizes and pointers of each group, tensor maps of each multiprocessor:
# about 100 KB), the slots of the ceiling while rows are exact (64 KiB), and roundings: 2% of the least peak. Workspaces
# that stay are allocated in the first call.
PRODUCT_BYTES = 2**19


def measured_call(rank: Rank, case: Case, ep: ExpertParallel) -> tuple[RoutedCall, LayerShape]:
    """A call of one rank's share of a case, and the shape that the formulas take."""
    inputs = draw(case, rank.world_size, rank.device)
    call, held = routed_call(inputs, rank.rank), case.num_experts // rank.world_size
    # Not views of the whole group's: the layer copies what is not aligned.
    call = replace(call, topk_idx=call.topk_idx.clone(), dy=call.dy.clone())
    max_tokens = max(case.tokens_of_rank(other) for other in range(rank.world_size))
    sizes = {"world_size": rank.world_size, "max_tokens": max_tokens, "top_k": case.top_k}
    ceiling = row_ceiling(**sizes, experts_per_rank=held, distinct=False)
    exact = int((inputs.topk_idx // held == rank.rank).sum())
    assert exact < ceiling or rank.world_size == 1
    shape = LayerShape(
        **sizes,
        **{name: getattr(case, name) for name in ("num_experts", "hidden", "intermediate")},
        tokens=call.x.shape[0],
        itemsize=case.dtype.itemsize,
        rows=exact if ep.config.cpu_sync_on_runtime else min(ceiling, ep.config.max_rows or ceiling),
        gated=call.experts.activation.gated,
        biases=case.bias,
        split=case.form == "split",
    )
    return call, shape


def backward(call: RoutedCall, outputs: Outcome) -> dict[str, Tensor]:
    return gradients(outputs, call.leaves, call.output_gradients())


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class LiveMemory(TorchDispatchMode):
    """Bytes of the live tensors that operations have made: now, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._live: list[tuple[StorageWeakRef, int]] = []
        self.most = 0

    def __enter__(self) -> Any:
        # Collection is fast where it visits only objects made from here on.
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
        before = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        # Neither views, nor results written in place, nor tensors over existing memory are new.
        made = () if func.overloadpacket is torch.ops.aten.set_ else tree_leaves(out)
        storages = [tensor.untyped_storage() for tensor in made if isinstance(tensor, Tensor)]
        fresh = [storage for storage in storages if storage.nbytes() and storage.data_ptr() not in before]
        if fresh:
            self._live += [(StorageWeakRef(storage), storage.nbytes()) for storage in fresh]
            self.most = max(self.most, self.now())
        return out


def assert_peaks(shape: LayerShape, config: EPConfig, found: list[int], slack: list[int]) -> None:
    """found: bytes beyond those before, of inference, forward, after forward, and backward. Never below the formula."""
    dispatch, again = DispatchMode(config.dispatch), {"redispatch_x_in_backward": config.redispatch_x_in_backward}
    formula = {
        "peak of inference": forward_peak_bytes(shape, dispatch, training=False, **again),
        "peak of forward": forward_peak_bytes(shape, dispatch, training=True, **again),
        "saved, and y": sum(saved_bytes(shape, dispatch, **again).values()) + shape.values("TH"),
        "peak of backward": backward_peak_bytes(shape, dispatch, **again),
    }
    for (what, nbytes), got, more in zip(formula.items(), found, slack, strict=True):
        assert 0 <= got - nbytes <= more, f"{what}: formula {nbytes}, found {got} ({got - nbytes:+}, at most +{more})"


PEAKS = {
    **{f"{mode.value}, no flag": (WIDE, config_of(mode)) for mode in DispatchMode},
    **{f"{mode.value}, both flags": (WIDE, config_of(mode, again=True, exact=True)) for mode in DispatchMode},
    "at the activation": (NARROW, config_of()),
    "at the activation, exact rows": (replace(NARROW, bias=True), config_of(exact=True)),
    "transposed": (replace(NARROW, form="transposed", activation=GPT_OSS, bias=True), config_of()),
    "split": (replace(NARROW, form="split", activation=GPT_OSS, bias=True), config_of(exact=True)),
    "split, wide rows": (replace(WIDE, form="split", activation=GPT_OSS), config_of(again=True)),
    # 9 tokens in all, so 18 rows at the most, where the ceiling is 28.
    "at the activation, max_rows": (NARROW, replace(config_of(again=True), max_rows=18)),
}
# Every day no flag and all of them, and the activation as the peak.
EVERYDAY = ("rank_dedup, no flag", "all_gather, both flags", "at the activation, max_rows", "transposed", "split")
MARKED = [pytest.param(*PEAKS[name], id=name, marks=[pytest.mark.thorough] * (name not in EVERYDAY)) for name in PEAKS]


@promise("memory-formulas")
@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize(("case", "config"), MARKED)
def test_peaks(rank: Rank, case: Case, config: EPConfig) -> None:
    with pytest.MonkeyPatch.context() as patch, ExpertParallel(backend="fast", config=config) as ep:
        # The products of a GPU: on the CPU a plain loop widens its operands instead.
        patch.setattr("sonic_ep.fast.call_plan.grouped_gemm", lambda operands, rows_per_group: LibraryGemm())
        call, shape = measured_call(rank, case, ep)
        # The first call allocates shared memory.
        call.forward(ep)
        with torch.no_grad(), LiveMemory() as inference:
            call.forward(ep)
        with LiveMemory() as forward:
            outputs = call.forward(ep)
        kept = forward.now()
        with LiveMemory() as behind:
            backward(call, outputs)
        # With exact rows, the slots of the ceiling's rows live until forward ends.
        of_forward = UNCOUNTED_BYTES + (shape.numbers("WCK") if config.cpu_sync_on_runtime else 0)
        found, slack = [inference.most, forward.most, kept, behind.most], [of_forward, of_forward, 0, UNCOUNTED_BYTES]
        assert_peaks(shape, config, found, slack)


# Of the plan, autograd keeps the ids, and each backend refers to the rest.
def ids_alone(shape: LayerShape, parts: Mapping[str, int]) -> int:
    return sum(parts.values()) - shape.plan + shape.numbers("WCK")


@promise("memory-formulas", "uncopied-weights")
@on_ranks(2, pool="cpu_pool")
@by_again
@pytest.mark.parametrize("form", ["whole", "transposed", "split"])
def test_nothing_is_saved_twice_and_no_weight_copied(rank: Rank, form: str, again: bool) -> None:
    """Storages that autograd saves, but for those of the caller, are those of the formula, by either backend."""
    case = replace(SMALL, form=form, activation=GPT_OSS, dtype=torch.bfloat16, hidden=32)
    for backend in ("fast", "reference"):
        config, kept = config_of(again=again, exact=True), dict[int, int]()
        with ExpertParallel(backend=backend, config=config) as ep:
            call, shape = measured_call(rank, case, ep)
            given = {address(leaf) for leaf in call.leaves.values()}

            def pack(tensor: Tensor, kept: dict[int, int] = kept, given: set[int] = given) -> Tensor:
                if tensor.numel() and address(tensor) not in given:
                    kept[address(tensor)] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = call.forward(ep)
            options = {"redispatch_x_in_backward": again}
            if backend == "fast":
                formula = ids_alone(shape, saved_bytes(shape, DispatchMode.ALL_TO_ALL, **options))
            else:
                formula = saved_bytes_of_reference(shape, valid_rows=shape.rows, limited=True, **options)
                formula = sum(formula.values())
            assert sum(kept.values()) == formula, (backend, list(kept.values()))
            backward(call, outputs)


@promise("memory-formulas")
@on_ranks(1, 2, pool="cpu_pool")
@by_again
@by_modes
def test_shared_buffers(rank: Rank, modes: Modes, again: bool) -> None:
    assert ALIGNMENT_BYTES == memory_model.SHARED_BLOCK_BYTES
    assert MOST_RECEIVED_BYTES == memory_model.MOST_RECEIVED_BYTES
    # Longer than a block of shared memory, and not a multiple of one.
    case, flags = replace(SMALL, hidden=36), {"redispatch_x_in_backward": again}
    with ExpertParallel(backend="fast", config=EPConfig(dispatch=modes[0], combine=modes[1], **flags)) as ep:
        call, shape = measured_call(rank, case, ep)
        call.forward(ep)
        buffers = ep._backend._context(rank.device).workspace._buffers
        found = {name: buffer.nbytes for name, buffer in buffers.items()}
    formula = memory_model.symmetric_bytes(shape, ModePair(dispatch=modes[0], combine=modes[1]), **flags)
    # The flags of barriers come first, under a name of their own.
    assert found.pop(next(iter(found))) == formula["barrier"]
    assert found == {name: nbytes for name, nbytes in formula.items() if nbytes and name != "barrier"}


def test_memory_that_combine_receives_at_a_time_is_bounded() -> None:
    # A token's eight rows are 128 KiB, of which 2^29 bytes hold 4096.
    sizes = {"world_size": 4, "max_tokens": 8192, "tokens": 1, "top_k": 8, "num_experts": 64, "hidden": 8192}
    shape = LayerShape(**sizes, intermediate=8, itemsize=2, rows=8)
    pair = ModePair(dispatch=DispatchMode.ALL_TO_ALL, combine=CombineMode.ALL_TO_ALL)
    shared = memory_model.symmetric_bytes(shape, pair)
    assert (shared["received"], shared["received_flags"]) == (2**29, 3 * 4096 * 8)
    # Of its three partial sums, 48 KiB, there is room for all tokens.
    shared = memory_model.symmetric_bytes(shape, replace(pair, combine=CombineMode.REDUCE_SCATTER))
    assert (shared["received"], shared["received_flags"]) == (8192 * 3 * 2**14, 3 * 8192 * 8)


@on_ranks(2, pool="cuda_pool")
@by_dispatch
@by_again
@by_exact
def test_peaks_of_the_allocator_on_a_gpu(rank: Rank, dispatch: DispatchMode, again: bool, exact: bool) -> None:
    """Rows of rank 0 and 1: 6144 if exact, 16384 at the ceiling."""
    config = config_of(dispatch, again=again, exact=exact)
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=max(LARGE.tokens)) as ep:
        call, shape = measured_call(rank, LARGE, ep)
        # The peaks of what runs, as the benchmark measures them.
        found = measured(call, ep, backward=True)
        kept = found[SAVED] + shape.values("TH")
        slack = [PRODUCT_BYTES, PRODUCT_BYTES, ROUNDINGS, PRODUCT_BYTES]
        assert_peaks(shape, config, [found[INFERENCE], found[FORWARD], kept, found[BACKWARD]], slack)
