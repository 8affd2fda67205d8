"""Autograd functions whose backward may run in two halves, inputs first and weights later, as in pipelines."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from sonic_ep.eager import outside_selective_checkpoint

# From this release on, PyTorch keeps the node of a Python autograd function alive between the two halves.
KEPT_SINCE = (2, 13)


def release_of(version: str) -> tuple[int, ...]:
    """Major and minor number.

    >>> release_of("2.11.0+cu130"), release_of("2.13.0a0+git1")
    ((2, 11), (2, 13))
    """
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


KEEPS_NODES = release_of(torch.__version__) >= KEPT_SINCE


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``function.apply(*arguments)``, one tensor, whose backward ``torch.distributed.pipelining`` may split in two.

    Between the halves that keeps the gradient of the result and the Python object of the node. Up to PyTorch 2.12 the
    object does not own the node itself ("_input_metadata is invalid"), so the gradient has to.
    """
    result: Tensor = function.apply(*arguments)
    return result if KEEPS_NODES or not result.requires_grad else _kept_by_its_gradient(result)


@outside_selective_checkpoint
def _kept_by_its_gradient(result: Tensor) -> Tensor:
    """``result`` behind one more node, whose hook attaches the gradient edge of ``result`` to the gradient. Not a view.

    A hook on the function's own node would make the node hold itself, and it would never be freed.
    """
    edge = get_gradient_edge(result)
    passed_on: Tensor = torch.ops.aten._unsafe_view(result, result.shape)

    def keep(gradients: tuple[Tensor | None, ...], _: object) -> None:
        # A view of the gradient that came in, which its owner may keep for longer than the graph.
        for gradient in gradients:
            if gradient is not None:
                gradient.sonic_ep_edge = edge  # type: ignore[attr-defined]

    assert passed_on.grad_fn is not None
    passed_on.grad_fn.register_hook(keep)
    return passed_on
