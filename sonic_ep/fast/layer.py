"""The fast backend: the layer and its parts over shared memory.

Where gradients are on, dispatch and combine take part in backward on every rank of a group of several, whether or not
this rank's own tensors need a gradient: a backward that communicates has to run on all ranks or on none, and to ask the
others which tensors need one would cost a read on the host in every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sonic_ep.backend import Experts, LayerOutput, Routing, Slots
from sonic_ep.config import EPConfig, RouterOptions
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.eager import outside_selective_checkpoint
from sonic_ep.fast.availability import interpreted
from sonic_ep.fast.combine import combine_primitives
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.device import movable, pieces
from sonic_ep.fast.dispatch import dispatch_primitives
from sonic_ep.fast.exchange import Combine, Dispatch, Exchange
from sonic_ep.fast.expert_layer import Begun, Call, ExpertLayer
from sonic_ep.fast.grouped_gemm import grouped_gemm
from sonic_ep.fast.planner import Planner
from sonic_ep.fast.router import route
from sonic_ep.fast.workspace import Workspace
from sonic_ep.meeting import Phase
from sonic_ep.once import savable
from sonic_ep.plan import RoutingPlan
from sonic_ep.precision import full_precision
from sonic_ep.split_backward import applied
from sonic_ep.waits import Waits

TOKENS_AGAIN = "tokens_again"


class FastBackend:
    """The backend protocol over shared memory. Holds a workspace for each device that a call has come with."""

    def __init__(self, waits: Waits, config: EPConfig) -> None:
        self._waits = waits
        self._group = waits.group
        self._config = config
        self._kits: dict[torch.device, Kit] = {}

    def meet(self, device: torch.device) -> None:
        """On the current stream: the host waits for nothing."""
        workspace = self._kit(device).workspace
        workspace.enter(Phase.MEETING)
        workspace.fence()

    @outside_selective_checkpoint
    def route(self, x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions) -> Routing:
        """See ``sonic_ep.fast.router``."""
        return route(x_TH, router_w_EH, options, self._kit(x_TH.device).workspace)

    def check_expert_ids(self, topk_idx_TK: Tensor, num_experts: int) -> None:
        """The plan's kernels flag ids out of range on the device: to look at them here would be a read on the host."""

    @outside_selective_checkpoint
    def plan(self, topk_idx_TK: Tensor, *, num_experts: int, capacity: int, distinct: bool) -> RoutingPlan:
        """See ``sonic_ep.fast.plan``. Raises what an earlier plan has flagged, on every rank alike: see ``Verdict``."""
        planner = self._kit(topk_idx_TK.device).planner
        pending = planner.begin(topk_idx_TK, num_experts=num_experts, capacity=capacity, distinct=distinct)
        return planner.sized(pending, planner.rows(pending))

    @outside_selective_checkpoint
    def dispatch(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """Rows in canonical order, (R, H)."""
        exchange = self._exchange(plan, x_TH)
        return applied(Dispatch, self._joined(x_TH), exchange)

    @outside_selective_checkpoint
    def combine(self, rows_RH: Tensor, topk_scores_TK: Tensor, plan: RoutingPlan) -> Tensor:
        """The weighted sums of a token's rows, (T, H)."""
        exchange = self._exchange(plan, rows_RH)
        return applied(Combine, self._joined(rows_RH), self._joined(topk_scores_TK.float()), exchange)

    @outside_selective_checkpoint
    def layer(self, x_TH: Tensor, slots: Slots, experts: Experts, shape: torch.Size) -> LayerOutput:
        """Plan, dispatch, experts, combine. x is staged while the plan runs, and where the host waits for R meanwhile.

        Where x is to be gathered again in backward, w1 has to require a gradient on every rank or on none.
        """
        with full_precision(x_TH.device):
            kit = self._kit(x_TH.device)
            given = (x_TH, slots.topk_scores, experts.w1, experts.w2, experts.b1, experts.b2)
            wants_x = x_TH.requires_grad
            several = self._group.world_size > 1
            training = torch.is_grad_enabled() and (several or any(t is not None and t.requires_grad for t in given))
            x_TH, scores_TK = self._joined(movable(x_TH)), self._joined(slots.topk_scores.float())
            pending = kit.planner.begin(
                slots.topk_idx,
                num_experts=experts.w1.shape[0] * self._group.world_size,
                capacity=slots.capacity,
                distinct=slots.distinct,
                scores_TK=scores_TK.detach(),
            )
            exchange = self._exchange(pending.plan, x_TH)
            gather = self._reserved_gather(x_TH, experts.w1, slots.capacity)
            call = Call(
                shape=shape,
                exchange=exchange,
                gemm=grouped_gemm((x_TH, experts.w1, experts.w2), rows_per_group(pending.plan)),
                activation=experts.activation,
                layout=experts.layout,
                gather=gather,
                training=training,
                wants_x=wants_x,
                begun=Begun(staged=exchange.stage(x_TH.detach()), pending=pending, planner=kit.planner),
            )
            y = applied(ExpertLayer, x_TH, scores_TK, experts.w1, experts.w2, experts.b1, experts.b2, call)
            # The caller's own: backward looks at the plan's again.
            return LayerOutput(y=y, counts=pending.plan.counts.clone())

    def check(self) -> None:
        """Wait for the devices, then raise what they have flagged."""
        for kit in self._kits.values():
            kit.workspace.synchronize()
            kit.workspace.expiry.raise_if_any()
            kit.planner.verdict.raise_all()

    def explain(self, error: RuntimeError) -> None:
        """Raise what a kernel of any device has waited for in vain, from the error that PyTorch made of its trap."""
        for kit in self._kits.values():
            kit.workspace.expiry.raise_if_any(error)

    def stray(self) -> None:
        """Kernels see where the others are whenever they meet, but not which of two runs of one backward it is."""
        for kit in self._kits.values():
            kit.workspace.stray()

    def leave(self) -> None:
        """End the waits of other ranks' kernels for this rank, on every device."""
        for kit in self._kits.values():
            kit.workspace.leave()

    def holds_memory(self) -> bool:
        """Whether memory is shared on any device."""
        return bool(self._kits)

    def raise_in_backward(self) -> None:
        """The host reads at once whether a recompute has gone astray."""
        for kit in self._kits.values():
            kit.planner.verdict.host_reads = True

    def let_go(self) -> None:
        """Shared memory goes with the last who needs it."""
        self._kits.clear()

    def close(self) -> None:
        """Give the shared memory back."""
        for kit in self._kits.values():
            kit.workspace.close()
        self._kits.clear()

    def _kit(self, device: torch.device) -> Kit:
        """What this group holds on ``device``. Collective on the first call with it."""
        if device not in self._kits:
            if interpreted() == (device.type == "cuda"):
                where = "the CPU under Triton's interpreter" if interpreted() else "CUDA devices"
                where += " for backend 'fast' (backend='reference' takes others)"
                raise ValueError(f"{self._group}: device: got {device}, expected one of {where}")
            self._kits[device] = Kit.make(self._waits, self._config, device)
        return self._kits[device]

    def _joined(self, tensor: Tensor) -> Tensor:
        """The tensor, requiring a gradient if there may be a backward that other ranks take part in."""
        if not torch.is_grad_enabled():
            return tensor
        tensor = savable(tensor)
        if self._group.world_size == 1 or tensor.requires_grad:
            return tensor
        return tensor.detach().requires_grad_()

    def _reserved_gather(self, x_TH: Tensor, w1: Tensor, capacity: int) -> CopyEngineGather | None:
        """Collective. What brings x again in backward, if the config asks for it, with its memory allocated.

        Also where gradients are off: under reentrant checkpointing this is the forward of which a backward will come.
        """
        if not (self._config.redispatch_x_in_backward and w1.requires_grad):
            return None
        gather: CopyEngineGather = self._kit(x_TH.device).gather
        gather.reserve(capacity, x_TH.shape[1] * x_TH.element_size())
        return gather

    def _exchange(self, plan: RoutingPlan, rows: Tensor) -> Exchange:
        kit = self._kit(rows.device)
        load = Workload(world_size=plan.world_size, top_k=plan.top_k, num_experts=plan.num_experts)
        modes = choose_modes(self._config, load)
        exchange = Exchange(
            plan=plan,
            dispatch=kit.dispatch[modes.dispatch],
            combine=kit.combine[modes.combine],
            workspace=kit.workspace,
            max_rows=kit.planner.max_rows,
            verdict=kit.planner.verdict,
            step=kit.workspace.step,
        )
        exchange.reserve(rows.shape[1] * rows.element_size())
        return exchange


def rows_per_group(plan: RoutingPlan) -> int:
    """Rows of an expert where all have as many. No flag changes it, and so none changes how products are cut up."""
    return pieces(plan.world_size * plan.capacity * plan.top_k, plan.num_experts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kit:
    """What a backend holds on one device: the workspace, every primitive over it, and who makes the plans."""

    workspace: Workspace
    planner: Planner
    dispatch: Any
    combine: Any
    gather: CopyEngineGather

    @staticmethod
    def make(waits: Waits, config: EPConfig, device: torch.device) -> Kit:
        """Collective: allocates shared memory."""
        workspace = Workspace(waits.group, device, waits=waits)
        return Kit(
            workspace=workspace,
            planner=Planner(waits.group, config, workspace),
            dispatch=dispatch_primitives(workspace),
            combine=combine_primitives(workspace),
            gather=CopyEngineGather(workspace, TOKENS_AGAIN),
        )
