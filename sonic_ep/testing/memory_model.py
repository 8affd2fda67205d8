"""Memory of the fast layer as formulas: what it keeps for backward, the most that lives at once, and what is shared.

All are bytes of one rank, for one call of ``moe_routed`` with every gradient required. Bytes are those of the tensors;
PyTorch's allocator rounds each of them up to 512, and does not split the rest of a large block below 1 MiB. The worked
example of ``sonic_ep.plan`` on rank 0, H=8, I=4, bf16 with a gated activation: R is W*C*K = 12, or 6 if exact.

>>> modes = ModePair(dispatch=DispatchMode.ALL_TO_ALL, combine=CombineMode.RANK_DEDUP)
>>> sizes = dict(world_size=2, max_tokens=3, tokens=3, top_k=2, num_experts=4, hidden=8, intermediate=4, itemsize=2)
>>> ceiling, exact = LayerShape(rows=12, **sizes), LayerShape(rows=6, **sizes)
>>> saved_bytes(ceiling, modes.dispatch)
SavedMemory(received=192, hidden=192, scores=48, plan=216)
>>> saved_bytes(exact, modes.dispatch, redispatch_x_in_backward=True)
SavedMemory(received=0, hidden=96, scores=48, plan=192)
>>> dict(forward_steps(exact, modes.dispatch, training=False))
{'up': 432, 'activate': 384, 'down': 384, 'combine': 384}
>>> forward_peak_bytes(exact, modes.dispatch, training=True), backward_peak_bytes(exact, modes.dispatch)
(576, 576)
>>> symmetric_bytes(ceiling, modes).total
3584
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from sonic_ep.config import CombineMode, DispatchMode, ModePair

INDEX_BYTES = 4
FP32_BYTES = 4
TAG_BYTES = 8
# Shared buffers are whole blocks of this, at least one; what combine receives at a time has a bound.
SHARED_BLOCK_BYTES = 512
MOST_RECEIVED_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One call on one rank; letters as in ``sonic_ep.plan``.

    tokens: T. itemsize: bytes of an element of x and of the weights. rows: R, for which rows are allocated: the exact
    rows with ``cpu_sync_on_runtime``, else the ceiling, or ``max_rows`` if that is less; see ``plan.room_for_rows``.
    gated: whether w1 has 2I rows. biases: whether there are b1 and b2.
    """

    world_size: int
    max_tokens: int
    tokens: int
    top_k: int
    num_experts: int
    hidden: int
    intermediate: int
    itemsize: int
    rows: int
    gated: bool = True
    biases: bool = False

    @property
    def experts_per_rank(self) -> int:
        """Experts of one rank, e."""
        return self.num_experts // self.world_size

    @property
    def up_width(self) -> int:
        """F, the width of the pre-activation: 2I, or I."""
        return 2 * self.intermediate if self.gated else self.intermediate

    @property
    def tokens_TH(self) -> int:
        """Bytes of x, of the output, of the gradient of either."""
        return self.tokens * self.hidden * self.itemsize

    @property
    def tokens_WCH(self) -> int:
        """Bytes of the tokens of all ranks."""
        return self.world_size * self.max_tokens * self.hidden * self.itemsize

    @property
    def rows_RH(self) -> int:
        """Bytes of rows as wide as a token."""
        return self.rows * self.hidden * self.itemsize

    @property
    def hidden_RF(self) -> int:
        """Bytes of the pre-activation, and of its gradient."""
        return self.rows * self.up_width * self.itemsize

    @property
    def activated_RI(self) -> int:
        """Bytes of what the activation yields, and of its gradient."""
        return self.rows * self.intermediate * self.itemsize

    @property
    def numbers_R(self) -> int:
        """Bytes of one fp32 or int32 number of each row."""
        return self.rows * FP32_BYTES

    @property
    def slots_TK(self) -> int:
        """Bytes of one fp32 number of each slot of this rank's tokens."""
        return self.tokens * self.top_k * FP32_BYTES

    @property
    def slots_WCK(self) -> int:
        """Bytes of one fp32 or int32 number of each slot of the group."""
        return self.world_size * self.max_tokens * self.top_k * INDEX_BYTES

    @property
    def w1_eFH(self) -> int:
        """Bytes of w1, and of its gradient."""
        return self.experts_per_rank * self.up_width * self.hidden * self.itemsize

    @property
    def w2_eHI(self) -> int:
        """Bytes of w2, and of its gradient."""
        return self.experts_per_rank * self.hidden * self.intermediate * self.itemsize

    @property
    def b1_eF(self) -> int:
        """Bytes of b1, and of its gradient; 0 without biases."""
        return self.experts_per_rank * self.up_width * self.itemsize if self.biases else 0

    @property
    def b2_eH(self) -> int:
        """Bytes of b2, and of its gradient; 0 without biases."""
        return self.experts_per_rank * self.hidden * self.itemsize if self.biases else 0

    @property
    def plan(self) -> int:
        """Bytes of the plan: all of its fields are int32."""
        expert_ids_and_row_of_slot = 2 * self.slots_WCK
        packed_of_token = self.world_size * self.max_tokens * INDEX_BYTES
        slot_of_row = self.numbers_R
        group_ends = self.experts_per_rank * INDEX_BYTES
        pair_tokens = self.world_size**2 * INDEX_BYTES
        # They are the start of what each expert and, behind that, each rank has in all.
        counts = (self.num_experts + self.world_size) * INDEX_BYTES
        return expert_ids_and_row_of_slot + packed_of_token + slot_of_row + group_ends + pair_tokens + counts


@dataclass(frozen=True, kw_only=True)
class SavedMemory:
    """What stays allocated from forward to backward because of the layer, in bytes; neither x, y nor weights.

    received: what dispatch brought. hidden: the pre-activation, b1 in it. scores: those of the group. plan: its fields.
    """

    received: int
    hidden: int
    scores: int
    plan: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.received + self.hidden + self.scores + self.plan


def received_bytes(shape: LayerShape, dispatch: DispatchMode) -> int:
    """What a dispatch brings: (R, H) in canonical order, or room for each token of the group once, (W*C, H)."""
    return shape.rows_RH if dispatch is DispatchMode.ALL_TO_ALL else shape.tokens_WCH


def saved_bytes(shape: LayerShape, dispatch: DispatchMode, *, redispatch_x_in_backward: bool = False) -> SavedMemory:
    """What forward leaves for backward. The x that is gathered again is the caller's own, T*H*itemsize, not counted."""
    return SavedMemory(
        received=0 if redispatch_x_in_backward else received_bytes(shape, dispatch),
        hidden=shape.hidden_RF,
        scores=shape.slots_WCK,
        plan=shape.plan,
    )


def forward_steps(
    shape: LayerShape, dispatch: DispatchMode, *, training: bool, redispatch_x_in_backward: bool = False
) -> Mapping[str, int]:
    """What lives in each step of ``MoEFunction.forward`` beyond what lived before the call: bytes by step.

    Counted: the plan, scores, what is kept for backward if ``training``, and the output. Not counted: x, routing and
    weights, symmetric memory, workspaces of libraries; the counts of the plan's tiles, which are gone by then; and with
    ``cpu_sync_on_runtime`` one int32 for each row of the ceiling, until forward returns.
    """
    received = received_bytes(shape, dispatch)
    in_order = 0 if dispatch is DispatchMode.ALL_TO_ALL else shape.rows_RH
    known = shape.slots_WCK + shape.plan
    kept = received if training and not redispatch_x_in_backward else 0
    hidden = shape.hidden_RF if training else 0
    return MappingProxyType(
        {
            "up": known + received + in_order + shape.hidden_RF,
            "activate": known + kept + shape.hidden_RF + shape.activated_RI,
            "down": known + kept + hidden + shape.activated_RI + shape.rows_RH,
            "combine": known + kept + hidden + shape.rows_RH + shape.tokens_TH,
        }
    )


def backward_steps(
    shape: LayerShape, dispatch: DispatchMode, *, redispatch_x_in_backward: bool = False
) -> Mapping[str, int]:
    """What lives in each step of ``MoEFunction.backward`` beyond what lived before it: bytes by step.

    Counted: all gradients as they are produced. Not counted: what was saved, the gradient of the output (contiguous,
    else a copy of it comes on top), symmetric memory, workspaces of libraries. dA becomes A' in place.
    """
    to_all_rows = dispatch is DispatchMode.ALL_TO_ALL
    out_grad = shape.rows_RH
    # And for each row where it stands in what was received.
    before_order = 0 if to_all_rows else shape.tokens_WCH + shape.numbers_R
    again = shape.tokens_WCH if redispatch_x_in_backward else 0
    between = shape.activated_RI + shape.hidden_RF + shape.numbers_R
    w2_grads = shape.w2_eHI + shape.b2_eH
    # By then the rows of d(out) and A' are let go, and there are the gradients of w2, biases and scores.
    behind = again + shape.hidden_RF + shape.numbers_R + w2_grads + shape.b1_eF + shape.slots_TK
    x_rows = 0 if to_all_rows and not redispatch_x_in_backward else shape.rows_RH
    return MappingProxyType(
        {
            "dispatch": before_order + out_grad,
            "activate": out_grad + again + between,
            "w2": out_grad + again + between + w2_grads,
            "combine": behind + shape.rows_RH + shape.tokens_TH,
            "w1": behind + shape.tokens_TH + x_rows + shape.w1_eFH,
        }
    )


def forward_peak_bytes(
    shape: LayerShape, dispatch: DispatchMode, *, training: bool, redispatch_x_in_backward: bool = False
) -> int:
    """The most of ``forward_steps``."""
    steps = forward_steps(shape, dispatch, training=training, redispatch_x_in_backward=redispatch_x_in_backward)
    return max(steps.values())


def backward_peak_bytes(shape: LayerShape, dispatch: DispatchMode, *, redispatch_x_in_backward: bool = False) -> int:
    """The most of ``backward_steps``."""
    return max(backward_steps(shape, dispatch, redispatch_x_in_backward=redispatch_x_in_backward).values())


@dataclass(frozen=True, kw_only=True)
class SymmetricMemory:
    """Bytes that a group shares on each rank, by buffer; they stay for its lifetime, and all calls use the same.

    barrier: the flags of barriers. ids, scores: of the slots of a rank, on their way to all. tokens: x, where
    peers read it; tokens_again: likewise in backward. received, received_flags: what combine receives at a time.
    values_of_slots: gradients of scores on their way to the rank of their token.
    """

    barrier: int
    ids: int
    scores: int
    tokens: int
    tokens_again: int
    received: int
    received_flags: int
    values_of_slots: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))


def symmetric_bytes(shape: LayerShape, modes: ModePair, *, redispatch_x_in_backward: bool = False) -> SymmetricMemory:
    """What the group shares for calls of this shape. None of it depends on R.

    redispatch_x_in_backward: where w1 requires a gradient. A router that sums its gradient has (E, H) fp32 more.
    """
    slots = shape.max_tokens * shape.top_k * INDEX_BYTES
    # With nobody to read them, tokens stay where they are, and nothing arrives.
    shared = shape.world_size > 1
    tokens = shape.max_tokens * shape.hidden * shape.itemsize if shared else 0
    rows_per_token = shape.top_k if modes.combine is CombineMode.ALL_TO_ALL else shape.world_size - 1
    rows_per_token = rows_per_token if shared else 0
    token_bytes = max(1, rows_per_token * shape.hidden * shape.itemsize)
    tokens_at_a_time = max(1, min(shape.max_tokens, MOST_RECEIVED_BYTES // token_bytes))
    return SymmetricMemory(
        barrier=_in_blocks(shape.world_size * TAG_BYTES),
        ids=_in_blocks(slots),
        scores=_in_blocks(slots),
        tokens=_in_blocks(tokens),
        tokens_again=_in_blocks(tokens) if redispatch_x_in_backward else 0,
        received=_in_blocks(tokens_at_a_time * token_bytes),
        received_flags=_in_blocks(max(1, shape.world_size - 1) * tokens_at_a_time * TAG_BYTES),
        values_of_slots=_in_blocks(slots),
    )


def _in_blocks(nbytes: int) -> int:
    """Up to whole blocks, at least one: 513 bytes take 1024."""
    return SHARED_BLOCK_BYTES * max(1, -(-nbytes // SHARED_BLOCK_BYTES))
