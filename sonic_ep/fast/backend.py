"""The fast backend: the layer and its parts over shared memory.

With gradients on, every rank takes part in every backward, even if its own tensors need no gradient: asking the
ranks would cost a read on the host.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton
from torch import Tensor

from sonic_ep.activation import Activation
from sonic_ep.autograd_utils import apply_function, joined
from sonic_ep.backend import ExpertWeights, LayerOutput, RouterWeights, Routing, Slots
from sonic_ep.call_memory import CallRecord
from sonic_ep.config import EPConfig, RouterOptions
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.activation import raise_without_kernel
from sonic_ep.fast.capabilities import interpreted
from sonic_ep.fast.context import DeviceContext
from sonic_ep.fast.exchange import Combine, Dispatch, Exchange
from sonic_ep.fast.gemm import grouped_gemm
from sonic_ep.fast.launch import aligned_contiguous
from sonic_ep.fast.moe_function import Call, MoEFunction
from sonic_ep.fast.router import route
from sonic_ep.plan import RoutingPlan, missing_rows_error


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

    def route(
        self, x_TH: Tensor, weights: RouterWeights, options: RouterOptions, max_tokens: int, record: CallRecord
    ) -> Routing:
        """See ``sonic_ep.fast.router``."""
        return route(x_TH, weights, options, self._context(x_TH.device).workspace)

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
        planner = self._context(topk_idx_TK.device).planner
        pending = planner.begin(topk_idx_TK, num_experts=num_experts, max_tokens=max_tokens, distinct=distinct)
        return replace(planner.sized(pending, planner.rows(pending)), step=step, object_number=object_number)

    def dispatch(self, x_TH: Tensor, plan: RoutingPlan, record: CallRecord) -> Tensor:
        """Rows in canonical order, (R, H)."""
        exchange = self._exchange(plan, x_TH)
        return apply_function(Dispatch, self._joined(x_TH), exchange)

    def combine(self, rows_NH: Tensor, topk_scores_TK: Tensor, plan: RoutingPlan, record: CallRecord) -> Tensor:
        """The weighted sums of a token's rows, (T, H)."""
        exchange = self._exchange(plan, rows_NH)
        if rows_NH.shape[0] < plan.row_capacity:
            exchange.planner.device_errors.flag_missing_rows(rows_NH.shape[0], plan)
        return apply_function(Combine, self._joined(rows_NH), self._joined(topk_scores_TK.float()), exchange)

    def layer(
        self, x_TH: Tensor, slots: Slots, experts: ExpertWeights, shape: torch.Size, record: CallRecord
    ) -> LayerOutput:
        """Plan, dispatch, experts, combine. x is staged while the plan runs, and while the host waits for R.

        x has to require a gradient on every rank or on none, and so has w1: ``facts_of`` compares it.
        """
        with torch.autocast(x_TH.device.type, enabled=False):
            context = self._context(x_TH.device)
            x_TH, scores_TK = aligned_contiguous(x_TH), self._joined(slots.topk_scores.float())
            given = (x_TH, scores_TK, *experts.tensors.values())
            training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
            num_experts = experts.w2.shape[0] * self._group.world_size
            sizes = {"num_experts": num_experts, "max_tokens": slots.max_tokens}
            held = scores_TK.detach()
            pending = context.planner.begin(slots.topk_idx, **sizes, distinct=slots.distinct, scores_TK=held)
            exchange = self._exchange(pending.plan, x_TH)
            gather = None
            if self._config.redispatch_x_in_backward and any(w1.requires_grad for w1 in experts.up_weights):
                gather = context.gather
                # Also where gradients are off: reentrant checkpointing runs the first forward so.
                gather.reserve(slots.max_tokens, x_TH.shape[1] * x_TH.element_size())
            # The mean. No flag changes it, so none changes how products are tiled.
            rows_per_group = triton.cdiv(exchange.plan.row_of_slot.numel(), num_experts)
            call = Call(
                shape=shape,
                exchange=exchange,
                gemm=grouped_gemm((x_TH, *experts.up_weights, experts.w2), rows_per_group),
                activation=experts.activation,
                layout=experts.layout,
                gather=gather,
                training=training,
                staged=exchange.stage(x_TH.detach()),
                pending=pending,
            )
            ups = (*experts.up_weights, *experts.up_biases)
            y = apply_function(MoEFunction, x_TH, scores_TK, experts.w2, experts.b2, call, *ups)
            # A copy to write to: backward rereads the plan's.
            return LayerOutput(y=y, counts=pending.plan.counts.clone(), expert_ids=pending.plan.expert_ids)

    def check(self) -> None:
        """Wait for the devices, then raise what they have flagged."""
        for context in self._contexts.values():
            context.workspace.synchronize()
            context.workspace.wait_errors.raise_if_any()
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
            self._contexts[device] = DeviceContext(self._collectives, self._config, device)
        return self._contexts[device]

    def _joined(self, tensor: Tensor) -> Tensor:
        return joined(tensor, self._group.world_size)

    def _exchange(self, plan: RoutingPlan, rows: Tensor) -> Exchange:
        context = self._context(rows.device)
        load = Workload(world_size=plan.world_size, top_k=plan.top_k, num_experts=plan.num_experts)
        modes = choose_modes(self._config, load)
        exchange = Exchange(
            plan=plan,
            dispatch=context.dispatch[modes.dispatch],
            combine=context.combine[modes.combine],
            workspace=context.workspace,
            planner=context.planner,
            step=context.workspace.step,
        )
        exchange.reserve(rows.shape[1] * rows.element_size())
        return exchange
