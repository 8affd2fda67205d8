"""The layer as an ``nn.Module`` that holds its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.api import ExpertParallel, MoEOutput
from sonic_ep.checks import ArgumentChecker, check_experts_divide
from sonic_ep.config import ScoreOrder, parse_choice

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SEEDS = 2**62
EXPERT_WEIGHTS = ("w1", "w2", "b1", "b2")


def weight_of(path: str) -> str:
    """Name of the ``MoE`` weight that the parameter at ``path`` belongs to.

    ``torch.nn.utils`` splits a weight into an original and adapters, magnitude and direction, or original and mask.

    >>> [weight_of(path) for path in ("w1", "parametrizations.w1.original", "parametrizations.w1.0.down", "w1_orig")]
    ['w1', 'w1', 'w1', 'w1']
    >>> weight_of("router_w"), weight_of("parametrizations.router_w.original")
    ('router_w', 'router_w')
    """
    name = path.removeprefix("parametrizations.").split(".")[0]
    return name.split("_")[0] if name.split("_")[0] in EXPERT_WEIGHTS else name


class MoE(nn.Module):
    """A Mixture-of-Experts layer whose experts are spread over the ranks of ``ep``. Construction is collective.

    hidden_size H, intermediate_size I, num_experts E (a multiple of W), top_k K; the further options are those of
    ``ExpertParallel.moe``. ``bias`` adds b1 and b2.

    Parameters: router_w (E, H), the same on every rank; w1, w2, b1, b2 of this rank's e experts. Their first values
    come from rank 0's default generator and from the number of an expert, not from W: the same seed gives the same
    layer on any number of ranks. Gradients arrive summed over the group, for ``expert_parameters`` and, unless
    ``reduce_router_grad`` is False, for router_w: reduce neither again within the group.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        ep: ExpertParallel,
        activation: str = "swiglu",
        gate_layout: str = "interleaved",
        score_order: ScoreOrder | str = ScoreOrder.TOPK_THEN_SOFTMAX,
        norm_topk_probs: bool = False,
        bias: bool = False,
        reduce_router_grad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(ep, ExpertParallel):
            raise TypeError(f"MoE: ep: got {type(ep).__name__}, expected an ExpertParallel")
        checker = ArgumentChecker(group=ep.group)
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_experts": num_experts,
        }
        for name, value in {**sizes, "top_k": top_k}.items():
            checker.count(name, value)
        check_experts_divide(checker, num_experts)
        checker.require(top_k <= num_experts, "top_k", top_k, f"at most E={num_experts}")
        self.ep = ep
        self.top_k = top_k
        self.activation = activation
        self.gate_layout = gate_layout
        self.score_order = parse_choice(f"{ep.group}: score_order", score_order, ScoreOrder)
        self.norm_topk_probs = checker.flag("norm_topk_probs", norm_topk_probs)
        self.reduce_router_grad = checker.flag("reduce_router_grad", reduce_router_grad)
        dtype = checker.dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        device = checker.device("device", device)
        checker.named("gate_layout", gate_layout, GATE_LAYOUTS)
        width = checker.named("activation", activation, ACTIVATIONS).up_width(intermediate_size)
        held = num_experts // ep.world_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.router_w = parameter(num_experts, hidden_size)
        self.w1 = parameter(held, width, hidden_size)
        self.w2 = parameter(held, hidden_size, intermediate_size)
        self.b1 = parameter(held, width) if checker.flag("bias", bias) else None
        self.b2 = parameter(held, hidden_size) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Collective. Weights normal with variance 1/fan_in, biases zero, by a seed that rank 0 draws.

        On the meta device there is nothing to fill: call it again after ``to_empty``.

        Parameters that ``fully_shard`` has made DTensors get this rank's shards of what a layer that is not sharded
        gets from the seed: give ranks that share one layer the same seed. Meanwhile that takes memory for one whole
        parameter and a shard of it. Of a parametrized or pruned weight the original is filled. TypeError if a weight is
        computed from several tensors, or if a DTensor has placements other than Shard and Replicate.
        """
        if self.router_w.is_meta:
            return
        held = {name: self._held(name) for name in ("router_w", *EXPERT_WEIGHTS) if getattr(self, name) is not None}
        for name, parameter in held.items():
            self._check_placements(name, parameter)
        seed = self.ep.agree(int(torch.randint(SEEDS, (), device="cpu")), self.router_w.device)
        _write(held["router_w"], lambda whole: _fill(whole, seed))
        _write(held["w1"], lambda whole: self._fill_experts(whole, seed + 1))
        _write(held["w2"], lambda whole: self._fill_experts(whole, seed + 2))
        for name in ("b1", "b2"):
            if name in held:
                held[name].zero_()

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this rank's experts: w1, w2, b1, b2. Every rank of the group holds different ones.

        For a parametrized weight (LoRA): its original and the adapter's parameters. For ``prune`` and ``weight_norm``:
        the parameters from which the weight is computed (``w1_orig``; ``w1_g``, ``w1_v``).
        """
        # Also an adapter that the router's weight shares, which would come under that name alone.
        paths = self.named_parameters(remove_duplicate=False)
        return iter({id(found): found for path, found in paths if weight_of(path) in EXPERT_WEIGHTS}.values())

    def forward(self, x: Tensor) -> MoEOutput:
        """From x, (T, H) or (..., H), to ``MoEOutput``; ``.y`` has the shape of x. Collective."""
        return self.ep.moe(
            x,
            self.router_w,
            self.w1,
            self.w2,
            self.top_k,
            b1=self.b1,
            b2=self.b2,
            activation=self.activation,
            gate_layout=self.gate_layout,
            score_order=self.score_order,
            norm_topk_probs=self.norm_topk_probs,
            reduce_router_grad=self.reduce_router_grad,
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(layer)``."""
        experts, hidden = self.router_w.shape
        return (
            f"hidden_size={hidden}, intermediate_size={self.w2.shape[2]}, num_experts={experts} "
            f"({self.w1.shape[0]} here), top_k={self.top_k}, activation={self.activation}"
        )

    def _held(self, name: str) -> Tensor:
        """The parameter that ``reset_parameters`` fills: the weight, or the original that it is computed from."""
        paths = (name, f"parametrizations.{name}.original", f"{name}_orig")
        held = dict(self.named_parameters())
        found = next((held[path] for path in paths if path in held), None)
        if found is None:
            raise TypeError(
                f"{self.ep.group}: {name}: got a weight computed from several tensors, expected one original"
            )
        return found

    def _fill_experts(self, weight: Tensor, seed: int) -> None:
        held = weight.shape[0]
        for place in range(held):
            _fill(weight[place], seed + 2 * (self.ep.rank * held + place))

    def _check_placements(self, name: str, parameter: Tensor) -> None:
        if not _is_dtensor(parameter):
            return
        from torch.distributed.tensor import Replicate, Shard

        if not all(type(placement) in (Shard, Replicate) for placement in parameter.placements):
            got = f"got {parameter.placements}, expected Shard and Replicate only"
            raise TypeError(f"{self.ep.group}: placements of {name}: {got}")


def _fill(weight: Tensor, seed: int) -> None:
    generator = torch.Generator(weight.device).manual_seed(seed)
    weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)


def _is_dtensor(parameter: Tensor) -> TypeGuard[DTensor]:
    # Only who shards pays for the import.
    if type(parameter) is nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _write(parameter: Tensor, fill: Callable[[Tensor], None]) -> None:
    """``fill`` the parameter or, if it is a DTensor, a whole tensor of which it then takes this rank's shard."""
    if not _is_dtensor(parameter):
        fill(parameter)
        return
    from torch.distributed.tensor import DTensor, Replicate

    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    fill(whole)
    # Every rank has the whole, so nothing is sent.
    mesh = parameter.device_mesh
    held_by_all = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    parameter.to_local().copy_(held_by_all.redistribute(mesh, parameter.placements).to_local())
