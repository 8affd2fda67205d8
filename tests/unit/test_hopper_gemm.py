"""The products in Gluon: which rows their descriptors describe, the order of tiles, machine code; on GPUs, the results.

``test_gemm`` holds them against a loop over the groups, as all products.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from limits import HANG_SECONDS
from on_ranks import on_ranks
from torch import Tensor

from sonic_ep.testing import Rank, assert_bitwise

# Only ranks launch anything: this process need not interpret.
pytest.importorskip("triton")
from gluon_model import on_model

from sonic_ep.compat import gluon_is_proven
from sonic_ep.fast import device_functions, hopper_tiles
from sonic_ep.fast.gemm import HOPPER, LibraryGemm
from sonic_ep.fast.hopper_gemm import HopperGemm
from sonic_ep.fast.hopper_tiles import MOST_ROWS, within_groups

HELPERS = Path(__file__).parents[1] / "helpers"
pytestmark = pytest.mark.fast


def test_rows_within_groups_are_where_they_say() -> None:
    """As TMA computes: an address of 64 bits from coordinates and strides, if each coordinate is within its bound."""
    row_bytes, most = 24 * 2, MOST_ROWS.value
    described = within_groups(4096, torch.bfloat16, 24, 64, 128)
    assert described.base.data_ptr() == 4096
    assert (described.shape[-1], described.strides[-1], described.block_shape) == (24, 1, [1, 1, 64, 128])

    def row_at(coordinates: Sequence[int]) -> int | None:
        """The row there; None out of bounds."""
        inside = all(0 <= at < bound for at, bound in zip(coordinates, described.shape, strict=False))
        distance = sum(at * stride for at, stride in zip(coordinates, described.strides, strict=False))
        return distance * 2 % 2**64 // row_bytes if inside else None

    assert row_at((most, 5, most - 2)) == 3
    assert row_at((most, 5, most)) is None
    for end in (0, 1, 5, 10):
        found = [row_at((most, end, most - end + row)) for row in range(14)]
        assert found == [row if row < end else None for row in range(14)], end
    # TMA's own limit on distances.
    assert all(stride * 2 < 2**40 for stride in described.strides)


def test_examples_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic that Python does as well."""
    ends = [20, 20, 25]
    memory = SimpleNamespace(minimum=min, load=lambda place, mask, other: ends[place] if mask else other, constexpr=int)
    monkeypatch.setattr(hopper_tiles, "gl", memory)
    monkeypatch.setattr(device_functions, "tl", memory)
    monkeypatch.setattr(device_functions, "BAND", 8)
    monkeypatch.setattr(hopper_tiles, "rows_of_group", hopper_tiles.rows_of_group.fn)
    found = [hopper_tiles.group_of_tile.fn(tile, 0, 0, (0, 3, 25), 16, 2) for tile in range(7)]
    assert found == [(0, 0, 0, 20)] * 4 + [(2, 4, 20, 25)] * 2 + [(3, 6, 0, 0)]
    # The same from an earlier tile on; rows past R count as none.
    assert hopper_tiles.group_of_tile.fn(5, 2, 4, (0, 3, 25), 16, 2) == found[5]
    assert hopper_tiles.group_of_tile.fn(4, 0, 0, (0, 3, 18), 16, 2) == (3, 4, 0, 0)
    assert hopper_tiles.rows_of_group(2, (0, 3, 18)) == (18, 18)
    places = [hopper_tiles.place_of_tile.fn(tile, 9, 2) for tile in range(18)]
    assert places[:9] == [*((row, 0) for row in range(8)), (0, 1)]
    assert places[16:] == [(8, 0), (8, 1)]
    assert len(set(places)) == 18


def test_machine_code_for_hopper() -> None:
    """Without a GPU. Other releases of Triton than those proven on one are compiled, too."""
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HELPERS / "compile_hopper.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[0])
    assert len(found) == 6
    for kernel in found:
        assert kernel["spilled_bytes"] == 0, kernel
        # What a program may have on Hopper.
        assert kernel["shared_bytes"] <= 227 * 2**10, kernel
        assert (kernel["multiplies"], kernel["loads"], kernel["stores"]) == (True, True, True), kernel
        assert (kernel["frees_in_order"], kernel["stores_in_order"]) == (True, True), kernel


def whole_numbers(*shape: int) -> Tensor:
    """Small ones, whose sums are exact in any order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def by_loop(rows: Tensor, others: Tensor, ends: Sequence[int]) -> Tensor:
    """The rows times the matrix of their group, or of each group the sum of products of its rows."""
    parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    if others.ndim == 3:
        found = [rows[part].float() @ matrix.float() for part, matrix in zip(parts, others, strict=True)]
        return torch.cat(found).bfloat16()
    return torch.stack([rows[part].float().t() @ others[part].float() for part in parts]).bfloat16()


# Ends of groups, R, K and N. Groups without rows, of one tile and of several, rows past the last group, groups that end
# past R; fewer tiles than programs and more, a depth of one step and of more than are in flight, widths of no tile.
OF_MODEL = [
    ((130, 130, 137), 142, 72, 136),
    ((0, 0, 3), 3, 8, 8),
    ((40, 300, 1400, 1400), 1400, 328, 72),
    ((130, 5000, 9000), 200, 64, 264),
    ((0,), 5, 16, 16),
]


@pytest.mark.parametrize(("ends", "rows", "depth", "width"), OF_MODEL, ids=str)
def test_products_on_a_model_of_the_gpu(ends: tuple[int, ...], rows: int, depth: int, width: int) -> None:
    """On the CPU the kernels' own code, with copies, barriers and products as Hopper's: see ``gluon_model``."""
    a, b, matrices = whole_numbers(rows, depth), whole_numbers(rows, width), whole_numbers(len(ends), depth, width)
    valid = [min(end, rows) for end in ends]
    for tensor in (a, b):
        tensor[valid[-1] :] = float("nan")
    group_ends = torch.tensor(ends, dtype=torch.int32)
    for given in (matrices, matrices.mT.contiguous().mT):
        with on_model(a, given.mT if given.stride(2) != 1 else given, group_ends):
            found = HopperGemm().rows(a, given, group_ends)
        assert_bitwise(found[: valid[-1]], by_loop(a, matrices, valid))
        assert bool(found[valid[-1] :].isnan().all()), "rows past the last group were written"
    with on_model(a, b, group_ends):
        found = HopperGemm().weights(a, b, group_ends)
    assert_bitwise(found, by_loop(a, b, valid))


ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == HOPPER and gluon_is_proven()
WANTED = "needs a Hopper GPU, and a release of Triton whose Gluon has run on one"


def on_hopper(body: Callable[..., None]) -> Callable[..., None]:
    """A test of one rank on such a GPU: these kernels are not interpreted."""
    return pytest.mark.skipif(not ON_HOPPER, reason=WANTED)(on_ranks(1, pool="cuda_pool")(body))


def operands(
    device: torch.device, sizes: Sequence[int], widths: tuple[int, int], behind: int = 0
) -> tuple[Tensor, ...]:
    """Rows (R, M) and (R, N), matrices (e, M, N), and group ends; NaN behind the valid rows."""
    generator = torch.Generator(device).manual_seed(sum(sizes))
    shapes = [(sum(sizes) + behind, widths[0]), (sum(sizes) + behind, widths[1]), (len(sizes), *widths)]
    a, b, matrices = (torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes)
    for rows in (a, b):
        rows[sum(sizes) :] = float("nan")
    return a, b, matrices, torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


# Groups of no row, one, a tile and one more, several bands; depths and widths that fill no tile, and many.
SHAPES = [((300, 0, 1, 129), (264, 520)), ((1200, 3), (2880, 136)), ((0, 0, 700), (72, 2880)), ((5,), (8, 8))]


@on_hopper
@pytest.mark.parametrize(("sizes", "widths"), SHAPES, ids=str)
def test_the_bits_are_those_of_the_library(rank: Rank, sizes: tuple[int, ...], widths: tuple[int, int]) -> None:
    for behind in (0, 37):
        a, b, matrices, ends = operands(rank.device, sizes, widths, behind)
        for given in (matrices, matrices.mT.contiguous().mT):
            found, expected = (gemm.rows(a, given, ends) for gemm in (HopperGemm(), LibraryGemm()))
            assert_bitwise(found[: sum(sizes)], expected[: sum(sizes)])
        found, expected = (gemm.weights(a, b, ends) for gemm in (HopperGemm(), LibraryGemm()))
        assert_bitwise(found, expected)


@on_hopper
def test_nothing_is_written_past_the_last_group(rank: Rank) -> None:
    a, _, matrices, ends = operands(rank.device, (130, 0, 7), (264, 520), behind=50)
    out = torch.full((len(a), 520), float("nan"), device=rank.device, dtype=a.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *given, **options: out)
        HopperGemm().rows(a, matrices, ends)
    assert bool(out[137:].isnan().all())
    assert bool(out[:137].isfinite().all())


@on_hopper
def test_groups_that_end_past_the_last_row(rank: Rank) -> None:
    a, b, matrices, ends = operands(rank.device, (130, 70), (264, 520))
    past = ends + torch.tensor([0, 5000], dtype=torch.int32, device=rank.device)
    assert_bitwise(HopperGemm().rows(a, matrices, past), HopperGemm().rows(a, matrices, ends))
    assert_bitwise(HopperGemm().weights(a, b, past), HopperGemm().weights(a, b, ends))


def test_more_rows_than_a_group_may_have_are_refused() -> None:
    """Before any memory is looked at: of these tensors there is none."""
    many, few = (torch.empty(rows, 8, dtype=torch.bfloat16, device="meta") for rows in (2**30 + 1, 2))
    matrices, ends = few.new_empty(2, 8, 16), few.new_empty(2, dtype=torch.int32)
    refused = pytest.raises(ValueError, match="grouped product: got 1073741825 rows, expected at most 1073741824")
    with refused:
        HopperGemm().rows(many, matrices, ends)
    with refused:
        HopperGemm().weights(many, many, ends)


def test_without_rows_nothing_is_launched() -> None:
    none, ends = torch.empty(0, 8, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    assert HopperGemm().rows(none, none.new_empty(2, 8, 16), ends).shape == (0, 16)
    assert_bitwise(HopperGemm().weights(none, none, ends), torch.zeros(2, 8, 8, dtype=torch.bfloat16))


# Operands between memory that is not there, of which TMA must read nothing, whatever a tile covers.
ALONE = """
import torch
from sonic_ep.fast.hopper_gemm import HopperGemm

def alone(*shape):
    size = 2 * torch.Size(shape).numel()
    around = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    memory = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    around.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    return memory.normal_()

ends = torch.arange(1, 33, dtype=torch.int32, device="cuda") * 1024
rows, others, matrices = alone(32768, 5760), alone(32768, 2880), alone(32, 5760, 2880)
for product in (HopperGemm().rows(rows, matrices, ends), HopperGemm().weights(rows, others, ends)):
    assert bool(product.isfinite().all())
print("ran")
"""


@on_hopper
def test_no_memory_is_read_that_is_not_there(rank: Rank) -> None:
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sys.executable, "-c", ALONE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert run.stdout.endswith("ran\n"), run.stderr[-4000:]
