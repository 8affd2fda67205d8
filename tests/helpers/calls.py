"""Arguments of a right call, small, for tests that change one of them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

# HELD: experts of a rank in ``call_of``.
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, HELD, TOP_K, F32 = 5, 8, 4, 4, 2, 2, torch.float32


def good_call(
    *, experts: int = EXPERTS, held: int = EXPERTS, hidden: int = HIDDEN, dtype: torch.dtype = F32, **changes: Any
) -> dict[str, Any]:
    """Arguments of ``moe`` that are right, but for ``changes``."""
    tokens = {"x": (TOKENS, hidden), "router_w": (experts, hidden)}
    shapes = {**tokens, "w1": (held, 2 * INTERMEDIATE, hidden), "w2": (held, hidden, INTERMEDIATE)}
    return {**{name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}, "top_k": TOP_K, **changes}


def routed(arguments: dict[str, Any], k: int = TOP_K) -> dict[str, Any]:
    """Arguments of ``moe_routed`` of those of ``moe``: every token chooses the first ``k`` experts."""
    experts = {name: value for name, value in arguments.items() if name not in ("router_w", "top_k")}
    tokens = len(arguments["x"])
    return {**experts, "topk_idx": torch.arange(k).repeat(tokens, 1), "topk_scores": torch.rand(tokens, k)}


def good_routed_call(**changes: Any) -> dict[str, Any]:
    return {**routed(good_call()), **changes}


def call_of(world_size: int, *, held: int = HELD, **changes: Any) -> dict[str, Any]:
    """Arguments of ``moe`` on one of the ranks."""
    return good_call(experts=held * world_size, held=held, **changes)


def with_trained_experts(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "w1": arguments["w1"].requires_grad_()}


def in_another_thread(*calls: Callable[[], object]) -> list[str]:
    """The errors of ``calls``, one after the other."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        errors = [thread.submit(call).exception() for call in calls]
    return [str(error) for error in errors if error is not None]
