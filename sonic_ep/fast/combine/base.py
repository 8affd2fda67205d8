"""Where what other ranks push arrives, with a flag for each token and sender: the shared half of every combine.

A combine is one kernel that sends and receives at once. Programs come in groups of W, one group a token: W - 1 send
what this rank holds of that token of each other rank, and one sums the home token ``LAG_TOKENS`` groups earlier, as
soon as the flags of its senders are up. Senders wait for nobody, and a program waits only for senders that stand
before its own group on every rank; so with programs started in order, all of them come to an end.

All tokens of a rank take their turn in chunks that fit the receive buffer; a fence stands before each chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
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
# Groups between sending a token and summing one: more than run at a time on a GPU, so that sums rarely have to wait.
LAG_TOKENS = 1024
# Columns that a program sums at a time, 8 a thread. Few, so that many programs fit on a multiprocessor: each of them
# waits for its stores to reach the peer before it raises its flag, and meanwhile others have to keep the memory busy.
COLUMNS = 1024
SUM_WARPS = 4
# Parameters of the combine kernels that differ from call to call, or from rank to rank.
UNSPECIALIZED = [
    *("max_tokens", "own_tokens", "row_capacity", "first_token", "tokens", "lag", "chunk"),
    *("rank", "tag", "limit"),
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Receiver:
    """Shared memory for one chunk of tokens, and the flags that say what of it has arrived.

    received: the rows of ``chunk`` tokens on every rank. flags: (W - 1, chunk) int64 on every rank, all down before and
    after a call; flag (s, t) is for token t of the chunk and sender s, see ``receive_slot_of``. A raised flag is a tag
    of the meeting: after a call that ended in an error, flags of that call may still be up.
    """

    received: SharedBuffer
    flags: SharedBuffer
    chunk: int
    max_tokens: int
    world_size: int

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first token, tokens) of each chunk."""
        for first in range(0, self.max_tokens, self.chunk):
            yield first, min(self.chunk, self.max_tokens - first)

    def lag(self, tokens: int) -> int:
        """Groups between sending and summing, for a chunk of ``tokens``."""
        return min(tokens, LAG_TOKENS) if self.world_size > 1 else 0

    def grid(self, tokens: int) -> tuple[int]:
        """Programs of a chunk: its tokens and the lag, W each."""
        return ((tokens + self.lag(tokens)) * self.world_size,)


def receiver(
    workspace: Workspace, plan: RoutingPlan, *, rows_per_token: int, row_bytes: int, most_bytes: int
) -> Receiver:
    """Collective. Shared memory for as many of the C tokens as ``most_bytes`` admit, at least one."""
    token_bytes = max(1, rows_per_token * row_bytes)
    chunk = max(1, min(plan.max_tokens, most_bytes // token_bytes))
    flag_bytes = max(1, plan.world_size - 1) * chunk * TAG_BYTES
    return Receiver(
        received=workspace.reserve(RECEIVED, chunk * token_bytes),
        flags=workspace.reserve(FLAGS, flag_bytes, byte=0),
        chunk=chunk,
        max_tokens=plan.max_tokens,
        world_size=plan.world_size,
    )


def send_and_sum(
    kernel: Any,
    rows_RH: Tensor,
    scores_WCK: Tensor | None,
    plan: RoutingPlan,
    workspace: Workspace,
    shared: Receiver,
    **constants: Any,
) -> Tensor:
    """Collective. (T, H): run ``kernel``, one of the combine kernels, over every chunk of tokens."""
    hidden = rows_RH.shape[1]
    out_TH = rows_RH.new_empty((plan.num_tokens, hidden))
    for first_token, tokens in shared.chunks():
        workspace.barrier_before_write()
        workspace.run_waiting(
            kernel,
            shared.grid(tokens),
            rows_RH,
            # Without scores the pointer is not read.
            rows_RH if scores_WCK is None else scores_WCK,
            out_TH,
            plan.expert_ids,
            plan.row_of_slot,
            shared.received.addresses,
            shared.flags.addresses,
            plan.world_size,
            plan.max_tokens,
            plan.num_tokens,
            plan.experts_per_rank,
            plan.row_capacity,
            first_token,
            tokens,
            shared.lag(tokens),
            shared.chunk,
            HAS_SCORES=scores_WCK is not None,
            K=plan.top_k,
            K_PADDED=triton.next_power_of_2(plan.top_k),
            H=hidden,
            COLUMNS=min(triton.next_power_of_2(hidden), COLUMNS),
            num_warps=SUM_WARPS,
            **constants,
        )
    return out_TH


class PushedCombine(ABC):
    """A combine mode over one kernel that sends and sums.

    most_bytes: shared memory for what peers push; tokens take turns where all of them need more.
    """

    _kernel: ClassVar[Any]
    _constants: ClassVar[Mapping[str, bool]] = MappingProxyType({})

    def __init__(self, workspace: Workspace, most_bytes: int = MOST_RECEIVED_BYTES) -> None:
        self._workspace = workspace
        self._most_bytes = most_bytes

    @staticmethod
    @abstractmethod
    def _rows_per_token(plan: RoutingPlan) -> int:
        """Rows that may arrive for one token."""

    def reserve(self, plan: RoutingPlan, row_bytes: int) -> None:
        """Collective. Allocate what ``combine`` needs for rows of ``row_bytes``."""
        self._receiver(plan, row_bytes)

    def combine(self, rows_RH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """Collective. (T, H) from rows in canonical order. Rows past the valid ones are not read."""
        shared = self._receiver(plan, rows_RH.shape[1] * rows_RH.element_size())
        return send_and_sum(self._kernel, rows_RH, scores_WCK, plan, self._workspace, shared, **self._constants)

    def _receiver(self, plan: RoutingPlan, row_bytes: int) -> Receiver:
        rows = self._rows_per_token(plan)
        return receiver(self._workspace, plan, rows_per_token=rows, row_bytes=row_bytes, most_bytes=self._most_bytes)


@triton.jit
def origin_and_group(program, rank, world_size, lag):
    """Whose token a program of grid ((tokens + lag) * W,) takes, and which of the chunk; out of range if none.

    In each group the other ranks come first, from the next one around, and this rank last, ``lag`` groups later. With
    W=3, lag=1 on rank 1, programs 0 to 5 take token 0 of ranks 2 and 0, none, token 1 of ranks 2 and 0, token 0 of
    rank 1.
    """
    home = (rank + 1 + program % world_size) % world_size
    group = program // world_size
    return home, tl.where(home == rank, group - lag, group)


@triton.jit
def has_slot(experts, first_expert, experts_per_rank):
    """Whether one of a token's ``experts`` (K,) is among those of one rank."""
    return tl.max(((experts >= first_expert) & (experts < first_expert + experts_per_rank)).to(tl.int32), axis=0) == 1


@triton.jit
def receive_slot_of(sender, home, group, world_size, chunk):
    """Place, among (W - 1, chunk), of what ``sender`` has for token ``group`` of ``home``'s chunk.

    Senders are counted around from the home: with W=4 and chunk=10, ranks 3 0 1 are senders 0 1 2 of home 2, and token
    5 has the places 5 15 25.
    """
    return (sender - home - 1 + world_size) % world_size * chunk + group


@triton.jit
def signal_receive_slot(flags_ptr, home, arrival, tag):
    """Tell ``home`` that what this program has written there, in the meeting ``tag``, is complete."""
    signal(tl.load(flags_ptr + home).to(tl.pointer_type(tl.int64)) + arrival, tag)


@triton.jit
def await_receive_slots(
    flags_ptr,
    experts,
    group,
    chunk,
    world_size,
    experts_per_rank,
    wait_errors_ptr,
    rank,
    tag,
    limit,
    ALL: tl.constexpr,
):
    """Wait for what every other rank that has a slot of the token sends, or for that of all other ranks."""
    flags = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int64))
    for sender in range(world_size):
        if (sender != rank) & (has_slot(experts, sender * experts_per_rank, experts_per_rank) | ALL):
            arrival = receive_slot_of(sender, rank, group, world_size, chunk)
            take_signal(flags + arrival, wait_errors_ptr, sender, tag, limit)
