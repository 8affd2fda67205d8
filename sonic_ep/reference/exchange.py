"""Dispatch and combine of one plan, and their gradients; x dispatched again in backward.

The gradient of dispatch is a combine without scores in the configured combine mode; the gradient of combine dispatches
d(out) in the configured dispatch mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sonic_ep.autograd_utils import (
    in_halves,
    once_differentiable,
    savable,
    unpack_saved,
)
from sonic_ep.backend import CombinePrimitive, DispatchPrimitive
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase, Step
from sonic_ep.plan import RoutingPlan, raise_if_malformed, recompute_error
from sonic_ep.profiler_names import BACKWARD, COMBINE, DISPATCH, EXPERTS, named
from sonic_ep.reference.experts import up_projection
from sonic_ep.reference.plan import pad_tokens, slot_exchange


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """One plan with the primitives that move rows by it, as the autograd functions need them."""

    plan: RoutingPlan
    dispatch: DispatchPrimitive
    combine: CombinePrimitive
    collectives: BoundedCollectives
    step: Step
    backward: bool = False

    def sync(self, phase: Phase, device: torch.device, own: int = 0) -> list[int]:
        """Collective. ``own`` of every rank, once all are in this phase of the step."""
        return self.collectives.sync(phase, device, own, self.step, backward=self.backward)

    def raise_if_changed(self, expert_ids_WCK: Tensor) -> None:
        """``ValueError`` if the plan was freed, ``RecomputeError`` if forward ran again with other ids than these."""
        raise_if_malformed(self.collectives.group, self.plan)
        again = expert_ids_WCK.data_ptr() != self.plan.expert_ids.data_ptr()
        if again and not torch.equal(expert_ids_WCK, self.plan.expert_ids):
            raise recompute_error(self.collectives.group, self.step.number)

    def rows(self, x_TH: Tensor) -> Tensor:
        """Collective. x of the group's tokens in canonical row order, (R, H); zeros past the valid rows."""
        received = self.dispatch.receive(x_TH, self.plan)
        source_N = self.dispatch.source_of_row(self.plan)
        if source_N is None:
            return received
        rows_RH = x_TH.new_zeros((self.plan.row_capacity, *x_TH.shape[1:]))
        rows_RH[: len(source_N)] = received[source_N]
        return rows_RH

    def return_to_origin(self, value_of_row_N: Tensor) -> Tensor:
        """Collective. One value of each valid row back to its slot's token, (T, K); zero for dropped slots."""
        exchange = slot_exchange(self.plan)
        values_N, splits = value_of_row_N[exchange.rows], (exchange.receive_splits, exchange.send_splits)
        origin_N = self.collectives.all_to_all_rows(values_N, *splits)
        value_of_slot_F = origin_N.new_zeros(self.plan.num_tokens * self.plan.top_k)
        value_of_slot_F[exchange.slots] = origin_N
        return value_of_slot_F.view(self.plan.num_tokens, self.plan.top_k)


class Dispatch(torch.autograd.Function):
    """x (T, H) to rows (R, H). Backward: a combine without scores."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, exchange: Exchange) -> Tensor:
        """Rows in canonical order."""
        ctx.exchange, ctx.call_lock = exchange, exchange.collectives.call_lock
        ctx.save_for_backward(savable(exchange.plan.expert_ids))
        return exchange.rows(x_TH)

    @staticmethod
    @named(DISPATCH + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        """Gradient of x: the sum of a token's row gradients, with the rounding points of the combine mode."""
        exchange: Exchange = replace(ctx.exchange, backward=True)
        (expert_ids_WCK,) = unpack_saved(ctx, exchange.collectives.group, ("expert_ids of plan",))
        exchange.raise_if_changed(expert_ids_WCK)
        exchange.sync(Phase.COMBINE, grad_RH.device)
        return exchange.combine.combine(grad_RH, None, exchange.plan), None


class Combine(torch.autograd.Function):
    """rows (N, H), N at most R, and scores (T, K) fp32 to (T, H). Backward: d(out) is dispatched to the rows.

    There d(row) = round(score * d(out)), d(score) = the sum over H of d(out) * row in fp32, which returns to the token.
    later: tensors of the caller, by name, that autograd's own functions read later in backward, without a check
    for freed memory: so they are checked here, before communication.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_NH: Tensor, scores_TK: Tensor, exchange: Exchange, shape: torch.Size, later: dict[str, Tensor]
    ) -> Tensor:
        """The weighted sums, (..., H) as ``shape`` says."""
        scores_WCK = exchange.collectives.all_gather(pad_tokens(scores_TK, exchange.plan.max_tokens, 0))
        valid_slots_N = exchange.plan.slot_of_row[: exchange.plan.rows()].long()
        ctx.exchange, ctx.call_lock = exchange, exchange.collectives.call_lock
        ctx.rows, ctx.names = rows_NH.shape[0], ("scores", "rows", "expert_ids of plan", *later)
        ctx.strides = {name: tensor.stride() for name, tensor in later.items()}
        ctx.save_for_backward(
            scores_WCK.flatten()[valid_slots_N] if ctx.needs_input_grad[0] else None,
            rows_NH if ctx.needs_input_grad[1] else None,
            savable(exchange.plan.expert_ids),
            *(tensor.detach() for tensor in later.values()),
        )
        # Not a view: an in-place write by the caller replaces the node of a view, and FSDP's hooks with it.
        return exchange.combine.combine(rows_NH, scores_WCK, exchange.plan).resize_(shape)

    @staticmethod
    @named(COMBINE + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Gradients of the rows (N, H) and of the scores (T, K)."""
        exchange: Exchange = replace(ctx.exchange, backward=True)
        saved = unpack_saved(ctx, exchange.collectives.group, ctx.names, ctx.strides)
        score_of_row_N, rows_NH, expert_ids_WCK, *_ = saved
        del saved
        exchange.raise_if_changed(expert_ids_WCK)
        exchange.sync(Phase.DISPATCH, grad.device)
        out_grad_RH = exchange.rows(grad.reshape(exchange.plan.num_tokens, grad.shape[-1]))
        valid = slice(exchange.plan.rows())
        grad_NH = grad_scores_TK = None
        # In place: where one rank gets most rows, its rows in fp32 are the largest tensor of the call.
        if rows_NH is not None:
            product_NH = out_grad_RH[valid].to(torch.float32, copy=True).mul_(rows_NH[valid])
            grad_scores_TK = exchange.return_to_origin(product_NH.sum(dim=1))
            del product_NH
        if score_of_row_N is not None:
            # The product is fp32, as the score is, and rounded once.
            out_grad_RH[valid].mul_(score_of_row_N[:, None])
            grad_NH = out_grad_RH[: ctx.rows]
        return grad_NH, grad_scores_TK, None, None, None


class UpProjectionOfRowsGatheredAgain(torch.autograd.Function):
    """The up-projection of dispatched rows, (R, H) to (R, 2I or I), that saves x (T, H) and not the rows.

    Backward dispatches x again, on every rank, also on one without rows, and passes the rows to autograd.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, rows_RH: Tensor, exchange: Exchange, names: Sequence[str], *ups: Any) -> Tensor:
        """``up_projection`` of the rows. ups: the weights, then the biases or None for each; names: theirs."""
        ctx.exchange, ctx.call_lock = exchange, exchange.collectives.call_lock
        ctx.names, ctx.strides = (
            ("x", *names),
            {n: w.stride() for n, w in zip(names, ups, strict=True) if w is not None},
        )
        ctx.save_for_backward(x_TH, *ups)
        return up_projection(rows_RH, exchange.plan.group_ends, *in_halves(ups))

    @staticmethod
    @named(EXPERTS + BACKWARD)
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows, weights and biases, those that are required."""
        exchange: Exchange = replace(ctx.exchange, backward=True)
        x_TH, *ups = unpack_saved(ctx, exchange.collectives.group, ctx.names, ctx.strides)
        exchange.sync(Phase.DISPATCH, x_TH.device)
        _, needs_rows, _, _, *needs_ups = ctx.needs_input_grad
        rows_RH = exchange.rows(x_TH).requires_grad_(needs_rows)
        pairs = zip(ups, needs_ups, strict=True)
        leaves = [None if held is None else held.detach().requires_grad_(need) for held, need in pairs]
        with torch.enable_grad():
            hidden_RF = up_projection(rows_RH, exchange.plan.group_ends, *in_halves(leaves))
        needed = [needs_rows, *needs_ups]
        wanted: list[Any] = [leaf for leaf, need in zip((rows_RH, *leaves), needed, strict=True) if need]
        found = iter(torch.autograd.grad(hidden_RF, wanted, grad_RF))
        rows_grad, *up_grads = (next(found) if need else None for need in needed)
        return None, rows_grad, None, None, *up_grads


def joined_in_backward(exchange: Exchange, phase: Phase, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Collective. The tensors, each requiring a gradient here if it does on any rank: backward runs on all or none."""
    mine = sum(1 << place for place, tensor in enumerate(tensors) if tensor.requires_grad)
    masks = exchange.sync(phase, tensors[0].device, mine if torch.is_grad_enabled() else 0)
    needed = [any(mask >> place & 1 for mask in masks) for place in range(len(tensors))]
    if not torch.is_grad_enabled():
        return tensors
    joining = (need and not tensor.requires_grad for tensor, need in zip(tensors, needed, strict=True))
    return tuple(t.detach().requires_grad_() if joins else t for t, joins in zip(tensors, joining, strict=True))
