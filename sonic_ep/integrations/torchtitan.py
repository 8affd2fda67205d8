"""Two overrides for torchtitan, of which a model takes one: ``token_dispatcher`` and ``routed_experts``.

``--override.imports sonic_ep.integrations.torchtitan.token_dispatcher`` moves rows by ``ExpertParallel.plan``,
``dispatch`` and ``combine`` around torchtitan's own experts. ``...routed_experts`` runs the region from routed tokens
to their weighted sums as one ``ExpertParallel.moe_routed`` on the weights of torchtitan's experts. Both keep
torchtitan's router, parameters, checkpoints and meshes. Their keyword arguments are the options of ``sonic_ep.shared``
and the fields of ``EPConfig``, as plain JSON. See docs/torchtitan.md.

Letters of torchtitan, as suffixes: B batch, L sequence, D model dimension, F intermediate size, E experts, e those of
this rank, K experts a token, T = B*L tokens of this rank, R rows of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonic_ep import compat
from sonic_ep.activation import Swiglu
from sonic_ep.api import ExpertParallel
from sonic_ep.config import EPConfig
from sonic_ep.experts import ONE_PROCESS
from sonic_ep.plan import RoutingPlan
from sonic_ep.sharding import is_dtensor
from sonic_ep.sharing import OPTIONS, shared

try:
    import spmd_types as spmd
    from torchtitan.config import derive, override
    from torchtitan.distributed.spmd_types import current_spmd_mesh, maybe_set_sparse_mesh
    from torchtitan.models.common.moe import RoutedExperts
    from torchtitan.models.common.token_dispatcher import BaseEPTokenDispatcher
except ImportError as error:
    raise ImportError(
        f"sonic_ep.integrations.torchtitan needs torchtitan 0.3 or later on Python 3.11 or later ({error}): "
        "pip install 'torchtitan>=0.3'"
    ) from error

# What ``GroupedExperts`` casts rows and weights to, whatever they are.
COMPUTE_DTYPE = torch.bfloat16
FIELDS = tuple(each.name for each in fields(EPConfig))
KNOWN = (*(name for name in OPTIONS if name != "config"), *FIELDS)
DISPATCHER = f"{__name__}.token_dispatcher"


def shared_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``sonic_ep.shared`` from an override's, in which the fields of ``EPConfig`` lie beside the rest.

    Raises ``TypeError`` for an unknown name, ``ValueError`` for a wrong value of ``EPConfig``.
    """
    if unknown := sorted(given.keys() - set(KNOWN)):
        raise TypeError(f"{__name__}: got options {', '.join(unknown)}, expected some of {', '.join(KNOWN)}")
    config = EPConfig(**{name: value for name, value in given.items() if name in FIELDS})
    return {"config": config, **{name: value for name, value in given.items() if name not in FIELDS}}


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """Where the R rows of a plan lie in what experts get: unchanged, or each expert's padded to a multiple of rows.

    counts_e (e,): rows of each expert, padding included, one expert after the other. num_rows: of all that experts get,
    at least 1. unused_R1 (R, 1): whether a row belongs to no expert; None if all do. place_R (R,): where a row goes;
    None if it stays where it is.

    Two experts of 1 and 3 rows, R=4, multiple 2: counts [2, 4], places [0, 2, 3, 4].
    """

    counts_e: Tensor
    num_rows: int
    unused_R1: Tensor | None
    place_R: Tensor | None

    @staticmethod
    def of(plan: RoutingPlan, *, exact: bool, multiple: int | None) -> ExpertRows:
        """exact: all R rows are valid. multiple: each expert's number of rows is padded to one or more times this."""
        rows, first = plan.row_capacity, plan.rank * plan.experts_per_rank
        counts_e, ends_e = plan.counts[first : first + plan.experts_per_rank], plan.group_ends
        if not exact:
            # Where a bound is exceeded there are fewer rows than were routed, until the error is raised.
            ends_e = ends_e.clamp(max=rows)
            counts_e = ends_e.diff(prepend=ends_e.new_zeros(1))
        # At least one: products of no rows at all are an error of some kernels. Graphs are traced for any R.
        num_rows = rows + 1 if torch.compiler.is_compiling() else max(rows, 1)
        plain = ExpertRows(counts_e=counts_e, num_rows=num_rows, unused_R1=None, place_R=None)
        if exact and multiple is None:
            return plain
        row_R = torch.arange(rows, device=ends_e.device)
        unused_R1 = None if exact else (row_R >= ends_e[-1])[:, None]
        if multiple is None:
            return replace(plain, unused_R1=unused_R1)
        padded_e = -(-counts_e.clamp(min=1) // multiple) * multiple
        # Rows of expert i move by what was added to those before it, unused ones by all of it.
        shift = F.pad((padded_e - counts_e).cumsum(0), (1, 0))
        place_R = row_R + shift[torch.searchsorted(ends_e, row_R, right=True)]
        num_rows = (-(-rows // multiple) + len(ends_e)) * multiple
        return ExpertRows(counts_e=padded_e, num_rows=num_rows, unused_R1=unused_R1, place_R=place_R)

    def spread(self, rows_RD: Tensor) -> Tensor:
        """(num_rows, D): what experts get; zeros in unused rows, whose gradient is not read."""
        if self.unused_R1 is not None:
            rows_RD = rows_RD.masked_fill(self.unused_R1, 0)
        if self.place_R is not None:
            return rows_RD.new_zeros(self.num_rows, rows_RD.shape[1]).index_copy(0, self.place_R, rows_RD)
        return F.pad(rows_RD, (0, 0, 0, self.num_rows - len(rows_RD))) if self.num_rows > len(rows_RD) else rows_RD

    def gather(self, rows_ND: Tensor, num_rows: int) -> Tensor:
        """(R, D) of what experts return for the rows of ``spread``, (num_rows, D); their gradient is zero elsewhere."""
        rows_RD = rows_ND[:num_rows] if self.place_R is None else rows_ND.index_select(0, self.place_R)
        return rows_RD if self.unused_R1 is None else rows_RD.masked_fill(self.unused_R1, 0)


@dataclass(frozen=True, kw_only=True)
class DispatchMetadata:
    """What ``combine`` needs of ``dispatch``."""

    plan: RoutingPlan
    topk_scores_TK: Tensor
    expert_rows: ExpertRows


@dataclass(kw_only=True, slots=True)
class TokenDispatcherConfig(BaseEPTokenDispatcher.Config):
    """options: see ``shared_options``. pad_multiple: each expert's rows are padded to a multiple of it."""

    options: dict[str, Any] = field(default_factory=dict)
    pad_multiple: int | None = None


class SonicEPTokenDispatcher(BaseEPTokenDispatcher):
    """A token dispatcher of torchtitan over ``ExpertParallel``; without an EP mesh, over this process alone."""

    Config = TokenDispatcherConfig

    def __init__(self, config: TokenDispatcherConfig) -> None:
        super().__init__(config)
        self._options, self._pad_multiple = shared_options(config.options), config.pad_multiple
        self._exact: bool = self._options["config"].cpu_sync_on_runtime
        self._ep: ExpertParallel | None = None

    def init_buffer(self) -> None:
        """Collective: torchtitan calls it once the EP mesh is known."""
        if self.ep_mesh is not None:
            self._ep = shared(self.ep_mesh, **self._options)

    def expert_parallel(self, x: Tensor) -> ExpertParallel:
        """The ``ExpertParallel`` that all layers of this EP group share."""
        self._make_usable(x.is_cuda)
        assert self._ep is not None
        return self._ep

    @compat.constant_when_traced
    def _make_usable(self, on_gpu: bool) -> None:
        if self._ep is None or not self._ep.usable:
            group: Any = ONE_PROCESS if self.ep_mesh is None else self.ep_mesh
            # As for ``Experts`` of one process.
            backend = {"backend": "reference"} if self.ep_mesh is None and not on_gpu else {}
            self._ep = shared(group, **{**backend, **self._options})

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, DispatchMetadata]:
        """Collective. (rows for this rank's experts, rows of each (e,), metadata for ``combine``).

        Rows are in the order of ``ExpertParallel.dispatch``; those of no expert are zeros. Of
        num_local_tokens_per_expert_E (E,) only the dtype is used, for the counts: the plan counts what arrives.
        """
        ep = self.expert_parallel(x_TD)
        with spmd.no_typecheck():
            plan = ep.plan(topk_expert_ids_TK, self.num_experts)
            expert_rows = ExpertRows.of(plan, exact=self._exact, multiple=self._pad_multiple)
            rows_ND = expert_rows.spread(ep.dispatch(x_TD, plan))
            counts_e = expert_rows.counts_e.to(num_local_tokens_per_expert_E.dtype)
        with maybe_set_sparse_mesh():
            declare_varying(rows_ND, counts_e)
        return rows_ND, counts_e, DispatchMetadata(plan=plan, topk_scores_TK=topk_scores_TK, expert_rows=expert_rows)

    def combine(self, routed_output_RD: Tensor, metadata: DispatchMetadata, x_TD: Tensor) -> Tensor:
        """Collective. (T, D), dtype of x: each token's sum over k of score * row, in fp32, rounded once."""
        ep, plan = self.expert_parallel(x_TD), metadata.plan
        with spmd.no_typecheck():
            rows_RD = metadata.expert_rows.gather(routed_output_RD, plan.row_capacity)
            out_TD: Tensor = ep.combine(rows_RD, metadata.topk_scores_TK, plan).to(x_TD.dtype)
        declare_varying(out_TD)
        return out_TD


def declare_varying(*tensors: Tensor) -> None:
    """Tell torchtitan's type checker, where it runs (debug.spmd_typechecking), that ranks have values of their own."""
    if spmd.is_type_checking():
        names = current_spmd_mesh().mesh_dim_names
        for tensor in tensors:
            spmd.assert_type(tensor, dict.fromkeys(names, spmd.V))


def local(weight: Tensor) -> Tensor:
    """This rank's tensor of a weight, in the dtype that torchtitan's experts compute in."""
    here: Tensor = weight.to_local() if is_dtensor(weight) else weight  # type: ignore[attr-defined]
    return here.to(COMPUTE_DTYPE)


def swiglu_experts(experts: nn.Module) -> dict[str, Any]:
    """Arguments of ``moe_routed`` for ``GroupedExperts``: silu(x w1) * (x w3), then w2. Weights are not copied."""
    gate, up, down = (local(getattr(experts, name)) for name in ("w1_EFD", "w3_EFD", "w2_EDF"))
    return {"w1": (gate, up), "w2": down, "activation": "swiglu"}


def gpt_oss_experts(experts: nn.Module) -> dict[str, Any]:
    """Arguments of ``moe_routed`` for ``GptOssGroupedExperts``: gates and ups alternate, both have biases."""
    names = {"w1": "mlp1_weight_EGD", "b1": "mlp1_bias_EG", "w2": "mlp2_weight_EDF", "b2": "mlp2_bias_ED"}
    weights = {ours: local(getattr(experts, theirs)) for ours, theirs in names.items()}
    limit = float(experts.swiglu_limit)  # type: ignore[arg-type]
    return {**weights, "activation": Swiglu(alpha=1.702, limit=limit, up_offset=1.0), "gate_layout": "interleaved"}


# By full names: importing torchtitan's GPT-OSS needs a later PyTorch than its other experts do. No subclasses: they are
# there to compute something else.
ARGUMENTS_OF: Mapping[str, Callable[[nn.Module], dict[str, Any]]] = {
    "torchtitan.models.common.moe.GroupedExperts": swiglu_experts,
    "torchtitan.models.gpt_oss.moe.GptOssGroupedExperts": gpt_oss_experts,
}


def name_of(experts: type) -> str:
    """The full name of a class."""
    return f"{experts.__module__}.{experts.__qualname__}"


@dataclass(kw_only=True, slots=True)
class FusedRoutedExpertsConfig(RoutedExperts.Config):
    """Its token dispatcher is a ``SonicEPTokenDispatcher``, of which only the ``ExpertParallel`` is used."""


class FusedRoutedExperts(RoutedExperts):
    """The ``RoutedExperts`` of torchtitan as one ``ExpertParallel.moe_routed``, on the parameters of its experts."""

    Config = FusedRoutedExpertsConfig

    def __init__(self, config: FusedRoutedExpertsConfig) -> None:
        super().__init__(config)
        self._arguments_of = ARGUMENTS_OF[name_of(type(self.inner_experts))]

    def parallelize(self, parallel_dims: Any) -> None:
        """As torchtitan's. Raises ``ValueError`` for biases under tensor parallelism of experts."""
        if self._arguments_of is gpt_oss_experts and parallel_dims.tp_enabled and not parallel_dims.ep_enabled:
            got = "got tensor parallelism of experts with biases, expected expert parallelism"
            raise ValueError(f"{__name__}: {got}: raise expert_parallel_degree, or override by {DISPATCHER}")
        super().parallelize(parallel_dims)

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Collective. (B, L, D), dtype of x. Computed in bf16, as torchtitan's experts do; sums over k are in fp32.

        num_local_tokens_per_expert_E is not read.
        """
        ep = self.token_dispatcher.expert_parallel(x_BLD)
        top_k = topk_scores_BLK.shape[-1]
        idx_TK, scores_TK = topk_expert_ids_BLK.reshape(-1, top_k), topk_scores_BLK.reshape(-1, top_k)
        with spmd.no_typecheck():
            x = x_BLD.to(COMPUTE_DTYPE)
            out: Tensor = ep.moe_routed(x, idx_TK, scores_TK, **self._arguments_of(self.inner_experts))
            return out.to(x_BLD.dtype)


@override(  # type: ignore[untyped-decorator]
    target=BaseEPTokenDispatcher.Config,
    description="sonic_ep: dispatch and combine around torchtitan's experts.",
)
def token_dispatcher(cfg: Any, **options: Any) -> TokenDispatcherConfig:
    """In place of any EP token dispatcher. Unless ``cpu_sync_on_runtime`` says otherwise the host reads R in each call.

    Experts of torchtitan compute on all rows of a tensor, and without that read it has room for W*T*K rows, W the ranks
    of the EP group. A ``pad_multiple`` of the replaced dispatcher, which converters to fp8 set, is kept.
    """
    options = {"cpu_sync_on_runtime": True, **options}
    shared_options(options)
    made: TokenDispatcherConfig = derive(cfg, TokenDispatcherConfig, options=options)
    return made


@override(  # type: ignore[untyped-decorator]
    target=RoutedExperts.Config,
    description="sonic_ep: dispatch, experts and combine as one region.",
)
def routed_experts(cfg: Any, **options: Any) -> FusedRoutedExpertsConfig:
    """In place of dispatch, experts and combine. ``TypeError`` for classes other than torchtitan's own two."""
    shared_options(options)
    experts = name_of(type(cfg.inner_experts)._owner)
    if experts not in ARGUMENTS_OF:
        got = f"inner_experts: got {experts}, expected {' or '.join(ARGUMENTS_OF)}"
        raise TypeError(f"{__name__}.routed_experts: {got}: override by {DISPATCHER}, which runs any experts")
    dispatcher = derive(cfg.token_dispatcher, TokenDispatcherConfig, options=options, pad_multiple=None)
    made: FusedRoutedExpertsConfig = derive(cfg, FusedRoutedExpertsConfig, token_dispatcher=dispatcher)
    return made
