"""The routing plan: the one metadata format that both backends share.

Letters, used as suffixes of host tensors throughout this project:

====  ==============================================================================================
W, r  ranks in the expert-parallel (EP) group, and one of them; the group may be any part of the world
T     tokens on this rank; differs from rank to rank and from call to call, may be 0
C     the most tokens any rank may bring, equal on all: given, or the largest T of the call; ``max_tokens`` in code
K     experts per token
E, e  experts, and experts per rank (E // W); expert j lives on rank j // e
H, I  hidden size, and intermediate size of an expert; F rows of its w1: 2I if gated, else I
f     slot (r*C + t)*K + k: choice k of token t of rank r
R     rows that a rank has room for; the first group_ends[-1] of them are valid
P     tokens of the group with at least one slot on this rank: the rows of a packed buffer
====  ==============================================================================================

**Canonical row order**: the valid rows of a rank are sorted by expert, then source rank, then token, then k. So
dispatch is a pure permutation, and combine has one order of summation.

Worked example (W=2, E=4, T=C=3 on both ranks, K=2; experts 0 and 1 live on rank 0, experts 2 and 3 on rank 1)::

    expert_ids      rank 0: [[ 0, 2], [ 1, 0], [ 3, 2]]     rank 1: [[ 2, 1], [-1, 3], [ 0, 0]]
    slots f         rank 0: [[ 0, 1], [ 2, 3], [ 4, 5]]     rank 1: [[ 6, 7], [ 8, 9], [10,11]]

Token 1 of rank 1 dropped its first slot; token 2 of rank 1 chose expert 0 twice. Sorted by expert, stably, the slots
are 0 3 10 11 | 2 7 | 1 5 6 | 4 9; the first six become rows of rank 0, the last five rows of rank 1::

    counts          [4, 2, 3, 2]
    row_of_slot     rank 0: [[ 0, 0], [ 4, 1], [ 3, 1]]     rank 1: [[ 2, 5], [-1, 4], [ 2, 3]]
    pair_tokens     [[2, 2], [2, 2]]

    on rank 0:      group_ends [4, 6]   tokens_per_expert [4, 2]   slot_of_row [0, 3, 10, 11, 2, 7]
                    packed_of_token [[0, 1, -1], [2, -1, 3]]
    on rank 1:      group_ends [3, 5]   tokens_per_expert [3, 2]   slot_of_row [1, 5, 6, 4, 9]
                    packed_of_token [[0, -1, 1], [2, 3, -1]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sonic_ep.compat import is_zero_without_memory
from sonic_ep.config import EPConfig, is_count
from sonic_ep.errors import MissingRowsError, PlanError, RecomputeError, RowOverflowError

# Slots and rows are int32, and kernels count past the last one: by a grid's stride, the rest of a tile (at most
# 2 * 65536 slots), or the lag of a combine (1024 tokens for each rank).
MOST_SLOTS = 2**31 - 2**20
INDEX_DTYPE, NO_ROW = torch.int32, -1
INDEX_BYTES = INDEX_DTYPE.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingPlan:
    """Where every slot of the group goes. Tensors are int32 and contiguous, on the device of the routing.

    rank: r. num_tokens: T. object_number, step: which ``ExpertParallel`` of the group made the plan, and in which call;
        ranks compare both before they use it. 0 if it was made otherwise. made: of a plan made by the operator
        ``sonic_ep::plan``, whose step is not known while it is traced: the tensor that owns the plan.

    expert_ids (W, C, K): the expert of each slot; -1 where it is dropped or the token does not exist.
    counts (E,): ``counts[j] = #{f : expert_ids[f] == j}``, over the group.
    row_of_slot (W, C, K): row of the slot on its owner, ``position(f) - position of the owner's first slot``, where
        ``position`` is the place in the stable sort of all slots by expert; -1 where there is no expert.
    group_ends (e,): ``group_ends[i] = sum(counts[r*e : r*e + i + 1])``, the ``offs`` of
        ``torch.nn.functional.grouped_mm``; its last entry is the number of valid rows on this rank.
    slot_of_row (R,): inverse of ``row_of_slot`` on this rank; -1 past the last valid row.
    pair_tokens (W, W): ``pair_tokens[p, q] = #{t : some slot of token t of rank p lives on rank q}``.
    packed_of_token (W, C): place of token (p, t) among the tokens that have a slot on this rank, ordered by p, then t;
        -1 where it has none.
    """

    rank: int
    num_tokens: int
    expert_ids: Tensor
    counts: Tensor
    row_of_slot: Tensor
    group_ends: Tensor
    slot_of_row: Tensor
    pair_tokens: Tensor
    packed_of_token: Tensor
    step: int = 0
    object_number: int = 0
    made: Tensor | None = None

    @classmethod
    def of(cls, **fields: Any) -> RoutingPlan:
        """As the constructor, in a quarter of the time: that sets every frozen field by a call."""
        plan = object.__new__(cls)
        plan.__dict__.update(fields)
        return plan

    def of_origin(self, step: int, object_number: int) -> RoutingPlan:
        """This plan as made by an ``ExpertParallel`` in a call."""
        return RoutingPlan.of(**{**self.__dict__, "step": step, "object_number": object_number})

    @property
    def world_size(self) -> int:
        """W."""
        return self.expert_ids.shape[0]

    @property
    def max_tokens(self) -> int:
        """C."""
        return self.expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids.shape[2]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[0]

    @property
    def experts_per_rank(self) -> int:
        """Experts of one rank, e."""
        return self.group_ends.shape[0]

    @property
    def row_capacity(self) -> int:
        """R."""
        return self.slot_of_row.shape[0]

    @property
    def tokens_per_expert(self) -> Tensor:
        """Rows of each expert of this rank r, (e,) int32: ``counts[r*e : (r+1)*e]``, the differences of ``group_ends``.

        A view of ``counts``: do not write it. Reads nothing on the host.
        """
        return self.counts.narrow(0, self.rank * self.experts_per_rank, self.experts_per_rank)

    def rows(self) -> int:
        """Valid rows on this rank. A host read: on a GPU it waits for the plan."""
        return int(self.group_ends[-1])

    def packed_rows(self) -> int:
        """P. A host read."""
        return int(self.pair_tokens[:, self.rank].sum())

    def owner_of_slot(self) -> Tensor:
        """The rank of each slot's expert, (W, C, K) int32; -1 where there is no expert."""
        owner_WCK = torch.div(self.expert_ids, self.experts_per_rank, rounding_mode="floor")
        return owner_WCK.where(self.expert_ids >= 0, NO_ROW)

    def check(self) -> None:
        """Check every field against its definition, by host reads. ``PlanError`` names the first wrong one."""
        for field, holds in _definitions(self):
            if not holds:
                raise PlanError(f"routing plan: {field} contradicts its definition")


# All that the routing determines.
ORIGIN = ("step", "object_number", "made")
ROUTING_FIELDS = tuple(field.name for field in fields(RoutingPlan) if field.name not in ORIGIN)
# Where a plan keeps its form.
FORM = "_form"
TENSOR_FIELDS = tuple(field.name for field in fields(RoutingPlan) if field.type == "Tensor")


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanForm:
    """What a well-formed plan is apart from its values. Kept with the plan: asking its tensors takes longer.

    identity: what has to be the same on every rank that uses the plan: the object and call that made it, and (W, C, K).
    addresses, shapes: of the tensors, in the order of ``TENSOR_FIELDS``.
    """

    device: torch.device
    world_size: int
    top_k: int
    num_experts: int
    row_capacity: int
    identity: tuple[int, ...]
    addresses: list[int]
    shapes: list[torch.Size]


def form_of(plan: RoutingPlan) -> PlanForm | None:
    """The form of a plan; None where a field is malformed, see ``malformed_field``."""
    fields_of = plan.__dict__
    kept: PlanForm | None = fields_of.get(FORM)
    if kept is not None:
        for name, address, shape in zip(TENSOR_FIELDS, kept.addresses, kept.shapes, strict=True):
            tensor = fields_of[name]
            # Freed or resized storage is at another address, or at none. ``.data`` may have got another view of it.
            if tensor.data_ptr() != address or tensor.shape != shape or tensor.dtype != INDEX_DTYPE:
                break
            if not tensor.is_contiguous():
                break
        else:
            return kept
    return None if malformed_field(plan) is not None else noted_form(plan)


def noted_form(plan: RoutingPlan) -> PlanForm:
    """The form of a plan that is known to be well formed, kept for ``form_of``."""
    fields_of = plan.__dict__
    tensors = [fields_of[name] for name in TENSOR_FIELDS]
    fields_of[FORM] = found = PlanForm(
        device=plan.expert_ids.device,
        world_size=plan.world_size,
        top_k=plan.top_k,
        num_experts=plan.num_experts,
        row_capacity=plan.row_capacity,
        identity=(plan.object_number, plan.step, *plan.expert_ids.shape),
        addresses=[tensor.data_ptr() for tensor in tensors],
        shapes=[tensor.shape for tensor in tensors],
    )
    return found


def malformed_field(plan: RoutingPlan) -> str | None:
    """The first field of a wrong type, dtype, layout, device or shape, or None. Reads no value on the device."""
    ids_WCK = plan.expert_ids
    # ``expert_ids`` comes first, so it is a tensor wherever its device is asked for.
    for name in TENSOR_FIELDS:
        tensor = getattr(plan, name)
        if not _is_readable(tensor) or tensor.device != ids_WCK.device:
            return name
    if ids_WCK.ndim != 3 or 0 in (ids_WCK.shape[0], ids_WCK.shape[2]) or ids_WCK.numel() > MOST_SLOTS:
        return "expert_ids"
    if plan.group_ends.ndim != 1 or plan.experts_per_rank == 0:
        return "group_ends"
    if plan.slot_of_row.ndim != 1 or plan.row_capacity > ids_WCK.numel():
        return "slot_of_row"
    # The others have to fit W, C, K and e.
    world_size, max_tokens, _ = ids_WCK.shape
    shapes = {"counts": (world_size * plan.experts_per_rank,), "row_of_slot": ids_WCK.shape}
    shapes |= {"pair_tokens": (world_size, world_size), "packed_of_token": (world_size, max_tokens)}
    wrong = [name for name, shape in shapes.items() if getattr(plan, name).shape != shape]
    if not (is_count(plan.num_tokens) and plan.num_tokens <= max_tokens):
        wrong.append("num_tokens")
    return wrong[0] if wrong else None


def raise_if_malformed(where: object, plan: RoutingPlan) -> None:
    """Raise ``ValueError`` if a field of ``plan`` was freed or resized between forward and this backward."""
    if form_of(plan) is None:
        malformed = malformed_field(plan)
        got = f"{malformed} of plan: got a tensor that was freed or resized after forward, expected it unchanged"
        raise ValueError(f"{where}: {got}: keep the plan until its backward has run")


def row_ceiling(*, world_size: int, max_tokens: int, top_k: int, experts_per_rank: int, distinct: bool) -> int:
    """The most rows that a rank can receive: W*C*min(K, e) if a token's experts are distinct, else W*C*K."""
    return world_size * max_tokens * (min(top_k, experts_per_rank) if distinct else top_k)


def check_slots(where: object, *, world_size: int, max_tokens: int, top_k: int) -> None:
    """Raise ``ValueError`` if the group has more slots than int32 can count."""
    slots = world_size * max_tokens * top_k
    if slots > MOST_SLOTS:
        raise ValueError(f"{where}: W*C*K: got {slots} slots, expected at most {MOST_SLOTS} (slots are int32)")


def overflow_error(where: object, *, max_rows: int, rank: int, rows: int, more: str = "") -> RowOverflowError:
    """The error for ``rank`` being routed more than ``max_rows`` rows."""
    got = f"max_rows: got {max_rows}, expected at least {rows}"
    return RowOverflowError(f"{where}: {got}: rank {rank} is routed {rows} rows{more}")


def missing_rows_error(where: object, *, missing: int) -> MissingRowsError:
    """The error for a combine of ``missing`` fewer rows than the plan has valid ones."""
    got = f"rows of combine: got {missing} fewer than the plan's valid rows on this rank"
    return MissingRowsError(f"{where}: {got}, expected at least plan.rows(): pass one row for each row of dispatch")


def recompute_error(where: object, step: int) -> RecomputeError:
    """The error for a recomputed forward of ``step`` that routed differently."""
    got = f"step {step}: got another routing when activation checkpointing ran forward again, expected the same"
    return RecomputeError(f"{where}: {got}: x of the layer has changed (dropout before it: preserve_rng_state=True)")


def room_for_rows(where: object, config: EPConfig, *, rank: int, ceiling: int, rows_W: Sequence[int] | None) -> int:
    """R: the exact rows with ``cpu_sync_on_runtime``, else the lesser of ``ceiling`` and ``config.max_rows``.

    rows_W: the rows of every rank, if the host has read them; more than ``max_rows`` then raise on all ranks alike.
    """
    if rows_W is not None and config.max_rows is not None and max(rows_W) > config.max_rows:
        most, more = max(rows_W), f" (all ranks: {list(rows_W)})"
        raise overflow_error(where, max_rows=config.max_rows, rank=rows_W.index(most), rows=most, more=more)
    if rows_W is not None and config.cpu_sync_on_runtime:
        return rows_W[rank]
    return ceiling if config.max_rows is None else min(ceiling, config.max_rows)


def _is_readable(tensor: object) -> bool:
    """Whether kernels can read ``tensor`` in place, as contiguous int32."""
    if type(tensor) is not Tensor or tensor.dtype != INDEX_DTYPE or tensor.layout != torch.strided or tensor.is_nested:
        return False
    if not tensor.is_contiguous() or tensor.is_neg() or is_zero_without_memory(tensor):
        return False
    # Its storage may have been freed.
    return tensor.untyped_storage().nbytes() >= INDEX_BYTES * (tensor.storage_offset() + tensor.numel())


def _definitions(plan: RoutingPlan) -> Iterator[tuple[str, bool]]:
    """Each field and whether it fits its definition; every check relies on those before it."""
    malformed = malformed_field(plan)
    yield f"form of {malformed}", malformed is None
    yield "rank", 0 <= plan.rank < plan.world_size
    yield "num_tokens", not bool((plan.expert_ids[plan.rank, plan.num_tokens :] >= 0).any())
    yield "expert_ids", bool((plan.expert_ids < plan.num_experts).all() & (plan.expert_ids >= NO_ROW).all())
    valid_WCK = plan.expert_ids >= 0
    counts_E = torch.bincount(plan.expert_ids[valid_WCK].long(), minlength=plan.num_experts)
    yield "counts", torch.equal(plan.counts.long(), counts_E)
    here_e = counts_E.view(plan.world_size, plan.experts_per_rank)[plan.rank]
    yield "group_ends", torch.equal(plan.group_ends.long(), here_e.cumsum(0))
    yield "row_of_slot", torch.equal(plan.row_of_slot >= 0, valid_WCK)
    owner_WCK, ids_F, row_F = plan.owner_of_slot(), plan.expert_ids.flatten().long(), plan.row_of_slot.flatten().long()
    for rank in range(plan.world_size):
        slots_N = (owner_WCK.flatten() == rank).nonzero().squeeze(1)
        by_row_N = slots_N[row_F[slots_N].argsort()]
        yield "row_of_slot", _counts_up(row_F[by_row_N])
        # Canonical order sorts by expert, then by slot: a slot's number orders rank, token and k.
        yield "row_of_slot", bool(((ids_F[by_row_N] * ids_F.numel() + by_row_N).diff() > 0).all())
        present_WC = (owner_WCK == rank).any(dim=2)
        yield "pair_tokens", torch.equal(plan.pair_tokens[:, rank].long(), present_WC.sum(dim=1))
        if rank == plan.rank:
            rows = len(by_row_N)
            yield "slot_of_row", rows <= plan.row_capacity and torch.equal(plan.slot_of_row[:rows].long(), by_row_N)
            yield "slot_of_row", bool((plan.slot_of_row[rows:] == NO_ROW).all())
            yield "packed_of_token", _counts_up(plan.packed_of_token[present_WC])
            yield "packed_of_token", bool((plan.packed_of_token[~present_WC] == NO_ROW).all())


def _counts_up(values_N: Tensor) -> bool:
    """Whether the values are 0, 1, 2, ..."""
    return torch.equal(values_N.long(), torch.arange(len(values_N), device=values_N.device))
