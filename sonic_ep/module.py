"""The layer as an ``nn.Module``: a router and experts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sonic_ep.activation import Activation
from sonic_ep.api import ExpertParallel, MoEOutput
from sonic_ep.checks import ArgumentChecker, check_top_k
from sonic_ep.config import RouterConfig, ScoreOrder
from sonic_ep.experts import ONE_PROCESS, Experts
from sonic_ep.router import Router
from sonic_ep.router_checks import check_groups, check_router_config


class MoE(nn.Module):
    """A Mixture-of-Experts layer whose experts are spread over the ranks of ``ep``. Construction is collective.

    hidden_size H, intermediate_size I, num_experts E (a multiple of W), top_k K. ep, ``bias`` (b1 and b2),
    ``distribute``: see ``Experts``; without ``ep`` all experts are in this process. router: a ``RouterConfig``, instead
    of score_order and norm_topk_probs. ``router_bias`` adds a bias to the logits; ``correction_bias`` a buffer that
    takes part in the choice only. router_dtype: of the router's weight, ``dtype`` unless given. The other options are
    those of ``ExpertParallel.moe``.

    Parameters: router.weight (E, H), the same on every rank, and those of ``Experts``. Initial values depend on rank
    0's seed and on the expert's number: one seed gives one layer, whatever W. Gradients are summed over the group,
    those of the router unless ``reduce_router_grad`` is False: do not reduce them again.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        ep: ExpertParallel | None = None,
        activation: str | Activation = "swiglu",
        gate_layout: str = "interleaved",
        score_order: ScoreOrder | str = ScoreOrder.TOPK_THEN_SOFTMAX,
        norm_topk_probs: bool = False,
        bias: bool = False,
        reduce_router_grad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        router: RouterConfig | None = None,
        router_bias: bool = False,
        router_dtype: torch.dtype | None = None,
        correction_bias: bool = False,
        distribute: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(ep, ExpertParallel | None):
            got = f"got {type(ep).__name__}, expected an ExpertParallel or None"
            raise TypeError(f"MoE: ep: {got}: make one of a group, sonic_ep.ExpertParallel(group)")
        checker = ArgumentChecker(group=ONE_PROCESS if ep is None else ep.group)
        checker.count("num_experts", num_experts)
        check_top_k(checker, top_k, num_experts)
        config = check_router_config(checker, router, score_order, norm_topk_probs)
        check_groups(checker, config, top_k, num_experts)
        router_dtype = dtype if router_dtype is None else checker.dtype("router_dtype", router_dtype)
        # First among the modules, as in the layer's forward.
        self.register_module("router", None)
        of_experts: dict[str, Any] = {"activation": activation, "gate_layout": gate_layout, "device": device}
        of_experts |= {"bias": bias, "distribute": distribute, "dtype": dtype}
        self.experts = Experts(hidden_size, intermediate_size, num_experts, ep, **of_experts)
        self.router = Router(
            hidden_size,
            num_experts,
            top_k,
            config,
            bias=checker.flag("router_bias", router_bias),
            correction_bias=checker.flag("correction_bias", correction_bias),
            reduce_grad=checker.flag("reduce_router_grad", reduce_router_grad),
            device=self.experts.w2.device,
            dtype=router_dtype,
        )
        self._fill_router()

    @property
    def ep(self) -> ExpertParallel | None:
        """The ``ExpertParallel`` of the experts; None if all of them are in this process."""
        return self.experts.ep

    def reset_parameters(self) -> None:
        """Collective. Fills the router and the experts, see ``Experts.reset_parameters``."""
        self.experts.reset_parameters()
        self._fill_router()

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the experts, adapters and originals of ``torch.nn.utils`` included."""
        return self.experts.parameters()

    def forward(self, x: Tensor) -> MoEOutput:
        """x, (T, H) or (..., H), to ``MoEOutput``. Collective."""
        # One call of a module: FSDP gathers the experts' weights before it.
        out: MoEOutput = self.experts(x, router=self.router)
        return out

    def _fill_router(self) -> None:
        first = next(self.router.parameters())
        if not first.is_meta:
            self.router.fill(self.experts.group, self.experts.drawn_seed(first.device))
