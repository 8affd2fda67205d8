"""Grouped products against a loop over the groups, by both ways, and which way is chosen for what."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.testing import Rank, RankPool, assert_as_accurate, assert_bitwise

if TYPE_CHECKING:
    from sonic_ep.fast.gemm import GroupedGemm, TileShape

pytestmark = pytest.mark.fast
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GROUPS = {
    "first empty": (0, 3, 5),
    "middle empty": (4, 0, 3),
    "last empty": (3, 2, 0),
    "all empty": (0, 0, 0),
    "one expert": (6,),
    "more than rows": (1, 0, 0, 0, 1, 0, 0),
}
# Widths of a, b and, for the sums over rows, of a again: none a multiple of 16 bytes in any dtype.
ODD = (33, 7, 5)
WHOLE = (32, 8, 24)
# Rows behind the valid ones, which hold no numbers.
BEHIND = 3
NAN = float("nan")


def small_tiles() -> "TileShape":
    """The smallest there are, so that small sizes need many."""
    # Not at the top: triton asks whether it is to interpret when it is imported, and only ranks know.
    from sonic_ep.fast.gemm import TileShape

    return TileShape(height=16, width=16, depth=16, warps=4, stages=2)


def numbers(rank: Rank, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(rank.device, dtype)


def with_nan_behind(rows: Tensor, behind: int = BEHIND) -> Tensor:
    return torch.cat([rows, rows.new_full((behind, *rows.shape[1:]), NAN)])


def ends(rank: Rank, sizes: Sequence[int]) -> Tensor:
    return torch.tensor(sizes, device=rank.device).cumsum(0).to(torch.int32)


def rows_by_loop(a_RK: Tensor, b_eKN: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.cat([a @ b for a, b in zip(a_RK.split(list(sizes)), b_eKN, strict=True)])


def weights_by_loop(a_RM: Tensor, b_RN: Tensor, sizes: Sequence[int]) -> Tensor:
    groups = zip(a_RM.split(list(sizes)), b_RN.split(list(sizes)), strict=True)
    return torch.stack([a.t() @ b for a, b in groups])


@contextmanager
def without_reads(device: torch.device) -> Iterator[None]:
    """On GPUs, PyTorch raises where it would wait for the device."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_rows(way: "GroupedGemm", a_RK: Tensor, b_eKN: Tensor, sizes: Sequence[int], group_ends_e: Tensor) -> None:
    """a_RK: the valid rows only."""
    given = with_nan_behind(a_RK)
    with without_reads(a_RK.device):
        found = way.rows(given, b_eKN, group_ends_e)
    assert found.shape == (given.shape[0], b_eKN.shape[2])
    truth = rows_by_loop(a_RK.double(), b_eKN.double(), sizes)
    assert_as_accurate(found[: a_RK.shape[0]], truth, rows_by_loop(a_RK, b_eKN, sizes), f"rows {sizes} {way}")


def check_weights(way: "GroupedGemm", a_RM: Tensor, b_RN: Tensor, sizes: Sequence[int], group_ends_e: Tensor) -> None:
    """a_RM, b_RN: the valid rows only."""
    given = with_nan_behind(a_RM), with_nan_behind(b_RN)
    with without_reads(a_RM.device):
        found = way.weights(*given, group_ends_e)
    truth = weights_by_loop(a_RM.double(), b_RN.double(), sizes)
    assert_as_accurate(found, truth, weights_by_loop(a_RM, b_RN, sizes), f"weights {sizes} {way}")
    for group, size in enumerate(sizes):
        assert bool((found[group] == 0).all()) == (size == 0)


def check_products(
    rank: Rank, way: "GroupedGemm", sizes: Sequence[int], widths: Sequence[int], dtype: torch.dtype
) -> None:
    """Both products, that of rows with matrices as they lie in memory and with transposed ones."""
    k, n, m = widths
    valid, groups = sum(sizes), ends(rank, sizes)
    a, b, rows = (numbers(rank, dtype, *shape) for shape in ((valid, k), (len(sizes), k, n), (valid, m)))
    check_rows(way, a, b, sizes, groups)
    check_rows(way, a, numbers(rank, dtype, len(sizes), n, k).transpose(1, 2), sizes, groups)
    check_weights(way, rows, a, sizes, groups)


def products_of_groups(rank: Rank, sizes: Sequence[int], dtype: torch.dtype) -> None:
    from sonic_ep.fast.gemm import LibraryGemm, LoopGemm, TritonGemm, library_serves

    check_products(rank, TritonGemm(), sizes, ODD, dtype)
    serves = library_serves([numbers(rank, dtype, 8, 8)])
    assert serves or rank.device.type == "cuda"
    if serves:
        check_products(rank, LibraryGemm(), sizes, WHOLE, dtype)
    if rank.device.type == "cpu":
        check_products(rank, LoopGemm(), sizes, ODD, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", GROUPS)
def test_products_are_those_of_a_loop(pool: RankPool, groups: str, dtype: torch.dtype) -> None:
    pool.run(products_of_groups, GROUPS[groups], dtype, world_size=1)


def products_of_many_tiles(rank: Rank, dtype: torch.dtype) -> None:
    from sonic_ep.fast.gemm import TritonGemm

    way = TritonGemm(tiles=small_tiles())
    sizes = (35, 0, 20)
    check_products(rank, way, sizes, (33, 40, 37), dtype)
    # More tiles of rows than a band holds, and matrices whose rows and experts lie apart in memory.
    wide = torch.full((1, 20, 100), NAN, dtype=dtype, device=rank.device)
    wide[:, :, 7:39] = numbers(rank, dtype, 1, 20, 32)
    check_rows(way, numbers(rank, dtype, 9 * 16 + 1, 20), wide[:, :, 7:39], (9 * 16 + 1,), ends(rank, (9 * 16 + 1,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_many_tiles(pool: RankPool, dtype: torch.dtype) -> None:
    pool.run(products_of_many_tiles, dtype, world_size=1)


def products_of_the_largest_tiles(rank: Rank, dtype: torch.dtype) -> None:
    from sonic_ep.fast.gemm import TritonGemm, tile_shape

    sizes, widths = (300, 270), (260, 264, 272)
    tiles = tile_shape(dtype, 285, *widths[:2])
    assert all(extent < 260 for extent in (tiles.height, tiles.width, tiles.depth))
    check_products(rank, TritonGemm(), sizes, widths, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_the_largest_tiles(pool: RankPool, dtype: torch.dtype) -> None:
    pool.run(products_of_the_largest_tiles, dtype, world_size=1)


def products_of_one_term(rank: Rank, dtype: torch.dtype) -> None:
    """Nothing to sum: exact in fp32, and then rounded to the nearest."""
    from sonic_ep.fast.gemm import TritonGemm

    a, b = numbers(rank, dtype, 20, 1), numbers(rank, dtype, 1, 30)
    product = (a.float() * b.float()).to(dtype)
    assert_bitwise(TritonGemm().rows(a, b[None], ends(rank, (20,))), product)
    assert_bitwise(TritonGemm().weights(a.view(1, 20), b, ends(rank, (1,))), product[None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_one_term(pool: RankPool, dtype: torch.dtype) -> None:
    pool.run(products_of_one_term, dtype, world_size=1)


def products_of_fp32(rank: Rank) -> None:
    """Nothing but the last rounding: a score's gradient, of one number, has no others that would even its error out."""
    from sonic_ep.fast.gemm import LoopGemm, TritonGemm

    dtype, sizes = torch.float32, (40, 30)
    a, b, groups = numbers(rank, dtype, 70, 90), numbers(rank, dtype, 2, 90, 50), ends(rank, sizes)
    for way in (TritonGemm(), LoopGemm()):
        assert_bitwise(way.rows(a, b, groups), rows_by_loop(a.double(), b.double(), sizes).float())
        assert_bitwise(way.weights(a, a, groups), weights_by_loop(a.double(), a.double(), sizes).float())


def test_products_of_fp32_are_the_truth_rounded(pool: RankPool) -> None:
    pool.run(products_of_fp32, world_size=1)


def products_without_rows(rank: Rank) -> None:
    from sonic_ep.fast.gemm import LibraryGemm, TritonGemm

    a, b, none = numbers(rank, torch.bfloat16, 0, 16), numbers(rank, torch.bfloat16, 2, 16, 8), ends(rank, (0, 0))
    for way in (LibraryGemm(), TritonGemm()):
        assert_bitwise(way.rows(a, b, none), a[:, :8])
        assert_bitwise(way.weights(a, a[:, :8], none), torch.zeros_like(b))


def test_products_without_rows(pool: RankPool) -> None:
    pool.run(products_without_rows, world_size=1)


def products_of_more_than_there_is_room_for(rank: Rank) -> None:
    """Groups that end past the rows count up to the last row, and nothing behind it is read."""
    from sonic_ep.fast.gemm import TritonGemm

    dtype, way = torch.float32, TritonGemm(tiles=small_tiles())
    a, b = numbers(rank, dtype, 21, 5), numbers(rank, dtype, 3, 5, 7)
    for sizes in ((4, 9, 20), (4, 60, 3), (60, 0, 3)):
        groups = ends(rank, sizes)
        fitting = torch.diff(groups.clamp(max=21), prepend=groups.new_zeros(1)).tolist()
        rows = with_nan_behind(a, behind=60)[:21]
        plain = rows_by_loop(a, b, fitting)
        assert_as_accurate(way.rows(rows, b, groups), rows_by_loop(a.double(), b.double(), fitting), plain)
        plain = weights_by_loop(a, a, fitting)
        truth = weights_by_loop(a.double(), a.double(), fitting)
        assert_as_accurate(way.weights(rows, rows, groups), truth, plain)


def test_products_of_more_than_there_is_room_for(pool: RankPool) -> None:
    pool.run(products_of_more_than_there_is_room_for, world_size=1)


def written(rank: Rank, programs: int, rows: int, group_ends: Sequence[int], columns: int) -> Tensor:
    """What the first ``programs`` of a product of ones leave: row by column 1 + its group, 0 where nobody wrote."""
    import triton

    from sonic_ep.fast.gemm import rows_kernel
    from sonic_ep.fast.launch import launch

    experts = len(group_ends)
    a = torch.ones(rows, 16, device=rank.device)
    b = (torch.arange(experts, dtype=torch.float32, device=rank.device) + 1).view(-1, 1, 1).repeat(1, 16, columns) / 16
    out = torch.zeros(rows + 16, columns, device=rank.device)
    launch(
        rows_kernel,
        (programs,),
        a,
        b,
        a,
        out,
        torch.tensor(group_ends, dtype=torch.int32, device=rank.device),
        experts,
        rows,
        triton.cdiv(rows, 16) + experts - 1,
        device=rank.device,
        K=16,
        N=columns,
        **dict(zip(("STRIDE_E", "STRIDE_K", "STRIDE_N"), b.stride(), strict=True)),
        HAS_BIAS=False,
        EXPERTS=triton.next_power_of_2(experts),
        **small_tiles().constants(),
    )
    assert not out[rows:].any(), "nothing is written past the rows there are"
    return out[:rows].int().cpu()


def examples_of_tiles(rank: Rank) -> None:
    # Groups that end at rows 20 20 25: two tiles of group 0, one of group 2, and then none.
    expected = torch.zeros(27, 16, dtype=torch.int32)
    for programs, (tile, group) in enumerate([(slice(0, 16), 0), (slice(16, 20), 0), (slice(20, 25), 2)], start=1):
        expected[tile] = group + 1
        assert_bitwise(written(rank, programs, 27, (20, 20, 25), 16), expected)
    assert_bitwise(written(rank, 4, 27, (20, 20, 25), 16), expected)
    assert_bitwise(written(rank, 4, 25, (20, 20, 90), 16), expected[:25])
    # Nine tiles of rows by two of columns: eight down, eight down beside them, then both columns of the ninth.
    expected = torch.zeros(9 * 16, 32, dtype=torch.int32)
    tiles = [(row, column) for rows in (range(8), range(8, 9)) for column in range(2) for row in rows]
    for programs, (row, column) in enumerate(tiles, start=1):
        expected[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)] = 1
        if programs in (1, 8, 9, 16, 17, 18):
            assert_bitwise(written(rank, programs, 9 * 16, (9 * 16,), 32), expected)


def test_examples_of_tiles(pool: RankPool) -> None:
    pool.run(examples_of_tiles, world_size=1)


def shapes_of_tiles(rank: Rank) -> None:
    from sonic_ep.fast.gemm import LARGEST, LARGEST_INTERPRETED, LEAST_EXTENT, tile_shape

    for dtype in DTYPES:
        largest = LARGEST[dtype.itemsize]
        # What a program of Hopper may have, 227 KiB.
        assert (largest.height + largest.width) * largest.depth * largest.stages * dtype.itemsize <= 227 * 2**10
        most = LARGEST_INTERPRETED if rank.device.type == "cpu" else largest
        assert tile_shape(dtype, 4096, 4096, 4096) == most
        least = tile_shape(dtype, 1, 17, 3)
        assert (least.height, least.width, least.depth) == (LEAST_EXTENT, 32, LEAST_EXTENT)


def test_tiles_are_no_larger_than_needed(pool: RankPool) -> None:
    pool.run(shapes_of_tiles, world_size=1)


def layer_operands(rank: Rank, dtype: torch.dtype, hidden: int, up: int, inner: int) -> list[Tensor]:
    shapes = ((5, hidden), (2, up, hidden), (2, hidden, inner))
    return [numbers(rank, dtype, *shape) for shape in shapes]


def shifted(operand: Tensor) -> Tensor:
    """The same, contiguous, at an address that is one element further."""
    moved = operand.new_empty(operand.numel() + 1)[1:].view(operand.shape)
    return moved.copy_(operand)


def odd_views(operand: Tensor) -> list[Tensor]:
    """At an odd address, with rows of odd length, with every other element, those transposed, one row many times."""
    every_other = operand.repeat_interleave(2, -1)[..., ::2]
    repeated = operand[..., :1, :].expand_as(operand)
    return [shifted(operand), operand[..., :-1], every_other, every_other.mT, repeated]


def choices(rank: Rank) -> None:
    from sonic_ep.fast.gemm import LibraryGemm, LoopGemm, TritonGemm, grouped_gemm

    on_cpu = rank.device.type == "cpu"
    hopper = not on_cpu and torch.cuda.get_device_capability(rank.device)[0] == 9
    for dtype in DTYPES:
        best = LoopGemm() if on_cpu else LibraryGemm() if hopper and dtype == torch.bfloat16 else TritonGemm()
        x, w1, w2 = layer_operands(rank, dtype, 32, 16, 8)
        assert grouped_gemm((x, w1, w2)) == best
        assert grouped_gemm((x[:0], w1, w2)) == best
        assert grouped_gemm((x, w1.transpose(1, 2), w2.mT)) == best
        for at, odd in enumerate((x, w1, w2)):
            for view in odd_views(odd):
                operands = [x, w1, w2]
                operands[at] = view
                assert grouped_gemm(operands) == TritonGemm(), (at, view.shape, view.stride())
        # Matrices one element further apart than 16 bytes allow, though the addresses of rows do.
        mismatch = w1.new_empty(2 * 512 + 1).as_strided((2, 16, 32), (513, 32, 1))
        assert grouped_gemm((x, mismatch, w2)) == TritonGemm()
        for widths in ((31, 16, 8), (32, 15, 8), (32, 16, 7)):
            assert grouped_gemm(layer_operands(rank, dtype, *widths)) == TritonGemm()
        many = w1[:1, :8, :8].repeat(1024, 1, 1)
        assert grouped_gemm((x, many[:-1])) == best
        assert grouped_gemm((x, many)) == TritonGemm()


def test_choices(pool: RankPool) -> None:
    pool.run(choices, world_size=1)


def with_bias_by_loop(a: Tensor, b: Tensor, bias: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    groups = zip(a.to(dtype).split(list(sizes)), b.to(dtype), bias.to(dtype), strict=True)
    return torch.cat([F.linear(rows, matrix.t(), own) for rows, matrix, own in groups])


def biases(rank: Rank) -> None:
    """A bias counts before the one rounding, each group's own, by every way that takes one."""
    from sonic_ep.fast.gemm import LibraryGemm, LoopGemm, TritonGemm

    sizes = (3, 0, 18)
    on_gpu = rank.device.type == "cuda"
    for dtype in DTYPES:
        ways = [TritonGemm(tiles=small_tiles()), TritonGemm(), LibraryGemm() if on_gpu else LoopGemm()]
        for (depth, width), way in product(((33, 21), (32, 24)), ways):
            a, b = numbers(rank, dtype, sum(sizes), depth), numbers(rank, dtype, len(sizes), depth, width)
            bias = numbers(rank, dtype, len(sizes), width)
            found = way.rows(with_nan_behind(a), b, ends(rank, sizes), bias)[: sum(sizes)]
            truth, plain = (with_bias_by_loop(a, b, bias, sizes, kind) for kind in (torch.float64, dtype))
            assert_as_accurate(found, truth, plain)


def test_biases_are_added_before_the_rounding(pool: RankPool) -> None:
    pool.run(biases, world_size=1)


def layers(rank: Rank) -> None:
    """Every product of a layer, forward and backward, by the way chosen."""
    from sonic_ep.fast.gemm import grouped_gemm

    sizes, groups = (2, 3), ends(rank, (2, 3))
    for dtype in DTYPES:
        for place in (lambda operand: operand, shifted):
            for hidden, up, inner in ((16, 16, 8), (8, 8, 8), (16, 12, 6), (3, 2, 1), (1, 1, 1)):
                x, w1, w2 = (place(operand) for operand in layer_operands(rank, dtype, hidden, up, inner))
                way = grouped_gemm((x, w1, w2))
                up_rows, inner_rows = numbers(rank, dtype, 5, up), numbers(rank, dtype, 5, inner)
                for a, b in ((x, w1.mT), (inner_rows, w2.mT), (x, w2), (up_rows, w1)):
                    check_rows(way, a, b, sizes, groups)
                check_weights(way, up_rows, x, sizes, groups)
                check_weights(way, x, inner_rows, sizes, groups)


def test_the_way_chosen_serves_every_product_of_a_layer(pool: RankPool) -> None:
    pool.run(layers, world_size=1)
