"""Staging: ids, scores and rows of this rank into shared memory, by one kernel before one barrier."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, triton_kernel
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.sync import staged_at
from sonic_ep.fast.workspace import Workspace

# Staged in place of an id out of range; the plan counts it as dropped.
OUT_OF_RANGE: tl.constexpr = tl.constexpr(-2)
# Slots, and bytes of rows, that one program stages.
SLOTS, ROW_BYTES = 1024, 16384
# Bytes of the widest access.
VECTOR_BYTES = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedCall:
    """Where a call stages what its plan and its dispatch read. scores: None where they do not go with the ids.

    rows: that of the ids, where no rows are staged.
    """

    ids: Staging
    scores: Staging | None
    rows: Staging


@triton.jit
def own_half(table_ptr, epoch_ptr, rank, world_size, like_ptr):
    """Where this rank stages in this step, as a pointer of the type of ``like_ptr``. table_ptr: of a ``Staging``."""
    return peer_pointer(table_ptr + staged_at(epoch_ptr, world_size, False), rank, like_ptr)


@triton.jit
def stage_numbers(program, source_ptr, target_ptr, numbers, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Copy BLOCK of ``numbers`` elements; program p those from p * BLOCK on. VECTOR: elements of 16 bytes."""
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    vector_bytes: tl.constexpr = VECTOR * source_ptr.dtype.element_ty.primitive_bitwidth // 8
    # Two copies, since Triton has to know of each mask whether accesses may be wide.
    if source_ptr.to(tl.int64) % vector_bytes == 0:
        # Whole groups of 16 bytes, so that they are. Shared buffers are padded to 512 bytes, and the source's last
        # group is of memory that there is.
        inside = place // VECTOR * VECTOR < numbers
        tl.store(target_ptr + place, tl.load(source_ptr + place, mask=inside), mask=inside)
    else:
        inside = place < numbers
        tl.store(target_ptr + place, tl.load(source_ptr + place, mask=inside), mask=inside)


@triton_kernel
def stage_kernel(
    ids_ptr,
    scores_ptr,
    rows_ptr,
    ids_table_ptr,
    scores_table_ptr,
    rows_table_ptr,
    epoch_ptr,
    rank,
    world_size,
    given,
    room,
    num_experts,
    numbers,
    HAS_IDS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SLOTS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stage ids as int32, scores, and rows. Grid (ceil(room / SLOTS) if HAS_IDS, plus ceil(numbers / BLOCK),).

    ids_ptr (T*K,) int32 or int64, ``given`` = T*K, ``room`` = C*K: past the given ids -1 is staged, and
    ``OUT_OF_RANGE`` for one that is neither -1 nor an expert. scores_ptr (T*K,) fp32, if HAS_SCORES. rows_ptr:
    ``numbers`` elements of any type. The tables are those of ``Staging``s.
    """
    program = tl.program_id(0)
    if HAS_IDS:
        slot_programs = tl.cdiv(room, SLOTS)
        if program < slot_programs:
            place = program * SLOTS + tl.arange(0, SLOTS)
            expert = tl.load(ids_ptr + place, mask=place < given, other=-1)
            known = (expert >= -1) & (expert < num_experts)
            like_ptr = epoch_ptr
            target_ptr = own_half(ids_table_ptr, epoch_ptr, rank, world_size, like_ptr)
            tl.store(target_ptr + place, tl.where(known, expert, OUT_OF_RANGE).to(tl.int32), mask=place < room)
            if HAS_SCORES:
                score = tl.load(scores_ptr + place, mask=place < given)
                target_ptr = own_half(scores_table_ptr, epoch_ptr, rank, world_size, scores_ptr)
                tl.store(target_ptr + place, score, mask=place < given)
        program -= slot_programs
    if program >= 0:
        target_ptr = own_half(rows_table_ptr, epoch_ptr, rank, world_size, rows_ptr)
        stage_numbers(program, rows_ptr, target_ptr, numbers, VECTOR, BLOCK)


def row_constants(itemsize: int) -> dict[str, int]:
    """Constants of ``stage_numbers`` for elements of ``itemsize`` bytes."""
    return {"VECTOR": VECTOR_BYTES // itemsize, "BLOCK": ROW_BYTES // itemsize}


@lru_cache(LAUNCHERS_KEPT)
def _stage(device: torch.device, dtype: torch.dtype, ids_dtype: torch.dtype | None, has_scores: bool) -> Launcher:
    form = {"HAS_IDS": ids_dtype is not None, "HAS_SCORES": has_scores, "SLOTS": SLOTS}
    return Launcher(stage_kernel, device, form | row_constants(dtype.itemsize))


def row_programs(numbers: int, itemsize: int) -> int:
    """Programs that stage ``numbers`` elements."""
    return -(-numbers * itemsize // ROW_BYTES)


def stage_rows(rows_NH: Tensor, staging: Staging, workspace: Workspace) -> None:
    """Copy contiguous rows, or any tensor, to this rank's half; needs a barrier after it."""
    group, numbers, itemsize = workspace.group, rows_NH.numel(), rows_NH.element_size()
    table, epoch = staging.addresses, workspace.epoch
    # Pointers that are not read: of ids and of scores.
    pointers = (epoch, rows_NH, rows_NH, table, table, table, epoch)
    sizes = (group.rank, group.world_size, 0, 0, 0, numbers)
    _stage(rows_NH.device, rows_NH.dtype, None, False)((row_programs(numbers, itemsize),), *pointers, *sizes)


def stage_call(
    topk_idx_TK: Tensor,
    scores_TK: Tensor | None,
    x_TH: Tensor | None,
    staged: StagedCall,
    workspace: Workspace,
    *,
    max_tokens: int,
    num_experts: int,
) -> None:
    """Copy ids, and scores (fp32) and rows if there is room for them, to this rank's halves; needs a barrier after it.

    All contiguous.
    """
    group, epoch, ids = workspace.group, workspace.epoch, staged.ids.addresses
    rows, numbers, rows_table = epoch, 0, ids
    # Of one rank no peer reads the rows.
    if x_TH is not None and group.world_size > 1:
        rows, numbers, rows_table = x_TH, x_TH.numel(), staged.rows.addresses
    itemsize, room = rows.element_size(), max_tokens * topk_idx_TK.shape[1]
    # Pointers that are not read without scores.
    scores, scores_table, scored = topk_idx_TK, ids, False
    if scores_TK is not None and staged.scores is not None:
        scores, scores_table, scored = scores_TK, staged.scores.addresses, True
    grid = (-(-room // SLOTS) + row_programs(numbers, itemsize),)
    sizes = (group.rank, group.world_size, topk_idx_TK.numel(), room, num_experts, numbers)
    run = _stage(topk_idx_TK.device, rows.dtype, topk_idx_TK.dtype, scored)
    run(grid, topk_idx_TK, scores, rows, ids, scores_table, rows_table, epoch, *sizes)
