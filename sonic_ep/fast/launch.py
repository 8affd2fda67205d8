"""How a kernel is launched, and how rows are cut up for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether kernels run under Triton's interpreter, on the CPU: Triton decides it when it is imported.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
# A row is copied in blocks of this many bytes: 16 bytes for each thread of 4 warps, four times over.
BLOCK_BYTES = 8192
MOST_COLUMNS = 4096
ROW_WARPS = 4
# Programs of ROW_WARPS warps that fill a multiprocessor.
PROGRAMS_PER_MULTIPROCESSOR = 16
ONE_LAUNCH = threading.Lock()


@contextmanager
def alone_in_this_process() -> Iterator[None]:
    """Raises ``RuntimeError`` while another thread interprets a kernel: Triton patches its language per process."""
    if not ONE_LAUNCH.acquire(blocking=False):
        raise RuntimeError("Triton's interpreter: got a kernel while another thread runs one, expected one thread")
    try:
        yield
    finally:
        ONE_LAUNCH.release()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of ``device``; an empty grid launches nothing.

    As in plain PyTorch, products and sums are rounded one by one: no fused multiply-add.
    """
    if min(grid) == 0:
        return
    if INTERPRETED.value:
        scope: Any = alone_in_this_process()
    elif torch.cuda.current_device() != device.index:
        scope = torch.cuda.device(device)
    else:
        scope = nullcontext()
    with scope:
        kernel[grid](*arguments, enable_fp_fusion=False, **constants)


def host_ints(count: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Zeros on the host, (count,), that kernels on ``device`` write and the host reads: pinned for a GPU."""
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a GPU is captured in a graph: then the host cannot wait for it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs_over(rows: int, device: torch.device) -> int:
    """Programs that share R = ``rows``: as many as run at a time, at most one a row. Most rows may be invalid."""
    return min(rows, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device))


def as_int_view(rows_NH: Tensor) -> Tensor:
    """The same memory as int32, or as int16 where a row (N, H) is no multiple of 4 bytes."""
    whole = rows_NH.shape[-1] * rows_NH.element_size() % 4 == 0
    return rows_NH.view(torch.int32 if whole else torch.int16)


def aligned_contiguous(rows_NH: Tensor) -> Tensor:
    """The same rows, contiguous and aligned to 4 bytes, as ``as_int_view`` needs them."""
    # Flattened, because any strides count as contiguous for one row or none, but not for ``view``.
    rows_NH = rows_NH.contiguous().flatten().view(rows_NH.shape)
    return rows_NH.clone() if rows_NH.data_ptr() % 4 else rows_NH


def copy_constants(rows_NH: Tensor) -> dict[str, int]:
    """Constants of a kernel that copies rows, from ``as_int_view``: INTS of a row, BLOCK at a time."""
    width = rows_NH.shape[1]
    at_once = min(triton.next_power_of_2(width), BLOCK_BYTES // rows_NH.element_size())
    return {"INTS": width, "BLOCK": at_once, "num_warps": ROW_WARPS}


def column_constants(width: int) -> dict[str, int]:
    """Constants of a kernel that computes over rows of ``width``: a power of two of COLUMNS at a time."""
    return {"H": width, "COLUMNS": min(triton.next_power_of_2(width), MOST_COLUMNS), "num_warps": ROW_WARPS}
