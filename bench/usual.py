"""The usual path: the same work by the collectives of ``torch.distributed``, with local gathers around them.

All that the host has to know, splits and indices, is worked out beforehand and not timed, in its favour. And of a
layer, the matrix products by themselves, and what makes an answer right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from workload import LayerProblem, Outcome, Problem, tensors_of

from sonic_ep.group import EPGroup
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


def splits(problem: Problem) -> Splits:
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


def dispatch_by_all_to_all(problem: Problem) -> Callable[[], Tensor]:
    """Rows (rows, H) in canonical order: permute, ``all_to_all_single`` of one row a slot, permute."""
    by, group = splits(problem), problem.group.process_group

    def dispatch() -> Tensor:
        sent = problem.x_TH.index_select(0, by.token_of_sent)
        arrived = sent.new_empty((problem.valid_rows, problem.shape.hidden))
        dist.all_to_all_single(arrived, sent, by.receive, by.send, group=group)
        return arrived.index_select(0, by.received_of_row)

    return dispatch


def dispatch_by_all_gather(problem: Problem) -> Callable[[], Tensor]:
    """Rows (rows, H) in canonical order: all tokens to all ranks, then a local gather."""
    token_of_row = problem.plan.slot_of_row[: problem.valid_rows] // problem.shape.top_k
    gather = collective("all_gather_single", "all_gather_into_tensor")

    def dispatch() -> Tensor:
        size = (problem.group.world_size * problem.shape.tokens, problem.shape.hidden)
        gathered = problem.x_TH.new_empty(size)
        gather(gathered, problem.x_TH, group=problem.group.process_group)
        return gathered.index_select(0, token_of_row)

    return dispatch


def combine_by_all_to_all(problem: Problem) -> Callable[[], Tensor]:
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


def combine_by_reduce_scatter(problem: Problem, partial_WTH: Tensor) -> Callable[[], Tensor]:
    """Sums (T, H) of dense partial sums (W, T, H) that every rank has made beforehand."""
    scatter = collective("reduce_scatter_single", "reduce_scatter_tensor")

    def combine() -> Tensor:
        out_TH = torch.empty_like(problem.x_TH)
        scatter(out_TH, partial_WTH.view(-1, problem.shape.hidden), group=problem.group.process_group)
        return out_TH

    return combine


def dense_partials(problem: Problem) -> Tensor:
    """This rank's weighted sum of every token's rows here, (W, T, H), in the dtype of the rows."""
    plan = problem.plan
    slots_N = plan.slot_of_row[: problem.valid_rows].long()
    weighted_NH = problem.rows_RH[: problem.valid_rows].float() * problem.scores_WCK.flatten()[slots_N, None]
    total = weighted_NH.new_zeros((plan.world_size * plan.capacity, problem.shape.hidden))
    total.index_add_(0, slots_N // plan.top_k, weighted_NH)
    return total.to(problem.shape.dtype).view(plan.world_size, plan.capacity, -1)


def exact_sums(problem: Problem) -> Tensor:
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


def expect_accurate(problem: Problem, truth: Tensor, plain: Tensor) -> Callable[[Tensor], None]:
    """A check: at most twice as far from the truth as the reference is."""
    return lambda got: assert_as_accurate(got, truth, plain, f"sums of {problem.group}")


def collective(name: str, older_name: str) -> Callable[..., object]:
    """A function of ``torch.distributed``: PyTorch 2.13 gave some new names and deprecated the old ones."""
    found: Callable[..., object] = getattr(dist, name if hasattr(dist, name) else older_name)
    return found


def has_collectives(group: EPGroup) -> bool:
    """Whether there is anybody to communicate with."""
    return group.process_group is not None and group.world_size > 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What every call has to give, by one call of the fast backend, and what the reference says of that.

    plain: the reference's, in the dtype of the layer; truth: in fp32. faults: what is wrong with the answer.
    """

    outcome: Outcome
    plain: Outcome
    truth: Outcome
    faults: tuple[str, ...]


def faults_of(got: Outcome, truth: Outcome, plain: Outcome) -> tuple[str, ...]:
    """Which of y and the gradients are not as accurate as those of plain PyTorch."""
    found = []
    found_by_name, yardsticks = tensors_of(got), tensors_of(plain)
    for name, right in tensors_of(truth).items():
        if name == "logits":
            continue
        try:
            assert_as_accurate(found_by_name[name], right, yardsticks[name], name)
        except AssertionError as error:
            found.append(str(error))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """The matrix products of a layer by ``grouped_mm``, at the rows that its routing sends here; random numbers.

    ends (e,) int32. rows, out_grad (R, H); hidden_grad (R, 2I); activated (R, I), with R = ends[-1].
    """

    ends: Tensor
    rows: Tensor
    out_grad: Tensor
    hidden_grad: Tensor
    activated: Tensor
    w1: Tensor
    w2: Tensor

    @staticmethod
    def of(problem: LayerProblem, ends_e: Tensor, rows: int) -> Products:
        """Drawn for ``rows`` rows."""
        w1, w2 = problem.inputs.w1.detach(), problem.inputs.w2.detach()
        generator = torch.Generator(w1.device).manual_seed(problem.group.rank)

        def normal(width: int) -> Tensor:
            return w1.new_empty((rows, width)).normal_(generator=generator)

        hidden, intermediate = w2.shape[1:]
        return Products(
            ends=ends_e,
            rows=normal(hidden),
            out_grad=normal(hidden),
            hidden_grad=normal(w1.shape[1]),
            activated=normal(intermediate),
            w1=w1,
            w2=w2,
        )

    def operands(self, *, backward: bool) -> list[tuple[Tensor, Tensor]]:
        """Left (R, .) and right of the two of a forward, or of all six.

        Rows are multiplied by a right of (e, ., .); of one of (R, .) the products with rows are summed, by expert.
        """
        forward = [(self.rows, self.w1.transpose(1, 2)), (self.activated, self.w2.transpose(1, 2))]
        if not backward:
            return forward
        of_rows = [(self.out_grad, self.w2), (self.hidden_grad, self.w1)]
        return [*forward, *of_rows, (self.out_grad, self.activated), (self.hidden_grad, self.rows)]

    def all_of(self, operands: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Each of the products, one behind the other."""
        lefts = [(left if right.ndim == 3 else left.t(), right) for left, right in operands]
        return [F.grouped_mm(left, right, offs=self.ends) for left, right in lefts]

    def expect_of_one_group(self, found: Tensor, left: Tensor, right: Tensor, name: str) -> None:
        """The group with most rows, as accurate as a product of its own."""
        sizes = self.ends.diff(prepend=self.ends.new_zeros(1))
        group = int(sizes.argmax())
        end = int(self.ends[group])
        rows = slice(end - int(sizes[group]), end)
        by_rows = right.ndim == 3
        a, b = (left[rows], right[group]) if by_rows else (left[rows].t(), right[rows])
        assert_as_accurate(found[rows] if by_rows else found[group], a.float() @ b.float(), a @ b, name)
