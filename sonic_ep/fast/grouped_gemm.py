"""Products over the experts of one rank, without a read on the host: PyTorch's own where they serve, else two kernels.

``rows`` multiplies each row with the matrix of its own expert, ``weights`` sums products of rows, expert by expert.
Both accumulate in fp32, or in fp64 for fp32 operands (Hopper's tensor cores take fp64 at the rate of plain fp32), and
round once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.fast.device import INTERPRETED, launch, pieces, power_of_two
from sonic_ep.fast.grouped_gemm_kernels import rows_kernel, weights_kernel

# Tensor cores take no smaller tiles.
LEAST_EXTENT = 16

# What PyTorch's products ask of addresses and strides, and of the number of groups.
ALIGNED_BYTES = 16
MOST_GROUPS = 1023
# Older GPUs get PyTorch's loop, which reads the host; on newer ones an empty group's weights are not zero
# (pytorch issue 172439).
HOPPER = 9


class GroupedGemm(Protocol):
    """Both products. group_ends_e (e,) int32: group j has the rows from group_ends_e[j-1] up to group_ends_e[j].

    Rows past ``group_ends_e[-1]`` are never read. Results have the dtype of ``a``: bf16, fp16 or fp32.
    """

    def rows(self, a_RK: Tensor, b_eKN: Tensor, group_ends_e: Tensor, bias_eN: Tensor | None = None) -> Tensor:
        """(R, N): each row of ``a``, contiguous, times its own group's matrix, of any strides, plus its group's bias.

        The bias is added in fp32, before the one rounding. Unspecified past ``group_ends_e[-1]``.
        """
        ...

    def weights(self, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor) -> Tensor:
        """(e, M, N): of each group ``a^T . b`` over its rows, both contiguous. Exact zeros for a group without rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class LibraryGemm:
    """PyTorch's own products. For operands as ``library_serves`` wants them, and ``group_ends_e[-1] <= R``.

    They take no bias. With one, the own kernel is faster than PyTorch's and a pass over the rows after it.
    rows_per_group: as of ``TritonGemm``.
    """

    rows_per_group: int | None = None

    def rows(self, a_RK: Tensor, b_eKN: Tensor, group_ends_e: Tensor, bias_eN: Tensor | None = None) -> Tensor:
        """See ``GroupedGemm``."""
        if bias_eN is not None:
            return TritonGemm(rows_per_group=self.rows_per_group).rows(a_RK, b_eKN, group_ends_e, bias_eN)
        if a_RK.shape[0] == 0:
            return a_RK.new_empty((0, b_eKN.shape[2]))
        return F.grouped_mm(a_RK, b_eKN, offs=group_ends_e)

    def weights(self, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor) -> Tensor:
        """See ``GroupedGemm``."""
        if a_RM.shape[0] == 0:
            return a_RM.new_zeros((group_ends_e.shape[0], a_RM.shape[1], b_RN.shape[1]))
        return F.grouped_mm(a_RM.t(), b_RN, offs=group_ends_e)


@dataclass(frozen=True, kw_only=True)
class LoopGemm:
    """PyTorch's plain products, group by group, for the CPU: there the host has nothing to wait for.

    Summed as ``TritonGemm`` does, fp32 in fp64 and all else in fp32, and rounded once.
    """

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
    """Where the rows of each group stand. A read on the host. Ends 2 2 5 are rows 0 and 1, none, and rows 2 to 4."""
    ends = group_ends_e.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def widened(tensor: Tensor) -> Tensor:
    """In the type that its products are summed in."""
    return tensor.double() if tensor.dtype == torch.float32 else tensor.float()


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """How a product is cut up: a program computes (height, width) of the result, summing over ``depth`` at a time.

    All three are powers of two, at least ``LEAST_EXTENT``. stages: steps of the sum that are on their way at once.
    """

    height: int
    width: int
    depth: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """What a kernel is compiled with."""
        extents = {"HEIGHT": self.height, "WIDTH": self.width, "DEPTH": self.depth}
        return extents | {"STAGES": self.stages, "num_warps": self.warps}


# Per element size: 144 KiB of shared memory at 2 bytes. At 4 bytes sums are fp64: registers decide.
LARGEST = {
    2: TileShape(height=128, width=256, depth=64, warps=8, stages=3),
    4: TileShape(height=64, width=64, depth=32, warps=4, stages=3),
}
# For tiles of less than the largest height and width.
FEWER_WARPS = 4
# The interpreter's time goes by programs, not by elements.
LARGEST_INTERPRETED = TileShape(height=256, width=256, depth=256, warps=4, stages=1)


def tile_shape(dtype: torch.dtype, height: int, width: int, depth: int) -> TileShape:
    """Tiles for a product of (height, depth) with (depth, width): the largest, or less where the product has less."""
    largest = LARGEST_INTERPRETED if INTERPRETED.value else LARGEST[dtype.itemsize]
    shape = replace(
        largest,
        height=_extent(height, largest.height),
        width=_extent(width, largest.width),
        depth=_extent(depth, largest.depth),
    )
    whole = (shape.height, shape.width) == (largest.height, largest.width)
    return shape if whole else replace(shape, warps=FEWER_WARPS)


def _extent(size: int, largest: int) -> int:
    return min(max(power_of_two(size), LEAST_EXTENT), largest)


@dataclass(frozen=True, kw_only=True)
class TritonGemm:
    """The products by own kernels: any sizes, strides of ``b`` and addresses. Group ends past R count as R.

    tiles: of both products; None: chosen by ``tile_shape`` for each.
    rows_per_group: rows of a group to choose tiles for; None: the mean of those there is room for. How a sum is cut up
        decides its last bits, so what may not change them may not change this either.
    """

    tiles: TileShape | None = None
    rows_per_group: int | None = None

    def rows(self, a_RK: Tensor, b_eKN: Tensor, group_ends_e: Tensor, bias_eN: Tensor | None = None) -> Tensor:
        """See ``GroupedGemm``."""
        rows, (experts, depth, width) = a_RK.shape[0], b_eKN.shape
        out_RN = a_RK.new_empty((rows, width))
        if rows == 0:
            return out_RN
        tiles = self.tiles or tile_shape(a_RK.dtype, self._expected(rows, experts), width, depth)
        # Each of the groups that have rows, of which there are at most R, leaves one tile not full.
        row_tiles = pieces(rows, tiles.height) + min(experts, rows) - 1
        launch(
            rows_kernel,
            (row_tiles * pieces(width, tiles.width),),
            a_RK,
            b_eKN,
            # Without a bias the pointer is not read.
            a_RK if bias_eN is None else bias_eN,
            out_RN,
            group_ends_e,
            experts,
            rows,
            row_tiles,
            device=a_RK.device,
            K=depth,
            N=width,
            STRIDE_E=b_eKN.stride(0),
            STRIDE_K=b_eKN.stride(1),
            STRIDE_N=b_eKN.stride(2),
            HAS_BIAS=bias_eN is not None,
            EXPERTS=power_of_two(experts),
            **tiles.constants(),
        )
        return out_RN

    def weights(self, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor) -> Tensor:
        """See ``GroupedGemm``."""
        (rows, height), width, experts = a_RM.shape, b_RN.shape[1], group_ends_e.shape[0]
        if rows == 0:
            return a_RM.new_zeros((experts, height, width))
        out_eMN = a_RM.new_empty((experts, height, width))
        tiles = self.tiles or tile_shape(a_RM.dtype, height, width, self._expected(rows, experts))
        launch(
            weights_kernel,
            (experts * pieces(height, tiles.height) * pieces(width, tiles.width),),
            a_RM,
            b_RN,
            out_eMN,
            group_ends_e,
            rows,
            device=a_RM.device,
            M=height,
            N=width,
            **tiles.constants(),
        )
        return out_eMN

    def _expected(self, rows: int, experts: int) -> int:
        return self.rows_per_group or pieces(rows, experts)


def grouped_gemm(operands: Sequence[Tensor], rows_per_group: int | None = None) -> GroupedGemm:
    """The way for a layer of these operands: rows (R, H) and weights (e, F, H), (e, H, I).

    What lies between the products is fresh and contiguous, of the widths of these. rows_per_group: see ``TritonGemm``.
    """
    if not library_serves(operands):
        return TritonGemm(rows_per_group=rows_per_group)
    return LibraryGemm(rows_per_group=rows_per_group) if operands[0].device.type == "cuda" else LoopGemm()


def library_serves(operands: Sequence[Tensor]) -> bool:
    """Whether PyTorch multiplies these, and contiguous rows of their widths, without a read on the host.

    It asks for sizes and strides of whole 16 bytes, for addresses likewise, and on GPUs for bf16 on Hopper and fewer
    than 1024 groups.
    """
    return _device_serves(operands[0]) and all(_aligned(operand) for operand in operands)


def _device_serves(operand: Tensor) -> bool:
    if operand.device.type == "cpu":
        return True
    return operand.dtype == torch.bfloat16 and torch.cuda.get_device_capability(operand.device)[0] == HOPPER


def _aligned(operand: Tensor) -> bool:
    """Whether an operand, rows or matrices, has its address, strides and widths at whole 16 bytes."""
    *groups, height, width = operand.shape
    *jumps, row, column = operand.stride()
    # The longer of the last two strides, and what it has to reach over.
    leading, extent = (row, width) if column == 1 else (column, height)
    widths = [height, width] if groups else [width]
    return (
        1 in (row, column)
        and leading >= extent
        and all(length * operand.element_size() % ALIGNED_BYTES == 0 for length in (*widths, *jumps, leading))
        and operand.data_ptr() % ALIGNED_BYTES == 0
        and max(groups, default=0) <= MOST_GROUPS
    )
