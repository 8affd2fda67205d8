"""Memory of the fast layer as formulas: kept for backward, the most that lives at once, and shared.

All are bytes of one rank, for one call of ``moe_routed`` with every gradient required. Bytes are those of the tensors;
PyTorch's allocator rounds each of them up to 512, and does not split the rest of a large block below 1 MiB. The worked
example of ``sonic_ep.plan`` on rank 0, H=8, I=4, bf16 with a gated activation: R is W*C*K = 12, or 6 if exact.

>>> modes = ModePair(dispatch=DispatchMode.ALL_TO_ALL, combine=CombineMode.RANK_DEDUP)
>>> sizes = dict(world_size=2, max_tokens=3, tokens=3, top_k=2, num_experts=4, hidden=8, intermediate=4, itemsize=2)
>>> ceiling, exact = LayerShape(rows=12, **sizes), LayerShape(rows=6, **sizes)
>>> saved_bytes(ceiling, modes.dispatch)
{'received': 192, 'hidden': 192, 'scores': 48, 'plan': 208}
>>> saved_bytes(exact, modes.dispatch, redispatch_x_in_backward=True)
{'received': 0, 'hidden': 96, 'scores': 48, 'plan': 184}
>>> dict(forward_steps(exact, modes.dispatch, training=False))
{'up': 424, 'activate': 376, 'down': 376, 'combine': 376}
>>> forward_peak_bytes(exact, modes.dispatch, training=True), backward_peak_bytes(exact, modes.dispatch)
(568, 576)
>>> sum(symmetric_bytes(ceiling, modes).values())
5120
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sonic_ep.config import CombineMode, DispatchMode, ModePair

INDEX_BYTES, TAG_BYTES = 4, 8
# Shared buffers are whole blocks of this, at least one; what combine receives at a time has a bound.
SHARED_BLOCK_BYTES = 512
MOST_RECEIVED_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One call on one rank; letters as in ``sonic_ep.plan``.

    tokens: T. itemsize: bytes of an element of x and of the weights. rows: R, for which rows are allocated: the exact
    rows with ``cpu_sync_on_runtime``, else the ceiling, or ``max_rows`` if that is less; see ``plan.room_for_rows``.
    gated: whether w1 has 2I rows. biases: whether there are b1 and b2. split: whether gate and up have weights of their
    own. How weights lie in memory changes nothing.
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
    split: bool = False

    def values(self, letters: str) -> int:
        """Bytes of a tensor of these extents in the dtype of x: "RF" is the pre-activation, F = 2I or I."""
        return self._elements(letters) * self.itemsize

    def numbers(self, letters: str) -> int:
        """Bytes of a tensor of these extents in int32 or fp32: "WCK" is one number of each slot of the group."""
        return self._elements(letters) * INDEX_BYTES

    @property
    def plan(self) -> int:
        """Bytes of the plan."""
        # expert_ids, row_of_slot, packed_of_token, slot_of_row, group_ends, pair_tokens, counts.
        return sum(self.numbers(letters) for letters in ("WCK", "WCK", "WC", "R", "e", "WW", "E"))

    def _elements(self, letters: str) -> int:
        extents = {"W": self.world_size, "C": self.max_tokens, "T": self.tokens, "K": self.top_k, "R": self.rows}
        extents |= {"E": self.num_experts, "e": self.num_experts // self.world_size}
        extents |= {"H": self.hidden, "I": self.intermediate, "F": self.intermediate * (2 if self.gated else 1)}
        return math.prod(extents[letter] for letter in letters)


def received_bytes(shape: LayerShape, dispatch: DispatchMode) -> int:
    """Bytes that dispatch receives: (R, H) in canonical order, or room for each token of the group once, (W*C, H)."""
    return shape.values("RH" if dispatch is DispatchMode.ALL_TO_ALL else "WCH")


def saved_bytes(
    shape: LayerShape, dispatch: DispatchMode, *, redispatch_x_in_backward: bool = False
) -> Mapping[str, int]:
    """What forward keeps for backward: rows of dispatch, the pre-activation, scores of the group, the plan.

    Neither x, which may be dispatched again and is the caller's own, nor y, nor weights; but for those that are fp32
    under autocast, of which casts are kept.
    """
    received = 0 if redispatch_x_in_backward else received_bytes(shape, dispatch)
    return {"received": received, "hidden": shape.values("RF"), "scores": shape.numbers("WCK"), "plan": shape.plan}


def saved_bytes_of_reference(
    shape: LayerShape, *, valid_rows: int, limited: bool, redispatch_x_in_backward: bool = False
) -> Mapping[str, int]:
    """What the reference's autograd keeps, scores trained: no weight, and nothing of the caller's.

    For gated activations: "swiglu", "geglu", "reglu", or limited: a ``Swiglu`` with numbers of its own. These compute
    in fp32 and keep h and the gate's factor, or four factors and a byte for each gate and up, whether it was limited.
    valid_rows: rows that arrive.
    """
    factors = 4 * shape.numbers("RI") + 2 * shape.numbers("RI") // INDEX_BYTES
    return {
        "rows": 0 if redispatch_x_in_backward else shape.values("RH"),
        "factors": factors if limited else shape.numbers("RF") + shape.numbers("RI"),
        "activated": shape.values("RI"),
        "outputs": shape.values("RH"),
        "scores": valid_rows * INDEX_BYTES,
        "expert_ids": shape.numbers("WCK"),
    }


def forward_steps(
    shape: LayerShape, dispatch: DispatchMode, *, training: bool, redispatch_x_in_backward: bool = False
) -> Mapping[str, int]:
    """Bytes that live in each step of ``MoEFunction.forward`` beyond those that lived before the call.

    Counted: the plan, scores, saved tensors if ``training``, and the output. Not counted: x, routing, weights,
    symmetric memory, workspaces of libraries, and with ``cpu_sync_on_runtime`` one int32 for each row of the ceiling.
    """
    received = received_bytes(shape, dispatch)
    in_order = 0 if dispatch is DispatchMode.ALL_TO_ALL else shape.values("RH")
    known = shape.numbers("WCK") + shape.plan
    kept = known + (received if training and not redispatch_x_in_backward else 0)
    hidden = shape.values("RF") if training else 0
    return {
        "up": known + received + in_order + shape.values("RF"),
        "activate": kept + shape.values("RF") + shape.values("RI"),
        "down": kept + hidden + shape.values("RI") + shape.values("RH"),
        "combine": kept + hidden + shape.values("RH") + shape.values("TH"),
    }


def backward_steps(
    shape: LayerShape, dispatch: DispatchMode, *, redispatch_x_in_backward: bool = False
) -> Mapping[str, int]:
    """Bytes that live in each step of ``MoEFunction.backward`` beyond those that lived before it.

    Counted: all gradients. Not counted: saved tensors, the gradient of the output (a copy comes on top unless it is
    contiguous), symmetric memory, workspaces of libraries. dA becomes A' in place.
    """
    to_all_rows = dispatch is DispatchMode.ALL_TO_ALL
    rows = shape.values("RH")
    # And for each row its place in what was received.
    before_order = 0 if to_all_rows else shape.values("WCH") + shape.numbers("R")
    again = shape.values("WCH") if redispatch_x_in_backward else 0
    between = rows + again + shape.values("RI") + shape.values("RF") + shape.numbers("R")
    b1, b2 = (shape.values("eF"), shape.values("eH")) if shape.biases else (0, 0)
    w2_grads = shape.values("eHI") + b2
    # By then the rows of d(out) and A' are freed, and there are the gradients of w2, biases and scores.
    later = again + shape.values("RF") + shape.numbers("R") + w2_grads + b1 + shape.numbers("TK")
    # Of split weights the second product is added to the first.
    products = 2 * rows if shape.split else rows
    x_rows = 0 if to_all_rows and not redispatch_x_in_backward else rows
    return {
        "dispatch": before_order + rows,
        "activate": between,
        "w2": between + w2_grads,
        "x rows": later + products,
        "combine": later + rows + shape.values("TH"),
        "w1": later + shape.values("TH") + x_rows + shape.values("eFH"),
    }


def forward_peak_bytes(shape: LayerShape, dispatch: DispatchMode, **options: bool) -> int:
    """The most of ``forward_steps``."""
    return max(forward_steps(shape, dispatch, **options).values())


def backward_peak_bytes(shape: LayerShape, dispatch: DispatchMode, **options: bool) -> int:
    """The most of ``backward_steps``."""
    return max(backward_steps(shape, dispatch, **options).values())


def symmetric_bytes(shape: LayerShape, modes: ModePair, *, redispatch_x_in_backward: bool = False) -> Mapping[str, int]:
    """What the group shares on each rank for its lifetime, by buffer, for calls of this shape, whatever R.

    ids, scores, tokens: in two halves on several ranks. tokens: x, where peers read it; tokens_of_copy_engines: x,
    where copy engines do, like tokens_again one buffer. received, received_flags: of combine, at a time.
    values_of_slots: gradients of scores for their origin ranks. A router that sums its gradient has (2, E, H) fp32
    more.
    """
    slots = _in_blocks(shape.numbers("CK"))
    # One rank has no peers to read its tokens or to send it rows.
    shared = shape.world_size > 1
    tokens = _in_blocks(shape.values("CH") if shared else 0)
    halves = 2 if shared else 1
    copied = modes.dispatch is DispatchMode.ALL_GATHER
    rows_per_token = shape.top_k if modes.combine is CombineMode.ALL_TO_ALL else shape.world_size - 1
    token_bytes = max(1, rows_per_token * shape.values("H") if shared else 0)
    tokens_at_a_time = max(1, min(shape.max_tokens, MOST_RECEIVED_BYTES // token_bytes))
    return {
        "barrier": _in_blocks(shape.world_size * TAG_BYTES),
        "ids": halves * slots,
        "scores": halves * slots,
        "tokens": 0 if copied else halves * tokens,
        "tokens_of_copy_engines": tokens if copied else 0,
        "tokens_again": tokens if redispatch_x_in_backward else 0,
        "received": _in_blocks(tokens_at_a_time * token_bytes),
        "received_flags": _in_blocks(max(1, shape.world_size - 1) * tokens_at_a_time * TAG_BYTES),
        "values_of_slots": slots,
    }


def _in_blocks(nbytes: int) -> int:
    """Up to whole blocks, at least one: 513 bytes take 1024."""
    return SHARED_BLOCK_BYTES * max(1, -(-nbytes // SHARED_BLOCK_BYTES))
