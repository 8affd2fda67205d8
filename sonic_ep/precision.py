"""The dtypes of the arguments decide, not an autocast around the call or around its backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def full_precision(device: torch.device) -> torch.autocast:
    """While this lasts, autocast is off for ``device``."""
    return torch.autocast(device.type, enabled=False)


def keep_from_autocast(results: Iterable[Tensor], inputs: Iterable[Tensor | None]) -> None:
    """Autocast is off while the gradients of ``inputs`` are computed from those of ``results``.

    Autograd's own steps, those between the two, would follow one around the backward.
    """
    seen: set[Any] = {found.grad_fn for found in inputs if found is not None}
    ahead: list[Any] = [result.grad_fn for result in results if result.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        # A leaf adds up what it is given.
        if node in seen or type(node).__name__ == "AccumulateGrad":
            continue
        seen.add(node)
        _keep(node)
        ahead += [before for before, _ in node.next_functions if before is not None]


def _keep(node: Any) -> None:
    before: list[tuple[str, bool]] = []

    def enter(gradients: tuple[Tensor | None, ...]) -> None:
        kinds = {gradient.device.type for gradient in gradients if gradient is not None}
        before[:] = [(kind, torch.is_autocast_enabled(kind)) for kind in kinds]
        for kind, _ in before:
            torch.set_autocast_enabled(kind, False)

    def leave(found: object, given: object) -> None:
        for kind, enabled in before:
            torch.set_autocast_enabled(kind, enabled)

    node.register_prehook(enter)
    node.register_hook(leave)
