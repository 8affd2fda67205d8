"""Dispatch by all-to-all: rows straight into canonical order, each remote token read once for all its rows here."""

import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer, rank_and_token
from sonic_ep.fast.dispatch.base import PulledDispatch
from sonic_ep.fast.launch import as_int_view, copy_constants, launch, triton_kernel
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.plan import RoutingPlan


@triton_kernel
def pull_to_rows_kernel(
    own_ptr,
    staged_ptr,
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
    INTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read one token of the group once, store it to each of its rows on this rank. Grid (W * C,): ``rank_and_token``.

    own_ptr (T, INTS): this rank's tokens; staged_ptr (W,) int64: addresses of all ranks' (C, INTS).
    rows_ptr (R, INTS), canonical order. expert_ids_ptr, row_of_slot_ptr (W, C, K).
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
            token_ptr = peer_pointer(staged_ptr, source, own_ptr)
        for first in tl.static_range(0, INTS, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < INTS
            value = tl.load(token_ptr + token * INTS + column, mask=inside)
            for choice in range(K):
                expert = tl.load(expert_ids_ptr + first_slot + choice)
                row = tl.load(row_of_slot_ptr + first_slot + choice).to(tl.int64)
                if (expert >= first_expert) & (expert < first_expert + experts_per_rank) & (row < row_capacity):
                    tl.store(rows_ptr + row * INTS + column, value, mask=inside)


class AllToAllDispatch(PulledDispatch):
    """Every rank receives one row for each slot that is routed to it."""

    sized_by_rows = True

    def pull(self, x_TH: Tensor, staged: SharedBuffer, plan: RoutingPlan, rows: int) -> Tensor:
        """(R, H) in canonical row order; unspecified past the valid rows."""
        return pull_to_rows(x_TH, staged.addresses, plan, rows)

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """None: received rows are in canonical order."""
        return None


def pull_to_rows(x_TH: Tensor, addresses_W: Tensor, plan: RoutingPlan, rows: int) -> Tensor:
    """(R, H) in canonical row order, R = ``rows``: this rank's tokens from x, the others' from ``addresses_W``.

    addresses_W (W,) int64: of the (C, H) tokens of each rank, in local or peer memory; this rank's entry is not read.
    """
    rows_RH = x_TH.new_empty((rows, x_TH.shape[1]))
    own, out = as_int_view(x_TH), as_int_view(rows_RH)
    pointers = (own, addresses_W, out, plan.expert_ids, plan.row_of_slot)
    sizes = (plan.rank, plan.world_size, plan.max_tokens, plan.experts_per_rank, rows)
    constants = copy_constants(out) | {"K": plan.top_k, "K_PADDED": triton.next_power_of_2(plan.top_k)}
    grid = (plan.world_size * plan.max_tokens,)
    launch(pull_to_rows_kernel, grid, *pointers, *sizes, device=out.device, **constants)
    return rows_RH
