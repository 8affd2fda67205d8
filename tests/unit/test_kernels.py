"""Kernels one by one: the examples of their docstrings, order, rounding, range, and machine code."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
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
from sonic_ep.reference.plan import build_plan
from sonic_ep.testing import Rank, RankPool, assert_bitwise

# Only ranks launch anything: this process need not interpret.
pytest.importorskip("triton")
import triton
import triton.language as tl

from sonic_ep.fast import counting_sort, plan, sync
from sonic_ep.fast.choice import choose_experts
from sonic_ep.fast.collectives import BLOCK
from sonic_ep.fast.combine import base
from sonic_ep.fast.combine.all_to_all import exchange_rows_kernel
from sonic_ep.fast.device_functions import push_value, rank_and_token, rounded
from sonic_ep.fast.dispatch.rank_dedup import pull_packed_kernel
from sonic_ep.fast.experts import INTERPRETED_TILE, SUMMED_ROWS, add_bias_dots_kernel
from sonic_ep.fast.launch import PROGRAMS_INTERPRETED, PROGRAMS_PER_MULTIPROCESSOR, launch
from sonic_ep.fast.permute import gather_rows
from sonic_ep.fast.staging import SLOTS, VECTOR_BYTES, stage_kernel

PROGRAM = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"
pytestmark = pytest.mark.fast


def index(rank: Rank, *numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=rank.device)


def table_of(*halves: Tensor) -> Tensor:
    """Addresses, (2 * W,): the first halves of all ranks, then the second."""
    return torch.tensor([half.data_ptr() for half in halves], device=halves[0].device)


@on_ranks(1)
def test_examples_of_the_plan(rank: Rank) -> None:
    run, device_errors = partial(launch, device=rank.device), index(rank, 0, 0, 0)
    epoch = torch.tensor(1, dtype=torch.int32, device=rank.device)
    # Two tokens with the experts 0 2 and 1 0 of four, on two ranks: staged before the barrier, in the first halves.
    staged, other = index(rank, 0, 2, 1, 0), index(rank, *[7] * 4)
    table = table_of(staged, staged, other, other)
    ids, counts = index(rank, *[9] * 8), index(rank, *[9] * 12)
    tile = {"K": 2, "K_PADDED": 2, "TOKENS": 2, "EXPERTS_PADDED": 8}
    arguments = (table, table, epoch, ids, ids, counts, device_errors, 2, 1, 4, 2, 2)
    run(counting_sort.count_kernel, (2,), *arguments, HAS_SCORES=False, **tile)
    assert ids.tolist() == [0, 2, 1, 0] * 2
    assert counts.tolist() == [2, 1, 1, 0, 2, 1] * 2
    assert device_errors.tolist() == [0, 0, 0]
    # With scores, which stand in halves of their own; rank 1 has an id out of range.
    wrong, own = index(rank, 0, -2, 1, 0), torch.tensor([0.5, 0.25, 1.0, 2.0], device=rank.device)
    theirs, none = -own, own * 0
    tables = (table_of(other, other, staged, wrong), table_of(none, none, own, theirs))
    scores = torch.zeros(8, device=rank.device)
    arguments = (*tables, epoch - 1, ids, scores, counts, device_errors, 2, 1, 4, 2, 2)
    run(counting_sort.count_kernel, (2,), *arguments, HAS_SCORES=True, **tile)
    assert ids.tolist() == [0, 2, 1, 0, 0, -1, 1, 0]
    assert scores.tolist() == [0.5, 0.25, 1, 2, -0.5, -0.25, -1, -2]
    assert counts.tolist() == [2, 1, 1, 0, 2, 1, 2, 1, 0, 0, 2, 0]
    assert device_errors.tolist() == [2, 0, 0]
    counts = index(rank, 2, 0, 3, 9)
    run(counting_sort.scan_kernel, (1,), counts, 3, 1, TILES=2, BINS=4)
    assert counts.tolist() == [0, 2, 2, 5]


@on_ranks(1)
@pytest.mark.parametrize("scanned", [1, 0])
def test_examples_of_placing(rank: Rank, scanned: int) -> None:
    """From sums over tiles, or from the counts of few tiles."""
    run, fields = partial(launch, device=rank.device), (4, 4, 4, 2, 2, 2, 1)
    tile = {"K": 1, "K_PADDED": 1, "TOKENS": 4, "EXPERTS_PADDED": 4, "COMPARED": 4, "RANKS_PADDED": 2}
    # Four slots of one tile with experts 1 0 1 0: 0 0 1 1 of each expert before them, and expert 1 begins at row 2.
    ids, device_errors = index(rank, 1, 0, 1, 0), index(rank, 0, 0, 0)
    before = index(rank, *([0, 0, 0, 2, 2, 4] if scanned else [2, 2, 4, 9, 9, 9]))
    row_of_slot, slot_of_row, packed, counts, copy, ends, pairs = (index(rank, *[9] * size) for size in fields)
    pointers = (ids, before, row_of_slot, slot_of_row, packed, counts, copy, ends, pairs, device_errors)
    run(counting_sort.place_kernel, (2,), *pointers, 0, 4, 1, 2, 2, 1, 4, 4, scanned, **tile)
    assert row_of_slot.tolist() == [2, 0, 3, 1]
    assert slot_of_row.tolist() == [1, 3, 0, 2]
    assert packed.tolist() == [0, 1, 2, 3]
    assert (counts.tolist(), copy.tolist(), ends.tolist(), pairs.tolist()) == ([2, 2], [2, 2], [2, 4], [4])
    assert device_errors.tolist() == [0, 0, 0]
    # On rank 1 of two, with one expert each: tiles that begin with 0 and 3 tokens there before them, and 5 in all;
    # three rows on rank 0 where two have room.
    sums, counts_of_tiles = [0, 0, 0, 0, 2, 1, 3, 3, 3, 3, 5, 5], [2, 1, 3, 3, 1, 2, 2, 2, 9, 9, 9, 9]
    before = index(rank, *(sums if scanned else counts_of_tiles))
    ids, ends, pairs = index(rank, *[-1] * 8), index(rank, 9), index(rank, *[9] * 4)
    row_of_slot, packed = index(rank, *[9] * 8), index(rank, *[9] * 8)
    pointers = (ids, before, row_of_slot, slot_of_row, packed, counts, copy, ends, pairs, device_errors)
    run(counting_sort.place_kernel, (4,), *pointers, 1, 4, 1, 2, 1, 2, 2, 2, scanned, **tile)
    assert pairs.tolist() == [3, 3, 2, 2]
    assert ends.tolist() == [3]
    assert counts.tolist() == [3, 3]
    assert (row_of_slot.tolist(), packed.tolist()) == ([-1] * 8, [-1] * 8)
    assert device_errors.tolist() == [0, 1, 3]


STAGE = {"SLOTS": 8, "VECTOR": 8, "BLOCK": 64}
HALF_BYTES = 512


@on_ranks(1)
@pytest.mark.parametrize("epoch", [0, 1, 2**31 - 1, -(2**31)])
def test_staging_writes_its_own_half_and_nothing_else(rank: Rank, epoch: int) -> None:
    """As rank 1 of two. Three ids given and room for ten: one dropped, one out of range; two programs, two of rows."""
    kinds = (torch.int32, torch.float32, torch.bfloat16)
    # Of each kind four halves, of two ranks, one behind the other, with a margin at both ends.
    buffers = [torch.full((6 * HALF_BYTES,), 77, dtype=torch.uint8, device=rank.device) for _ in kinds]
    tables = [table_of(*(buffer[HALF_BYTES * (1 + half) :] for half in (0, 2, 1, 3))) for buffer in buffers]
    mine = slice(HALF_BYTES * (3 + epoch % 2), HALF_BYTES * (4 + epoch % 2))
    halves = [buffer[mine].view(kind) for buffer, kind in zip(buffers, kinds, strict=True)]
    untouched = [half.clone() for half in halves]
    ids = torch.tensor([1, -1, 2], device=rank.device)
    scores = torch.tensor([0.5, 0.25, 2.0], device=rank.device)
    rows = torch.randn(99, device=rank.device).bfloat16()
    counter = torch.tensor(epoch, dtype=torch.int32, device=rank.device)
    arguments = (ids, scores, rows, *tables, counter, 1, 2, 3, 10, 2, 99)
    launch(stage_kernel, (4,), *arguments, device=rank.device, HAS_IDS=True, HAS_SCORES=True, **STAGE)
    assert halves[0][:10].tolist() == [1, -1, -2, *[-1] * 7]
    assert_bitwise(halves[1][:3], scores)
    assert_bitwise(halves[2][:99], rows)
    # Of rows whole groups of 16 bytes are written; see `stage_numbers`.
    for half, before, written in zip(halves, untouched, (10, 3, 104), strict=True):
        assert_bitwise(half[written:].view(torch.uint8), before[written:].view(torch.uint8), "behind what is staged")
    for buffer in buffers:
        buffer[mine] = 77
        assert bool((buffer == 77).all()), "outside of the half"


@on_ranks(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_staging_reads_nothing_past_rows_that_begin_between_two_accesses(rank: Rank, dtype: torch.dtype) -> None:
    """Where rows do not begin with 16 bytes that are read at once, the last of these would reach past their memory."""
    source = torch.arange(120, device=rank.device, dtype=dtype)
    rows = source[1:100]
    epoch, staged = torch.zeros((), dtype=torch.int32, device=rank.device), torch.full_like(source, -7)
    table = table_of(staged, staged)
    arguments = (epoch, rows, rows, *[table] * 3, epoch, 0, 1, 0, 0, 0, len(rows))
    constants = {"SLOTS": 8, "VECTOR": VECTOR_BYTES // dtype.itemsize, "BLOCK": 64}
    launch(stage_kernel, (2,), *arguments, device=rank.device, HAS_IDS=False, HAS_SCORES=False, **constants)
    assert_bitwise(staged[:99], rows)
    assert bool((staged[99:] == -7).all())


@on_ranks(1)
def test_ids_past_64_bits_are_out_of_range_and_none_past_those_given(rank: Rank) -> None:
    """int64 ids that an int32 would cut to one in range."""
    given = torch.tensor([2**32, 2**32 - 1, -(2**33) + 1, 3, -3, 4], device=rank.device)
    epoch, staged = torch.zeros((), dtype=torch.int32, device=rank.device), index(rank, *[9] * 8)
    table = table_of(staged, staged)
    arguments = (given, given, epoch, *[table] * 3, epoch, 0, 1, 6, 8, 4, 0)
    launch(stage_kernel, (1,), *arguments, device=rank.device, HAS_IDS=True, HAS_SCORES=False, **STAGE)
    assert staged.tolist() == [-2, -2, -2, 3, -2, -2, -1, -1]


@triton.jit
def halves_kernel(epochs_ptr, out_ptr, world_size, COUNT: tl.constexpr):
    """``staged_at`` of each epoch, before and after the barrier."""
    for i in range(COUNT):
        tl.store(out_ptr + 2 * i, sync.staged_at(epochs_ptr + i, world_size, False))
        tl.store(out_ptr + 2 * i + 1, sync.staged_at(epochs_ptr + i, world_size, True))


@on_ranks(1)
def test_examples_of_halves(rank: Rank) -> None:
    """After 0 1 2 barriers a step stages in halves 0 1 0, and reads there after one more; also past 2**31."""
    epochs = index(rank, 0, 1, 2, 3, 2**31 - 2, 2**31 - 1, -(2**31), 1 - 2**31, -1)
    out = index(rank, *[9] * 2 * len(epochs))
    launch(halves_kernel, (1,), epochs, out, 3, device=rank.device, COUNT=len(epochs))
    staged, read = out[::2].tolist(), out[1::2].tolist()
    assert staged == [0, 3, 0, 3, 0, 3, 0, 3, 3]
    assert read == [3 - half for half in staged]


@triton.jit
def push_kernel(values_ptr, slots_ptr, origins_ptr, rank, slots_per_rank, COUNT: tl.constexpr):
    """``push_value`` of several at once, then of the first alone."""
    i = tl.arange(0, COUNT)
    push_value(tl.load(values_ptr + i), tl.load(slots_ptr + i), origins_ptr, rank, slots_per_rank)
    push_value(tl.load(values_ptr) + 1, tl.load(slots_ptr), origins_ptr, rank, slots_per_rank)


@on_ranks(1)
def test_example_of_pushed_values(rank: Rank) -> None:
    """From rank 2 of three with 8 slots each: slots 3 and 9 go to ranks 0 and 1; its own and none go nowhere."""
    received = [torch.zeros(8, device=rank.device) for _ in range(3)]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], device=rank.device)
    arguments = (values, index(rank, 3, 9, 17, -1), table_of(*received), 2, 8)
    launch(push_kernel, (1,), *arguments, device=rank.device, COUNT=4)
    assert [values.tolist() for values in received] == [[0, 0, 0, 2, 0, 0, 0, 0], [0, 2, *[0] * 6], [0] * 8]


@triton.jit
def visit_kernel(ticket_ptr, visits_ptr, order_ptr, rank, world_size, tokens, lag):
    """Count what the programs of a combine take."""
    ticket = base.take_ticket(tl.program_id(0), ticket_ptr, world_size)
    tl.atomic_add(order_ptr + ticket, 1)
    origin, group = base.origin_and_group(ticket, rank, world_size, lag)
    if (group >= 0) & (group < tokens):
        tl.atomic_add(visits_ptr + origin * tokens + group, 1)


@on_ranks(1)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_ticket_and_every_token_is_taken_once(rank: Rank, ranks: int) -> None:
    """By the programs of several launches in a row, of other sizes."""
    ticket = torch.zeros((), dtype=torch.int32, device=rank.device)
    for as_rank, (tokens, lag) in product(range(ranks), ((5, 5), (7, 2), (1, 1), (3, 0))):
        visits, order = index(rank, *[0] * ranks * tokens), index(rank, *[0] * ranks * (tokens + lag))
        arguments = (ticket, visits, order, as_rank, ranks, tokens, lag)
        launch(visit_kernel, (len(order),), *arguments, device=rank.device)
        assert int(ticket) == 0
        assert bool((order == 1).all())
        assert bool((visits == 1).all())


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
    addresses = torch.zeros(2, dtype=torch.int64, device=rank.device)
    arguments = (tokens, addresses, index(rank, 0), packed, index(rank, 0, -1, 1), 0, 1, 3)
    launch(pull_packed_kernel, (3,), *arguments, device=rank.device, WIDTH=4, BLOCK=4)
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


# Experts, of which four are chosen, and tokens of each of two ranks, each in a tile of its own: tiles from the 16th on
# have their counts 2**31 elements or more behind the first's.
FAR_EXPERTS, FAR_TOKENS = 2**27 - 2, 17
FAR_BYTES = (2 * FAR_TOKENS + 1) * 2**27 * 4 + 2**30


def counts_of_tiles(rank: Rank) -> None:
    """Count, scan and place on rank 0. The kernels visit few of the counts."""
    bins, tiles, run = FAR_EXPERTS + 2, 2 * FAR_TOKENS, partial(launch, device=rank.device)
    before = far_tensor(rank, (tiles + 1, bins), torch.int32)
    before[:, [0, 1, 2, 3, -2, -1]] = 0
    staged = torch.randint(0, 4, (2, FAR_TOKENS, 1), generator=torch.Generator().manual_seed(0)).int().to(rank.device)
    expected = build_plan(staged.cpu(), rank=0, num_tokens=FAR_TOKENS, num_experts=8, row_capacity=tiles)
    ids, device_errors = torch.full_like(staged, 9), index(rank, 0, 0, 0)
    epoch, experts = torch.tensor(1, dtype=torch.int32, device=rank.device), (FAR_EXPERTS, FAR_EXPERTS // 2)
    tile = {"K": 1, "K_PADDED": 1, "TOKENS": 1, "EXPERTS_PADDED": 4}
    table = table_of(*staged, *staged)
    arguments = (table, table, epoch, ids, ids, before, device_errors, FAR_TOKENS, FAR_TOKENS, *experts, 2)
    run(counting_sort.count_kernel, (tiles,), *arguments, HAS_SCORES=False, **tile)
    assert_bitwise(ids, staged)
    run(counting_sort.scan_kernel, (1,), before, tiles, bins, TILES=16, BINS=4)
    # The scan's programs of the bins between would take hours: all tokens have their slot on rank 0.
    before[:, -2] = torch.arange(tiles + 1, dtype=torch.int32, device=rank.device)
    row_of_slot, slot_of_row, packed = (index(rank, *[9] * tiles) for _ in range(3))
    counts, copy, ends, pairs = (index(rank, *[9] * 4) for _ in range(4))
    pointers = (ids, before, row_of_slot, slot_of_row, packed, counts, copy, ends, pairs, device_errors)
    arguments = (*pointers, 0, FAR_TOKENS, FAR_TOKENS, *experts, 2, tiles, tiles, 1)
    run(counting_sort.place_kernel, (tiles + 2,), *arguments, COMPARED=4, RANKS_PADDED=2, **tile)
    found = {"row_of_slot": row_of_slot, "slot_of_row": slot_of_row, "packed_of_token": packed, "group_ends": ends}
    for name, values in found.items():
        assert values.tolist() == getattr(expected, name).flatten().tolist(), name
    assert (counts.tolist(), copy.tolist()) == (expected.counts[:4].tolist(),) * 2
    assert pairs.tolist() == [FAR_TOKENS, 0, FAR_TOKENS, 0]
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
    arguments = (rows, bias, dots, index(rank, 0, 0), table_of(dots), ends, 0, 2, experts, 2)
    launch(add_bias_dots_kernel, (2,), *arguments, device=rank.device, **tile)
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
    tile = {"K": top_k, "K_PADDED": 2**11, "H": hidden, "COLUMNS": 1024, "num_warps": 4}
    tile |= dict.fromkeys(("HAS_SCORES", "STAGED_SCORES", "HAS_VALUES"), False)
    ticket = index(rank, 0)

    def run(as_rank: int, programs: int, out: Tensor) -> None:
        sizes, wait = (2, 1, 1, 1, 1, 0, 1, 0, 1), (as_rank, tag, 10**11)
        # The pointers of scores and of values are not read.
        pointers = (sent, sent, ids, ticket, out, ids, rows, sent, ids, sent, *addresses, ticket, wait_errors)
        launch(exchange_rows_kernel, (programs,), *pointers, *sizes, *wait, device=rank.device, **tile)

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
        "rows, interpreted": PROGRAMS_INTERPRETED * INTERPRETED_TILE,
        "rows of a tile": max(SUMMED_ROWS, 256),
        "slots of a tile: of K of them, padded": plan.TILE_SLOTS + plan.COMPARED_SLOTS + 2 * 2**16,
        "slots of a block": max(BLOCK, SLOTS),
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

    def type_of(argument: object, declared: str) -> str:
        if not isinstance(argument, Tensor):
            return "fp32" if isinstance(argument, float) else "i64" if "int64" in declared else "i32"
        return POINTERS.get(argument.dtype, f"*i{8 * argument.element_size()}")

    def record(kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
        name, parameters = kernel.fn.__name__, inspect.signature(kernel.fn).parameters.values()
        # The interpreter takes many rows of an activation at a time, a GPU one; see `sonic_ep.fast.experts`.
        one_row = {"ROWS": 1} if {"ROWS", "COLUMNS"} <= constants.keys() and name != "sum_groups_kernel" else {}
        types = [type_of(argument, str(p.annotation)) for argument, p in zip(arguments, parameters, strict=False)]
        entry = {"module": kernel.fn.__module__, "name": name, "types": types, "constants": {**constants, **one_row}}
        # Products in the interpreter's own tiles, which have one stage, are not for GPUs.
        if constants.get("STAGES") != 1:
            seen.setdefault(json.dumps(entry, sort_keys=True), entry)

    with each_launch(record):
        run_every_kernel(rank.device, dtype, hidden, top_k)
    return list(seen.values())


def compiled_for(capability: int, recorded: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(PROGRAM), str(recorded), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_kernel_compiles_for_blackwell(cpu_pool: RankPool, tmp_path: Path) -> None:
    """For compute capability 10.0, on which none has run."""
    recorded = tmp_path / "launches.json"
    recorded.write_text(json.dumps(cpu_pool.run(launches, torch.bfloat16, 4096, 8, world_size=2)[0]))
    compiled = compiled_for(100, recorded)
    in_gluon = {"hopper_rows_kernel", "hopper_weights_kernel"}
    assert {entry["name"] for entry in compiled} == set(kernels()) - in_gluon
    assert [entry for entry in compiled if entry["spilled_bytes"]] == []


@pytest.mark.parametrize(
    ("dtype", "hidden"), [(torch.bfloat16, 4096), pytest.param(torch.float32, 33, marks=pytest.mark.thorough)], ids=str
)
def test_every_kernel_compiles_for_hopper(cpu_pool: RankPool, tmp_path: Path, dtype: torch.dtype, hidden: int) -> None:
    """Without a GPU: Triton and its own assembler, for compute capability 9.0, with the arguments of real calls."""
    recorded = tmp_path / "launches.json"
    recorded.write_text(json.dumps(cpu_pool.run(launches, dtype, hidden, 8, world_size=2)[0]))
    compiled = compiled_for(90, recorded)
    # They split gradients of half precision.
    not_launched = set() if dtype == torch.bfloat16 else {"parts_kernel", "sum_parts_kernel"}
    # In Gluon, which is not interpreted: see test_hopper_gemm.
    not_launched |= {"hopper_rows_kernel", "hopper_weights_kernel"}
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
        if entry["stages_bytes"] > 0:
            # Of each thread as many accesses of 16 bytes as it takes: rows of any width are staged alike.
            each = entry["stages_bytes"] // (32 * constants.get("num_warps", 4) * VECTOR_BYTES)
            assert min(entry["wide_loads"], entry["wide_stores"]) >= max(1, each), entry
        if entry["waits"]:
            # A barrier announces what kernels before it have written.
            of_barrier = {"signals_after_stores": True} if name == "barrier_kernel" else {}
            assert all((entry["orders"] | of_barrier).values()), entry
        if name == "barrier_kernel":
            # Host memory is read only after a timeout of one of the two waits: otherwise combine is 5x slower.
            assert entry["host_reads_are_deeper"] == [True, True], entry
        if name in ("exchange_rows_kernel", "exchange_partial_sums_kernel"):
            assert entry["passes_first_cache"], entry
