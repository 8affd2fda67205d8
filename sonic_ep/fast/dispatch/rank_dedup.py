"""Dispatch without repetition: one row for each distinct (token, rank) pair, packed by source rank, then token."""

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import copy_row, peer_pointer, rank_and_token
from sonic_ep.fast.dispatch.base import PulledDispatch
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, copy_constants, triton_kernel
from sonic_ep.fast.permute import token_of_row
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.sync import staged_at
from sonic_ep.plan import RoutingPlan


@triton_kernel
def pull_packed_kernel(
    own_ptr,
    table_ptr,
    epoch_ptr,
    packed_ptr,
    packed_of_token_ptr,
    rank,
    world_size,
    max_tokens,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read one token of the group if it has a slot on this rank. Grid (W * C,): ``rank_and_token``.

    own_ptr (T, WIDTH); table_ptr, epoch_ptr: where all ranks' (C, WIDTH) are, see ``staged_at``; packed_of_token_ptr
    (W, C). packed_ptr (W * C, WIDTH): with places 0 -1 1 of three tokens, its first two rows are tokens 0 and 2.
    """
    source, token = rank_and_token(tl.program_id(0), rank, world_size)
    token = token.to(tl.int64)
    place = tl.load(packed_of_token_ptr + source * max_tokens + token).to(tl.int64)
    if place >= 0:
        token_ptr = own_ptr
        if source != rank:
            token_ptr = peer_pointer(table_ptr + staged_at(epoch_ptr, world_size, True), source, own_ptr)
        copy_row(token_ptr + token * WIDTH, packed_ptr + place * WIDTH, WIDTH, BLOCK)


class RankDedupDispatch(PulledDispatch):
    """Every rank receives each token that has a slot on it once, packed by source rank, then token."""

    def pull(self, x_TH: Tensor, staged: Staging, plan: RoutingPlan, rows: int) -> Tensor:
        """(W*C, H): first the tokens with a slot here, in the order of ``packed_of_token``; the rest unspecified."""
        return pull_packed(x_TH, staged, self._workspace.epoch, plan)

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """Packed place of the row's token: with K=2 and ``packed_of_token`` [0, -1, 1], slot 5 is of place 1."""
        # Token -1, past the valid rows, indexes the last token; no row of it is read.
        return plan.packed_of_token.flatten()[token_of_row(plan)]


@lru_cache(LAUNCHERS_KEPT)
def _pull(device: torch.device, width: int, dtype: torch.dtype) -> Launcher:
    return Launcher(pull_packed_kernel, device, copy_constants(width, dtype.itemsize))


def pull_packed(x_TH: Tensor, staged: Staging, epoch: Tensor, plan: RoutingPlan) -> Tensor:
    """(W*C, H), packed, of the tokens that every rank has staged."""
    width, (world_size, max_tokens, _) = x_TH.shape[1], plan.expert_ids.shape
    packed_PH = x_TH.new_empty((world_size * max_tokens, width))
    pointers = (x_TH, staged.addresses, epoch, packed_PH, plan.packed_of_token)
    run = _pull(x_TH.device, width, x_TH.dtype)
    run((world_size * max_tokens,), *pointers, plan.rank, world_size, max_tokens)
    return packed_PH
