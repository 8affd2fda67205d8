"""Weights as DTensors: made of the ranks' shares, filled by global index, and given to a call as local tensors.

``torch.distributed.tensor`` is imported where a DTensor is made: it takes half as long to import as PyTorch.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sonic_ep import compat
from sonic_ep.distributed.group import EPGroup

# Before anything has imported it there are no DTensors.
DTENSOR_MODULE = "torch.distributed.tensor"
# ``fully_shard`` splits what is sharded already by the last of these.
BLOCKS = ("Shard", "Replicate", "_StridedShard")


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor."""
    module = sys.modules.get(DTENSOR_MODULE)
    return module is not None and isinstance(value, module.DTensor)


def mesh_of(group: EPGroup, mesh: DeviceMesh | None, device: torch.device) -> DeviceMesh | None:
    """The mesh of the group's ranks: ``mesh`` if given, else a new one for ``device``; None for one rank.

    FSDP2 combines with ``mesh`` only, and only if its own mesh is of the same parent.
    """
    process_group = group.process_group
    if group.world_size == 1 or process_group is None:
        return None
    if mesh is not None:
        return mesh
    kinds = group.device_types() or frozenset()
    # A weight on the meta device moves to a GPU later, if the group has any.
    kind = device.type if device.type in kinds else "cuda" if "cuda" in kinds else min(kinds)
    return DeviceMesh.from_group(process_group, kind)


def sharded(local: Tensor, mesh: DeviceMesh) -> Tensor:
    """The DTensor, ``Shard(0)`` on ``mesh``, of which every rank has an equal share: ``local`` of this rank."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)


def local_of(group: EPGroup, name: str, value: Any, *, replicated: bool = False) -> Any:
    """This rank's tensor of a DTensor, differentiable; anything else as it is.

    Raises ``ValueError`` unless the DTensor is ``Shard(0)`` in equal shares, or ``Replicate()`` if ``replicated``, on a
    one-dimensional mesh of the group's ranks.
    """
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Replicate, Shard

    mesh, expected = value.device_mesh, Replicate() if replicated else Shard(0)
    if value.placements == (expected,) and _ranks_of(mesh) == group.of_world():
        local = value.to_local()
        if replicated or local.shape[0] * group.world_size == value.shape[0]:
            return local
    got = f"{name}: got a DTensor {tuple(value.shape)}, {value.placements} on {mesh}"
    wanted = f"expected ({expected!r},) on the W={group.world_size} ranks of this ExpertParallel"
    shares = "" if replicated else ", in equal shares"
    remedy = "call its module: FSDP gathers a weight only while the forward of its module runs"
    raise ValueError(f"{group}: {got}, {wanted}{shares}: {remedy}")


@compat.constant_when_traced
def _ranks_of(mesh: DeviceMesh) -> tuple[int, ...]:
    """The ranks of a mesh of one dimension; none for others."""
    # By numbers: a DTensor may have an equal mesh of earlier process groups from a cache, whose names are unknown now.
    if mesh.ndim != 1:
        return ()
    with compat.without_modes():
        return tuple(mesh.mesh.tolist())


@dataclass(frozen=True, kw_only=True)
class Share:
    """What this process holds of a weight. local: a block of the whole, which has ``shape``, from ``offset`` on.

    A weight (6, 4) in equal shares on three ranks: rank 1 has shape (6, 4), offset (2, 0), and local is (2, 4).
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @staticmethod
    def of(weight: Any) -> "Share":
        """The share of a DTensor; a plain weight is whole."""
        if is_dtensor(weight):
            local = weight.to_local()
            return Share(local=local, shape=tuple(weight.shape), offset=compat.global_offset(weight))
        return Share(local=weight, shape=tuple(weight.shape), offset=(0,) * weight.ndim)

    def fill(self, whole: Callable[[Tensor], None]) -> None:
        """Fill with this share of what ``whole`` writes into a tensor of the whole shape."""
        self._fill(self.local, self.shape, self.offset, whole)

    def fill_rows(self, row: Callable[[int, Tensor], None]) -> None:
        """Fill each row j of the whole that is here, shape[1:], with this share of what ``row(j, tensor)`` writes."""
        for index, local in enumerate(self.local, start=self.offset[0]):
            self._fill(local, self.shape[1:], self.offset[1:], partial(row, index))

    @staticmethod
    def _fill(local: Tensor, shape: tuple[int, ...], offset: tuple[int, ...], fill: Callable[[Tensor], None]) -> None:
        if tuple(local.shape) == shape:
            fill(local)
            return
        whole = local.new_empty(shape)
        fill(whole)
        block = (slice(start, start + extent) for start, extent in zip(offset, local.shape, strict=True))
        local.copy_(whole[tuple(block)])


def originals(where: object, module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """By name, the weights of ``module`` that it has, or the originals that ``torch.nn.utils`` computes them from.

    Raises ``TypeError`` for a weight computed from several tensors, and for a DTensor that is not sharded or
    replicated.
    """
    held: dict[str, Tensor] = dict(module.named_parameters())
    found: dict[str, Tensor] = {}
    for name in names:
        if getattr(module, name) is None:
            continue
        paths = (path for path in (name, f"parametrizations.{name}.original", f"{name}_orig") if path in held)
        path = next(paths, None)
        if path is None:
            got = "got a weight computed from several tensors, expected one original: remove the parametrization first"
            raise TypeError(f"{where}: {name}: {got}")
        found[name] = held[path]
        placements = getattr(held[path], "placements", ())
        if any(type(placement).__name__ not in BLOCKS for placement in placements):
            got = f"placements of {name}: got {placements}"
            raise TypeError(f"{where}: {got}, expected Shard and Replicate only")
    return found
