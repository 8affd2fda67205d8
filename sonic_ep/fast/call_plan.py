"""The plan of a call: all that follows from its shapes, dtypes, flags and modes, found once for calls alike.

An ``ExpertParallel`` keeps one for each kind of call, in the call's record, until it is closed. T, addresses and
values, which differ from call to call, are not in it; what follows from C is found again when C changes. Kernels and
their constants are kept where they are launched.
"""

from dataclasses import dataclass

from torch import Tensor

from sonic_ep.backend import ExpertWeights
from sonic_ep.config import EPConfig
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.fast.activation import ActivationForm, activation_form
from sonic_ep.fast.choice import Choice
from sonic_ep.fast.collectives import reserve_values
from sonic_ep.fast.context import DeviceContext
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.exchange import Exchange
from sonic_ep.fast.gemm import GroupedGemm, addresses_serve, grouped_gemm, library_gemm, library_serves
from sonic_ep.fast.plan import PlanShape
from sonic_ep.fast.staging import StagedCall, stage_call
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class SizedPlan:
    """What calls with one C share. generation: of the shared buffers."""

    max_tokens: int
    shape: PlanShape
    staged: StagedCall
    generation: int

    def holds(self, max_tokens: int, workspace: Workspace) -> bool:
        """Whether it is of this C, and of the buffers that there are."""
        return self.max_tokens == max_tokens and self.generation == workspace.generation


class CallPlan:
    """The plan of calls with K, E and rows of ``row_bytes``: what moves their rows, and what its users share."""

    def __init__(
        self, context: DeviceContext, config: EPConfig, *, top_k: int, num_experts: int, row_bytes: int
    ) -> None:
        world_size = context.workspace.group.world_size
        load = Workload(world_size=world_size, top_k=top_k, num_experts=num_experts)
        modes = choose_modes(config, load)
        self.top_k, self.num_experts, self.row_bytes = top_k, num_experts, row_bytes
        self.workspace, self.planner = context.workspace, context.planner
        self.dispatch, self.combine = context.dispatch[modes.dispatch], context.combine[modes.combine]
        self._gather = context.gather if config.redispatch_x_in_backward else None
        self.choice: Choice | None = None
        self._form: ActivationForm | None = None
        self._serves: bool | None = None
        self._library: tuple[int, GroupedGemm] | None = None
        self._sized: SizedPlan | None = None

    def at(self, max_tokens: int) -> "SizedPlan":
        """Collective. Sizes at this C, and memory for moving rows and for its backward, which never allocates any."""
        held, workspace = self._sized, self.workspace
        if held is not None and held.holds(max_tokens, workspace):
            return held
        group = workspace.group
        sizes = {"rank": group.rank, "world_size": group.world_size, "max_tokens": max_tokens}
        shape = PlanShape(top_k=self.top_k, num_experts=self.num_experts, **sizes)
        rows = self.dispatch.reserve(max_tokens, self.row_bytes)
        staged = self.planner.reserve(max_tokens, self.top_k, scored=True, rows=rows)
        self.combine.reserve(max_tokens, self.top_k, self.row_bytes)
        reserve_values(workspace, max_tokens, self.top_k)
        self._sized = SizedPlan(max_tokens=max_tokens, shape=shape, staged=staged, generation=workspace.generation)
        return self._sized

    def begin(self, max_tokens: int) -> "SizedPlan":
        """Collective. Begin a layer; its ids, scores and tokens are staged next. Raises as ``DeviceErrors.begin``."""
        self.planner.begin()
        sized = self.at(max_tokens)
        self.combine.expect(max_tokens, self.top_k, self.row_bytes)
        if max_tokens > 0 and self.workspace.group.world_size > 1:
            self.dispatch.before_staging()
        return sized

    def stage(self, topk_idx_TK: Tensor, scores_TK: Tensor, x_TH: Tensor, sized: SizedPlan) -> None:
        """Copy ids, scores and tokens to this rank's halves of shared memory. The plan's barrier follows."""
        if sized.max_tokens > 0:
            sizes = {"max_tokens": sized.max_tokens, "num_experts": self.num_experts}
            stage_call(topk_idx_TK, scores_TK, x_TH, sized.staged, self.workspace, **sizes)

    def gather(self, experts: ExpertWeights, max_tokens: int) -> CopyEngineGather | None:
        """Collective. What gathers x again in backward; None where the rows received are saved."""
        gather = self._gather
        if gather is None or not any(w1.requires_grad for w1 in experts.up_weights):
            return None
        # Also where gradients are off: reentrant checkpointing runs the first forward so.
        gather.reserve(max_tokens, self.row_bytes)
        return gather

    def exchange(self, plan: RoutingPlan) -> Exchange:
        """What moves rows by ``plan``, for the step that has begun."""
        return Exchange(
            plan=plan,
            dispatch=self.dispatch,
            combine=self.combine,
            workspace=self.workspace,
            planner=self.planner,
            tag=self.workspace.tag,
        )

    def form(self, experts: ExpertWeights) -> ActivationForm:
        """The kernels of the activation."""
        if self._form is None:
            ups = experts.up_weights
            of_h = (ups[0].dtype, ups[0].shape[1], len(ups), experts.activation, experts.layout)
            self._form = activation_form(self.workspace.device, *of_h)
        return self._form

    def gemm(self, x_TH: Tensor, experts: ExpertWeights, slots: int) -> GroupedGemm:
        """The products for these weights. slots: of the group, W*C*K."""
        weights = (*experts.up_weights, experts.w2)
        if x_TH.numel() == 0:
            # Without a token it may have any strides, and products read no x but the rows received.
            x_TH = x_TH.new_empty(x_TH.shape)
        # The mean over the group. No flag changes it, so none changes how products are tiled.
        rows_per_group = -(-slots // self.num_experts)
        if self._serves is None:
            self._serves = library_serves((x_TH, *weights))
        if self._serves and x_TH.is_cuda and addresses_serve(weights):
            if self._library is None or self._library[0] != rows_per_group:
                self._library = rows_per_group, library_gemm(x_TH.device, rows_per_group)
            return self._library[1]
        return grouped_gemm((x_TH, *weights), rows_per_group)
