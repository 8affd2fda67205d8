"""The fast backend: the layer and its parts over shared memory.

With gradients on, every rank takes part in every backward, even if its own tensors need no gradient: asking the
ranks would cost a read on the host.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sonic_ep import compat
from sonic_ep.activation import Activation
from sonic_ep.autograd_utils import apply_function, joined
from sonic_ep.backend import ExpertWeights, LayerOutput, RouterWeights, Routing, Slots
from sonic_ep.call_memory import CallRecord
from sonic_ep.config import EPConfig, RouterOptions
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.activation import raise_without_kernel
from sonic_ep.fast.call_plan import CallPlan, SizedPlan
from sonic_ep.fast.capabilities import interpreted
from sonic_ep.fast.choice import StagedChoice, choice_of
from sonic_ep.fast.context import DeviceContext
from sonic_ep.fast.exchange import Combine, Dispatch, Exchange
from sonic_ep.fast.moe_function import Call, MoEFunction, run_forward
from sonic_ep.fast.plan import PlanShape
from sonic_ep.fast.router import route
from sonic_ep.fast.staging import stage_call
from sonic_ep.plan import RoutingPlan, missing_rows_error, noted_form
from sonic_ep.profiler_names import COMBINE, DISPATCH, ROUTE, named


class FastBackend:
    """The backend protocol over shared memory: a context for each device that calls have used."""

    def __init__(self, collectives: BoundedCollectives, config: EPConfig) -> None:
        self._collectives = collectives
        self._group = collectives.group
        self._config = config
        self._contexts: dict[torch.device, DeviceContext] = {}

    def meet(self, device: torch.device) -> None:
        """On the current stream: the host waits for nothing."""
        workspace = self._context(device).workspace
        workspace.enter(Phase.SYNC)
        workspace.barrier_before_write()

    @named(ROUTE)
    def route(
        self, x_TH: Tensor, weights: RouterWeights, options: RouterOptions, max_tokens: int, record: CallRecord
    ) -> Routing:
        """See ``sonic_ep.fast.router``. The layer follows: its ids, scores and tokens are staged with the choice."""
        call_plan = self._call_plan(record, x_TH, options.top_k, weights.weight.shape[0])
        sized = call_plan.begin(max_tokens)
        choice = call_plan.choice
        if choice is None:
            corrected = weights.correction is not None
            choice = choice_of(x_TH.device, call_plan.num_experts, options, corrected=corrected, staged=x_TH.dtype)
            call_plan.choice = choice
        into = None
        if max_tokens > 0:
            into = StagedChoice(choice=choice, staged=sized.staged, x_TH=x_TH, max_tokens=max_tokens)
        routing = route(x_TH, weights, options, call_plan.workspace, into)
        # Also where there was nothing to stage: the layer has begun.
        routing.staged = sized
        return routing

    def check_activation(self, activation: Activation) -> None:
        """Raise ``ValueError`` for an activation without a kernel."""
        raise_without_kernel(self._group, activation)

    def check_expert_ids(self, topk_idx_TK: Tensor, num_experts: int) -> None:
        """The plan's kernels flag ids out of range on the device: checking them here would take a host read."""

    def check_rows(self, rows_NH: Tensor, plan: RoutingPlan) -> None:
        """Raise ``ValueError`` where R is exact. Elsewhere ``combine`` flags missing rows on the device."""
        if self._config.cpu_sync_on_runtime and rows_NH.shape[0] < plan.row_capacity:
            raise missing_rows_error(self._group, missing=plan.row_capacity - rows_NH.shape[0])

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
        """See ``sonic_ep.fast.plan``. Raises the error of an earlier plan, on all ranks alike: see ``DeviceErrors``."""
        context = self._context(topk_idx_TK.device)
        planner, workspace, group = context.planner, context.workspace, self._group
        tokens, top_k = topk_idx_TK.shape
        planner.begin()
        sizes = {"max_tokens": max_tokens, "num_experts": num_experts}
        sized: SizedPlan | None = record.plan
        if sized is None or not sized.holds(max_tokens, workspace):
            shape = PlanShape(rank=group.rank, world_size=group.world_size, top_k=top_k, **sizes)
            staged = planner.reserve(max_tokens, top_k, scored=False)
            generation = workspace.generation
            sized = SizedPlan(max_tokens=max_tokens, shape=shape, staged=staged, generation=generation)
            record.plan = sized
        if max_tokens > 0:
            stage_call(topk_idx_TK, None, None, sized.staged, workspace, **sizes)
        pending = planner.plan(sized.staged, sized.shape, num_tokens=tokens, distinct=distinct)
        plan = planner.sized(pending, planner.rows(pending)).of_origin(step, object_number)
        noted_form(plan)
        return plan

    @named(DISPATCH)
    def dispatch(self, x_TH: Tensor, plan: RoutingPlan, record: CallRecord) -> Tensor:
        """Rows in canonical order, (R, H)."""
        exchange = self._exchange(record, x_TH, plan)
        if not torch.is_grad_enabled():
            return exchange.rows(x_TH)[0]
        return apply_function(Dispatch, self._joined(x_TH), exchange)

    @named(COMBINE)
    def combine(self, rows_NH: Tensor, topk_scores_TK: Tensor, plan: RoutingPlan, record: CallRecord) -> Tensor:
        """The weighted sums of a token's rows, (T, H)."""
        exchange = self._exchange(record, rows_NH, plan)
        if rows_NH.shape[0] < plan.row_capacity:
            exchange.planner.device_errors.flag_missing_rows(rows_NH.shape[0], plan)
        scores_TK = topk_scores_TK.float()
        if not torch.is_grad_enabled():
            return exchange.weighted_sums(rows_NH, scores_TK)[0]
        return apply_function(Combine, self._joined(rows_NH), self._joined(scores_TK), exchange)

    def layer(
        self, x_TH: Tensor, slots: Slots, experts: ExpertWeights, shape: torch.Size, record: CallRecord
    ) -> LayerOutput:
        """Plan, dispatch, experts, combine. With ``cpu_sync_on_runtime`` the host reads R while the plan is placed.

        x has to require a gradient on every rank or on none, and so has w1: ``facts_of`` compares it.
        """
        if not torch.is_autocast_enabled(x_TH.device.type):
            return self._layer(x_TH, slots, experts, shape, record)
        with torch.autocast(x_TH.device.type, enabled=False):
            return self._layer(x_TH, slots, experts, shape, record)

    def _layer(
        self, x_TH: Tensor, slots: Slots, experts: ExpertWeights, shape: torch.Size, record: CallRecord
    ) -> LayerOutput:
        scores_TK, max_tokens = self._joined(slots.topk_scores.float()), slots.max_tokens
        tokens, top_k = slots.topk_idx.shape
        call_plan = self._call_plan(record, x_TH, top_k, experts.w2.shape[0] * self._group.world_size)
        sized: SizedPlan | None = slots.staged
        if sized is None:
            sized = call_plan.begin(max_tokens)
            call_plan.stage(slots.topk_idx, scores_TK, x_TH, sized)
        staged = sized.staged
        gather = call_plan.gather(experts, max_tokens)
        pending = call_plan.planner.plan(staged, sized.shape, num_tokens=tokens, distinct=slots.distinct)
        plan, grad = pending.plan, torch.is_grad_enabled()
        ups = (*experts.up_weights, *experts.up_biases)
        given = (x_TH, scores_TK, experts.w2, experts.b2, *ups)
        call = Call(
            shape=shape,
            exchange=call_plan.exchange(plan),
            gemm=call_plan.gemm(x_TH, experts, self._group.world_size * max_tokens * top_k),
            form=call_plan.form(experts),
            gather=gather,
            training=grad and any(tensor is not None and tensor.requires_grad for tensor in given),
            staged=staged.rows,
            pending=pending,
        )
        if grad:
            y = apply_function(MoEFunction, x_TH, scores_TK, experts.w2, experts.b2, call, *ups)
        else:
            y, _ = run_forward(x_TH, experts.w2, experts.b2, call, ups)
        return LayerOutput(y=y, counts=pending.counts, expert_ids=plan.expert_ids)

    def check(self) -> None:
        """Wait for the devices, then raise what they have flagged."""
        for context in self._contexts.values():
            context.workspace.synchronize()
            context.workspace.wait_errors.raise_if_any()
        # No rank waits for another in this call: one that raises alone may go on.
        self._collectives.call_lock.begun = False
        for context in self._contexts.values():
            context.planner.device_errors.raise_all()

    def explain(self, error: RuntimeError) -> None:
        """Raise the failed wait of a kernel, on any device, from the error that PyTorch made of its trap."""
        for context in self._contexts.values():
            context.workspace.wait_errors.raise_if_any(error)

    def leave(self, tag: int = 0) -> None:
        """End the waits of other ranks' kernels for this rank, on every device."""
        for context in self._contexts.values():
            context.workspace.leave(tag)

    def tags_shown(self) -> Mapping[int, int]:
        """Of every device's barrier."""
        return {rank: tag for held in self._contexts.values() for rank, tag in held.workspace.tags_shown().items()}

    def holds_memory(self) -> bool:
        """Whether memory is shared on any device."""
        return bool(self._contexts)

    def raise_in_backward(self) -> None:
        """The host reads at once whether a recompute routed otherwise."""
        for context in self._contexts.values():
            context.planner.device_errors.host_reads = True

    def detach(self) -> None:
        """Shared memory is freed with the last graph that needs it."""
        self._contexts.clear()

    def close(self) -> None:
        """Free the shared memory."""
        for context in self._contexts.values():
            context.workspace.close()
        self._contexts.clear()

    def _context(self, device: torch.device) -> DeviceContext:
        """The context of ``device``. Collective on the first call with it."""
        if device not in self._contexts:
            if interpreted() == (device.type == "cuda"):
                where = "the CPU under Triton's interpreter" if interpreted() else "CUDA devices"
                where += " for backend 'fast' (backend='reference' takes others)"
                raise ValueError(f"{self._group}: device: got {device}, expected one of {where}")
            if compat.transforms_active():
                # It would make of memory that outlives it a tensor of its own.
                raise RuntimeError(
                    f"{self._group}: got a first call inside of a transform of torch.func: make it outside"
                )
            self._contexts[device] = DeviceContext(self._collectives, self._config, device)
        return self._contexts[device]

    def _joined(self, tensor: Tensor) -> Tensor:
        return joined(tensor, self._group.world_size)

    def _exchange(self, record: CallRecord, rows_NH: Tensor, plan: RoutingPlan) -> Exchange:
        call_plan = self._call_plan(record, rows_NH, plan.top_k, plan.num_experts)
        call_plan.at(plan.max_tokens)
        return call_plan.exchange(plan)

    def _call_plan(self, record: CallRecord, rows_NH: Tensor, top_k: int, num_experts: int) -> CallPlan:
        held: CallPlan | None = record.plan
        if held is None:
            sizes = {"top_k": top_k, "num_experts": num_experts, "row_bytes": rows_NH.shape[1] * rows_NH.element_size()}
            record.plan = held = CallPlan(self._context(rows_NH.device), self._config, **sizes)
        return held
