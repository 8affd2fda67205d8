"""How a kernel is launched, and over how much at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether kernels run under Triton's interpreter, on the CPU; Triton itself decides when it is imported.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
# A row is moved in pieces of this many bytes: one piece is 16 bytes for each of 4 warps, four times over.
PIECE_BYTES = 8192
ROW_WARPS = 4
# Programs of ROW_WARPS warps that fill a multiprocessor.
PROGRAMS_PER_MULTIPROCESSOR = 16
ONE_LAUNCH = threading.Lock()


@contextmanager
def alone_in_this_process() -> Iterator[None]:
    """Raises ``RuntimeError`` while another thread's kernel is interpreted: the grid, and what stands in for Triton's
    language, are the process's. Nobody waits: the other kernel may be waiting for this rank.
    """
    if not ONE_LAUNCH.acquire(blocking=False):
        raise RuntimeError("Triton's interpreter: got a kernel while another thread runs one, expected one thread")
    try:
        yield
    finally:
        ONE_LAUNCH.release()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of ``device``; an empty grid is no launch.

    Products and sums are rounded one by one, as in plain PyTorch: no fused multiply-add.
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
    """Zeros on the host, for kernels on ``device`` to write and the host to read: pinned for a GPU."""
    # What is made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs_over(rows: int, device: torch.device) -> int:
    """Programs that share ``rows`` rows, of which few may be valid: as many as a GPU has room for, at most one a row.

    A program for each row would cost more where most of them find nothing to do: with W ranks, a rank has room for up
    to W times the rows that it receives on average.
    """
    return min(rows, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device))


def as_int_view(rows: Tensor) -> Tensor:
    """The same memory as integers of 4 bytes, or of 2 where a row (N, H) has no whole number of 4."""
    whole = rows.shape[-1] * rows.element_size() % 4 == 0
    return rows.view(torch.int32 if whole else torch.int16)


def aligned_contiguous(rows_NH: Tensor) -> Tensor:
    """The same rows, contiguous, and aligned as ``as_int_view`` needs it: a view may begin at any element.

    Of one row or none any strides count as contiguous; ``as_int_view`` minds them all the same.
    """
    rows_NH = rows_NH.contiguous().flatten().view(rows_NH.shape)
    return rows_NH.clone() if rows_NH.data_ptr() % 4 else rows_NH


def block_size(words_per_row: int, word_bytes: int) -> int:
    """Words of a row that one program moves at a time: a power of two, at most ``PIECE_BYTES``."""
    return min(triton.next_power_of_2(words_per_row), PIECE_BYTES // word_bytes)
