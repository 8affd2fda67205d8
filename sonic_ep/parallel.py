"""For ``torch.distributed``'s own tools: a style of ``parallelize_module``, and clipping over several meshes."""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from sonic_ep.api import ExpertParallel
from sonic_ep.experts import Experts
from sonic_ep.module import MoE
from sonic_ep.sharing import shared


class ExpertParallelStyle(ParallelStyle):
    """Spreads an ``Experts`` or a ``MoE`` that was built without ``ep`` over the mesh of ``parallelize_module``.

    options: those of ``sonic_ep.shared``, which gives one ``ExpertParallel`` to all layers of a mesh. Use it before
    ``fully_shard``. Rank 0's weights count, as in PyTorch's own styles; those on the meta device stay there.

    Example::

        parallelize_module(model, mesh["ep"], {"layers.*.moe": ExpertParallelStyle(max_tokens_per_rank=8192)})
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options
        self._last: weakref.ref[ExpertParallel] | None = None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        experts = module.experts if isinstance(module, MoE) else module
        if not isinstance(experts, Experts):
            raise TypeError(f"ExpertParallelStyle: got {type(module).__name__}, expected a MoE or Experts of sonic_ep")
        for held in (*module.parameters(), *module.buffers()):
            if not (held.is_meta or isinstance(held, DTensor)):
                dist.broadcast(held.detach(), group=device_mesh.get_group(), group_src=0)
        ep = None if self._last is None else self._last()
        if ep is None or not ep.usable or ep.mesh != device_mesh:
            ep = shared(device_mesh, **self._options)
        experts.shard(ep)
        # For the next layer: ``shared`` would collect garbage again.
        self._last = weakref.ref(ep)
        return module


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for parameters on several meshes, plain ones included. Collective.

    The norm is that of all gradients as one vector: a DTensor counts whole, however it is sharded; a plain tensor
    counts once, as it does where every rank has the same. Returns the norm before clipping, the same on every rank.
    Gradients are scaled in place to a norm of at most ``max_norm``. Raises ``ValueError`` for plain expert weights
    (``distribute=False``), which are others on every rank, and for a ``norm_type`` of 0; ``RuntimeError`` for a norm of
    NaN or infinity if ``error_if_nonfinite``.
    """
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm_: norm_type: got {norm_type!r}, expected a number above 0")
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in given:
        if getattr(parameter, "is_share_of_experts", False):
            raise ValueError("clip_grad_norm_: got expert weights of this rank alone, expected distribute=True")
        if (grad := parameter.grad) is not None:
            alike[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None].append(parameter)
    if not alike:
        return torch.tensor(0.0)
    norms = []
    for of_mesh in alike.values():
        norms.append(_norm([p.grad for p in of_mesh if p.grad is not None], norm_type, foreach))
    total = nn.utils.get_total_norm([norm.to(norms[0].device) for norm in norms], norm_type, error_if_nonfinite)
    for of_mesh in alike.values():
        nn.utils.clip_grads_with_norm_(of_mesh, max_norm, total, foreach)
    return total


def _norm(grads: list[Tensor], norm_type: float, foreach: bool | None) -> Tensor:
    """The norm of gradients that are alike, on every rank."""
    if math.isinf(norm_type) and isinstance(grads[0], DTensor):
        # PyTorch refuses the largest number of an empty shard.
        local = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
        norm = nn.utils.get_total_norm([grad for grad in local if grad.numel() > 0], norm_type, foreach=foreach)
        norm = norm.to(local[0].device)
        for dimension in range(grads[0].device_mesh.ndim):
            dist.all_reduce(norm, dist.ReduceOp.MAX, group=grads[0].device_mesh.get_group(dimension))
        return norm
    norm = nn.utils.get_total_norm(grads, norm_type, foreach=foreach)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
