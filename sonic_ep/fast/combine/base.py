"""What all combines share: receive slots in shared memory, a flag for each, and programs that send and sum.

A combine is one kernel. Its programs come in groups of W, one group a token t: W - 1 send this rank's rows of token t
of one other rank each, and one sums this rank's own token t - ``LAG_TOKENS``, once its senders have raised their flags.
Senders never wait, and a sum waits only for senders before its group on every rank; so programs that are numbered as
they start (``take_ticket``) all finish. Tokens are sent in chunks that fit the receive buffer, with barriers between
them. Every operation that combines passes a barrier first, which also orders the first chunk.

Pointers of its kernels, in ``all_to_all`` and ``ordered_sum``: scores_ptr (W, C, K) fp32, filled from scores_table_ptr
(see ``Staging``) if STAGED_SCORES; epoch_ptr: see ``staged_at``; expert_ids_ptr, row_of_slot_ptr (W, C, K); if
HAS_VALUES, values_ptr (R,) fp32 of rows, origins_ptr (W,) int64 as of ``push_value``, values_out_ptr (T, K) fp32;
ticket_ptr: see ``take_ticket``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.collectives import FP32_BYTES, SCORES, reserve_values, returned_values
from sonic_ep.fast.device_functions import peer_pointer
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher
from sonic_ep.fast.staging import stage_rows
from sonic_ep.fast.symmetric_memory import SharedBuffer, Staging
from sonic_ep.fast.sync import signal, staged_at, take_signal
from sonic_ep.fast.workspace import TAG_BYTES, WAITING, Workspace
from sonic_ep.plan import RoutingPlan

RECEIVED = "received"
FLAGS = "received_flags"
MOST_RECEIVED_BYTES = 2**29
# Groups between sending a token and summing one: more than a GPU runs at a time, so that sums rarely wait.
LAG_TOKENS = 1024
# Columns that a program sums at a time. Few, so that many programs fit on a multiprocessor: while one waits for its
# stores to reach the peer, before it raises its flag, others keep the memory busy.
COLUMNS, SUM_WARPS = 1024, 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Receiver:
    """Shared memory for one chunk of tokens, and a flag for each receive slot.

    received: the rows of ``chunk`` tokens on every rank. flags: (W - 1, chunk) int64 on every rank, 0 before and after
    a call unless it ended in an error; flag (s, t), see ``receive_slot_of``, is raised to the tag of the call.
    """

    received: SharedBuffer
    flags: SharedBuffer
    chunk: int


class PushedCombine(ABC):
    """A combine mode: one kernel that sends and sums. most_bytes: of shared memory for received rows."""

    _kernel: ClassVar[Any]
    # Of kernels that have the constant DENSE, else None.
    _dense: ClassVar[bool | None] = None

    def __init__(self, workspace: Workspace, most_bytes: int = MOST_RECEIVED_BYTES) -> None:
        self._workspace = workspace
        self._most_bytes = most_bytes

    @staticmethod
    @abstractmethod
    def _rows_per_token(world_size: int, top_k: int) -> int:
        """The most rows received for one token."""

    def reserve(self, max_tokens: int, top_k: int, row_bytes: int) -> Receiver:
        """Collective. Shared memory for as many of the C tokens as ``most_bytes`` allow, at least one."""
        # Not this object, which holds the workspace: the two would be freed by the garbage collector only.
        form = (type(self), self._most_bytes, max_tokens, top_k, row_bytes)
        held: Receiver | None = self._workspace.kept.get(form)
        if held is not None:
            return held
        world_size = self._workspace.group.world_size
        token_bytes = max(1, self._rows_per_token(world_size, top_k) * row_bytes)
        chunk = max(1, min(max_tokens, self._most_bytes // token_bytes))
        received = self._workspace.reserve(RECEIVED, chunk * token_bytes)
        flags = self._workspace.reserve(FLAGS, max(1, world_size - 1) * chunk * TAG_BYTES, byte=0)
        # Only the last, whatever C was before.
        self._workspace.kept.clear()
        held = self._workspace.kept[form] = Receiver(received=received, flags=flags, chunk=chunk)
        return held

    def expect(self, max_tokens: int, top_k: int, row_bytes: int) -> None:
        """This combine comes next: where peers wait in it for this rank, should it leave before."""
        receiver = self.reserve(max_tokens, top_k, row_bytes)
        self._workspace.receive_flags = (receiver.flags, receiver.chunk)

    def combine(self, rows_NH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """Collective. (T, H) from rows in canonical order. Rows past the valid ones are not read; missing ones are NaN.

        Without scores N has to be R.
        """
        self._workspace.barrier_before_write()
        return self.sums(rows_NH, scores_WCK, plan)[0]

    def weighted(self, rows_NH: Tensor, scores_TK: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        """Collective. ``combine`` with this rank's scores, fp32, and the scores of the group by slot, (W, C, K).

        On one rank they are the same, (T, K): slots of tokens that do not exist are at the end, and are not read.
        """
        workspace = self._workspace
        if workspace.group.world_size == 1:
            return self.sums(rows_NH, scores_TK, plan)[0], scores_TK
        scores_WCK = torch.empty_like(plan.expert_ids, dtype=torch.float32)
        staged = workspace.staging(SCORES, scores_WCK[0].numel() * FP32_BYTES)
        stage_rows(scores_TK, staged, workspace)
        workspace.barrier_after_write()
        return self.sums(rows_NH, scores_WCK, plan, staged_scores=staged)[0], scores_WCK

    def sums(
        self,
        rows_NH: Tensor,
        scores_WCK: Tensor | None,
        plan: RoutingPlan,
        *,
        staged_scores: Staging | None = None,
        values_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``combine`` after a barrier, which must have passed since the last one, whose receive slots are used again.

        staged_scores: what every rank staged before that barrier; it is copied to ``scores_WCK``. values_R: a number
        of each row, fp32, that ``push_value`` has pushed since then: returned besides, (T, K).
        """
        (rows, hidden), (world_size, max_tokens, top_k) = rows_NH.shape, plan.expert_ids.shape
        workspace, itemsize = self._workspace, rows_NH.element_size()
        shared = self.reserve(max_tokens, top_k, hidden * itemsize)
        out_TH = rows_NH.new_empty((plan.num_tokens, hidden))
        form = (scores_WCK is not None, staged_scores is not None, values_R is not None)
        run = _launcher(self._kernel, workspace.device, rows_NH.dtype, hidden, top_k, (*form, self._dense))
        # Pointers that are not read: of scores and of values.
        scores = rows_NH if scores_WCK is None else scores_WCK
        table, epoch = shared.flags.addresses, workspace.epoch
        staged = table if staged_scores is None else staged_scores.addresses
        values, origins, values_out = scores, table, scores
        if values_R is not None:
            origins = reserve_values(workspace, max_tokens, top_k).addresses
            values, values_out = values_R, values_R.new_empty((plan.num_tokens, top_k))
        routed = (rows_NH, scores, staged, epoch, out_TH, plan.expert_ids, plan.row_of_slot)
        received = (shared.received.addresses, table, workspace.ticket)
        pointers = (*routed, values, origins, values_out, *received)
        sizes = (world_size, max_tokens, plan.num_tokens, plan.experts_per_rank, rows)
        for first_token in range(0, max_tokens, shared.chunk):
            tokens = min(shared.chunk, max_tokens - first_token)
            lag = min(tokens, LAG_TOKENS) if world_size > 1 else 0
            grid = ((tokens + lag) * world_size,)
            if first_token > 0:
                # Two, so that every chunk finds scores in the half in which they were staged: see ``staged_at``.
                workspace.barrier_before_write()
                workspace.barrier_before_write()
            workspace.run_waiting(run, grid, pointers, (*sizes, first_token, tokens, lag, shared.chunk))
        return out_TH, None if values_R is None else values_out


@lru_cache(LAUNCHERS_KEPT)
def _launcher(
    kernel: Any,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    top_k: int,
    form: tuple[bool, bool, bool, bool | None],
) -> Launcher:
    """For rows of ``dtype``, which tells launchers apart."""
    scored, staged, valued, dense = form
    constants = {"K": top_k, "K_PADDED": triton.next_power_of_2(top_k), "H": hidden, **WAITING}
    constants |= {"HAS_SCORES": scored, "STAGED_SCORES": staged, "HAS_VALUES": valued}
    constants |= {"COLUMNS": min(triton.next_power_of_2(hidden), COLUMNS), "num_warps": SUM_WARPS}
    return Launcher(kernel, device, constants if dense is None else {**constants, "DENSE": dense})


@triton.jit
def take_ticket(program, ticket_ptr, world_size):
    """This ``program``'s number in the order in which programs start, which a GPU does not promise to be that of ids.

    ticket_ptr () int32: 0 before and after a launch. On one rank, where no program waits, the order does not matter.
    """
    ticket = program
    if world_size > 1:
        ticket = tl.atomic_add(ticket_ptr, 1)
        if ticket == tl.num_programs(0) - 1:
            # All have been taken.
            tl.atomic_xchg(ticket_ptr, 0)
    return ticket


@triton.jit
def experts_of_token(expert_ids_ptr, first_slot, K: tl.constexpr, K_PADDED: tl.constexpr):
    """The experts of a token's slots, (K_PADDED,); -1 past K."""
    k = tl.arange(0, K_PADDED)
    return tl.load(expert_ids_ptr + first_slot + k, mask=k < K, other=-1)


@triton.jit
def bring_scores(
    scores_ptr, table_ptr, epoch_ptr, origin, token, first_slot, world_size, K: tl.constexpr, K_PADDED: tl.constexpr
):
    """Copy the scores of a token from where its rank has staged them to ``scores_ptr`` (W, C, K), of this rank."""
    k = tl.arange(0, K_PADDED)
    staged_ptr = peer_pointer(table_ptr + staged_at(epoch_ptr, world_size, True), origin, scores_ptr)
    score = tl.load(staged_ptr + token.to(tl.int64) * K + k, mask=k < K)
    tl.store(scores_ptr + first_slot + k, score, mask=k < K)
    # Other threads of the program read them.
    tl.debug_barrier()


@triton.jit
def return_values(token, first_slot, values, routing, sizes, K: tl.constexpr, K_PADDED: tl.constexpr):
    """Store the values of a token of this rank, if there is such a token, (K,) fp32: ``returned_values`` of its slots.

    values: values_ptr, origins_ptr and values_out_ptr; routing: expert_ids_ptr and row_of_slot_ptr; sizes: rank, e, R
    and T.
    """
    k = tl.arange(0, K_PADDED)
    # Not ``(k < K) & (token < sizes[3])``: for Triton's interpreter a vector and a scalar together are no mask.
    slot, own_slot, inside = first_slot + k, token * K + k, k < tl.where(token < sizes[3], K, 0)
    value = returned_values(
        slot, own_slot, inside, values[1], values[0], routing[0], routing[1], sizes[0], sizes[1], sizes[2]
    )
    tl.store(values[2] + own_slot, value, mask=inside)


@triton.jit
def origin_and_group(program, rank, world_size, lag):
    """Origin rank and token of the chunk for a program of grid ((tokens + lag) * W,); out of range if it has none.

    Each group begins with the next rank and ends with this one, ``lag`` groups later. With W=3, lag=1 on rank 1,
    programs 0 to 5 take token 0 of ranks 2 and 0, none, token 1 of ranks 2 and 0, token 0 of rank 1.
    """
    origin = (rank + 1 + program % world_size) % world_size
    group = program // world_size
    return origin, tl.where(origin == rank, group - lag, group)


@triton.jit
def has_slot(experts, first_expert, experts_per_rank):
    """Whether one of a token's ``experts`` (K,) is on the rank that begins with ``first_expert``."""
    return tl.max(((experts >= first_expert) & (experts < first_expert + experts_per_rank)).to(tl.int32), axis=0) == 1


@triton.jit
def receive_slot_of(sender, origin, group, world_size, chunk):
    """Receive slot, of (W - 1, chunk) on rank ``origin``, for ``sender`` and token ``group`` of the chunk.

    Senders are counted from the origin rank around: with W=4 and chunk=10, ranks 3 0 1 are senders 0 1 2 of origin 2,
    and token 5 has the receive slots 5 15 25.
    """
    return (sender - origin - 1 + world_size) % world_size * chunk + group


@triton.jit
def signal_receive_slot(flags_ptr, origin, slot, tag):
    """Tell rank ``origin``, in the call ``tag``, that this program has written the whole receive slot."""
    signal(tl.load(flags_ptr + origin).to(tl.pointer_type(tl.int64)) + slot, tag)


@triton.jit
def await_receive_slots(
    flags_ptr, experts, group, chunk, world_size, experts_per_rank, wait_errors_ptr, rank, tag, limit, ALL: tl.constexpr
):
    """Wait for the receive slots of a token: of the other ranks that have a slot of it, or of ALL other ranks."""
    flags = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int64))
    for sender in range(world_size):
        if (sender != rank) & (has_slot(experts, sender * experts_per_rank, experts_per_rank) | ALL):
            slot = receive_slot_of(sender, rank, group, world_size, chunk)
            take_signal(flags + slot, wait_errors_ptr, sender, tag, limit)
