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
