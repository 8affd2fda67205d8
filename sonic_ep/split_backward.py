"""Autograd functions whose backward may run in two halves, inputs first and weights later, as in pipelines."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from sonic_ep.eager import outside_dispatch_modes

# Since this release PyTorch itself keeps the node of a Python function until the second half has run.
KEPT_SINCE = (2, 13)


def release_of(version: str) -> tuple[int, ...]:
    """Major and minor number.

    >>> release_of("2.11.0+cu130"), release_of("2.13.0a0+git1")
    ((2, 11), (2, 13))
    """
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


KEEPS_NODES = release_of(torch.__version__) >= KEPT_SINCE


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``function.apply(*arguments)``, of one result, fit for a backward in two halves.

    ``torch.distributed.pipelining`` keeps, between the halves, the gradient of the result and the Python object of the
    function's node. Up to torch 2.12 that object does not keep the node itself: "_input_metadata is invalid". There
    the gradient keeps it.
    """
    result: Tensor = function.apply(*arguments)
    return result if KEEPS_NODES or not result.requires_grad else _kept_by_its_gradient(result)


@outside_dispatch_modes
def _kept_by_its_gradient(result: Tensor) -> Tensor:
    """The same tensor, not a view, one node later: that node hands the edge to the gradient that it passes on.

    A hook of the function's own node could not hold the edge: the node would hold itself, and would never be freed.
    """
    edge = get_gradient_edge(result)
    passed_on: Tensor = torch.ops.aten._unsafe_view(result, result.shape)

    def keep(gradients: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...] | None:
        (gradient,) = gradients
        if gradient is None:
            return None
        # The caller's own gradient may live on: an alias of it does not.
        alias = gradient.view_as(gradient)
        alias.sonic_ep_edge = edge  # type: ignore[attr-defined]
        return (alias,)

    assert passed_on.grad_fn is not None
    passed_on.grad_fn.register_hook(keep)
    return passed_on
