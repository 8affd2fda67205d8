"""The layer's operators, ``sonic_ep::moe`` and ``sonic_ep::moe_routed``."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sonic_ep.activation import Activation, activation_of
from sonic_ep.backend import MoEOutput, RoutedOutput
from sonic_ep.checks import ArgumentChecker
from sonic_ep.config import RouterConfig, ScoreOrder, router_config_of
from sonic_ep.distributed.group import EPGroup
from sonic_ep.ops.operator import Given, Operator, flags_of, registered
from sonic_ep.router_checks import RouterArguments, local_router
from sonic_ep.sharding import local_of

# One weight, gate and up, or none.
Parts = Tensor | tuple[Tensor, Tensor] | None

# ep: the ``operator_name`` of an ``ExpertParallel``. w1, b1: ``Parts``. trained: of each tensor, in order, whether it
# requires a gradient.
_ROUTER = "Tensor router_w, Tensor? router_b, Tensor? correction_bias, int top_k, str? router"
_SCORES = "str score_order, bool norm_topk_probs, bool reduce_router_grad"
_EXPERTS = "Tensor[] w1, Tensor w2, Tensor[] b1, Tensor? b2, str activation, str gate_layout"
_CALL = "str ep, bool autocast, bool[] trained"
MOE = (
    f"(Tensor x, {_ROUTER}, {_SCORES}, {_EXPERTS}, {_CALL}) -> "
    "(Tensor y, Tensor router_logits, Tensor tokens_per_expert, Tensor topk_idx, Tensor topk_scores, Tensor graph)"
)
_ROUTED = "(Tensor y, Tensor tokens_per_expert, Tensor graph)"
MOE_ROUTED = f"(Tensor x, Tensor topk_idx, Tensor topk_scores, {_EXPERTS}, {_CALL}) -> {_ROUTED}"


def _parts(given: list[Tensor]) -> Parts:
    return None if not given else given[0] if len(given) == 1 else tuple(given)  # type: ignore[return-value]


def _of_experts(given: Given) -> dict[str, Any]:
    text = given["activation"]
    weights = {"w1": _parts(given["w1"]), "w2": given["w2"], "b1": _parts(given["b1"]), "b2": given["b2"]}
    return {**weights, "activation": activation_of(text), "gate_layout": given["gate_layout"]}


def _moe(ep: Any, given: Given) -> tuple[Tensor, ...]:
    same = ("router_w", "router_b", "correction_bias", "top_k", "score_order", "norm_topk_probs", "reduce_router_grad")
    router = None if given["router"] is None else router_config_of(given["router"])
    out, expert_ids = ep.moe.with_ids(
        ep, given["x"], router=router, **{name: given[name] for name in same}, **_of_experts(given)
    )
    return (*out, expert_ids)


def _moe_routed(ep: Any, given: Given) -> tuple[Tensor, ...]:
    # A copy: the plan, which is no saved tensor, may keep the ids as they are.
    of_call = (given["x"], given["topk_idx"].clone(), given["topk_scores"])
    out, expert_ids = ep.moe_routed.with_ids(ep, *of_call, **_of_experts(given), return_routing=True)
    return out.y, out.tokens_per_expert, expert_ids


def _fake_results(given: Given) -> tuple[Tensor, Tensor]:
    x, num_experts = given["x"], given["w2"].shape[0] * registered(given["ep"]).world_size
    return x.new_empty(x.shape), x.new_empty(num_experts, dtype=torch.int32)


def _moe_fake(given: Given) -> tuple[Tensor, ...]:
    x, num_experts, top_k = given["x"], given["router_w"].shape[0], given["top_k"]
    # Not numel(), which makes a symbolic T a constant.
    tokens = math.prod(x.shape[:-1])
    y, counts = _fake_results(given)
    logits = x.new_empty(tokens, num_experts, dtype=torch.float32)
    idx, scores = (x.new_empty(tokens, top_k, dtype=dtype) for dtype in (torch.int64, torch.float32))
    return y, logits, counts, idx, scores


Operator(name="moe", schema=MOE, run=_moe, fake=_moe_fake).define()
Operator(name="moe_routed", schema=MOE_ROUTED, run=_moe_routed, fake=_fake_results).define()


# The calls below are traced: Dynamo inlines them, so they hold no more than the operator and what it takes.


def moe(
    ep: Any,
    x: Tensor,
    router_w: Tensor,
    w1: Parts,
    w2: Tensor,
    top_k: int,
    b1: Parts = None,
    b2: Tensor | None = None,
    activation: str | Activation = "swiglu",
    gate_layout: str = "interleaved",
    score_order: ScoreOrder | str = ScoreOrder.TOPK_THEN_SOFTMAX,
    norm_topk_probs: bool = False,
    reduce_router_grad: bool = True,
    router: RouterConfig | None = None,
    router_b: Tensor | None = None,
    correction_bias: Tensor | None = None,
) -> MoEOutput:
    """``ExpertParallel.moe`` by its operator."""
    of_router = RouterArguments(router_w=router_w, router_b=router_b, correction_bias=correction_bias)
    local = local_router(ArgumentChecker(group=ep.group), of_router, reduce_grad=reduce_router_grad)
    options = [top_k, None if router is None else router.text, getattr(score_order, "value", score_order)]
    experts = _experts_given(ep, w1, w2, b1, b2)
    arguments = [
        x,
        local.router_w,
        local.router_b,
        local.correction_bias,
        *options,
        norm_topk_probs,
        reduce_router_grad,
        *experts,
    ]
    of_call = _of_call(ep, activation, gate_layout, arguments)
    y, logits, counts, idx, scores, _ = torch.ops.sonic_ep.moe(*arguments, *of_call)
    return MoEOutput(y=y, router_logits=logits, tokens_per_expert=counts, topk_idx=idx, topk_scores=scores)


def moe_routed(
    ep: Any,
    x: Tensor,
    topk_idx: Tensor,
    topk_scores: Tensor,
    w1: Parts,
    w2: Tensor,
    b1: Parts = None,
    b2: Tensor | None = None,
    activation: str | Activation = "swiglu",
    gate_layout: str = "interleaved",
    return_routing: bool = False,
) -> Tensor | RoutedOutput:
    """``ExpertParallel.moe_routed`` by its operator."""
    scores = topk_scores.float() if return_routing else topk_scores
    arguments = [x, topk_idx, scores, *_experts_given(ep, w1, w2, b1, b2)]
    y, counts, _ = torch.ops.sonic_ep.moe_routed(*arguments, *_of_call(ep, activation, gate_layout, arguments))
    if not return_routing:
        return cast(Tensor, y)
    return RoutedOutput(y=y, tokens_per_expert=counts, topk_idx=topk_idx, topk_scores=scores)


@dataclass(frozen=True, kw_only=True)
class ByName:
    """Stands for an ``ExpertParallel`` that is made while a call is traced: the trace has only its name and group."""

    operator_name: str
    group: EPGroup
    moe = moe
    moe_routed = moe_routed


def _experts_given(ep: Any, w1: Parts, w2: Tensor, b1: Parts, b2: Tensor | None) -> list[Any]:
    return [_list_of(ep, "w1", w1), _local(ep, "w2", w2), _list_of(ep, "b1", b1), _local(ep, "b2", b2)]


def _list_of(ep: Any, name: str, parts: Parts) -> list[Tensor]:
    if parts is None:
        return []
    return [_local(ep, name, part) for part in (parts if isinstance(parts, tuple) else (parts,))]


def _local(ep: Any, name: str, value: Any) -> Any:
    return local_of(ep.group, name, value)


def _of_call(ep: Any, activation: str | Activation, gate_layout: str, arguments: list[Any]) -> list[Any]:
    text = activation if isinstance(activation, str) else activation.text
    return [text, gate_layout, ep.operator_name, *flags_of(arguments)]
