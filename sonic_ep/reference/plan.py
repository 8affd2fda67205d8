"""The routing plan in plain torch, and the uneven exchanges that it implies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic_ep.config import EPConfig
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.plan import INDEX_DTYPE, NO_ROW, RoutingPlan, check_slots, room_for_rows, row_ceiling


def pad_tokens(tokens: Tensor, max_tokens: int, fill: float) -> Tensor:
    """(T, ...) to (C, ...), padded with ``fill``."""
    padded = tokens.new_full((max_tokens, *tokens.shape[1:]), fill)
    padded[: tokens.shape[0]] = tokens
    return padded


def exchange_plan(
    topk_idx_TK: Tensor,
    *,
    num_experts: int,
    max_tokens: int,
    distinct: bool,
    config: EPConfig,
    collectives: BoundedCollectives,
) -> RoutingPlan:
    """Collective. This rank's plan from the ids of all. ``RowOverflowError`` on all ranks past ``config.max_rows``."""
    group, (num_tokens, top_k) = collectives.group, topk_idx_TK.shape
    sizes = {"world_size": group.world_size, "max_tokens": max_tokens, "top_k": top_k}
    check_slots(group, **sizes)
    expert_ids_WCK = collectives.all_gather(pad_tokens(topk_idx_TK.to(INDEX_DTYPE), max_tokens, NO_ROW))
    rows_W = _slots_of_expert(expert_ids_WCK, num_experts).view(group.world_size, -1).sum(dim=1).tolist()
    ceiling = row_ceiling(experts_per_rank=num_experts // group.world_size, distinct=distinct, **sizes)
    rows = room_for_rows(group, config, rank=group.rank, ceiling=ceiling, rows_W=rows_W)
    counts = {"num_tokens": num_tokens, "num_experts": num_experts, "row_capacity": rows}
    return build_plan(expert_ids_WCK, rank=group.rank, **counts)


def build_plan(
    expert_ids_WCK: Tensor, *, rank: int, num_tokens: int, num_experts: int, row_capacity: int
) -> RoutingPlan:
    """The plan of ``rank`` from the ids of all ranks, by the formulas of ``RoutingPlan``."""
    experts_per_rank = num_experts // expert_ids_WCK.shape[0]
    counts_E = _slots_of_expert(expert_ids_WCK, num_experts)
    row_of_slot_WCK = _rows_of_slots(expert_ids_WCK, counts_E, experts_per_rank)
    owner_WCK = torch.where(expert_ids_WCK >= 0, expert_ids_WCK // experts_per_rank, NO_ROW)
    ranks_W = torch.arange(expert_ids_WCK.shape[0], device=expert_ids_WCK.device)
    present_WCW = (owner_WCK.unsqueeze(-1) == ranks_W).any(dim=2)
    return RoutingPlan(
        rank=rank,
        num_tokens=num_tokens,
        expert_ids=expert_ids_WCK,
        counts=counts_E.to(INDEX_DTYPE),
        row_of_slot=row_of_slot_WCK,
        group_ends=counts_E.view(-1, experts_per_rank)[rank].cumsum(0).to(INDEX_DTYPE),
        slot_of_row=_slots_of_rows(row_of_slot_WCK, owner_WCK == rank, row_capacity),
        pair_tokens=present_WCW.sum(dim=1).to(INDEX_DTYPE),
        packed_of_token=_packed_places(present_WCW[:, :, rank]),
    )


def _slots_of_expert(expert_ids_WCK: Tensor, num_experts: int) -> Tensor:
    """Slots of each expert, (E,) int64."""
    return torch.bincount(expert_ids_WCK[expert_ids_WCK >= 0].long(), minlength=num_experts)


def _rows_of_slots(expert_ids_WCK: Tensor, counts_E: Tensor, experts_per_rank: int) -> Tensor:
    """Position of each slot in the stable sort by expert, minus that of its owner's first; (W, C, K) int32."""
    ids_F = expert_ids_WCK.flatten().long()
    valid_F = ids_F >= 0
    # Dropped slots sort last.
    order_F = torch.where(valid_F, ids_F, len(counts_E)).argsort(stable=True)
    place_F = torch.empty_like(order_F)
    place_F[order_F] = torch.arange(len(order_F), device=order_F.device)
    first_place_E = counts_E.cumsum(0) - counts_E
    first_expert_F = ids_F.clamp(min=0) // experts_per_rank * experts_per_rank
    row_F = torch.where(valid_F, place_F - first_place_E[first_expert_F], NO_ROW)
    return row_F.to(INDEX_DTYPE).view_as(expert_ids_WCK)


def _slots_of_rows(row_of_slot_WCK: Tensor, here_WCK: Tensor, row_capacity: int) -> Tensor:
    """The slot of each row of this rank, (R,) int32; -1 past the last."""
    slots_N = here_WCK.flatten().nonzero().squeeze(1)
    slot_of_row_R = row_of_slot_WCK.new_full((row_capacity,), NO_ROW)
    slot_of_row_R[row_of_slot_WCK.flatten()[slots_N].long()] = slots_N.to(INDEX_DTYPE)
    return slot_of_row_R


def _packed_places(present_WC: Tensor) -> Tensor:
    """Running number of the tokens that are present, (W, C) int32; -1 for the others."""
    number_WC = present_WC.flatten().cumsum(0).view_as(present_WC) - 1
    return torch.where(present_WC, number_WC, NO_ROW).to(INDEX_DTYPE)


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotExchange:
    """One row for each slot, from the rank of its token to the rank of its expert.

    slots (N,) int64: this rank's slots t*K + k by receiver, then by row there; send_splits[q] of them go to rank q.
    rows (rows,) int64: the row of each received slot; receive_splits[p] of them come from rank p.
    """

    slots: Tensor
    send_splits: list[int]
    rows: Tensor
    receive_splits: list[int]


def slot_exchange(plan: RoutingPlan) -> SlotExchange:
    """The exchange of one row for each slot. Reads the host."""
    ranks = range(plan.world_size)
    owner_WF, row_WF = plan.owner_of_slot().flatten(1), plan.row_of_slot.flatten(1).long()

    def slots_by_row(source: int, owner: int) -> Tensor:
        slots_N = (owner_WF[source] == owner).nonzero().squeeze(1)
        return slots_N[row_WF[source, slots_N].argsort()]

    sent = [slots_by_row(plan.rank, owner) for owner in ranks]
    received = [row_WF[source, slots_by_row(source, plan.rank)] for source in ranks]
    return SlotExchange(
        slots=torch.cat(sent),
        send_splits=[len(slots_N) for slots_N in sent],
        rows=torch.cat(received),
        receive_splits=[len(rows_N) for rows_N in received],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class PairExchange:
    """One row for each distinct (token, rank) pair, received in the order of ``packed_of_token``.

    tokens (N,) int64: this rank's tokens by receiver, then ascending. Splits: as of ``SlotExchange``.
    """

    tokens: Tensor
    send_splits: list[int]
    receive_splits: list[int]


def pair_exchange(plan: RoutingPlan) -> PairExchange:
    """The exchange of one row for each distinct pair. Reads the host."""
    owner_CK = plan.owner_of_slot()[plan.rank]
    sent = [(owner_CK == rank).any(dim=1).nonzero().squeeze(1) for rank in range(plan.world_size)]
    sent_to, received_from = plan.pair_tokens[plan.rank].tolist(), plan.pair_tokens[:, plan.rank].tolist()
    return PairExchange(tokens=torch.cat(sent), send_splits=sent_to, receive_splits=received_from)
