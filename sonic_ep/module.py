"""The layer as an ``nn.Module`` with its own parameters."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.api import ExpertParallel, MoEOutput
from sonic_ep.checks import ROW_DTYPES, ArgumentChecker, check_experts_divide, check_top_k
from sonic_ep.config import ScoreOrder, parse_choice

SEEDS = 2**62
EXPERT_WEIGHTS = ("w1", "w2", "b1", "b2")
# Arguments of ``ExpertParallel.moe`` that are attributes of the layer.
OPTIONS = ("activation", "gate_layout", "score_order", "norm_topk_probs", "reduce_router_grad")


def weight_of(path: str) -> str:
    """The ``MoE`` weight that the parameter at ``path`` is part of; ``torch.nn.utils`` may have split it into several.

    >>> weight_of("w1"), weight_of("w1_orig"), weight_of("parametrizations.w1.0.down"), weight_of("router_w")
    ('w1', 'w1', 'w1', 'router_w')
    """
    name = path.removeprefix("parametrizations.").split(".")[0]
    return name.split("_")[0] if name.split("_")[0] in EXPERT_WEIGHTS else name


class MoE(nn.Module):
    """A Mixture-of-Experts layer whose experts are spread over the ranks of ``ep``. Construction is collective.

    hidden_size H, intermediate_size I, num_experts E (a multiple of W), top_k K; ``bias`` adds b1 and b2; the other
    options are those of ``ExpertParallel.moe``.

    Parameters: router_w (E, H), the same on every rank; w1, w2, b1, b2 of this rank's e experts, shaped as in ``moe``.
    Initial values depend on rank 0's seed and on the expert's number: one seed gives one layer, whatever W. Gradients
    are summed over the group, that of router_w unless ``reduce_router_grad`` is False: do not reduce them again.
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
        checker.count("hidden_size", hidden_size)
        checker.count("intermediate_size", intermediate_size)
        checker.count("num_experts", num_experts)
        check_experts_divide(checker, num_experts)
        check_top_k(checker, top_k, num_experts)
        self.ep, self.top_k, self.activation, self.gate_layout = ep, top_k, activation, gate_layout
        self.score_order = parse_choice(f"{ep.group}: score_order", score_order, ScoreOrder)
        self.norm_topk_probs = checker.flag("norm_topk_probs", norm_topk_probs)
        self.reduce_router_grad = checker.flag("reduce_router_grad", reduce_router_grad)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        known = isinstance(dtype, torch.dtype) and dtype in ROW_DTYPES
        checker.require(known, "dtype", repr(dtype), " or ".join(map(str, ROW_DTYPES)))
        device = None if device is None else checker.device("device", device)
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
        """Collective. Weights normal with variance 1/fan_in, biases zero, from a seed that rank 0 draws.

        Does nothing on the meta device: call it again after ``to_empty``. Fills the original of a parametrized or
        pruned weight. After ``fully_shard`` each rank gets its shard of the layer of that seed, at a peak of one whole
        parameter; ranks that share a layer need the same seed. Raises ``TypeError`` for a weight computed from several
        tensors, and for a DTensor with placements other than Shard and Replicate.
        """
        if self.router_w.is_meta:
            return
        held = {name: self._held(name) for name in ("router_w", *EXPERT_WEIGHTS) if getattr(self, name) is not None}
        for name, parameter in held.items():
            placements = getattr(parameter, "placements", ())
            if any(type(placement).__name__ not in ("Shard", "Replicate") for placement in placements):
                got = f"placements of {name}: got {placements}"
                raise TypeError(f"{self.ep.group}: {got}, expected Shard and Replicate only")
        seed = self.ep.agree(int(torch.randint(SEEDS, (), device="cpu")), self.router_w.device)
        _write(held["router_w"], lambda whole: _fill(whole, seed))
        _write(held["w1"], lambda whole: self._fill_experts(whole, seed + 1))
        _write(held["w2"], lambda whole: self._fill_experts(whole, seed + 2))
        for name in ("b1", "b2"):
            if name in held:
                held[name].zero_()

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of this rank's experts: w1, w2, b1, b2, or those that ``torch.nn.utils`` computes them from.

        That is the original and an adapter (LoRA), ``w1_orig`` (``prune``), ``w1_g`` and ``w1_v`` (``weight_norm``).
        """
        # With duplicates: an adapter shared with router_w would be listed under that name only.
        paths = self.named_parameters(remove_duplicate=False)
        return iter({id(found): found for path, found in paths if weight_of(path) in EXPERT_WEIGHTS}.values())

    def forward(self, x: Tensor) -> MoEOutput:
        """x, (T, H) or (..., H), to ``MoEOutput``. Collective."""
        options: dict[str, Any] = {name: getattr(self, name) for name in OPTIONS}
        return self.ep.moe(x, self.router_w, self.w1, self.w2, self.top_k, self.b1, self.b2, **options)

    def extra_repr(self) -> str:
        """The sizes, for ``print(layer)``."""
        experts, hidden = self.router_w.shape
        sizes = f"hidden_size={hidden}, intermediate_size={self.w2.shape[2]}, num_experts={experts}"
        return f"{sizes} ({self.w1.shape[0]} here), top_k={self.top_k}, activation={self.activation}"

    def _held(self, name: str) -> Tensor:
        """The weight called ``name``, or the original that it is computed from."""
        held = dict(self.named_parameters())
        for path in (name, f"parametrizations.{name}.original", f"{name}_orig"):
            if path in held:
                return held[path]
        raise TypeError(f"{self.ep.group}: {name}: got a weight computed from several tensors, expected one original")

    def _fill_experts(self, weight: Tensor, seed: int) -> None:
        for place, of_expert in enumerate(weight):
            _fill(of_expert, seed + 2 * (self.ep.rank * len(weight) + place))


def _fill(weight: Tensor, seed: int) -> None:
    generator = torch.Generator(weight.device).manual_seed(seed)
    weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)


def _write(parameter: Any, fill: Callable[[Tensor], None]) -> None:
    """``fill`` the parameter; for a DTensor, a whole tensor, of which this rank then keeps its shard."""
    if not hasattr(parameter, "placements"):
        fill(parameter)
        return
    # Not at the top: it takes half as long to import as PyTorch.
    from torch.distributed.tensor import distribute_tensor

    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    fill(whole)
    # Without a source rank nothing is sent: every rank has the whole.
    shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(shard.to_local())
