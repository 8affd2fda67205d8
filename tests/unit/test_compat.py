"""What each private API behind ``sonic_ep.compat`` needs of the installed PyTorch; each fails by its name."""

import importlib.util
import weakref
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint as checkpointing
from on_ranks import on_ranks
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sonic_ep import compat
from sonic_ep.testing import Rank

CPU, SOON = torch.device("cpu"), timedelta(seconds=60)


@on_ranks(2, pool="cpu_pool")
def test_collectives_take_a_timeout(rank: Rank) -> None:
    """``_allgather_base``, ``alltoall_base`` and their options; the work that they return can be waited for."""
    group, gathered = dist.group.WORLD, torch.empty(2)
    compat.all_gather(group, gathered, torch.full((1,), float(rank.rank)), SOON).wait(SOON)
    assert gathered.tolist() == [0, 1]
    compat.all_to_all(group, gathered, torch.tensor([1.0, 2.0]) + rank.rank, [1, 1], [1, 1], SOON).wait(SOON)
    assert gathered.tolist() == [1 + rank.rank, 2 + rank.rank]


@on_ranks(2, pool="cpu_pool")
def test_the_wrapper_of_debug_mode_comes_off(rank: Rank) -> None:
    """``_get_backend`` and ``wrapped_pg``."""
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        group = dist.new_group([0, 1])
    finally:
        dist.set_debug_level(level)
    assert "Wrapper" in type(group._get_backend(CPU)).__name__
    assert "Wrapper" not in type(compat.unwrapped(group, CPU)).__name__
    assert "Wrapper" not in type(compat.unwrapped(dist.group.WORLD, CPU)).__name__


@on_ranks(2, pool="cpu_pool")
def test_the_timeout_of_a_group_is_known(rank: Rank) -> None:
    """``_get_backend``, its ``options`` and their ``_timeout``, also below the wrapper of debug mode."""
    level = dist.get_debug_level()
    for debug in (level, dist.DebugLevel.DETAIL):
        dist.set_debug_level(debug)
        try:
            group = dist.new_group([0, 1], timeout=timedelta(seconds=41))
        finally:
            dist.set_debug_level(level)
        assert compat.timeout_of(group, CPU) == 41
    assert compat.timeout_of(group, torch.device("meta")) is None


def test_a_backward_is_known_from_inside() -> None:
    """``torch._C._current_graph_task_id``: in a recompute, of both kinds of checkpointing, and not in forward."""
    found: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        found.append(compat.backward_is_running())
        return x.exp()

    for reentrant in (False, True):
        checkpointing.checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert found == [False, True] * 2
    assert not compat.backward_is_running()


@pytest.mark.parametrize("kept_under", [compat.RENDEZVOUS_KEY, "another/{}"])
def test_the_number_of_a_rendezvous_is_read_from_its_store(kept_under: str) -> None:
    """``_register_process_group`` gives a group a name, under which the rendezvous finds its store."""
    from torch._C._distributed_c10d import _resolve_process_group

    def rendezvous(name: str) -> None:
        _resolve_process_group(name).get_group_store().set(kept_under.format(7), "a handle")

    assert compat.rendezvous_number(rendezvous) == (7 if kept_under == compat.RENDEZVOUS_KEY else -1)
    with pytest.raises(RuntimeError):
        _resolve_process_group(compat.LONE_GROUP)


def test_what_is_kept_forever_is_not_freed() -> None:
    """``Py_IncRef``."""
    kept = set[int]()
    held = weakref.ref(kept)
    compat.keep_forever(kept)
    del kept
    assert held() is not None


def test_tangents_inside_of_a_level_and_zeros_without_memory_are_known() -> None:
    """``forward_ad._current_level`` is below 0 outside of any level; ``Tensor._is_zerotensor``."""
    x = torch.ones(2)
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0
        assert compat.has_tangent(forward_ad.make_dual(x, x))
        assert not compat.has_tangent(x)
    assert not compat.has_tangent(x)
    assert compat.is_zero_without_memory(torch._efficientzerotensor((2,)))
    assert not compat.is_zero_without_memory(x)


def test_a_recompute_that_stops_early_raises_the_known_error() -> None:
    """``_StopRecomputationError`` leaves the function, once the last saved tensor has been computed."""
    left: list[type[BaseException]] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        try:
            return x.exp().sum() * 1
        except BaseException as error:
            left.append(type(error))
            raise

    checkpointing.checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=False).backward()
    assert left == [compat.STOP_RECOMPUTATION]


class Counting(TorchDispatchMode):
    calls_of_exp = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.calls_of_exp += function is torch.ops.aten.exp.default
        return function(*arguments, **(keywords or {}))


def test_modes_of_selective_checkpointing_are_off_and_others_on() -> None:
    """``_push_mode``, ``_pop_mode``, ``_len_torch_dispatch_stack``; the types that checkpointing uses."""
    must_save = checkpointing.CheckpointPolicy.MUST_SAVE
    caching, cached = checkpointing.create_selective_checkpoint_contexts(lambda *_, **__: must_save)
    assert (type(caching), type(cached)) == compat.CHECKPOINT_MODES
    assert not compat.dispatch_modes_active()
    with Counting() as outer, caching, Counting() as inner:
        with compat.without_dispatch_modes(compat.CHECKPOINT_MODES):
            assert torch._C._len_torch_dispatch_stack() == 2
            torch.ones(1).exp()
        assert torch._C._len_torch_dispatch_stack() == 3
    assert outer.calls_of_exp == inner.calls_of_exp == 1


class Twice(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: 2 * x)
    backward = staticmethod(lambda ctx, grad: 2 * grad)


def test_python_objects_keep_their_nodes_where_the_gate_says_so() -> None:
    """What ``torch.distributed.pipelining`` reads of a node between the halves of a backward, the result being gone."""
    node = Twice.apply(torch.ones(2, requires_grad=True)).grad_fn
    try:
        kept = len(node._input_metadata) == 1
    except RuntimeError:
        kept = False
    assert kept == compat.KEEPS_NODES


def test_a_function_is_applied_as_autograd_does_and_refused_in_transforms() -> None:
    x = torch.ones(2, requires_grad=True)
    (compat.applied(Twice, x) * 3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [6, 6]
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda given: compat.applied(Twice, given).sum())(torch.ones(2))


@on_ranks(1, pool="cpu_pool")
def test_meshes_of_destroyed_groups_are_forgotten(rank: Rank) -> None:
    """``_clear_sharding_prop_cache``: results of DTensors have the mesh of their operands, no equal one of before."""
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            assert (distribute_tensor(torch.ones(2), mesh, [Shard(0)]) + 1).device_mesh is mesh
        finally:
            dist.destroy_process_group()
            compat.forget_destroyed_meshes()


def test_a_tensor_that_does_not_keep_its_memory() -> None:
    """``_construct_storage_from_data_pointer``."""
    kept = torch.arange(12.0).view(3, 4)[:, 1:]
    unowned = compat.unowned(kept)
    assert unowned.stride() == kept.stride()
    kept.mul_(2)
    assert torch.equal(unowned, kept)
    assert compat.unowned(kept[:0]).shape == (0, 3)
    storage = weakref.ref(kept.untyped_storage())
    del kept
    assert storage() is None


def test_leaves_of_nested_results() -> None:
    """``tree_flatten`` and ``tree_unflatten``."""
    leaves, rebuilt = compat.flattened({"a": (1, [2]), "b": 3})
    assert leaves == [1, 2, 3]
    assert rebuilt([4, 5, 6]) == {"a": (4, [5]), "b": 6}


def test_modes_that_every_call_asks_for_are_known() -> None:
    """``_is_any_autocast_enabled``, ``_len_torch_dispatch_stack``, ``get_eval_frame_callback``, ``_current_level``."""

    def asked() -> tuple[bool, int, object, bool]:
        modes = (compat.any_autocast_enabled(), compat.dispatch_modes(), compat.compiles_frames())
        return (*modes, compat.in_forward_mode())

    off = (False, 0, None, False)
    assert asked() == off
    with torch.autocast("cpu", dtype=torch.bfloat16), TorchDispatchMode(), forward_ad.dual_level():
        assert asked() == (True, 1, None, True)
    assert asked() == off


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class CompiledKernel(SimpleNamespace):
    """What Triton 3.6 makes of a kernel (a_ptr, count, tag: tl.int64, BLOCK) on a GPU, without which it makes none."""

    def __init__(self, launch: Callable[..., None], **signature: str) -> None:
        run = {"launch": launch, "launch_cooperative_grid": False, "launch_pdl": False}
        scratch = {"global_scratch_size": 0, "profile_scratch_size": 0}
        kinds = {"a_ptr": "*fp32", "count": "i32", "tag": "i64", "BLOCK": "constexpr", **signature}
        metadata = {"function": 77, "packed_metadata": "metadata", "metadata": SimpleNamespace(tensordesc_meta=None)}
        super().__init__(run=SimpleNamespace(**run, **scratch), src=SimpleNamespace(signature=kinds), **metadata)


def parameters(*, specialized: bool) -> SimpleNamespace:
    """Those of that kernel."""
    kinds = {"a_ptr": "", "count": "", "tag": "i64", "BLOCK": ""}
    params = [
        SimpleNamespace(name=n, annotation_type=k, is_constexpr=n == "BLOCK", do_not_specialize=not specialized)
        for n, k in kinds.items()
    ]
    return SimpleNamespace(params=params)


def test_a_compiled_kernel_is_launched_directly_or_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a release that is known, if no number is compiled in or wider than declared."""
    launched: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> None:
        launched.append(arguments)

    monkeypatch.setattr(compat, "version", lambda package: {"triton": "3.6.0"}[package])
    free = parameters(specialized=False)
    direct = compat.direct_launch(CompiledKernel(record), free, [64])
    assert direct is not None
    direct((3, 2), 5, [4096], (10, 2**40))
    assert launched == [(3, 2, 1, 5, 77, False, False, None, None, "metadata", None, None, None, 4096, 10, 2**40, 64)]
    assert compat.direct_launch(CompiledKernel(record, count="i64"), free, [64]) is None
    assert compat.direct_launch(CompiledKernel(record), parameters(specialized=True), [64]) is None
    with_scratch = CompiledKernel(record)
    with_scratch.run.global_scratch_size = 128
    assert compat.direct_launch(with_scratch, free, [64]) is None
    monkeypatch.setattr(compat, "version", lambda package: "3.5.1")
    assert compat.direct_launch(CompiledKernel(record), free, [64]) is None


@pytest.mark.skipif(
    not _has_triton() or compat.release_of(version("triton")) not in compat.TRITON_KNOWN,
    reason="needs a release of Triton that direct_launch knows",
)
def test_descriptors_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own function: its launcher gets what it would get through Triton's wrapper."""
    from triton.backends.nvidia import driver

    launched: list[tuple[Any, ...]] = []
    forms = [
        {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, size], "fp4_padded": False}
        for size in (8, 9)
    ]
    encoded: list[tuple[Any, ...]] = []

    def fill(*arguments: Any) -> str:
        encoded.append(arguments)
        return f"map {len(encoded)}"

    utils = SimpleNamespace(fill_tma_descriptor=fill)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(driver, "triton", SimpleNamespace(runtime=runtime))

    def described(address: int) -> SimpleNamespace:
        base = SimpleNamespace(data_ptr=lambda: address)
        return SimpleNamespace(base=base, shape=[4, 8], strides=[8, 1], padding="zero")

    kinds = {
        "a_ptr": "*fp32",
        "b_desc": "tensordesc<b>",
        "c_desc": "tensordesc<c>",
        "count": "i32",
        "BLOCK": "constexpr",
    }
    wrapper = driver.wrap_handle_tensordesc(lambda *arguments: launched.append(arguments), kinds, forms)
    compiled = CompiledKernel(wrapper)
    compiled.src.signature, compiled.metadata.tensordesc_meta = kinds, forms
    params = [
        SimpleNamespace(name=n, annotation_type="", is_constexpr=n == "BLOCK", do_not_specialize=n == "count")
        for n in kinds
    ]
    direct = compat.direct_launch(compiled, SimpleNamespace(params=params), [64])
    assert direct is not None
    first, second, other = described(4096), described(8192), described(512)
    for pair in ((first, second), (first, second), (first, other)):
        direct((3,), 5, [16], (*pair, 10))
    assert [arguments[0] for arguments in encoded] == [4096, 8192, 512]
    assert [arguments[4] for arguments in encoded] == [[64, 8], [64, 9], [64, 9]]
    wrapper(3, 1, 1, 5, 77, False, False, None, None, "metadata", None, None, None, 16, first, second, 10, 64)
    maps = {"map 4": "map 1", "map 5": "map 2"}
    assert launched[0] == launched[1] == tuple(maps.get(each, each) for each in launched[3])
    assert launched[2][19] == "map 3"


def test_releases_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them takes a hundred times as long as a small operation of PyTorch."""
    asked: list[str] = []
    monkeypatch.setattr(compat, "version", lambda package: asked.append(package) or "3.6.0")
    compat.gluon_is_proven.cache_clear()
    try:
        assert [compat.gluon_is_proven() for _ in range(3)] == [True] * 3
        assert asked == ["triton"]
    finally:
        compat.gluon_is_proven.cache_clear()
