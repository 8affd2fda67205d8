"""The NCCL baseline: the same work by the collectives of ``torch.distributed``, with local gathers around them.

What the host has to know, splits and indices, is computed beforehand and not timed, in its favour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from harness.routing_problem import RoutingProblem
from sonic_ep.reference.plan import slot_exchange
from sonic_ep.testing import assert_as_accurate


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """An exchange of one row a slot, as index_select and ``all_to_all_single`` want it; rows are in canonical order.

    token_of_sent (N,): this rank's token of each row sent, by receiver. sent_of_slot (T*K,): its inverse, by slot.
    received_of_row, row_of_received (rows,): canonical order from the order of arrival, and back.
    """

    token_of_sent: Tensor
    sent_of_slot: Tensor
    received_of_row: Tensor
    row_of_received: Tensor
    send: list[int]
    receive: list[int]


def splits(problem: RoutingProblem) -> Splits:
    """The exchange of this problem's routing, in which no slot is dropped."""
    exchange = slot_exchange(problem.plan)
    return Splits(
        token_of_sent=exchange.slots // problem.plan.top_k,
        sent_of_slot=exchange.slots.argsort(),
        received_of_row=exchange.rows.argsort(),
        row_of_received=exchange.rows,
        send=exchange.send_splits,
        receive=exchange.receive_splits,
    )


def dispatch_by_all_to_all(problem: RoutingProblem) -> Callable[[], Tensor]:
    """Rows (rows, H) in canonical order: permute, ``all_to_all_single`` of one row a slot, permute."""
    by, group = splits(problem), problem.group.process_group

    def dispatch() -> Tensor:
        sent = problem.x_TH.index_select(0, by.token_of_sent)
        arrived = sent.new_empty((problem.valid_rows, problem.shape.hidden))
        dist.all_to_all_single(arrived, sent, by.receive, by.send, group=group)
        return arrived.index_select(0, by.received_of_row)

    return dispatch


def dispatch_by_all_gather(problem: RoutingProblem) -> Callable[[], Tensor]:
    """Rows (rows, H) in canonical order: all tokens to all ranks, then a local gather."""
    token_of_row = problem.plan.slot_of_row[: problem.valid_rows] // problem.shape.top_k
    gather = collective("all_gather_single", "all_gather_into_tensor")

    def dispatch() -> Tensor:
        size = (problem.group.world_size * problem.shape.tokens, problem.shape.hidden)
        gathered = problem.x_TH.new_empty(size)
        gather(gathered, problem.x_TH, group=problem.group.process_group)
        return gathered.index_select(0, token_of_row)

    return dispatch


def combine_by_all_to_all(problem: RoutingProblem) -> Callable[[], Tensor]:
    """Weighted sums (T, H): permute, ``all_to_all_single`` of one row a slot, permute, one batched product."""
    by, group, shape = splits(problem), problem.group.process_group, problem.shape
    weights = problem.scores_TK.to(shape.dtype).unsqueeze(1)

    def combine() -> Tensor:
        sent = problem.rows_RH.index_select(0, by.row_of_received)
        arrived = sent.new_empty((shape.tokens * shape.top_k, shape.hidden))
        dist.all_to_all_single(arrived, sent, by.send, by.receive, group=group)
        by_slot = arrived.index_select(0, by.sent_of_slot)
        return torch.bmm(weights, by_slot.view(shape.tokens, shape.top_k, shape.hidden)).squeeze(1)

    return combine


def combine_by_reduce_scatter(problem: RoutingProblem, partial_WTH: Tensor) -> Callable[[], Tensor]:
    """Sums (T, H) of dense partial sums (W, T, H) that every rank has made beforehand."""
    scatter = collective("reduce_scatter_single", "reduce_scatter_tensor")

    def combine() -> Tensor:
        out_TH = torch.empty_like(problem.x_TH)
        scatter(out_TH, partial_WTH.view(-1, problem.shape.hidden), group=problem.group.process_group)
        return out_TH

    return combine


def dense_partials(problem: RoutingProblem) -> Tensor:
    """This rank's weighted sum of every token's rows here, (W, T, H), in the dtype of the rows."""
    plan = problem.plan
    slots_N = plan.slot_of_row[: problem.valid_rows].long()
    weighted_NH = problem.rows_RH[: problem.valid_rows].float() * problem.scores_WCK.flatten()[slots_N, None]
    total = weighted_NH.new_zeros((plan.world_size * plan.capacity, problem.shape.hidden))
    total.index_add_(0, slots_N // plan.top_k, weighted_NH)
    return total.to(problem.shape.dtype).view(plan.world_size, plan.capacity, -1)


def exact_sums(problem: RoutingProblem) -> Tensor:
    """The weighted sums of this rank's tokens in fp64, (T, H), from the rows that ``all_to_all`` brings home."""
    by, shape = splits(problem), problem.shape
    sent = problem.rows_RH.index_select(0, by.row_of_received)
    arrived = sent.new_empty((shape.tokens * shape.top_k, shape.hidden))
    dist.all_to_all_single(arrived, sent, by.send, by.receive, group=problem.group.process_group)
    slot_of_token_TK = by.sent_of_slot.view(shape.tokens, shape.top_k)
    total = torch.zeros((shape.tokens, shape.hidden), dtype=torch.float64, device=problem.device)
    for k in range(shape.top_k):
        total += arrived[slot_of_token_TK[:, k]].double() * problem.scores_TK[:, k, None].double()
    return total


def expect_accurate(problem: RoutingProblem, truth: Tensor, plain: Tensor) -> Callable[[Tensor], None]:
    """A check: at most twice as far from the truth as the reference is."""
    return lambda got: assert_as_accurate(got, truth, plain, f"sums of {problem.group}")


def collective(name: str, older_name: str) -> Callable[..., object]:
    """A function of ``torch.distributed``: PyTorch 2.13 gave some new names and deprecated the old ones."""
    found: Callable[..., object] = getattr(dist, name if hasattr(dist, name) else older_name)
    return found
