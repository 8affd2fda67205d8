"""Grouped products by every implementation against a loop over the groups, and which implementation is chosen."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hostile import shifted
from on_ranks import on_ranks
from promises import promise
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.testing import Rank, assert_as_accurate, assert_bitwise

# Only ranks launch anything: this process need not interpret.
pytest.importorskip("triton")
import triton

from sonic_ep.compat import gluon_is_proven
from sonic_ep.fast.gemm import (
    HOPPER,
    LARGEST,
    LARGEST_INTERPRETED,
    LEAST_EXTENT,
    GroupedGemm,
    LibraryGemm,
    LoopGemm,
    TileShape,
    TritonGemm,
    _device_serves,
    capability_of,
    grouped_gemm,
    library_gemm,
    library_serves,
    rows_kernel,
    tile_shape,
)
from sonic_ep.fast.hopper_gemm import HopperGemm
from sonic_ep.fast.launch import launch

pytestmark = pytest.mark.fast
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The first, the middle, the last and every group empty; one expert; more experts than rows.
GROUPS = [(0, 3, 5), (4, 0, 3), (3, 2, 0), (0, 0, 0), (6,), (1, 0, 0, 0, 1, 0, 0)]
# Widths of a, b and the third operand: ODD has none that is a multiple of 16 bytes in any dtype.
ODD, WHOLE = (33, 7, 5), (32, 8, 24)
NAN = float("nan")
SMALL_TILES = TileShape(height=16, width=16, depth=16, warps=4, stages=2)


def random(rank: Rank, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(rank.device, dtype)


def with_nan_behind(rows: Tensor, behind: int = 3) -> Tensor:
    return torch.cat([rows, rows.new_full((behind, *rows.shape[1:]), NAN)])


def ends(device: torch.device, sizes: Sequence[int]) -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


def by_loop(kind: str, a: Tensor, b: Tensor, sizes: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """kind: "rows", (R, K) by (e, K, N), plus a bias (e, N); or "weights", (R, M) by (R, N)."""
    rows = a.split(list(sizes))
    if kind == "weights":
        return torch.stack([one.t() @ other for one, other in zip(rows, b.split(list(sizes)), strict=True)])
    biases = [None] * len(b) if bias is None else bias
    return torch.cat([F.linear(one, matrix.t(), own) for one, matrix, own in zip(rows, b, biases, strict=True)])


def check(
    gemm: GroupedGemm,
    kind: str,
    a: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    behind: int = 3,
    bias: Tensor | None = None,
) -> None:
    """a, and b of "weights": the valid rows only; NaN rows are put behind them."""
    given = [with_nan_behind(a, behind), b if kind == "rows" else with_nan_behind(b, behind), ends(a.device, sizes)]
    # On GPUs, PyTorch raises where the host would wait for the device.
    set_mode = torch.cuda.set_sync_debug_mode if a.device.type == "cuda" else lambda mode: None
    set_mode("error")
    try:
        found = getattr(gemm, kind)(*given, *([] if bias is None else [bias]))
    finally:
        set_mode("default")
    truth = by_loop(kind, a.double(), b.double(), sizes, None if bias is None else bias.double())
    if kind == "rows":
        assert found.shape == (sum(sizes) + behind, b.shape[2])
        found = found[: sum(sizes)]
    else:
        assert [bool((of_group == 0).all()) for of_group in found] == [size == 0 for size in sizes]
    assert_as_accurate(found, truth, by_loop(kind, a, b, sizes, bias), f"{kind} {sizes} {gemm}")


def check_products(
    rank: Rank, gemm: GroupedGemm, sizes: Sequence[int], widths: Sequence[int], dtype: torch.dtype, behind: int = 3
) -> None:
    """Both products; that of rows with contiguous and with transposed matrices, ours also at an odd address."""
    k, n, m = widths
    a, b, rows = (random(rank, dtype, *shape) for shape in ((sum(sizes), k), (len(sizes), k, n), (sum(sizes), m)))
    for matrices in (b, random(rank, dtype, len(sizes), n, k).mT, *([shifted(b)] if gemm == TritonGemm() else [])):
        check(gemm, "rows", a, matrices, sizes, behind)
    check(gemm, "weights", rows, a, sizes, behind)


@on_ranks(1)
@by_dtype
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_products_match_a_loop(rank: Rank, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    serves = library_serves([random(rank, dtype, 8, 8)])
    assert serves or rank.device.type == "cuda"
    for behind in (3, 0):
        check_products(rank, TritonGemm(), sizes, ODD, dtype, behind)
        if serves and dtype == torch.bfloat16:
            check_products(rank, LibraryGemm(), sizes, WHOLE, dtype, behind)
        if serves and rank.device.type == "cuda":
            check_products(rank, HopperGemm(), sizes, WHOLE, dtype, behind)
        if rank.device.type == "cpu":
            check_products(rank, LoopGemm(), sizes, ODD, dtype, behind)


@on_ranks(1)
@by_dtype
def test_products_of_many_tiles(rank: Rank, dtype: torch.dtype) -> None:
    gemm = TritonGemm(tiles=SMALL_TILES)
    check_products(rank, gemm, (35, 0, 20), (33, 40, 37), dtype)
    # More tiles of rows than a band holds, and matrices whose rows and experts are not contiguous.
    wide, many = torch.full((1, 20, 100), NAN, dtype=dtype, device=rank.device), (9 * 16 + 1,)
    wide[:, :, 7:39] = random(rank, dtype, 1, 20, 32)
    check(gemm, "rows", random(rank, dtype, *many, 20), wide[:, :, 7:39], many)
    # The largest tiles.
    widths = (260, 264, 272)
    tiles = tile_shape(dtype, 285, *widths[:2])
    assert all(extent < 260 for extent in (tiles.height, tiles.width, tiles.depth))
    check_products(rank, TritonGemm(), (300, 270), widths, dtype)


@promise("fp32")
@on_ranks(1)
def test_products_of_one_term_and_all_of_fp32_are_rounded_once(rank: Rank) -> None:
    """A score's gradient is one number: no other errors would average its own out."""
    for dtype in DTYPES:
        a, b = random(rank, dtype, 20, 1), random(rank, dtype, 1, 30)
        expected = (a.float() * b.float()).to(dtype)
        assert_bitwise(TritonGemm().rows(a, b[None], ends(rank.device, (20,))), expected)
        assert_bitwise(TritonGemm().weights(a.view(1, 20), b, ends(rank.device, (1,))), expected[None])
    sizes = (40, 30)
    a, b, groups = random(rank, dtype, 70, 90), random(rank, dtype, 2, 90, 50), ends(rank.device, sizes)
    for gemm in (TritonGemm(), LoopGemm()):
        assert_bitwise(gemm.rows(a, b, groups), by_loop("rows", a.double(), b.double(), sizes).float())
        assert_bitwise(gemm.weights(a, a, groups), by_loop("weights", a.double(), a.double(), sizes).float())


@on_ranks(1)
@pytest.mark.parametrize("sizes", [(4, 9, 20), (4, 60, 3), (60, 0, 3)], ids=str)
def test_groups_that_end_past_the_last_row(rank: Rank, sizes: tuple[int, ...]) -> None:
    dtype, gemm, groups = torch.float32, TritonGemm(tiles=SMALL_TILES), ends(rank.device, sizes)
    a, b = random(rank, dtype, 21, 5), random(rank, dtype, 3, 5, 7)
    fitting = torch.diff(groups.clamp(max=21), prepend=groups.new_zeros(1)).tolist()
    rows = with_nan_behind(a, behind=60)[:21]
    for kind, second, plain in (("rows", b, b), ("weights", rows, a)):
        truth = by_loop(kind, a.double(), plain.double(), fitting)
        assert_as_accurate(getattr(gemm, kind)(rows, second, groups), truth, by_loop(kind, a, plain, fitting))


@on_ranks(1)
def test_tiles_go_down_in_bands_and_end_with_the_rows(rank: Rank) -> None:
    def written(programs: int, rows: int, group_ends: Sequence[int], columns: int) -> Tensor:
        """Where the first programs of a product write, 16 rows more than there are."""
        experts, groups = len(group_ends), torch.tensor(group_ends, dtype=torch.int32, device=rank.device)
        a, b = torch.ones(rows, 16, device=rank.device), torch.ones(experts, 16, columns, device=rank.device)
        out = torch.zeros(rows + 16, columns, device=rank.device)
        arguments = (a, b, a, out, groups, experts, rows, triton.cdiv(rows, 16) + experts - 1)
        constants = {"K": 16, "N": columns, "EXPERTS": triton.next_power_of_2(experts), "HAS_BIAS": False}
        constants |= dict(zip(("STRIDE_E", "STRIDE_K", "STRIDE_N"), b.stride(), strict=True)) | SMALL_TILES.constants()
        launch(rows_kernel, (programs,), *arguments, device=rank.device, **constants)
        return out.bool()

    # Groups that end at rows 20 20 25: tiles that end at rows 16, 20 and 25, then none.
    for programs, end in ((1, 16), (2, 20), (3, 25), (4, 25)):
        found = written(programs, 27, (20, 20, 25), 16)
        assert found[:end].all()
        assert not found[end:].any()
    assert written(4, 25, (20, 20, 90), 16).sum(dim=0).tolist() == [25] * 16, "nothing is written past the last row"
    # Nine tiles of rows by two of columns: eight down the first column, eight down the second, then both of the ninth.
    for programs, heights in ((1, (1, 0)), (8, (8, 0)), (9, (8, 1)), (16, (8, 8)), (17, (9, 8)), (18, (9, 9))):
        found = written(programs, 9 * 16, (9 * 16,), 32).view(10, 16, 2, 16)
        for column, height in enumerate(heights):
            assert found[:height, :, column].all()
            assert not found[height:, :, column].any()


@on_ranks(1)
@by_dtype
def test_tiles_are_no_larger_than_needed(rank: Rank, dtype: torch.dtype) -> None:
    largest = LARGEST[dtype.itemsize]
    # A program has at most 227 KiB of shared memory on Hopper.
    assert (largest.height + largest.width) * largest.depth * largest.stages * dtype.itemsize <= 227 * 2**10
    assert tile_shape(dtype, 4096, 4096, 4096) == (LARGEST_INTERPRETED if rank.device.type == "cpu" else largest)
    least = tile_shape(dtype, 1, 17, 3)
    assert (least.height, least.width, least.depth) == (LEAST_EXTENT, 32, LEAST_EXTENT)


def layer_operands(rank: Rank, dtype: torch.dtype, hidden: int, up: int, inner: int) -> list[Tensor]:
    """x, w1, w2 of two experts."""
    return [random(rank, dtype, *shape) for shape in ((5, hidden), (2, up, hidden), (2, hidden, inner))]


def odd_views(operand: Tensor) -> list[Tensor]:
    """At an odd address, with rows of odd length, with every other element, those transposed, one row many times."""
    every_other = operand.repeat_interleave(2, -1)[..., ::2]
    repeated = operand[..., :1, :].expand_as(operand)
    return [shifted(operand), operand[..., :-1], every_other, every_other.mT, repeated]


@on_ranks(1)
@by_dtype
def test_choice_of_the_implementation(rank: Rank, dtype: torch.dtype) -> None:
    on_cpu = rank.device.type == "cpu"
    halves, on_hopper = dtype != torch.float32, not on_cpu and capability_of(rank.device) == HOPPER
    best = LoopGemm() if on_cpu else HopperGemm() if on_hopper and halves and gluon_is_proven() else TritonGemm()
    x, w1, w2 = layer_operands(rank, dtype, 32, 16, 8)
    for operands in ((x, w1, w2), (x[:0], w1, w2), (x, w1.transpose(1, 2), w2.mT)):
        assert grouped_gemm(operands) == best
    for at, operand in enumerate((x, w1, w2)):
        for view in odd_views(operand):
            operands = [x, w1, w2]
            operands[at] = view
            assert grouped_gemm(operands) == TritonGemm(), (at, view.shape, view.stride())
    # Rows are 16-byte aligned, but the distance of the matrices is not a multiple of 16 bytes.
    misaligned = w1.new_empty(2 * 512 + 1).as_strided((2, 16, 32), (513, 32, 1))
    assert grouped_gemm((x, misaligned, w2)) == TritonGemm()
    for widths in ((31, 16, 8), (32, 15, 8), (32, 16, 7)):
        assert grouped_gemm(layer_operands(rank, dtype, *widths)) == TritonGemm()
    many = w1[:1, :8, :8].repeat(1024, 1, 1)
    assert grouped_gemm((x, many[:-1])) == best
    assert grouped_gemm((x, many)) == TritonGemm()


@on_ranks(1)
@by_dtype
def test_a_bias_is_added_before_the_rounding(rank: Rank, dtype: torch.dtype) -> None:
    sizes = (3, 0, 18)
    odd, whole, small = (33, 21), (32, 24), TritonGemm(tiles=SMALL_TILES)
    library = LibraryGemm() if rank.device.type == "cuda" else LoopGemm()
    cases = list(product((odd, whole), (small, TritonGemm(), library)))
    if rank.device.type == "cuda" and library_serves([random(rank, dtype, 8, 8)]):
        cases.append((whole, HopperGemm()))
    for (depth, width), gemm in cases:
        a, b = random(rank, dtype, sum(sizes), depth), random(rank, dtype, len(sizes), depth, width)
        bias = random(rank, dtype, len(sizes), width)
        check(gemm, "rows", a, b, sizes, bias=bias)


@pytest.mark.parametrize("major", [9, 10, 8, 12])
def test_the_capability_decides(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs: on GPUs of other capabilities PyTorch's products read the host."""
    monkeypatch.setattr("sonic_ep.fast.gemm.capability_of", lambda device: major)
    monkeypatch.setattr("sonic_ep.fast.gemm.gluon_is_proven", lambda: False)
    device = torch.device("cuda", 0)
    served = {dtype: _device_serves(device, dtype) for dtype in DTYPES}
    assert served == {torch.bfloat16: major in (9, 10), torch.float16: False, torch.float32: False}
    assert library_gemm(device, 7) == LibraryGemm(rows_per_group=7, zeroes_weights=major == 9)
    monkeypatch.setattr("sonic_ep.fast.gemm.gluon_is_proven", lambda: True)
    assert _device_serves(device, torch.float16) == (major == 9)
    assert isinstance(library_gemm(device), HopperGemm) == (major == 9)


@on_ranks(1)
def test_weights_of_a_library_that_leaves_them(rank: Rank) -> None:
    """After Hopper PyTorch does not write those of an empty group: there ours sum them."""
    check(LibraryGemm(zeroes_weights=False), "weights", *(random(rank, torch.float32, 8, n) for n in (5, 3)), (3, 0, 5))


@on_ranks(1)
def test_an_x_without_tokens_chooses_as_others_do(rank: Rank) -> None:
    """Whatever its strides: products read the rows received, not x."""
    from sonic_ep.fast.call_plan import CallPlan

    chosen, choose = [], CallPlan.gemm
    w1, w2 = random(rank, torch.bfloat16, 2, 16, 32), random(rank, torch.bfloat16, 2, 32, 8)
    odd, tokens = random(rank, torch.bfloat16, 5, 33)[:0, :32], random(rank, torch.bfloat16, 4, 32)
    assert odd.stride() == (33, 1)
    with pytest.MonkeyPatch.context() as patch, ExpertParallel(backend="fast", max_tokens_per_rank=8) as ep:
        patch.setattr(CallPlan, "gemm", lambda *given: chosen.append(choose(*given)) or chosen[-1])
        for x in (odd, tokens):
            idx = torch.zeros((len(x), 1), dtype=torch.int64, device=rank.device)
            ep.moe_routed(x, idx, torch.ones((len(x), 1), device=rank.device), w1, w2)
    assert type(chosen[0]) is type(chosen[1])
    assert type(chosen[0]) is not TritonGemm
