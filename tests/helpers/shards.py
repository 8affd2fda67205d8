"""Tensors of DTensors; plain ones stay as they are."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Any) -> Tensor:
    """This rank's part."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach()


def full(tensor: Any) -> Tensor:
    """The whole; collective for a DTensor."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def share_of(whole: Tensor, got: Any) -> Tensor:
    """The part of ``whole`` that this rank has if ``got`` is a DTensor of its first extent; all of it if plain."""
    return whole.chunk(got.device_mesh.size())[got.device_mesh.get_local_rank()] if isinstance(got, DTensor) else whole
