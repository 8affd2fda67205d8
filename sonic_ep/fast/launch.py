"""How a kernel is launched, and how rows are cut up for it."""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.compat import current_device, current_stream_address, direct_launch, stream_is_captured

# Whether kernels run under Triton's interpreter, on the CPU: Triton decides it when it is imported.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
ON_CPU: bool = INTERPRETED.value
# A row is copied in blocks of this many bytes: 16 bytes for each thread of 4 warps, four times over.
BLOCK_BYTES = 8192
MOST_COLUMNS = 4096
ROW_WARPS = 4
# Programs that share rows: some 20 times as many as run at once, so that none is long at work when the others have
# ended. Interpreted, they take turns.
PROGRAMS_PER_MULTIPROCESSOR, PROGRAMS_INTERPRETED = 256, 16
ONE_LAUNCH = threading.Lock()
# Kernels with their constants that ``launch`` remembers.
LAUNCHERS_KEPT = 1024
# Triton compiles for pointers to such addresses; it compiles again where one is no multiple.
ALIGNED_BYTES = 16


def triton_kernel(function: Callable[..., None]) -> Any:
    """``triton.jit`` of a kernel, compiled once for all values of its numbers. Pointers end in _ptr and come first.

    Triton would compile again when one is first 1 or a multiple of 16, on one rank, while the others wait.
    """
    return triton.jit(function, do_not_specialize=numbers_of(function))


def numbers_of(function: Callable[..., None]) -> list[str]:
    """Parameters of a kernel that are neither pointers, nor descriptors (``_desc``), nor compile-time constants."""
    parameters = inspect.signature(function).parameters.values()
    given = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return [name for name in given if not name.endswith(("_ptr", "_desc"))]


@contextmanager
def alone_in_this_process() -> Iterator[None]:
    """Raises ``RuntimeError`` while another thread interprets a kernel: Triton patches its language per process."""
    if not ONE_LAUNCH.acquire(blocking=False):
        raise RuntimeError("Triton's interpreter: got a kernel while another thread runs one, expected one thread")
    try:
        yield
    finally:
        ONE_LAUNCH.release()


class Launcher:
    """A kernel with its compile-time constants on one device. A call launches it on that device's current stream.

    Products and sums are rounded one by one, as in plain PyTorch: no fused multiply-add. An empty grid is no launch.
    Pointers have the same element types in every launch: only interpreted ones are checked for it. The first launch
    compiles. Later ones call the compiled kernel itself, where ``sonic_ep.compat`` knows how: Triton would look at
    every argument again.
    """

    __slots__ = ("_compiled", "_constants", "_device", "_form", "_has_run", "_index", "_kernel", "_pointers")

    def __init__(self, kernel: Any, device: torch.device, constants: Mapping[str, Any]) -> None:
        self._kernel, self._device, self._constants = kernel, device, constants
        self._index = device.index
        self._pointers = sum(name.endswith("_ptr") for name in kernel.arg_names)
        self._compiled: Callable[..., None] | None = None
        self._form: list[torch.dtype] | None = None
        self._has_run = False

    @property
    def is_ready(self) -> bool:
        """Whether a launch compiles nothing."""
        return self._has_run

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """arguments: tensors, which are passed as pointers, then descriptors of TMA, if any, then numbers."""
        if 0 in grid:
            return
        if ON_CPU:
            self._interpreted(grid, arguments)
            return
        addresses = [tensor.data_ptr() for tensor in arguments[: self._pointers]]
        compiled, aligned = self._compiled, reduce(or_, addresses) % ALIGNED_BYTES == 0
        if compiled is None or not aligned or current_device() != self._index:
            self._first(grid, arguments, aligned=aligned)
            return
        try:
            compiled(grid, current_stream_address(self._index), addresses, arguments[self._pointers :])
        except OverflowError:
            # A number of more than 32 bits, for which Triton has another variant.
            self._ordinary(grid, arguments)

    def _interpreted(self, grid: tuple[int, ...], arguments: Any) -> None:
        form = [tensor.dtype for tensor in arguments[: self._pointers]]
        # On a GPU nobody looks: the kernel would read memory as what it is not.
        self._form, self._has_run = self._form or form, True
        assert self._form == form, f"{self._kernel.__name__}: got pointers to {form}, before to {self._form}"
        with alone_in_this_process():
            self._ordinary(grid, arguments)

    def _first(self, grid: tuple[int, ...], arguments: Any, *, aligned: bool) -> None:
        with torch.cuda.device(self._device):
            compiled = self._ordinary(grid, arguments)
        if aligned and not self._has_run:
            # Asked once: where only Triton can launch it, that stays so.
            self._has_run = True
            constants = [self._constants[name] for name in self._kernel.arg_names[len(arguments) :]]
            self._compiled = direct_launch(compiled, self._kernel, constants)

    def _ordinary(self, grid: tuple[int, ...], arguments: Any) -> Any:
        return self._kernel[grid](*arguments, enable_fp_fusion=False, **self._constants)


@lru_cache(LAUNCHERS_KEPT, typed=True)
def launcher(kernel: Any, device: torch.device, constants: tuple[tuple[str, Any], ...], form: object) -> Launcher:
    """The ``Launcher`` of these, remembered. form: tells apart other element types of pointers."""
    return Launcher(kernel, device, dict(constants))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of ``device``: see ``Launcher``."""
    form = tuple([getattr(argument, "dtype", None) for argument in arguments])
    launcher(kernel, device, tuple(constants.items()), form)(grid, *arguments)


def host_ints(count: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Zeros on the host, (count,), that kernels on ``device`` write and the host reads: pinned for a GPU."""
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a GPU is captured in a graph: then the host cannot wait for it."""
    return device.type == "cuda" and stream_is_captured()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs_over(rows: int, device: torch.device) -> int:
    """Programs that share R = ``rows``, at most one a row, not always as many: most rows may be invalid."""
    most = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) if device.type == "cuda" else PROGRAMS_INTERPRETED
    return min(rows, most)


def copy_constants(width: int, itemsize: int) -> dict[str, int]:
    """Constants of a kernel that copies rows of WIDTH elements of ``itemsize`` bytes, BLOCK at a time."""
    block = min(triton.next_power_of_2(width), BLOCK_BYTES // itemsize)
    return {"WIDTH": width, "BLOCK": block, "num_warps": ROW_WARPS}


def column_constants(width: int) -> dict[str, int]:
    """Constants of a kernel that computes over rows of ``width``: a power of two of COLUMNS at a time."""
    return {"H": width, "COLUMNS": min(triton.next_power_of_2(width), MOST_COLUMNS), "num_warps": ROW_WARPS}
