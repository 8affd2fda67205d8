"""Every private API of PyTorch that the package uses, behind public names. ``test_compat.py`` says what each needs."""

import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack, _pop_mode, _push_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

LONE_GROUP: Any = "sonic_ep_lone_rank"
RENDEZVOUS_KEY = "CUDASymmetricMemory/{}/0"
MOST_RENDEZVOUS = 100_000
# The modes of selective activation checkpointing, in forward and in recompute.
CHECKPOINT_MODES = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
# Ends a recompute early, on all ranks alike: no error. Older PyTorch has none.
STOP_RECOMPUTATION: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())


def release_of(version: str) -> tuple[int, ...]:
    """Major and minor number.

    >>> release_of("2.11.0+cu130"), release_of("2.13.0a0+git1")
    ((2, 11), (2, 13))
    """
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


# Since 2.13 PyTorch keeps the node of a Python autograd function alive between the halves of a split backward.
KEEPS_NODES = release_of(torch.__version__) >= (2, 13)

# Whether a profiler records this thread, also in the backward of what that thread has called. No public API tells.
profiler_is_on: Callable[[], bool] = torch._C._autograd._profiler_enabled


def all_gather(group: dist.ProcessGroup, gathered: Tensor, own: Tensor, timeout: timedelta) -> dist.Work:
    """Start an all-gather into flat ``gathered``. The public function takes no timeout."""
    options = c10d.AllgatherOptions()
    options.timeout = timeout
    return group._allgather_base(gathered, own, options)


def all_to_all(
    group: dist.ProcessGroup,
    received: Tensor,
    own: Tensor,
    receive_splits: list[int],
    send_splits: list[int],
    timeout: timedelta,
) -> dist.Work:
    """Start an all-to-all of rows. The public function takes no timeout."""
    options = c10d.AllToAllOptions()
    options.timeout = timeout
    return group.alltoall_base(received, own, receive_splits, send_splits, options)


def unwrapped(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """``group`` without the wrapper of ``TORCH_DISTRIBUTED_DEBUG=DETAIL``, which waits for ranks by its own clock."""
    return getattr(group._get_backend(device), "wrapped_pg", group)


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> float | None:
    """Seconds that a collective of ``group`` on ``device`` may take; None if its backend does not tell."""
    try:
        backend = group._get_backend(device)
        timeout = getattr(getattr(backend, "wrapped_pg", backend).options, "_timeout", None)
    # No backend for this device, or one without options.
    except (RuntimeError, AttributeError):
        return None
    return timeout.total_seconds() if isinstance(timeout, timedelta) else None


# Whether one of functorch's transforms is active, such as ``torch.func.functionalize``.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, which outside of functorch's transforms looks for what they have left in every argument."""
    if transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def backward_is_running() -> bool:
    """Whether this thread is in a backward: activation checkpointing runs forward again in it."""
    return torch._C._current_graph_task_id() != -1


def rendezvous_number(rendezvous: Callable[[Any], object]) -> int:
    """The number that PyTorch gives to ``rendezvous(name of a group of this rank)``; -1 if it is not found.

    Up to 2.13 PyTorch numbers a process's rendezvous, and peers have to use the same: pytorch/pytorch/issues/196082.
    """
    store = dist.HashStore()  # type: ignore[attr-defined]
    # The registry does not keep it alive.
    alone = dist.ProcessGroup(store, 0, 1)
    c10d._register_process_group(LONE_GROUP, alone)
    try:
        rendezvous(LONE_GROUP)
    finally:
        c10d._unregister_process_group(LONE_GROUP)
    numbers = (number for number in range(MOST_RENDEZVOUS) if store.check([RENDEZVOUS_KEY.format(number)]))
    return next(numbers, -1)


def keep_forever(kept: object) -> None:
    """Never free ``kept``: not even at exit, where module globals are freed."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def in_forward_mode() -> bool:
    """Whether a forward-mode differentiation has begun, so that tensors may have tangents."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a forward-mode tangent. Costs nothing outside of forward-mode differentiation."""
    # PyTorch sets the level as it begins and ends; ``unpack_dual`` takes ten times as long.
    return in_forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


# The next four are PyTorch's own functions, not wrapped: every call of the layer asks them.
# Whether a tensor is one of autograd's zeros, which have no memory. No public API tells.
is_zero_without_memory: Callable[[Tensor], bool] = Tensor._is_zerotensor
# Whether autocast is on for any kind of device. The public function takes one, as text, which takes longer to read.
any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
# What ``torch.compile`` has set to look at frames as they begin; None where nothing is being compiled.
compiles_frames: Callable[[], object] = get_eval_frame_callback
# How many of ``TorchDispatchMode`` are active.
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def dispatch_modes_active() -> bool:
    """Whether any ``TorchDispatchMode`` is active."""
    return dispatch_modes() > 0


@contextmanager
def without_dispatch_modes(kinds: tuple[type, ...]) -> Iterator[None]:
    """Turn modes of these ``kinds`` off. The public ``__exit__`` removes only the innermost mode."""
    before = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    for mode in reversed(before):
        if not isinstance(mode, kinds):
            _push_mode(mode)
    try:
        yield
    finally:
        while torch._C._len_torch_dispatch_stack():
            _pop_mode()
        for mode in reversed(before):
            _push_mode(mode)


def global_offset(weight: Any) -> tuple[int, ...]:
    """The global index of the first element that this rank has of a DTensor, also of one sharded twice by FSDP2."""
    # Not at the top: it takes half as long to import as PyTorch.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return tuple(offset)


def forget_destroyed_meshes() -> None:
    """After process groups were destroyed: clear DTensor's caches, which hold meshes of theirs and take equal ones."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()


def ranks_reduced_by_ddp(parameters: Iterable[Tensor]) -> list[int]:
    """The ranks over which the ``DistributedDataParallel`` whose forward is running averages any of ``parameters``."""
    ddp = torch.nn.parallel.DistributedDataParallel._active_ddp_module
    if ddp is None:
        return []
    reduced = {id(parameter) for parameter in ddp._module_parameters}
    found = any(id(parameter) in reduced for parameter in parameters)
    return dist.get_process_group_ranks(ddp.process_group) if found else []


def is_second_backward(error: BaseException) -> bool:
    """Whether autograd has refused a second backward, by an error without a type, on all ranks before they exchange."""
    return isinstance(error, RuntimeError) and "through the graph a second time" in str(error)


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which would import the compiler: that takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Below autograd, where operators run, PyTorch leaves these out; a compiled graph also the last three.
_AUTOGRAD_KEYS = (
    "AutogradCPU",
    "AutogradCUDA",
    "AutogradOther",
    "ADInplaceOrView",
    "Conjugate",
    "Negative",
    "ZeroTensor",
)


@contextmanager
def autograd_in_operator() -> Iterator[None]:
    """Let autograd record what an operator runs, which PyTorch runs below autograd, and save it without hooks."""
    hooks = []
    # Those of activation checkpointing would count what is saved here.
    while top := torch._C._autograd._top_saved_tensors_default_hooks(True):
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    left_out = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        left_out = left_out - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    try:
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left_out):
            yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


_MODES_WITHOUT_VALUES = (FakeTensorMode, ProxyTorchDispatchMode, FunctionalTensorMode)


def without_modes() -> AbstractContextManager[object]:
    """Reads a tensor that has values, as the mesh of a traced DTensor has, outside of all dispatch modes."""
    return _disable_current_modes() if dispatch_modes_active() else nullcontext()


def selective_checkpoint_active() -> bool:
    """Whether selective activation checkpointing runs forward, or runs it again, with tensors that have values."""
    kinds = {type(mode) for mode in _get_current_dispatch_mode_stack()} if dispatch_modes_active() else set()
    return not kinds.isdisjoint(CHECKPOINT_MODES) and kinds.isdisjoint(_MODES_WITHOUT_VALUES)


def sees_operators() -> bool:
    """Whether a dispatch mode is active in which tensors have no values, or which selects what to save."""
    kinds = (*CHECKPOINT_MODES, *_MODES_WITHOUT_VALUES)
    return dispatch_modes_active() and any(isinstance(mode, kinds) for mode in _get_current_dispatch_mode_stack())


def _no_gpu(*_: object) -> int:
    raise RuntimeError("this PyTorch is built without CUDA")


# Without the checks of ``torch.cuda``, which take microseconds; CUDA is initialized where there are tensors on a GPU.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _no_gpu)
current_stream_address: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_gpu)
stream_is_captured: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
# Releases of Triton whose compiled kernels ``direct_launch`` knows.
TRITON_KNOWN = ((3, 6),)


def direct_launch(compiled: Any, kernel: Any, constants: Sequence[Any]) -> Callable[..., None] | None:
    """Launches a kernel that Triton has compiled: ``(grid, address of a stream, addresses of pointers, numbers)``.

    numbers: descriptors of TMA, each of which keeps what Triton makes of it as ``encoded``, then integers.

    constants: its compile-time constants in the order of its parameters, which follow the others. None where only
    Triton can launch it: in another release, with scratch memory, or where the numbers of this launch are compiled in.
    """
    known = release_of(version("triton")) in TRITON_KNOWN
    declared = {parameter.name for parameter in kernel.params if parameter.annotation_type == "i64"}
    wide = {name for name, kind in compiled.src.signature.items() if kind == "i64"} if known else set()
    # A number that Triton specializes is compiled in, as 1 or as a multiple of 16.
    kinds = compiled.src.signature
    numbers = [p for p in kernel.params if not p.is_constexpr and not kinds[p.name].startswith(("*", "tensordesc"))]
    run = compiled.run
    fixed = known and wide <= declared and all(number.do_not_specialize for number in numbers)
    if not fixed or run.global_scratch_size or run.profile_scratch_size:
        return None
    launch, function, metadata, constants = run.launch, compiled.function, compiled.packed_metadata, tuple(constants)
    # Scratch memory: none. Then what a profiler of Triton's would get.
    options = (run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None)

    def launched(grid: tuple[int, ...], stream: int, addresses: Sequence[int], numbers: Sequence[Any]) -> None:
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        launch(x, y, z, stream, function, *options, *addresses, *numbers, *constants)

    if not any(kind.startswith("tensordesc") for kind in kinds.values()):
        return launched
    # Triton wraps its launcher: in each launch it would encode every descriptor, and look at every argument.
    parts = dict(zip(launch.__code__.co_freevars, launch.__closure__, strict=True))
    described, encode = compiled.metadata.tensordesc_meta, launch.__globals__.get("make_tensordesc_arg")
    if "launcher" not in parts or encode is None or not described:
        return None
    unwrapped = parts["launcher"].cell_contents

    def launched_with(grid: tuple[int, ...], stream: int, addresses: Sequence[int], numbers: Sequence[Any]) -> None:
        encoded: list[Any] = []
        for descriptor, form in zip(numbers, described, strict=False):
            found = getattr(descriptor, "encoded", None)
            if found is None:
                descriptor.encoded = found = encode(descriptor, form)
            encoded += found
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        numbers = numbers[len(described) :]
        unwrapped(x, y, z, stream, function, *options, *addresses, *encoded, *numbers, *constants)

    return launched_with


# Releases of Triton whose Gluon kernels have run on a GPU. CI compiles them with others.
GLUON_PROVEN = ((3, 6),)


@lru_cache
def gluon_is_proven() -> bool:
    """Whether kernels in Gluon, which Triton calls experimental, are used."""
    return release_of(version("triton")) in GLUON_PROVEN


def unowned(tensor: Tensor) -> Tensor:
    """The same elements, whose memory it does not keep: for that of CUDA graphs, which is there as long as they are."""
    storage = tensor.untyped_storage()
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    place = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(place, tensor.storage_offset(), tensor.shape, tensor.stride())


def flattened(value: object) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The leaves of nested tuples, lists and dictionaries, and what makes the same of other leaves."""
    leaves, form = pytree.tree_flatten(value)
    return leaves, lambda others: pytree.tree_unflatten(others, form)
