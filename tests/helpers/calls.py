"""Arguments of a right call, small, for tests that change one of them."""

import threading
from collections.abc import Callable
from typing import Any

import torch

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 5, 8, 4, 4, 2


def good_call(**changes: Any) -> dict[str, Any]:
    """Arguments of ``moe`` that are right, but for ``changes``."""
    return {
        "x": torch.randn(TOKENS, HIDDEN),
        "router_w": torch.randn(EXPERTS, HIDDEN),
        "w1": torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        "w2": torch.randn(EXPERTS, HIDDEN, INTERMEDIATE),
        "top_k": TOP_K,
        **changes,
    }


def good_routed_call(**changes: Any) -> dict[str, Any]:
    """Arguments of ``moe_routed`` that are right, but for ``changes``."""
    arguments = good_call()
    del arguments["router_w"], arguments["top_k"]
    arguments["topk_idx"] = torch.tensor([[0, 1]] * TOKENS)
    arguments["topk_scores"] = torch.rand(TOKENS, TOP_K)
    return {**arguments, **changes}


# Shares of experts that any of the worlds here divides into.
HELD = 2


def call_of(world_size: int, **changes: Any) -> dict[str, Any]:
    """Arguments of ``moe`` on one of the ranks."""
    own = {
        "router_w": torch.randn(HELD * world_size, HIDDEN),
        "w1": torch.randn(HELD, 2 * INTERMEDIATE, HIDDEN),
        "w2": torch.randn(HELD, HIDDEN, INTERMEDIATE),
    }
    return good_call(**own, **changes)


def with_trained_experts(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "w1": arguments["w1"].requires_grad_()}


def memory_short(*arguments: object, **options: object) -> None:
    raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")


def in_another_thread(*calls: Callable[[], object]) -> list[str]:
    """What ``calls`` raise there, one after the other."""
    errors: list[str] = []

    def run() -> None:
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors
