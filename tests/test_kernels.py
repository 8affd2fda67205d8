"""Kernels one by one: the examples of their docstrings, their rounding, and what the compiler makes of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from every_kernel import run_every_kernel
from torch import Tensor

from sonic_ep.testing import Rank, RankPool, assert_bitwise

PROGRAM = Path(__file__).parent / "compile_kernels.py"
pytestmark = pytest.mark.fast


def index(rank: Rank, *numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=rank.device)


def examples_of_the_plan(rank: Rank) -> None:
    from sonic_ep.fast.device import launch
    from sonic_ep.fast.plan_kernels import count_kernel, place_kernel, scan_kernel, stage_ids_kernel, totals_kernel

    device = rank.device
    # Three ids given and room for four: one dropped, one out of range.
    staged = index(rank, 9, 9, 9, 9)
    launch(stage_ids_kernel, (1,), torch.tensor([1, -1, 2], device=device), staged, 3, 4, 2, device=device, BLOCK=8)
    assert staged.tolist() == [1, -1, -2, -1]
    # Two tokens with the experts 0 2 and 1 0 of four, on two ranks.
    staged = index(rank, 0, 2, 1, 0)
    addresses = torch.tensor([staged.data_ptr()] * 2, device=device)
    ids, counts, verdict = index(rank, *[9] * 8), index(rank, *[9] * 12), index(rank, 0, 0, 0)
    tile = {"K": 2, "K_PADDED": 2, "TOKENS": 2, "EXPERTS_PADDED": 8}
    launch(count_kernel, (2,), addresses, ids, counts, verdict, 2, 1, 4, 2, 2, device=device, **tile)
    assert ids.tolist() == [0, 2, 1, 0] * 2
    assert counts.tolist() == [2, 1, 1, 0, 2, 1] * 2
    assert verdict.tolist() == [0, 0, 0]
    counts, total = index(rank, 2, 0, 3), index(rank, 9)
    launch(scan_kernel, (1,), counts, total, 3, 1, device=device, TILES=2, BINS=4)
    assert (counts.tolist(), total.tolist()) == ([0, 2, 2], [5])
    # Four slots of one tile with experts 1 0 1 0: 0 0 1 1 of each expert before them, and expert 1 begins at row 2.
    ids, before, totals = index(rank, 1, 0, 1, 0), index(rank, 0, 0, 0), index(rank, 2, 2, 4)
    row_of_slot, slot_of_row, packed = (index(rank, *[9] * 4) for _ in range(3))
    sizes = (0, 4, 1, 2, 2, 1, 4)
    tile = {"K": 1, "K_PADDED": 1, "TOKENS": 4, "EXPERTS_PADDED": 4, "COMPARED": 4}
    launch(place_kernel, (1,), ids, before, totals, row_of_slot, slot_of_row, packed, *sizes, device=device, **tile)
    assert row_of_slot.tolist() == [2, 0, 3, 1]
    assert slot_of_row.tolist() == [1, 3, 0, 2]
    assert packed.tolist() == [0, 1, 2, 3]
    # Tiles of two ranks that begin with 0 and 3 tokens before them, and a total of 5; three rows where two have room.
    before, totals = index(rank, 0, 0, 0, 0, 2, 1, 3, 3), index(rank, 3, 3, 5, 5)
    ends, pairs = index(rank, 9), index(rank, 9, 9, 9, 9)
    sizes = (1, 1, 2, 1, 2, 2)
    launch(
        totals_kernel,
        (2,),
        before,
        totals,
        ends,
        pairs,
        verdict,
        *sizes,
        device=device,
        EXPERTS_PADDED=4,
        RANKS_PADDED=2,
    )
    assert pairs.tolist() == [3, 3, 2, 2]
    assert ends.tolist() == [3]
    assert verdict.tolist() == [0, 1, 3]


def test_examples_of_the_plan(pool: RankPool) -> None:
    pool.run(examples_of_the_plan, world_size=1)


def examples_of_rows(rank: Rank) -> None:
    from sonic_ep.fast.device import launch
    from sonic_ep.fast.dispatch.rank_dedup import pull_packed_kernel
    from sonic_ep.fast.rows import take_rows

    received = torch.arange(12, dtype=torch.float32, device=rank.device).view(3, 4)
    # Two valid rows, of an expert that has one and one that has none and one that has one.
    taken = take_rows(received, index(rank, 2, 0, -1), index(rank, 1, 1, 2))
    assert_bitwise(taken[:2], received[[2, 0]])
    assert bool(taken[2].isnan().all()), "rows behind the valid ones are left as they are"
    # More rows are routed here than there is room for.
    assert_bitwise(take_rows(received, index(rank, 1), index(rank, 3)), received[[1]])
    packed = torch.full((3, 4), -1, dtype=torch.int32, device=rank.device)
    tokens = torch.arange(12, dtype=torch.int32, device=rank.device).view(3, 4)
    addresses = torch.zeros(1, dtype=torch.int64, device=rank.device)
    places = index(rank, 0, -1, 1)
    launch(pull_packed_kernel, (3,), tokens, addresses, packed, places, 0, 1, 3, device=rank.device, WORDS=4, PIECE=4)
    assert packed.tolist() == [tokens[0].tolist(), tokens[2].tolist(), [-1] * 4]


def test_examples_of_rows(pool: RankPool) -> None:
    pool.run(examples_of_rows, world_size=1)


def example_of_arrivals(rank: Rank) -> None:
    import triton
    from _kernels_under_test import arrivals_kernel, homes_kernel, turns_kernel

    from sonic_ep.fast.device import launch

    assert triton.knobs.runtime.interpret == (rank.device.type == "cpu")
    senders, places = index(rank, 3, 0, 1), index(rank, 9, 9, 9)
    launch(arrivals_kernel, (3,), senders, places, 2, 5, 4, 10, device=rank.device)
    assert places.tolist() == [5, 15, 25]
    turns = torch.zeros(4, 2, dtype=torch.int32, device=rank.device)
    launch(turns_kernel, (4,), turns, 1, 3, device=rank.device)
    assert turns.tolist() == [[1, 0], [2, 0], [0, 0], [1, 1]]
    homes = torch.zeros(6, 2, dtype=torch.int32, device=rank.device)
    launch(homes_kernel, (6,), homes, 1, 3, 1, device=rank.device)
    assert homes.tolist() == [[2, 0], [0, 0], [1, -1], [2, 1], [0, 1], [1, 0]]


def test_example_of_arrivals_and_turns(pool: RankPool) -> None:
    pool.run(example_of_arrivals, world_size=1)


def roundings(rank: Rank) -> None:
    from _kernels_under_test import round_kernel

    from sonic_ep.fast.device import launch

    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    # Exact halves between neighbours of bf16, to even and to odd, and the ends of the range.
    halves = (torch.randint(0, 0x7F80, (1024,), generator=generator) << 16 | 0x8000).to(torch.int32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40, 65504.0, 65520.0])
    # Rounding by adding would carry these into zero or infinity.
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    values = torch.cat([bits.view(torch.float32), halves.view(torch.float32), special, nans.view(torch.float32)])
    values = values.to(rank.device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = torch.empty_like(values, dtype=dtype)
        launch(round_kernel, (1,), values, found, device=rank.device, COUNT=8192, GIVEN=len(values))
        expected = values.to(dtype)
        # Not a number stays not a number; of what bits, hardware and software each decide.
        assert torch.equal(found.isnan(), expected.isnan())
        assert_bitwise(found.nan_to_num(7.0), expected.nan_to_num(7.0), str(dtype))


def test_rounding_is_that_of_torch(pool: RankPool) -> None:
    pool.run(roundings, world_size=1)


def launches(rank: Rank, dtype: torch.dtype, hidden: int, top_k: int) -> list[dict[str, Any]]:
    """Every kernel that forward and backward run on this rank, with the types of its arguments."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: dict[str, dict[str, Any]] = {}

    def types(argument: object) -> str:
        if not isinstance(argument, Tensor):
            return "i32"
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return "*" + names.get(argument.dtype, f"i{8 * argument.element_size()}")

    run = InterpretedFunction.run

    def recorded(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        # The interpreter takes many rows of an activation at a time, a GPU one; see `sonic_ep.fast.experts`.
        if {"ROWS", "COLUMNS"} <= constants.keys() and kernel.fn.__name__ != "sum_groups_kernel":
            constants_there = {**constants, "ROWS": 1}
        else:
            constants_there = constants
        entry = {
            "module": kernel.fn.__module__,
            "name": kernel.fn.__name__,
            "types": [types(argument) for argument in arguments],
            "constants": constants_there,
        }
        seen.setdefault(json.dumps(entry, sort_keys=True), entry)
        return run(kernel, *arguments, grid=grid, warmup=warmup, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", recorded)
        run_every_kernel(rank.device, dtype, hidden, top_k)
    return list(seen.values())


@pytest.mark.parametrize(("dtype", "hidden"), [(torch.bfloat16, 4096), (torch.float32, 33)], ids=str)
def test_every_kernel_compiles_for_hopper(cpu_pool: RankPool, tmp_path: Path, dtype: torch.dtype, hidden: int) -> None:
    """Without a GPU: Triton and its own assembler, for compute capability 9.0, with the arguments of real calls."""
    recorded = cpu_pool.run(launches, dtype, hidden, 8, world_size=2)[0]
    # Products in the interpreter's own tiles, which have one stage, are not for GPUs.
    recorded = [launch for launch in recorded if launch["constants"].get("STAGES") != 1]
    (tmp_path / "launches.json").write_text(json.dumps(recorded))
    command = [sys.executable, str(PROGRAM), str(tmp_path / "launches.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout)
    names = {entry["name"] for entry in compiled}
    assert names >= {"barrier_kernel", "count_kernel", "place_kernel", "pull_to_rows_kernel", "pull_packed_kernel"}
    assert names >= {"exchange_rows_kernel", "exchange_partial_sums_kernel", "weigh_rows_kernel", "send_home_kernel"}
    assert names >= {"read_peer_kernel", "write_peer_kernel", "spoil_kernel", "take_rows_kernel", "collect_kernel"}
    assert names >= {"choose_kernel", "logits_gradient_kernel", "activate_kernel", "activate_backward_kernel"}
    assert names >= {"add_bias_dots_kernel", "sum_groups_kernel", "rows_kernel", "weights_kernel", "sum_ranks_kernel"}
    for entry in compiled:
        assert entry["spilled_bytes"] == 0, entry
        if hidden == 4096 and entry["name"] in ("activate_kernel", "activate_backward_kernel"):
            assert entry["wide_loads"] > 0 or entry["constants"]["I"] < 128, entry
        if hidden == 4096 and entry["moves_rows"]:
            assert entry["wide_loads"] > 0, entry
            assert entry["wide_stores"] > 0, entry
        if entry["waits"]:
            assert all(entry["orders"].values()), entry
        if entry["name"] in ("exchange_rows_kernel", "exchange_partial_sums_kernel"):
            assert entry["passes_first_cache"], entry
