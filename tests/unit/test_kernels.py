"""Kernels one by one: the examples of their docstrings, order, rounding, range, and machine code."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from every_kernel import run_every_kernel
from far_memory import far_tensor, skip_without_memory
from fast_kernels import each_launch, kernels
from limits import HANG_SECONDS
from on_ranks import on_ranks
from torch import Tensor

from sonic_ep.config import RouterOptions
from sonic_ep.plan import MOST_SLOTS
from sonic_ep.testing import Rank, RankPool, assert_bitwise

# Only ranks launch anything: this process need not interpret.
pytest.importorskip("triton")
import triton
import triton.language as tl

from sonic_ep.fast import plan
from sonic_ep.fast.collectives import BLOCK
from sonic_ep.fast.combine import base
from sonic_ep.fast.combine.all_to_all import exchange_rows_kernel
from sonic_ep.fast.device_functions import rank_and_token, rounded
from sonic_ep.fast.dispatch.rank_dedup import pull_packed_kernel
from sonic_ep.fast.experts import INTERPRETED_TILE, SUMMED_ROWS, add_bias_dots_kernel
from sonic_ep.fast.launch import PROGRAMS_PER_MULTIPROCESSOR, launch
from sonic_ep.fast.permute import gather_rows
from sonic_ep.fast.router import choose_experts

PROGRAM = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"
pytestmark = pytest.mark.fast


def index(rank: Rank, *numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=rank.device)


@on_ranks(1)
def test_examples_of_the_plan(rank: Rank) -> None:
    run, device_errors = partial(launch, device=rank.device), index(rank, 0, 0, 0)
    # Three ids given and room for four: one dropped, one out of range.
    staged = index(rank, 9, 9, 9, 9)
    run(plan.stage_ids_kernel, (1,), torch.tensor([1, -1, 2], device=rank.device), staged, 3, 4, 2, BLOCK=8)
    assert staged.tolist() == [1, -1, -2, -1]
    # Two tokens with the experts 0 2 and 1 0 of four, on two ranks.
    staged = index(rank, 0, 2, 1, 0)
    addresses = torch.tensor([staged.data_ptr()] * 2, device=rank.device)
    ids, counts = index(rank, *[9] * 8), index(rank, *[9] * 12)
    tile = {"K": 2, "K_PADDED": 2, "TOKENS": 2, "EXPERTS_PADDED": 8}
    run(plan.count_kernel, (2,), addresses, ids, counts, device_errors, 2, 1, 4, 2, 2, **tile)
    assert ids.tolist() == [0, 2, 1, 0] * 2
    assert counts.tolist() == [2, 1, 1, 0, 2, 1] * 2
    assert device_errors.tolist() == [0, 0, 0]
    counts, total = index(rank, 2, 0, 3), index(rank, 9)
    run(plan.scan_kernel, (1,), counts, total, 3, 1, TILES=2, BINS=4)
    assert (counts.tolist(), total.tolist()) == ([0, 2, 2], [5])
    # Four slots of one tile with experts 1 0 1 0: 0 0 1 1 of each expert before them, and expert 1 begins at row 2.
    ids, before, totals = index(rank, 1, 0, 1, 0), index(rank, 0, 0, 0), index(rank, 2, 2, 4)
    row_of_slot, slot_of_row, packed = (index(rank, *[9] * 4) for _ in range(3))
    tile = {"K": 1, "K_PADDED": 1, "TOKENS": 4, "EXPERTS_PADDED": 4, "COMPARED": 4}
    run(plan.place_kernel, (1,), ids, before, totals, row_of_slot, slot_of_row, packed, 0, 4, 1, 2, 2, 1, 4, **tile)
    assert row_of_slot.tolist() == [2, 0, 3, 1]
    assert slot_of_row.tolist() == [1, 3, 0, 2]
    assert packed.tolist() == [0, 1, 2, 3]
    # Tiles of two ranks that begin with 0 and 3 tokens before them, and a total of 5; three rows where two have room.
    before, totals = index(rank, 0, 0, 0, 0, 2, 1, 3, 3), index(rank, 3, 3, 5, 5)
    ends, pairs = index(rank, 9), index(rank, 9, 9, 9, 9)
    padded = {"EXPERTS_PADDED": 4, "RANKS_PADDED": 2}
    run(plan.totals_kernel, (2,), before, totals, ends, pairs, device_errors, 1, 1, 2, 1, 2, 2, **padded)
    assert pairs.tolist() == [3, 3, 2, 2]
    assert ends.tolist() == [3]
    assert device_errors.tolist() == [0, 1, 3]


@on_ranks(1)
def test_examples_of_rows(rank: Rank) -> None:
    received = torch.arange(12, dtype=torch.float32, device=rank.device).view(3, 4)
    # Two valid rows, of the first and the last of three experts.
    gathered = gather_rows(received, index(rank, 2, 0, -1), index(rank, 1, 1, 2))
    assert_bitwise(gathered[:2], received[[2, 0]])
    assert bool(gathered[2].isnan().all()), "rows behind the valid ones are not written"
    # More rows are routed here than there is room for.
    assert_bitwise(gather_rows(received, index(rank, 1), index(rank, 3)), received[[1]])
    packed = torch.full((3, 4), -1, dtype=torch.int32, device=rank.device)
    tokens = torch.arange(12, dtype=torch.int32, device=rank.device).view(3, 4)
    addresses = torch.zeros(1, dtype=torch.int64, device=rank.device)
    places = index(rank, 0, -1, 1)
    launch(pull_packed_kernel, (3,), tokens, addresses, packed, places, 0, 1, 3, device=rank.device, INTS=4, BLOCK=4)
    assert packed.tolist() == [tokens[0].tolist(), tokens[2].tolist(), [-1] * 4]


def test_examples_of_receive_slots_and_program_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic that Python does as well."""
    monkeypatch.setattr(base, "tl", SimpleNamespace(where=lambda condition, one, other: one if condition else other))
    slots = [base.receive_slot_of.fn(sender, 2, 5, 4, 10) for sender in (3, 0, 1)]
    of_dispatch = [rank_and_token.fn(program, 1, 3) for program in range(4)]
    of_combine = [base.origin_and_group.fn(program, 1, 3, 1) for program in range(6)]
    assert slots == [5, 15, 25]
    assert of_dispatch == [(1, 0), (2, 0), (0, 0), (1, 1)]
    assert of_combine == [(2, 0), (0, 0), (1, -1), (2, 1), (0, 1), (1, 0)]


# As many experts as there may be, and the least number of tiles of a rank that have more than 2**31 counts.
MOST_EXPERTS, FAR_TILES = 2**16, 2**15
FAR_BYTES = 2 * FAR_TILES * (MOST_EXPERTS + 2) * 4 + 2**30


def counts_of_tiles(rank: Rank) -> None:
    """Tiles of two ranks; the second rank's counts lie 2**31 elements behind the first's."""
    bins = MOST_EXPERTS + 2
    assert (FAR_TILES - 1) * bins < 2**31 <= FAR_TILES * bins
    before = far_tensor(rank, (2 * FAR_TILES, bins), torch.int32)
    before[0, MOST_EXPERTS:] = index(rank, 0, 0)
    before[FAR_TILES, MOST_EXPERTS:] = index(rank, 3, 1)
    totals = torch.zeros(bins, dtype=torch.int32, device=rank.device)
    totals[[0, MOST_EXPERTS - 2, MOST_EXPERTS - 1]] = index(rank, 7, 1, 2)
    totals[MOST_EXPERTS:] = index(rank, 5, 6)
    ends, pairs, device_errors = totals[: MOST_EXPERTS // 2] * 0, index(rank, *[9] * 4), index(rank, 0, 0, 0)
    sizes = (1, FAR_TILES, MOST_EXPERTS, MOST_EXPERTS // 2, 2, 7)
    padded = {"EXPERTS_PADDED": 2 * MOST_EXPERTS, "RANKS_PADDED": 2}
    launch(plan.totals_kernel, (2,), before, totals, ends, pairs, device_errors, *sizes, device=rank.device, **padded)
    assert pairs.tolist() == [3, 1, 2, 5]
    assert ends[-3:].tolist() == [0, 1, 3]
    assert device_errors.tolist() == [0, 0, 0]


def bias_of_an_expert(rank: Rank) -> None:
    """One row of the first expert and one of the last, whose bias lies 2**31 elements behind the first's."""
    experts, hidden = 2**15 + 1, 2**16
    bias = far_tensor(rank, (experts, hidden), torch.bfloat16)
    for expert, values in ((0, [1.0, 2.0]), (-1, [16.0, 32.0])):
        bias[expert] = 0
        bias[expert, [0, -1]] = torch.tensor(values, device=rank.device).bfloat16()
    rows = torch.ones(2, hidden, dtype=torch.bfloat16, device=rank.device)
    rows[1, -1] = 2
    ends = torch.ones(experts, dtype=torch.int32, device=rank.device)
    ends[-1] = 2
    dots = torch.tensor([0.0, 0.5], device=rank.device)
    tile = {"H": hidden, "ROWS": 1, "COLUMNS": 4096, "EXPERTS_PADDED": 2**16, "num_warps": 4}
    launch(add_bias_dots_kernel, (2,), rows, bias, dots, ends, experts, 2, device=rank.device, **tile)
    assert dots.tolist() == [3.0, 80.5]


def row_of_the_last_choice(rank: Rank) -> None:
    """The row of a token's last choice is received 2**31 elements behind that of the first.

    Under the interpreter the row is only sent; the sum would take an hour.
    """
    hidden, top_k, tag = 2**21, 2**10 + 1, 2**40
    received = far_tensor(rank, (top_k, hidden), torch.bfloat16)
    sent = torch.randn(1, hidden, device=rank.device).bfloat16()
    # Of two ranks with one expert each, the one token of rank 0 chooses the expert of rank 1, last of all.
    ids = torch.full((2, 1, top_k), -1, dtype=torch.int32, device=rank.device)
    rows = ids.clone()
    ids[0, 0, -1], rows[0, 0, -1] = 1, 0
    flags, wait_errors = (torch.zeros(4, dtype=torch.int64, device=rank.device) for _ in range(2))
    addresses = [torch.tensor([memory.data_ptr(), 0], device=rank.device) for memory in (received, flags)]
    tile = {"HAS_SCORES": False, "K": top_k, "K_PADDED": 2**11, "H": hidden, "COLUMNS": 1024, "num_warps": 4}

    def run(as_rank: int, programs: int, out: Tensor) -> None:
        sizes, wait = (2, 1, 1, 1, 1, 0, 1, 0, 1), (wait_errors, as_rank, tag, 10**11)
        arguments = (sent, sent, out, ids, rows, *addresses, *sizes, *wait)
        launch(exchange_rows_kernel, (programs,), *arguments, device=rank.device, **tile)

    out = torch.zeros_like(sent)
    run(1, 1, out)
    assert flags.tolist() == [tag, 0, 0, 0]
    assert_bitwise(received[-1], sent[0])
    if rank.device.type == "cuda":
        run(0, 2, out)
        assert_bitwise(out, sent)


@pytest.mark.parametrize("body", [counts_of_tiles, bias_of_an_expert, row_of_the_last_choice])
def test_offsets_past_int32(pool: RankPool, request: pytest.FixtureRequest, body: Callable[[Rank], None]) -> None:
    if request.node.callspec.params["pool"] == "cuda":
        skip_without_memory("cuda", FAR_BYTES)
    pool.run(body, world_size=1)


def choices_of_more_tokens_than_int32_counts(rank: Rank) -> None:
    """A call of so many is refused, but only after the router: until then no memory may be overwritten."""
    choices = choose_experts(torch.zeros(2**31 + 3, 1, device=rank.device), RouterOptions(top_k=1))
    assert bool((choices.topk_scores == 1).all())
    assert bool((choices.topk_idx == 0).all())


def test_choices_of_more_tokens_than_int32_counts(cuda_pool: RankPool) -> None:
    skip_without_memory("cuda", 5 * 2**33)
    cuda_pool.run(choices_of_more_tokens_than_int32_counts, world_size=1)


def test_no_index_of_a_kernel_passes_int32() -> None:
    """Past the last slot or row there is room for the furthest step that a kernel goes beyond it."""
    steps = {
        "rows, by as many programs as the largest GPU takes": PROGRAMS_PER_MULTIPROCESSOR * 1024,
        "rows, interpreted": PROGRAMS_PER_MULTIPROCESSOR * INTERPRETED_TILE,
        "rows of a tile": max(SUMMED_ROWS, 256),
        "slots of a tile: of K of them, padded": plan.TILE_SLOTS + plan.COMPARED_SLOTS + 2 * MOST_EXPERTS,
        "slots of a block": max(BLOCK, plan.STAGE_BLOCK),
        "programs of a combine": base.LAG_TOKENS * 1000,
    }
    assert {what: step for what, step in steps.items() if MOST_SLOTS + step > 2**31 - 1} == {}


@triton.jit
def round_kernel(values_ptr, rounded_ptr, COUNT: tl.constexpr, GIVEN: tl.constexpr):
    """Round fp32 to the dtype of the result."""
    place = tl.arange(0, COUNT)
    value = tl.load(values_ptr + place, mask=place < GIVEN, other=0.0)
    tl.store(rounded_ptr + place, rounded(value, rounded_ptr), mask=place < GIVEN)


@on_ranks(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_is_that_of_torch(rank: Rank, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    # Exact halves between neighbours of bf16, to even and to odd, and the ends of the range.
    halves = (torch.randint(0, 0x7F80, (1024,), generator=generator) << 16 | 0x8000).to(torch.int32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40, 65504.0, 65520.0])
    # Rounding by adding would carry these into zero or infinity.
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    values = torch.cat([part.view(torch.float32) for part in (bits, halves, special, nans)]).to(rank.device)
    found = torch.empty_like(values, dtype=dtype)
    launch(round_kernel, (1,), values, found, device=rank.device, COUNT=8192, GIVEN=len(values))
    expected = values.to(dtype)
    # Which bits a NaN has is up to the hardware.
    assert torch.equal(found.isnan(), expected.isnan())
    assert_bitwise(found.nan_to_num(7.0), expected.nan_to_num(7.0))


POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def launches(rank: Rank, dtype: torch.dtype, hidden: int, top_k: int) -> list[dict[str, Any]]:
    """Every kernel that forward and backward run on this rank, with the types of its arguments."""
    seen: dict[str, dict[str, Any]] = {}

    def type_of(argument: object) -> str:
        if not isinstance(argument, Tensor):
            return "fp32" if isinstance(argument, float) else "i32"
        return POINTERS.get(argument.dtype, f"*i{8 * argument.element_size()}")

    def record(kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
        name = kernel.fn.__name__
        # The interpreter takes many rows of an activation at a time, a GPU one; see `sonic_ep.fast.experts`.
        one_row = {"ROWS": 1} if {"ROWS", "COLUMNS"} <= constants.keys() and name != "sum_groups_kernel" else {}
        types = [type_of(argument) for argument in arguments]
        entry = {"module": kernel.fn.__module__, "name": name, "types": types, "constants": {**constants, **one_row}}
        # Products in the interpreter's own tiles, which have one stage, are not for GPUs.
        if constants.get("STAGES") != 1:
            seen.setdefault(json.dumps(entry, sort_keys=True), entry)

    with each_launch(record):
        run_every_kernel(rank.device, dtype, hidden, top_k)
    return list(seen.values())


@pytest.mark.parametrize(
    ("dtype", "hidden"), [(torch.bfloat16, 4096), pytest.param(torch.float32, 33, marks=pytest.mark.thorough)], ids=str
)
def test_every_kernel_compiles_for_hopper(cpu_pool: RankPool, tmp_path: Path, dtype: torch.dtype, hidden: int) -> None:
    """Without a GPU: Triton and its own assembler, for compute capability 9.0, with the arguments of real calls."""
    recorded = tmp_path / "launches.json"
    recorded.write_text(json.dumps(cpu_pool.run(launches, dtype, hidden, 8, world_size=2)[0]))
    command = [sys.executable, str(PROGRAM), str(recorded)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout)
    # The one runs after an error only, the others split gradients of half precision.
    not_launched = {"leave_kernel"} if dtype == torch.bfloat16 else {"leave_kernel", "parts_kernel", "sum_parts_kernel"}
    assert set(kernels()) - {entry["name"] for entry in compiled} <= not_launched
    for entry in compiled:
        name, constants = entry["name"], entry["constants"]
        assert entry["spilled_bytes"] == 0, entry
        if hidden == 4096 and name in ("activate_kernel", "activate_backward_kernel"):
            assert entry["wide_loads"] > 0 or constants["I"] < 128, entry
        if hidden == 4096 and entry["moves_rows"]:
            assert min(entry["wide_loads"], entry["wide_stores"]) > 0, entry
            assert entry["single_elements"] == 0, entry
        if hidden == 4096 and name in ("parts_kernel", "stage_sums_kernel", "sum_ranks_kernel", "sum_parts_kernel"):
            assert min(entry["wide_loads"], entry["wide_stores"]) > 0, entry
        if name == "gather_kernel" and constants["BLOCK"] > 1:
            assert entry["wide_loads"] > 0, entry
        if entry["waits"]:
            assert all(entry["orders"].values()), entry
        if name == "barrier_kernel":
            # Host memory is read only after a timeout of one of the two waits: otherwise combine is 5x slower.
            assert entry["host_reads_are_deeper"] == [True, True], entry
        if name in ("exchange_rows_kernel", "exchange_partial_sums_kernel"):
            assert entry["passes_first_cache"], entry
