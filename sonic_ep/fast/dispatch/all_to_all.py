"""Dispatch by all-to-all: rows straight into canonical order, each remote token read once for all its rows here."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer, rank_and_token
from sonic_ep.fast.dispatch.base import PulledDispatch
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, copy_constants, triton_kernel
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.sync import staged_at
from sonic_ep.plan import RoutingPlan


@triton_kernel
def pull_to_rows_kernel(
    own_ptr,
    table_ptr,
    epoch_ptr,
    rows_ptr,
    expert_ids_ptr,
    row_of_slot_ptr,
    rank,
    world_size,
    max_tokens,
    experts_per_rank,
    row_capacity,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read one token of the group once, store it to each of its rows on this rank. Grid (W * C,): ``rank_and_token``.

    own_ptr (T, WIDTH): this rank's tokens; table_ptr, epoch_ptr: where all ranks' (C, WIDTH) are, see ``staged_at``.
    rows_ptr (R, WIDTH), canonical order. expert_ids_ptr, row_of_slot_ptr (W, C, K).
    """
    source, token = rank_and_token(tl.program_id(0), rank, world_size)
    token = token.to(tl.int64)
    first_slot = (source * max_tokens + token) * K
    first_expert = rank * experts_per_rank
    k = tl.arange(0, K_PADDED)
    experts = tl.load(expert_ids_ptr + first_slot + k, mask=k < K, other=-1)
    here = (experts >= first_expert) & (experts < first_expert + experts_per_rank)
    if tl.max(here.to(tl.int32), axis=0) == 1:
        token_ptr = own_ptr
        if source != rank:
            token_ptr = peer_pointer(table_ptr + staged_at(epoch_ptr, world_size, True), source, own_ptr)
        for first in tl.static_range(0, WIDTH, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < WIDTH
            value = tl.load(token_ptr + token * WIDTH + column, mask=inside)
            for choice in range(K):
                expert = tl.load(expert_ids_ptr + first_slot + choice)
                row = tl.load(row_of_slot_ptr + first_slot + choice).to(tl.int64)
                if (expert >= first_expert) & (expert < first_expert + experts_per_rank) & (row < row_capacity):
                    tl.store(rows_ptr + row * WIDTH + column, value, mask=inside)


class AllToAllDispatch(PulledDispatch):
    """Every rank receives one row for each slot that is routed to it."""

    sized_by_rows = True

    def pull(self, x_TH: Tensor, staged: Staging, plan: RoutingPlan, rows: int) -> Tensor:
        """(R, H) in canonical row order; unspecified past the valid rows."""
        return pull_to_rows(x_TH, staged.addresses, self._workspace.epoch, plan, rows)

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """None: received rows are in canonical order."""
        return None


@lru_cache(LAUNCHERS_KEPT)
def _pull(device: torch.device, width: int, dtype: torch.dtype, top_k: int) -> Launcher:
    constants = {"K": top_k, "K_PADDED": triton.next_power_of_2(top_k)}
    return Launcher(pull_to_rows_kernel, device, constants | copy_constants(width, dtype.itemsize))


def pull_to_rows(x_TH: Tensor, table_2W: Tensor, epoch: Tensor, plan: RoutingPlan, rows: int) -> Tensor:
    """(R, H) in canonical row order, R = ``rows``: this rank's tokens from x, the others' by ``table_2W``.

    table_2W (2 * W,) int64: where the (C, H) tokens of each rank are, in local or peer memory, twice; see ``Staging``.
    This rank's entries are not read.
    """
    width, (world_size, max_tokens, top_k) = x_TH.shape[1], plan.expert_ids.shape
    rows_RH = x_TH.new_empty((rows, width))
    pointers = (x_TH, table_2W, epoch, rows_RH, plan.expert_ids, plan.row_of_slot)
    sizes = (plan.rank, world_size, max_tokens, plan.experts_per_rank, rows)
    _pull(x_TH.device, width, x_TH.dtype, top_k)((world_size * max_tokens,), *pointers, *sizes)
    return rows_RH
