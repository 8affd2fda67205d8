"""The public calls for fuzzing: right arguments, what a call returns, and whether it took what it should refuse."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from same import assert_same_bits
from torch import Tensor

from sonic_ep import ExpertParallel, RoutingPlan

# CPU time of this process: other load on its cores does not count.
MOST_SECONDS = 1.0
Arguments = dict[str, Any]
Outcome = list[Tensor]

OF_EXPERTS = ("w1", "w2", "b1", "b2", "activation")
# Of each public call.
ARGUMENTS = {
    "moe": ("x", "router_w", "top_k", *OF_EXPERTS),
    "moe_routed": ("x", "topk_idx", "topk_scores", *OF_EXPERTS),
    "plan": ("topk_idx", "num_experts"),
    "dispatch": ("x", "plan"),
    "combine": ("rows", "topk_scores", "plan"),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a call: T, H, I, E and K."""

    tokens: int = 3
    hidden: int = 8
    intermediate: int = 4
    num_experts: int = 2
    top_k: int = 2


SIZES = Sizes()
# One element wherever there may be one.
ONES = Sizes(tokens=1, num_experts=1, top_k=1)


def arguments_of(call: str, ep: ExpertParallel, device: torch.device, sizes: Sizes = SIZES) -> Arguments:
    """Right arguments."""
    T, H, I, E, K = sizes.tokens, sizes.hidden, sizes.intermediate, sizes.num_experts, sizes.top_k  # noqa: E741
    shapes = {"x": (T, H), "router_w": (E, H), "w1": (E, I, H), "w2": (E, H, I), "b1": (E, I), "b2": (E, H)}
    found: Arguments = {name: whole(shape, seed).to(device) for seed, (name, shape) in enumerate(shapes.items())}
    found["topk_idx"] = (torch.arange(T * K).view(T, K) % E).to(device)
    found["topk_scores"] = 2.0 ** whole((T, K)).to(device)
    # The score of a token's only expert is 1.
    found |= {"top_k": 1, "num_experts": E, "activation": "relu"}
    if "plan" in ARGUMENTS[call]:
        found["plan"] = ep.plan(found["topk_idx"], E)
        found["rows"] = whole((found["plan"].row_capacity, H)).to(device)
    return {name: found[name] for name in ARGUMENTS[call]}


def tensors_of(arguments: Arguments) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor)]


def run(call: str, ep: ExpertParallel, arguments: Arguments) -> Any:
    """A tensor, several, or a plan."""
    found = getattr(ep, call)(**arguments)
    # Rows past the valid ones may hold anything.
    return found[: arguments["plan"].rows()] if call == "dispatch" else found


def outcome(
    call: str, ep: ExpertParallel, arguments: Arguments, hold: Callable[[Tensor], Tensor] = torch.clone
) -> Outcome:
    """Results, and gradients of all arguments that require one. hold: changes the gradients that come in."""
    trained = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    found = run(call, ep, arguments)
    if isinstance(found, RoutingPlan):
        return [value for f in fields(found) if isinstance(value := getattr(found, f.name), Tensor)]
    results = list(found) if isinstance(found, tuple) else [found]
    outputs = [result for result in results if result.requires_grad]
    probes = [hold(whole(output.shape).to(output.device, output.dtype)) for output in outputs]
    grads = torch.autograd.grad(outputs, trained, probes, allow_unused=True) if outputs else ()
    return results + [torch.zeros(0) if grad is None else grad for grad in grads]


def leaves(arguments: Arguments) -> Arguments:
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf and not value.is_inference():
            value.requires_grad_()
    return arguments


def whole(shape: Sequence[int], seed: int = 5) -> Tensor:
    """Whole numbers so small that nothing is rounded."""
    return torch.randint(-3, 4, tuple(shape), generator=torch.Generator().manual_seed(seed)).float()


def plain(value: Any) -> Any:
    """The values of a tensor in a plain, contiguous one; everything else as it is."""
    if not isinstance(value, Tensor):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        held = value.detach().as_subclass(Tensor).resolve_neg()
        return torch.empty(held.shape, dtype=held.dtype, device=held.device).copy_(held)


def attempt(make: Callable[[], Any]) -> tuple[Any, str | None]:
    """What ``make`` returns, or None and what is wrong with its error: nothing if it is the right one, at once."""
    started = time.process_time()
    try:
        return make(), None
    except (ValueError, TypeError):
        took = time.process_time() - started
        return None, None if took < MOST_SECONDS else f"refused after {took:.1f} s"
    except Exception as error:
        return None, f"raised {type(error).__name__}: {str(error)[:200]}"


def complaint(call: str, ep: ExpertParallel, arguments: Arguments, changes: Arguments, base: Outcome) -> str | None:
    """What is wrong with the call with ``changes``: it has to be right, or a ``ValueError`` or ``TypeError`` at once.

    base: the outcome of ``leaves(arguments)``.
    """

    def checked() -> Outcome:
        found = outcome(call, ep, {**leaves(arguments), **leaves(changes)})
        ep.check()
        return found

    found, wrong = attempt(checked)
    if found is None:
        return wrong
    if not all(isinstance(value, Tensor) for value in changes.values()):
        return "was taken"
    same = {name: plain(value).requires_grad_(value.requires_grad) for name, value in changes.items()}
    try:
        pairs = [(value, arguments[name]) for name, value in same.items()]
        alike = all((v.dtype, v.requires_grad) == (o.dtype, o.requires_grad) and torch.equal(v, o) for v, o in pairs)
        assert_same(found, base if alike else outcome(call, ep, {**arguments, **same}))
    except AssertionError as error:
        return f"wrong: {error}"
    return None


def assert_same(found: Outcome, expected: Outcome) -> None:
    """The same bits, but for the sign of a zero."""
    assert_same_bits([plain(got) + 0 for got in found], [want.detach() + 0 for want in expected])
