"""The NCCL baseline: the same work by the collectives of ``torch.distributed``, with local gathers around them.

What the host has to know, splits and indices, is computed beforehand and not timed, in its favour.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep.profiler.problem import RoutingProblem
from sonic_ep.reference.plan import slot_exchange


class NcclSlotExchange:
    """One row a slot by ``all_to_all_single``, of a routing in which no slot is dropped."""

    def __init__(self, problem: RoutingProblem) -> None:
        exchange = slot_exchange(problem.plan)
        self._problem = problem
        # This rank's token of each row sent, by receiver, and the place of each slot (T*K,) among them.
        self._token_of_sent = exchange.slots // problem.plan.top_k
        self._sent_of_slot = exchange.slots.argsort()
        # Canonical order from the order of arrival, and back.
        self._received_of_row, self._row_of_received = exchange.rows.argsort(), exchange.rows
        self._send, self._receive = exchange.send_splits, exchange.receive_splits
        self._weights_T1K = problem.scores_TK.to(problem.shape.dtype).unsqueeze(1)

    def dispatch(self) -> Tensor:
        """Rows (rows, H) in canonical order: permute, exchange, permute."""
        sent = self._problem.x_TH.index_select(0, self._token_of_sent)
        return self._exchange(sent, self._send, self._receive).index_select(0, self._received_of_row)

    def combine(self) -> Tensor:
        """Weighted sums (T, H): permute, exchange, permute, one batched product."""
        return torch.bmm(self._weights_T1K, self._rows_of_slots()).squeeze(1)

    def exact_sums(self) -> Tensor:
        """The weighted sums of this rank's tokens in fp64, (T, H)."""
        return torch.einsum("tk,tkh->th", self._problem.scores_TK.double(), self._rows_of_slots().double())

    def _rows_of_slots(self) -> Tensor:
        """The rows of this rank's slots, (T, K, H)."""
        shape, sent = self._problem.shape, self._problem.rows_RH.index_select(0, self._row_of_received)
        by_slot = self._exchange(sent, self._receive, self._send).index_select(0, self._sent_of_slot)
        return by_slot.view(shape.tokens, shape.top_k, shape.hidden)

    def _exchange(self, sent: Tensor, send: list[int], receive: list[int]) -> Tensor:
        arrived = sent.new_empty((sum(receive), sent.shape[1]))
        dist.all_to_all_single(arrived, sent, receive, send, group=self._problem.group.process_group)
        return arrived


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


def combine_by_reduce_scatter(problem: RoutingProblem) -> Callable[[], Tensor]:
    """Sums (T, H) of dense partial sums (W*T, H) that every rank has made beforehand."""
    scatter, plan = collective("reduce_scatter_single", "reduce_scatter_tensor"), problem.plan
    slots_N = plan.slot_of_row[: problem.valid_rows].long()
    weighted_NH = problem.rows_RH[: problem.valid_rows].float() * problem.scores_WCK.flatten()[slots_N, None]
    total_NH = weighted_NH.new_zeros((plan.world_size * plan.max_tokens, problem.shape.hidden))
    partial_NH = total_NH.index_add_(0, slots_N // plan.top_k, weighted_NH).to(problem.shape.dtype)

    def combine() -> Tensor:
        out_TH = torch.empty_like(problem.x_TH)
        scatter(out_TH, partial_NH, group=problem.group.process_group)
        return out_TH

    return combine


def collective(name: str, older_name: str) -> Callable[..., object]:
    """A function of ``torch.distributed``: PyTorch 2.13 gave some new names and deprecated the old ones."""
    found: Callable[..., object] = getattr(dist, name if hasattr(dist, name) else older_name)
    return found
