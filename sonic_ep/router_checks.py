"""Checks of a router's arguments: its configuration, weights, and how both fit E and K. See ``sonic_ep.checks``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic_ep.autograd_utils import for_kernels
from sonic_ep.backend import RouterWeights
from sonic_ep.checks import ArgumentChecker, check_experts_divide, check_top_k
from sonic_ep.config import RouterConfig, RouterOptions, ScoreOrder, parse_choice, settings_of
from sonic_ep.sharding import is_dtensor, local_of

DTYPE = ": cast it (router_w and router_b are as x or fp32, correction_bias is fp32)"


@dataclass(frozen=True, kw_only=True)
class RouterArguments:
    """The router of a call as the caller passed it."""

    router_w: object
    router_b: object
    correction_bias: object


def check_router_config(
    checker: ArgumentChecker, router: object, score_order: object, norm_topk_probs: object
) -> RouterConfig:
    """``router``, or the configuration that the two options abbreviate where there is none."""
    order = parse_choice(f"{checker.group}: score_order", score_order, ScoreOrder)
    short = RouterConfig(score_order=order, norm_topk_probs=checker.flag("norm_topk_probs", norm_topk_probs))
    if router is None:
        return short
    given = checker.instance("router", router, RouterConfig, "a RouterConfig or None")
    remedy = "one or the other: set them in the RouterConfig"
    checker.require(short == RouterConfig(), "router", "a RouterConfig with score_order or norm_topk_probs", remedy)
    return given


def check_router_options(
    checker: ArgumentChecker,
    router: object,
    score_order: object,
    norm_topk_probs: object,
    top_k: int,
    reduce_router_grad: object,
) -> RouterOptions:
    """The router of a call, whose weights are not known yet."""
    config = check_router_config(checker, router, score_order, norm_topk_probs)
    reduced = checker.flag("reduce_router_grad", reduce_router_grad)
    return RouterOptions(**settings_of(config), top_k=top_k, reduce_router_grad=reduced)


def check_router(checker: ArgumentChecker, x: Tensor, given: RouterArguments, options: RouterOptions) -> RouterWeights:
    """router_w (E, H) and router_b (E,), as x or fp32; correction_bias (E,) fp32; and that groups fit E and K."""
    dtypes = tuple(dict.fromkeys((x.dtype, torch.float32)))
    given = local_router(checker, given, reduce_grad=options.reduce_router_grad)
    weight_EH = checker.tensor("router_w", given.router_w, dtypes, x, DTYPE)
    shape, hidden = tuple(weight_EH.shape), x.shape[-1]
    if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden:
        stored = ": stored as (H, E), pass router_w.T" if len(shape) == 2 and shape[0] == hidden else ""
        sides = f"(E, {hidden}) = (E, H), H as x {tuple(x.shape)}, E at least 1"
        checker.require(False, "shape of router_w", shape, f"{sides}{stored}")
    check_experts_divide(checker, shape[0])
    check_top_k(checker, options.top_k, shape[0])
    check_groups(checker, options, options.top_k, shape[0])
    bias_E = _check_of_experts(checker, x, "router_b", given.router_b, (shape[0], dtypes))
    correction_E = _check_of_experts(checker, x, "correction_bias", given.correction_bias, (shape[0], (torch.float32,)))
    trained = correction_E is not None and correction_E.requires_grad
    remedy = "one that does not: it only helps to choose experts, and has no gradient: pass correction_bias.detach()"
    checker.require(not trained, "correction_bias", "one that requires a gradient", remedy)
    return RouterWeights(weight=weight_EH, bias=bias_E, correction=correction_E)


def local_router(checker: ArgumentChecker, given: RouterArguments, *, reduce_grad: bool) -> RouterArguments:
    """This rank's tensors of a router that is replicated as DTensors."""
    weights = {"router_w": given.router_w, "router_b": given.router_b, "correction_bias": given.correction_bias}
    if not any(map(is_dtensor, weights.values())):
        return given
    local = {name: local_of(checker.group, name, weight, replicated=True) for name, weight in weights.items()}
    # A replicated DTensor says that its gradient is the same on all ranks.
    remedy = "reduce_router_grad=True, or plain tensors: else the gradient of a replicated DTensor differs over ranks"
    checker.require(reduce_grad, "router", "a DTensor", remedy)
    return RouterArguments(**local)


def check_groups(checker: ArgumentChecker, config: RouterConfig, top_k: int, num_experts: int) -> None:
    """Groups of equal size, of which those that stay hold K experts."""
    groups, stay = config.num_groups, config.top_groups
    if groups == 1:
        return
    of_groups = f"E={num_experts} experts in num_groups={groups}"
    checker.require(num_experts % groups == 0, "num_groups", groups, f"a divisor of E={num_experts}")
    size = num_experts // groups
    checker.require(config.group_top <= size, "group_top", config.group_top, f"at most {size}: {of_groups}")
    fits = f"at most {stay * size}: {of_groups}, of which top_groups={stay} stay"
    checker.require(top_k <= stay * size, "top_k", top_k, fits)


def _check_of_experts(
    checker: ArgumentChecker, x: Tensor, name: str, value: object, form: tuple[int, tuple[torch.dtype, ...]]
) -> Tensor | None:
    """A number of each expert, or None. form: E, and the dtypes."""
    if value is None:
        return None
    num_experts, dtypes = form
    tensor_E = checker.tensor(name, value, dtypes, x, DTYPE)
    checker.shape(name, tensor_E, (num_experts,), "(E,), as router_w")
    return tensor_E


def router_as_read(weights: RouterWeights) -> RouterWeights:
    """``weights`` with tensors that kernels can read."""
    bias_E, correction_E = (None if w is None else for_kernels(w) for w in (weights.bias, weights.correction))
    return RouterWeights(weight=for_kernels(weights.weight), bias=bias_E, correction=correction_E)
