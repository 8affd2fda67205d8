"""The reference backend: the layer in plain PyTorch over ``torch.distributed``."""

from dataclasses import replace

import torch
from torch import Tensor

from sonic_ep.autograd_utils import (
    apply_function,
    disable_autocast_in_backward,
)
from sonic_ep.backend import Backend, ExpertWeights, LayerOutput, RouterWeights, Routing, Slots
from sonic_ep.call_memory import CallRecord
from sonic_ep.config import EPConfig, RouterOptions
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.plan import NO_ROW, RoutingPlan, missing_rows_error
from sonic_ep.profiler_names import COMBINE, DISPATCH, EXPERTS, PLAN, ROUTE, named
from sonic_ep.reference.combine import combine_primitives
from sonic_ep.reference.dispatch import dispatch_primitives
from sonic_ep.reference.exchange import Combine, Dispatch, Exchange, UpProjectionOfRowsGatheredAgain, joined_in_backward
from sonic_ep.reference.experts import apply_experts, apply_second_half
from sonic_ep.reference.plan import exchange_plan
from sonic_ep.reference.router import route


class ReferenceBackend(Backend):
    """The backend protocol over ``torch.distributed``. Holds no memory, and raises every error at once."""

    def __init__(self, collectives: BoundedCollectives, config: EPConfig) -> None:
        self._config = config
        self._collectives = collectives
        self._dispatch = dispatch_primitives(self._collectives)
        self._combine = combine_primitives(self._collectives)

    def meet(self, device: torch.device) -> None:
        """An exchange of tags."""
        self._collectives.sync(Phase.SYNC, device)

    @named(ROUTE)
    def route(
        self, x_TH: Tensor, weights: RouterWeights, options: RouterOptions, max_tokens: int, record: CallRecord
    ) -> Routing:
        """See ``sonic_ep.reference.router``."""
        with torch.autocast(x_TH.device.type, enabled=False):
            routing = route(x_TH, weights, options, self._collectives)
        given = (x_TH, weights.weight, weights.bias)
        disable_autocast_in_backward((routing.topk_scores, routing.logits), given)
        return routing

    def check_expert_ids(self, topk_idx_TK: Tensor, num_experts: int) -> None:
        """Raises ``ValueError`` at once, by a read on the host."""
        least, most = (int(value) for value in topk_idx_TK.aminmax()) if topk_idx_TK.numel() > 0 else (0, 0)
        if least < NO_ROW or most >= num_experts:
            expected = f"expected 0 to {num_experts - 1}, or -1 for a dropped slot"
            got = f"topk_idx: got expert ids from {least} to {most}"
            raise ValueError(f"{self._collectives.group}: {got}, {expected}")

    def check_rows(self, rows_NH: Tensor, plan: RoutingPlan) -> None:
        """Raises ``ValueError`` at once, by a read on the host."""
        rows = rows_NH.shape[0]
        if rows < plan.row_capacity and rows < plan.rows():
            raise missing_rows_error(self._collectives.group, missing=plan.rows() - rows)

    @named(PLAN)
    def plan(
        self,
        topk_idx_TK: Tensor,
        *,
        num_experts: int,
        max_tokens: int,
        distinct: bool,
        record: CallRecord,
        step: int = 0,
        object_number: int = 0,
    ) -> RoutingPlan:
        """See ``sonic_ep.reference.plan``."""
        self._collectives.sync(Phase.EXCHANGE, topk_idx_TK.device)
        sizes = {"num_experts": num_experts, "max_tokens": max_tokens}
        plan = exchange_plan(
            topk_idx_TK, **sizes, distinct=distinct, config=self._config, collectives=self._collectives
        )
        return replace(plan, step=step, object_number=object_number)

    @named(DISPATCH)
    def dispatch(self, x_TH: Tensor, plan: RoutingPlan, record: CallRecord) -> Tensor:
        """Rows of x in canonical order, (R, H)."""
        exchange = self._exchange(plan)
        (x_TH,) = joined_in_backward(exchange, Phase.DISPATCH, x_TH)
        return apply_function(Dispatch, x_TH, exchange)

    def combine(self, rows_NH: Tensor, topk_scores_TK: Tensor, plan: RoutingPlan, record: CallRecord) -> Tensor:
        """The weighted sums of a token's rows, (T, H)."""
        return self._combined(rows_NH, topk_scores_TK, plan, torch.Size((plan.num_tokens, rows_NH.shape[1])), {})

    def layer(
        self, x_TH: Tensor, slots: Slots, experts: ExpertWeights, shape: torch.Size, record: CallRecord
    ) -> LayerOutput:
        """Plan, dispatch, experts, combine."""
        num_experts = experts.w2.shape[0] * self._collectives.group.world_size
        sizes = {"num_experts": num_experts, "max_tokens": slots.max_tokens}
        plan = self.plan(slots.topk_idx, **sizes, distinct=slots.distinct, record=record)
        with torch.autocast(x_TH.device.type, enabled=False):
            rows_RH = self.dispatch(x_TH, plan, record)
            y_RH = self._apply_experts(rows_RH, x_TH, plan, experts)
            y = self._combined(y_RH, slots.topk_scores, plan, shape, self._read_later(x_TH, experts))
        disable_autocast_in_backward((y,), (x_TH, slots.topk_scores, *experts.tensors.values()))
        # The caller's own: backward looks at the plan's again.
        return LayerOutput(y=y, counts=plan.counts.clone(), expert_ids=plan.expert_ids)

    @named(COMBINE)
    def _combined(
        self, rows_NH: Tensor, scores_TK: Tensor, plan: RoutingPlan, shape: torch.Size, later: dict[str, Tensor]
    ) -> Tensor:
        exchange = self._exchange(plan)
        rows_NH, scores_TK = joined_in_backward(exchange, Phase.COMBINE, rows_NH, scores_TK.float())
        return apply_function(Combine, rows_NH, scores_TK, exchange, shape, later)

    def _gathers_again(self, experts: ExpertWeights) -> bool:
        """Whether x is dispatched again in backward, where only the gradient of w1 reads the rows."""
        trained = any(weight.requires_grad for weight in experts.up_weights)
        return self._config.redispatch_x_in_backward and torch.is_grad_enabled() and trained

    def _read_later(self, x_TH: Tensor, experts: ExpertWeights) -> dict[str, Tensor]:
        """What the experts' backward reads of the caller's tensors, by name."""
        again = self._gathers_again(experts)
        read = {name: held for name, held in experts.tensors.items() if name[0] == "w" or (again and name != "b2")}
        return read | ({"x": x_TH} if again else {})

    @named(EXPERTS)
    def _apply_experts(self, rows_RH: Tensor, x_TH: Tensor, plan: RoutingPlan, experts: ExpertWeights) -> Tensor:
        if not self._gathers_again(experts):
            return apply_experts(rows_RH, plan.group_ends, experts)
        up, ups = UpProjectionOfRowsGatheredAgain, (*experts.up_weights, *experts.up_biases)
        weights = [name for name in experts.tensors if name[:2] == "w1"]
        names = (*weights, *(name.replace("w", "b") for name in weights))
        hidden_RF = apply_function(up, x_TH.detach(), rows_RH, self._exchange(plan), names, *ups)
        return apply_second_half(hidden_RF, plan.group_ends, experts)

    def _exchange(self, plan: RoutingPlan) -> Exchange:
        load = Workload(world_size=plan.world_size, top_k=plan.top_k, num_experts=plan.num_experts)
        modes, held = choose_modes(self._config, load), self._collectives
        dispatch, combine = self._dispatch[modes.dispatch], self._combine[modes.combine]
        return Exchange(plan=plan, dispatch=dispatch, combine=combine, collectives=held, step=held.step)
