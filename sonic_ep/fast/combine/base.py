"""The common half of every combine: receive slots in shared memory, a flag for each, and programs that send and sum.

A combine is one kernel. Its programs come in groups of W, one group a token: W - 1 send this rank's rows of that token
of each other rank, and one sums the own token ``LAG_TOKENS`` groups earlier, once its senders have raised their flags.
Senders never wait, and a sum waits only for senders before its group on every rank; so programs that start in order
all finish. Tokens are sent in chunks that fit the receive buffer, with a barrier before each.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.sync import signal, take_signal
from sonic_ep.fast.workspace import TAG_BYTES, Workspace
from sonic_ep.plan import RoutingPlan

RECEIVED = "received"
FLAGS = "received_flags"
MOST_RECEIVED_BYTES = 2**29
# Groups between sending a token and summing one: more than a GPU runs at a time, so that sums rarely wait.
LAG_TOKENS = 1024
# Columns that a program sums at a time. Few, so that many programs fit on a multiprocessor: while one waits for its
# stores to reach the peer, before it raises its flag, others keep the memory busy.
COLUMNS, SUM_WARPS = 1024, 4
# Parameters of the combine kernels that differ from call to call, or from rank to rank.
UNSPECIALIZED = [
    *("max_tokens", "own_tokens", "row_capacity", "first_token", "tokens", "lag", "chunk"),
    *("rank", "tag", "limit"),
]


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
    _constants: ClassVar[Mapping[str, bool]] = MappingProxyType({})

    def __init__(self, workspace: Workspace, most_bytes: int = MOST_RECEIVED_BYTES) -> None:
        self._workspace = workspace
        self._most_bytes = most_bytes

    @staticmethod
    @abstractmethod
    def _rows_per_token(plan: RoutingPlan) -> int:
        """The most rows received for one token."""

    def reserve(self, plan: RoutingPlan, row_bytes: int) -> Receiver:
        """Collective. Shared memory for as many of the C tokens as ``most_bytes`` allow, at least one."""
        token_bytes = max(1, self._rows_per_token(plan) * row_bytes)
        chunk = max(1, min(plan.max_tokens, self._most_bytes // token_bytes))
        received = self._workspace.reserve(RECEIVED, chunk * token_bytes)
        flags = self._workspace.reserve(FLAGS, max(1, plan.world_size - 1) * chunk * TAG_BYTES, byte=0)
        return Receiver(received=received, flags=flags, chunk=chunk)

    def combine(self, rows_NH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """Collective. (T, H) from rows in canonical order. Rows past the valid ones are not read; missing ones are NaN.

        Without scores N has to be R.
        """
        rows, hidden = rows_NH.shape
        shared = self.reserve(plan, hidden * rows_NH.element_size())
        out_TH = rows_NH.new_empty((plan.num_tokens, hidden))
        # Without scores their pointer is not read.
        scores = rows_NH if scores_WCK is None else scores_WCK
        pointers = (rows_NH, scores, out_TH, plan.expert_ids, plan.row_of_slot)
        addresses = (shared.received.addresses, shared.flags.addresses)
        sizes = (plan.world_size, plan.max_tokens, plan.num_tokens, plan.experts_per_rank, rows)
        constants = {"K": plan.top_k, "K_PADDED": triton.next_power_of_2(plan.top_k), **self._constants}
        constants |= {"H": hidden, "COLUMNS": min(triton.next_power_of_2(hidden), COLUMNS), "num_warps": SUM_WARPS}
        constants["HAS_SCORES"] = scores_WCK is not None
        for first_token in range(0, plan.max_tokens, shared.chunk):
            tokens = min(shared.chunk, plan.max_tokens - first_token)
            lag = min(tokens, LAG_TOKENS) if plan.world_size > 1 else 0
            grid, of_chunk = ((tokens + lag) * plan.world_size,), (first_token, tokens, lag, shared.chunk)
            self._workspace.barrier_before_write()
            self._workspace.run_waiting(self._kernel, grid, *pointers, *addresses, *sizes, *of_chunk, **constants)
        return out_TH


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
