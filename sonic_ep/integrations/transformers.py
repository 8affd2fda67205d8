"""Expert parallelism of transformers by sonic_ep: two values of ``DistributedConfig.ep_implementation``.

    import sonic_ep.integrations.transformers
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    distributed = DistributedConfig(fsdp_size=W, ep_size=W, ep_implementation="sonic_ep")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=distributed)

"sonic_ep" computes the experts by ``ExpertParallel.moe_routed``, from the model's own parameters without a copy. While
the model is built, the forward of each experts module runs on a few numbers: experts that ``moe_routed`` does not
reproduce with any of its activations raise ``ValueError``. "sonic_ep_dispatch" moves rows by
``ExpertParallel.dispatch`` and ``combine`` and runs the model's own experts on them, in whichever
``experts_implementation`` they have.

Layers with one EP group share one ``ExpertParallel``, see ``configure``. All ranks of an EP group run forward, and all
run backward. Gradients of experts are sums over the EP group, as those of transformers' own "all_to_all"; FSDP as
transformers sets it up divides them by the number of batches, so nothing is left to set. See docs/transformers.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from sonic_ep.api import ExpertParallel
from sonic_ep.checks import ROW_DTYPES
from sonic_ep.config import EPConfig
from sonic_ep.distributed.group import resolve_group
from sonic_ep.integrations.stored_experts import Refusal, StoredExperts, proven_activation
from sonic_ep.plan import RoutingPlan
from sonic_ep.sharing import OPTIONS, shared

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    try:
        found = f"transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        found = "no transformers"
    expected = "expected transformers 5.23 or later, which has a registry of EP implementations"
    raise ImportError(f"sonic_ep: got {found}, {expected}: pip install 'transformers>=5.23'") from error

FUSED, DISPATCHED = "sonic_ep", "sonic_ep_dispatch"


def configure(
    *,
    backend: str = "auto",
    config: EPConfig | None = None,
    max_tokens_per_rank: int | None = None,
    timeout: float | None = None,
    check_collective: bool = False,
) -> None:
    """Options of ``ExpertParallel`` for the models that this process builds from now on.

    Each call sets all of them, so ``configure()`` resets them. An option with its default counts as not given: a model
    then uses whatever object ``sonic_ep.shared`` has for its EP group. Building a model raises ``ValueError`` where
    that object was made with another value of an option that is given. The same on every rank.

    With ``EPConfig(cpu_sync_on_runtime=True)``, "sonic_ep_dispatch" runs the experts on the rows that arrived. Without
    it, on as many rows as could arrive at worst, and those that did not are zeros: W * C * K, of W ranks, C the most
    tokens of a rank, K experts of a token.
    """
    given: dict[str, Any] = {"backend": backend, "config": config, "max_tokens_per_rank": max_tokens_per_rank}
    given |= {"timeout": timeout, "check_collective": check_collective}
    options = {name: value for name, value in given.items() if value != OPTIONS[name]}
    SonicEPImplementation.options = MappingProxyType(options)


@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """The tokens of a rank that shares its batch with no other."""

    def mine(self, tensor_TX: Tensor) -> Tensor:
        """All of them."""
        return tensor_TX

    def joined(self, mine_SX: Tensor, num_tokens: int) -> Tensor:
        """The same."""
        return mine_SX


@dataclass(frozen=True, kw_only=True)
class SlicedBatch:
    """The tokens of a TP group, whose ranks hold the same batch: each computes a slice of consecutive tokens.

    mesh: the group. Of T tokens a rank takes ``ceil(T / size)``, the last ranks fewer or none: of 5 on 4 ranks 2, 2, 1
    and 0. Gradients of what is sliced are joined in backward, so they are whole on every rank.
    """

    mesh: DeviceMesh

    def mine(self, tensor_TX: Tensor) -> Tensor:
        """This rank's slice (S, ...) of a tensor (T, ...) that is the same on every rank."""
        whole = DTensor.from_local(tensor_TX, self.mesh, (Replicate(),), run_check=False)
        return whole.redistribute(placements=(Shard(0),)).to_local()

    def joined(self, mine_SX: Tensor, num_tokens: int) -> Tensor:
        """(T, ...) on every rank, from each rank's slice."""
        shape = torch.Size((num_tokens, *mine_SX.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        slices = DTensor.from_local(mine_SX.contiguous(), self.mesh, (Shard(0),), shape=shape, stride=stride)
        return slices.full_tensor()


class SonicEPImplementation(EPImplementation):
    """What both have in common: one object for each experts module, one ``ExpertParallel`` for an EP group."""

    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # Weak references to the mesh of the last module that was built, and to its ``ExpertParallel``.
    _last: ClassVar[tuple[Callable[[], Any], Callable[[], Any]]] = (lambda: None, lambda: None)

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.batch = WholeBatch() if tp_mesh.size() == 1 else SlicedBatch(mesh=tp_mesh)
        self.ep = self._shared(ep_mesh)

    @classmethod
    def _shared(cls, ep_mesh: DeviceMesh) -> ExpertParallel:
        """``shared`` collects garbage, so it is called once for a model, whose modules get the same mesh object."""
        mesh, last = SonicEPImplementation._last
        # Of another mesh it may be garbage, which ``shared`` cannot collect while it is held here.
        ep = last() if mesh() is ep_mesh else None
        if not isinstance(ep, ExpertParallel) or not ep.usable:
            ep = shared(ep_mesh, **cls.options)
            SonicEPImplementation._last = (weakref.ref(ep_mesh), weakref.ref(ep))
        return ep

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), from hidden_states (T, H), top_k_index (T, K) of all E experts, top_k_weights (T, K). Collective."""
        x_SH, idx_SK, scores_SK = map(self.batch.mine, (hidden_states, top_k_index, top_k_weights))
        return self.batch.joined(self.weighted_sums(x_SH, idx_SK, scores_SK), hidden_states.shape[0])

    def weighted_sums(self, x_TH: Tensor, idx_TK: Tensor, scores_TK: Tensor) -> Tensor:
        """(T, H): each token's sum over k of score * output of its expert, for tokens that no other rank has."""
        raise NotImplementedError


class FusedExpertsEP(SonicEPImplementation):
    """``ExpertParallel.moe_routed`` of the module's parameters. ``ValueError`` for a module that does something else.

    Refused while the model is built: other gates, other parameters (scales of quantized weights, norms), a forward of
    the user's own. Under autocast x is cast as by a linear layer.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        remedy = f'use ep_implementation="{DISPATCHED}", which runs the experts as they are'
        self.refusal = Refusal(group=resolve_group(ep_mesh), module=type(experts).__name__, remedy=remedy)
        check_is_of_transformers(experts, self.refusal)
        self.stored = StoredExperts.of(experts, self.refusal)
        check_shares(experts, self.stored, ep_mesh, self.refusal)
        # The forward of the class, and that which uses the module's gate: the model may run either.
        self.activation = proven_activation(experts, self.stored, ("eager", "batched_mm"), self.refusal)
        self.proven_gate = getattr(experts, "act_fn", None)
        super().__init__(experts, ep_mesh, tp_mesh)

    def weighted_sums(self, x_TH: Tensor, idx_TK: Tensor, scores_TK: Tensor) -> Tensor:
        """As ``moe_routed``."""
        if getattr(self.experts, "act_fn", None) is not self.proven_gate:
            raise self.refusal.of("an act_fn that was replaced after the model was built", "that of its class")
        if torch.is_autocast_enabled(x_TH.device.type):
            x_TH = x_TH.to(torch.get_autocast_dtype(x_TH.device.type))
        weights = self.stored.arguments({name: self._parameter(name) for name in self.stored.names})
        y_TH: Tensor = self.ep.moe_routed(x_TH, idx_TK, scores_TK, activation=self.activation, **weights)
        return y_TH

    def _parameter(self, name: str) -> Tensor:
        found = self.experts._parameters.get(name)
        if found is None:
            raise self.refusal.of(f"{name} computed from other tensors (a parametrization, as of LoRA)", "a parameter")
        return found


class DispatchedExpertsEP(SonicEPImplementation):
    """Rows by ``dispatch``, the module's own experts on them, sums by ``combine``.

    The experts get rows, each with one expert id and the weight 1; ``combine`` applies the scores on the tokens' rank.
    """

    def weighted_sums(self, x_TH: Tensor, idx_TK: Tensor, scores_TK: Tensor) -> Tensor:
        """By ``plan``, ``dispatch`` and ``combine``."""
        plan = self.ep.plan(idx_TK, self.num_local_experts * self.ep.world_size)
        rows_RH = self.ep.dispatch(x_TH, plan)
        return self.ep.combine(self._outputs(rows_RH, plan), scores_TK, plan)

    def _outputs(self, rows_RH: Tensor, plan: RoutingPlan) -> Tensor:
        """The experts' outputs, (R, H)."""
        if not torch.compiler.is_compiling() and len(rows_RH) > 0:
            return self._run(rows_RH, plan)
        # Backward, and FSDP in it, runs through the experts on every rank: here with one more row, of zeros. Graphs are
        # traced for any R.
        return self._run(F.pad(rows_RH, (0, 0, 0, 1)), plan)[:-1]

    def _run(self, rows_RH: Tensor, plan: RoutingPlan) -> Tensor:
        """The module's forward. Of its implementations, grouped_mm leaves out rows past the last expert."""
        numbers_R = torch.arange(len(rows_RH), dtype=plan.group_ends.dtype, device=rows_RH.device)
        # With group_ends 4 6: 0 0 0 0 1 1 2 2, where 2 is past the last expert.
        experts_R = torch.searchsorted(plan.group_ends, numbers_R, right=True)
        if not self.ep.config.cpu_sync_on_runtime:
            # They may be NaN. Their gradients are zeros, as combine's backward leaves them.
            unspecified_R1 = (experts_R == self.num_local_experts).unsqueeze(1)
            rows_RH = rows_RH.masked_fill(unspecified_R1, 0)
        skips = _implementation_name(self.experts) == "grouped_mm"
        last = self.num_local_experts - (0 if skips else 1)
        ids_R1 = experts_R.long().clamp(max=last).unsqueeze(1)
        y_RH: Tensor = self.experts_forward(rows_RH, ids_R1, rows_RH.new_ones(ids_R1.shape))
        return y_RH


def _implementation_name(experts: nn.Module) -> str | None:
    name: str | None = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return name


def check_is_of_transformers(experts: nn.Module, refusal: Refusal) -> None:
    """Refuse experts that end with a norm, and an ``experts_implementation`` that transformers does not bring."""
    if getattr(experts, "has_post_expert_norm", False):
        raise refusal.of("experts that end with a norm", "experts that end with their down-projection")
    name = _implementation_name(experts)
    function = None if name in (None, "eager") else ALL_EXPERTS_FUNCTIONS.get(name)
    if function is not None and not function.__module__.startswith("transformers."):
        raise refusal.of(f"experts_implementation={name!r}, which others registered", "one of transformers' own")


def check_shares(experts: nn.Module, stored: StoredExperts, ep_mesh: DeviceMesh, refusal: Refusal) -> None:
    """Refuse parameters that are not in a dtype of rows, and those that are not sharded by expert."""
    for name in stored.names:
        parameter: Tensor = experts.get_parameter(name)
        if parameter.dtype not in ROW_DTYPES:
            raise refusal.of(f"{name} in {parameter.dtype}", " or ".join(map(str, ROW_DTYPES)))
        if not isinstance(parameter, DTensor) or (parameter.device_mesh, parameter.placements) != (
            ep_mesh,
            (Shard(0),),
        ):
            expected = 'a DTensor that is Shard(0) on the EP mesh (rule "grouped_gemm" of ep_plan)'
            raise refusal.of(f"{name} that is not sharded by expert", expected)


EPImplementationInterface.register(FUSED, FusedExpertsEP)
EPImplementationInterface.register(DISPATCHED, DispatchedExpertsEP)
