"""Grouped products over the experts of one rank, with no read on the host, and the choice among them.

Operands in multiples of 16 bytes go to ``hopper_gemm`` on Hopper, or to PyTorch's products where those read nothing on
the host; all others to the two kernels of this file, for any sizes, strides and addresses. All sum in fp32, or in fp64
for fp32 operands (Hopper's tensor cores take fp64 at the rate of plain fp32), and round once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.autograd_utils import is_transposed
from sonic_ep.compat import gluon_is_proven
from sonic_ep.fast.device_functions import rounded, tile_in_bands
from sonic_ep.fast.launch import INTERPRETED, launch, triton_kernel


@triton.jit
def group_of_tile(tile, group_ends_ptr, experts, rows, EXPERTS: tl.constexpr, HEIGHT: tl.constexpr):
    """Group of a tile of ``HEIGHT`` rows, its first row, and the row where its group ends.

    Every group begins a new tile; for a tile past the last the group is ``experts`` or more. Groups that end at rows
    20 20 25, in tiles of 16: tiles 0 and 1 begin at rows 0 and 16 of group 0, tile 2 at row 20 of group 2.
    """
    group = tl.arange(0, EXPERTS)
    held = group < experts
    end = tl.minimum(tl.load(group_ends_ptr + group, mask=held, other=0), rows)
    begin = tl.minimum(tl.load(group_ends_ptr + group - 1, mask=held & (group > 0), other=0), rows)
    tiles = tl.where(held, (end - begin + HEIGHT - 1) // HEIGHT, 0)
    # The first group up to which more tiles have begun than are before this one.
    mine = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    before = tl.sum(tl.where(group < mine, tiles, 0), axis=0)
    first = tl.sum(tl.where(group == mine, begin, 0), axis=0) + (tile - before) * HEIGHT
    return mine, first, tl.sum(tl.where(group == mine, end, 0), axis=0)


@triton.jit
def add_product(a, b, total):
    """``total + a . b``, products and sums in the type of total: fp32, or fp64, where products of fp32 are exact."""
    # The interpreter would take bf16 for integers, and sum fp16 in fp16.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if total.dtype == tl.float64:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), total, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton_kernel
def rows_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    group_ends_ptr,
    experts,
    rows,
    row_tiles,
    K: tl.constexpr,
    N: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows times the matrix of their group. Grid (row_tiles * ceil(N / WIDTH),); tiles past the last do nothing.

    a_ptr (R, K); b_ptr (e, K, N) of the strides given; bias_ptr (e, N) if HAS_BIAS; out_ptr (R, N), not written past
    the last group; group_ends_ptr (e,) int32, clamped to ``rows`` = R.
    """
    tile, column_tile = tile_in_bands(tl.program_id(0), row_tiles, tl.cdiv(N, WIDTH))
    group, first, end = group_of_tile(tile, group_ends_ptr, experts, rows, EXPERTS, HEIGHT)
    if group < experts:
        row = tl.arange(0, HEIGHT)
        column = tl.arange(0, WIDTH)
        step = tl.arange(0, DEPTH)
        row_inside = first + row < end
        column_inside = column_tile * WIDTH + column < N
        # Offsets inside a tile fit in int32 (``checks.MOST_WIDTH``); the offset of the tile itself is int64.
        first_row = tl.cast(first, tl.int64)
        first_column = tl.cast(column_tile, tl.int64) * WIDTH
        a_ptr += first_row * K
        b_ptr += tl.cast(group, tl.int64) * STRIDE_E + first_column * STRIDE_N
        # Long fp32 sums of fp32 products would be less exact than PyTorch's, which sums in parts.
        total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float64 if a_ptr.dtype.element_ty == tl.float32 else tl.float32)
        for k in tl.range(0, K, DEPTH, num_stages=STAGES):
            inside = k + step < K
            a_tile = a_ptr + k + row[:, None] * K + step[None, :]
            b_tile = b_ptr + tl.cast(k, tl.int64) * STRIDE_K + step[:, None] * STRIDE_K + column[None, :] * STRIDE_N
            a = tl.load(a_tile, mask=row_inside[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_tile, mask=inside[:, None] & column_inside[None, :], other=0.0)
            total = add_product(a, b, total)
        if HAS_BIAS:
            bias_tile = bias_ptr + tl.cast(group, tl.int64) * N + first_column + column
            total += tl.load(bias_tile, mask=column_inside, other=0.0).to(total.dtype)[None, :]
        out_tile = out_ptr + first_row * N + first_column + row[:, None] * N + column[None, :]
        tl.store(out_tile, rounded(total.to(tl.float32), out_ptr), mask=row_inside[:, None] & column_inside[None, :])


@triton_kernel
def weights_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    group_ends_ptr,
    rows,
    M: tl.constexpr,
    N: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of each group the sum of products of its rows. Grid (e * ceil(M / HEIGHT) * ceil(N / WIDTH),), group by group.

    a_ptr (R, M); b_ptr (R, N); out_ptr (e, M, N); group_ends_ptr (e,) int32, clamped to ``rows`` = R.
    """
    row_tiles = tl.cdiv(M, HEIGHT)
    column_tiles = tl.cdiv(N, WIDTH)
    group = tl.program_id(0) // (row_tiles * column_tiles)
    tile, column_tile = tile_in_bands(tl.program_id(0) % (row_tiles * column_tiles), row_tiles, column_tiles)
    begin = tl.load(group_ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.minimum(tl.load(group_ends_ptr + group), rows)
    row = tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    step = tl.arange(0, DEPTH)
    row_inside = tile * HEIGHT + row < M
    column_inside = column_tile * WIDTH + column < N
    first_row = tl.cast(tile, tl.int64) * HEIGHT
    first_column = tl.cast(column_tile, tl.int64) * WIDTH
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float64 if a_ptr.dtype.element_ty == tl.float32 else tl.float32)
    for r in tl.range(begin, end, DEPTH, num_stages=STAGES):
        # Both factors are 0 past the group, since NaN * 0 is NaN.
        inside = r + step < end
        a_tile = a_ptr + tl.cast(r, tl.int64) * M + first_row + step[None, :] * M + row[:, None]
        b_tile = b_ptr + tl.cast(r, tl.int64) * N + first_column + step[:, None] * N + column[None, :]
        a = tl.load(a_tile, mask=row_inside[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_tile, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = add_product(a, b, total)
    out_tile = out_ptr + (tl.cast(group, tl.int64) * M + first_row) * N + first_column
    out_tile += row[:, None] * N + column[None, :]
    tl.store(out_tile, rounded(total.to(tl.float32), out_ptr), mask=row_inside[:, None] & column_inside[None, :])


# Tensor cores take no smaller tiles.
LEAST_EXTENT = 16
# PyTorch's requirements on addresses and strides, and on the number of groups.
ALIGNED_BYTES, MOST_GROUPS = 16, 1023
# Of compute capability: where PyTorch's products of rows read nothing on the host (9: Hopper, 10: datacenter Blackwell,
# on which nothing of this library has run), and where an empty group's weights are zero, too, which after Hopper they
# are not: pytorch/pytorch/issues/172439.
HOPPER, MAJORS_OF_LIBRARY = 9, (9, 10)


class GroupedGemm(Protocol):
    """Both products. group_ends_e (e,) int32: group j has rows group_ends_e[j-1] up to group_ends_e[j].

    Rows past ``group_ends_e[-1]``, NaN too, change no result. Results have the dtype of ``a``: bf16, fp16 or fp32.
    """

    def rows(self, a_RK: Tensor, b_eKN: Tensor, group_ends_e: Tensor, bias_eN: Tensor | None = None) -> Tensor:
        """(R, N): each row of ``a``, contiguous, times the matrix (any strides) of its group, plus the group's bias.

        The bias is added before the one rounding. Unspecified past ``group_ends_e[-1]``.
        """

    def weights(self, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor) -> Tensor:
        """(e, M, N): of each group ``a^T . b`` over its rows, both contiguous. Exact zeros for a group without rows."""


@dataclass(frozen=True, kw_only=True)
class LibraryGemm:
    """PyTorch's grouped products, for operands that ``library_serves`` and ``group_ends_e[-1] <= R``.

    Uses ``TritonGemm`` for a bias: faster than PyTorch's product and a pass over the rows. rows_per_group: for that.
    zeroes_weights: whether PyTorch's weights of a group without rows are zeros; else ``TritonGemm`` sums them all.
    """

    rows_per_group: int | None = None
    zeroes_weights: bool = True

    def rows(self, a_RK: Tensor, b_eKN: Tensor, group_ends_e: Tensor, bias_eN: Tensor | None = None) -> Tensor:
        """See ``GroupedGemm``."""
        if bias_eN is not None:
            return TritonGemm(rows_per_group=self.rows_per_group).rows(a_RK, b_eKN, group_ends_e, bias_eN)
        if a_RK.shape[0] == 0:
            return a_RK.new_empty((0, b_eKN.shape[2]))
        return F.grouped_mm(a_RK, b_eKN, offs=group_ends_e)

    def weights(self, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor) -> Tensor:
        """See ``GroupedGemm``."""
        if not self.zeroes_weights:
            return TritonGemm(rows_per_group=self.rows_per_group).weights(a_RM, b_RN, group_ends_e)
        if a_RM.shape[0] == 0:
            return a_RM.new_zeros((group_ends_e.shape[0], a_RM.shape[1], b_RN.shape[1]))
        return F.grouped_mm(a_RM.t(), b_RN, offs=group_ends_e)


@dataclass(frozen=True, kw_only=True)
class LoopGemm:
    """PyTorch's plain products, group by group, for the CPU, where the host waits for nothing."""

    def rows(self, a_RK: Tensor, b_eKN: Tensor, group_ends_e: Tensor, bias_eN: Tensor | None = None) -> Tensor:
        """See ``GroupedGemm``."""
        out_RN = a_RK.new_empty((a_RK.shape[0], b_eKN.shape[2]))
        for group, rows in enumerate(rows_of_groups(group_ends_e)):
            product = widened(a_RK[rows]) @ widened(b_eKN[group])
            out_RN[rows] = (product if bias_eN is None else product + widened(bias_eN[group])).to(a_RK.dtype)
        return out_RN

    def weights(self, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor) -> Tensor:
        """See ``GroupedGemm``."""
        products = [widened(a_RM[rows]).t() @ widened(b_RN[rows]) for rows in rows_of_groups(group_ends_e)]
        return torch.stack(products).to(a_RM.dtype)


def rows_of_groups(group_ends_e: Tensor) -> list[slice]:
    """The rows of each group, read on the host. Ends 2 2 5 are rows 0 and 1, none, and rows 2 to 4."""
    ends = group_ends_e.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the type in which its products are summed."""
    return tensor.double() if tensor.dtype == torch.float32 else tensor.float()


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """A program's (height, width) of the result; it sums over ``depth`` at a time, ``stages`` steps in flight."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """Compile-time constants of both kernels."""
        extents = {"HEIGHT": self.height, "WIDTH": self.width, "DEPTH": self.depth}
        return extents | {"STAGES": self.stages, "num_warps": self.warps}


# By element size. 2 bytes: 144 KiB of shared memory. 4 bytes: sums are fp64, so registers decide.
LARGEST = {
    2: TileShape(height=128, width=256, depth=64, warps=8, stages=3),
    4: TileShape(height=64, width=64, depth=32, warps=4, stages=3),
}
# For tiles smaller than the largest height and width.
FEWER_WARPS = 4
# Interpreted, the number of programs decides the time, not that of elements.
LARGEST_INTERPRETED = TileShape(height=256, width=256, depth=256, warps=4, stages=1)


def tile_shape(dtype: torch.dtype, height: int, width: int, depth: int) -> TileShape:
    """Tiles for a product of (height, depth) with (depth, width): the largest, or less where the product has less."""
    largest = LARGEST_INTERPRETED if INTERPRETED.value else LARGEST[dtype.itemsize]
    extents = {"height": height, "width": width, "depth": depth}
    for name, size in extents.items():
        extents[name] = min(max(triton.next_power_of_2(size), LEAST_EXTENT), getattr(largest, name))
    whole = (extents["height"], extents["width"]) == (largest.height, largest.width)
    return replace(largest, **extents, warps=largest.warps if whole else FEWER_WARPS)


@dataclass(frozen=True, kw_only=True)
class TritonGemm:
    """Our kernels: any sizes, strides of ``b`` and addresses. Group ends past R count as R.

    tiles: of both products; None: by ``tile_shape``. rows_per_group: the rows that tiles are chosen for; None: R over
    the groups. Tiles decide the last bits of a sum, and flags may change no bit: so flags may not change this.
    """

    tiles: TileShape | None = None
    rows_per_group: int | None = None

    def rows(self, a_RK: Tensor, b_eKN: Tensor, group_ends_e: Tensor, bias_eN: Tensor | None = None) -> Tensor:
        """See ``GroupedGemm``."""
        rows, (experts, depth, width), device = a_RK.shape[0], b_eKN.shape, a_RK.device
        out_RN = a_RK.new_empty((rows, width))
        if rows == 0:
            return out_RN
        tiles = self.tiles or tile_shape(a_RK.dtype, self._expected(rows, experts), width, depth)
        # Each of the groups that have rows, at most R of them, leaves one tile not full.
        row_tiles = triton.cdiv(rows, tiles.height) + min(experts, rows) - 1
        grid = (row_tiles * triton.cdiv(width, tiles.width),)
        # Without a bias its pointer is not read.
        pointers = (a_RK, b_eKN, a_RK if bias_eN is None else bias_eN, out_RN, group_ends_e)
        strides = dict(zip(("STRIDE_E", "STRIDE_K", "STRIDE_N"), b_eKN.stride(), strict=True))
        sizes = {"K": depth, "N": width, "EXPERTS": triton.next_power_of_2(experts), "HAS_BIAS": bias_eN is not None}
        constants = sizes | strides | tiles.constants()
        launch(rows_kernel, grid, *pointers, experts, rows, row_tiles, device=device, **constants)
        return out_RN

    def weights(self, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor) -> Tensor:
        """See ``GroupedGemm``."""
        (rows, height), width, experts = a_RM.shape, b_RN.shape[1], group_ends_e.shape[0]
        if rows == 0:
            return a_RM.new_zeros((experts, height, width))
        out_eMN = a_RM.new_empty((experts, height, width))
        tiles = self.tiles or tile_shape(a_RM.dtype, height, width, self._expected(rows, experts))
        grid = (experts * triton.cdiv(height, tiles.height) * triton.cdiv(width, tiles.width),)
        constants = {"M": height, "N": width} | tiles.constants()
        launch(weights_kernel, grid, a_RM, b_RN, out_eMN, group_ends_e, rows, device=a_RM.device, **constants)
        return out_eMN

    def _expected(self, rows: int, experts: int) -> int:
        return self.rows_per_group or triton.cdiv(rows, experts)


def weight_gradient(gemm: GroupedGemm, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor, weight: Tensor) -> Tensor:
    """``gemm.weights(a, b)``, (e, M, N), transposed in memory if ``weight`` is: so autograd accumulates it uncopied."""
    if is_transposed(weight):
        return gemm.weights(b_RN, a_RM, group_ends_e).transpose(1, 2)
    return gemm.weights(a_RM, b_RN, group_ends_e)


def grouped_gemm(operands: Sequence[Tensor], rows_per_group: int | None = None) -> GroupedGemm:
    """The products for a layer of operands rows (R, H), contiguous, and weights (e, F, H), (e, H, I) of any strides."""
    if not (library_serves(operands) and addresses_serve(operands)):
        return TritonGemm(rows_per_group=rows_per_group)
    return library_gemm(operands[0].device, rows_per_group)


def library_gemm(device: torch.device, rows_per_group: int | None = None) -> GroupedGemm:
    """The products on ``device`` for operands that ``library_serves`` and ``addresses_serve``."""
    if device.type != "cuda":
        return LoopGemm()
    major = capability_of(device)
    if major == HOPPER and gluon_is_proven():
        # Not at the top: an unproven release of Triton may have renamed what it imports.
        from sonic_ep.fast.hopper_gemm import HopperGemm

        return HopperGemm()
    return LibraryGemm(rows_per_group=rows_per_group, zeroes_weights=major == HOPPER)


def library_serves(operands: Sequence[Tensor]) -> bool:
    """Whether PyTorch multiplies operands of these forms without a read on the host, where ``addresses_serve``.

    Of fp16, which it does not, whether ``HopperGemm`` does.
    """
    first = operands[0]
    return _device_serves(first.device, first.dtype) and all(_aligned(operand) for operand in operands)


def _device_serves(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return device.type == "cpu"
    major = capability_of(device)
    if dtype == torch.float16:
        return major == HOPPER and gluon_is_proven()
    return dtype == torch.bfloat16 and major in MAJORS_OF_LIBRARY


@lru_cache
def capability_of(device: torch.device) -> int:
    """The first number of a GPU's compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def addresses_serve(operands: Sequence[Tensor]) -> bool:
    """Whether all addresses are multiples of 16 bytes."""
    addresses = 0
    for operand in operands:
        addresses |= operand.data_ptr()
    return addresses % ALIGNED_BYTES == 0


def _aligned(operand: Tensor) -> bool:
    """Whether strides and widths of an operand, rows or matrices, are multiples of 16 bytes."""
    *groups, height, width = operand.shape
    *jumps, row, column = operand.stride()
    # The longer of the last two strides, and the extent that it has to span.
    leading, extent = (row, width) if column == 1 else (column, height)
    widths = [height, width] if groups else [width]
    return (
        1 in (row, column)
        and leading >= extent
        and all(length * operand.element_size() % ALIGNED_BYTES == 0 for length in (*widths, *jumps, leading))
        and max(groups, default=0) <= MOST_GROUPS
    )
