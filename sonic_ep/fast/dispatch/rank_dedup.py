"""Dispatch without repetition: one row for each distinct (token, rank) pair, packed by source rank, then token."""

import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import copy_row, peer_pointer, rank_and_token
from sonic_ep.fast.dispatch.base import PulledDispatch
from sonic_ep.fast.launch import as_int_view, copy_constants, launch, triton_kernel
from sonic_ep.fast.permute import token_of_row
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.plan import RoutingPlan


@triton_kernel
def pull_packed_kernel(
    own_ptr,
    staged_ptr,
    packed_ptr,
    packed_of_token_ptr,
    rank,
    world_size,
    max_tokens,
    INTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read one token of the group if it has a slot on this rank. Grid (W * C,): ``rank_and_token``.

    own_ptr (T, INTS); staged_ptr (W,) int64: addresses of all ranks' (C, INTS); packed_of_token_ptr (W, C).
    packed_ptr (W * C, INTS): with places 0 -1 1 of three tokens, its first two rows are tokens 0 and 2.
    """
    source, token = rank_and_token(tl.program_id(0), rank, world_size)
    token = token.to(tl.int64)
    place = tl.load(packed_of_token_ptr + source * max_tokens + token).to(tl.int64)
    if place >= 0:
        token_ptr = own_ptr
        if source != rank:
            token_ptr = peer_pointer(staged_ptr, source, own_ptr)
        copy_row(token_ptr + token * INTS, packed_ptr + place * INTS, INTS, BLOCK)


class RankDedupDispatch(PulledDispatch):
    """Every rank receives each token that has a slot on it once, packed by source rank, then token."""

    def pull(self, x_TH: Tensor, staged: SharedBuffer, plan: RoutingPlan, rows: int) -> Tensor:
        """(W*C, H): first the tokens with a slot here, in the order of ``packed_of_token``; the rest unspecified."""
        return pull_packed(x_TH, staged, plan)

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """Packed place of the row's token: with K=2 and ``packed_of_token`` [0, -1, 1], slot 5 is of place 1."""
        # Token -1, past the valid rows, indexes the last token; no row of it is read.
        return plan.packed_of_token.flatten()[token_of_row(plan)]


def pull_packed(x_TH: Tensor, staged: SharedBuffer, plan: RoutingPlan) -> Tensor:
    """(W*C, H), packed, of the tokens that every rank has staged."""
    packed_PH = x_TH.new_empty((plan.world_size * plan.max_tokens, x_TH.shape[1]))
    own, packed = as_int_view(x_TH), as_int_view(packed_PH)
    pointers = (own, staged.addresses, packed, plan.packed_of_token)
    grid, sizes = (packed.shape[0],), (plan.rank, plan.world_size, plan.max_tokens)
    launch(pull_packed_kernel, grid, *pointers, *sizes, device=packed.device, **copy_constants(packed))
    return packed_PH
