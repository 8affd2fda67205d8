"""What a caller may hand in for a tensor: the same values held in odd ways, and things that are no tensor at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class Tagged(Tensor):
    """A subclass that changes nothing."""


class Doubling(Tensor):
    """A subclass whose products are twice as large."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        found = super().__torch_function__(function, types, arguments, keywords or {})
        return found * 2 if function in (torch.mul, torch.nn.functional.linear) else found


def transposed(tensor: Tensor) -> Tensor:
    """Its last two dimensions lie in memory the other way round."""
    return tensor if tensor.ndim < 2 else tensor.mT.contiguous().mT


def sliced(tensor: Tensor) -> Tensor:
    """Every second element of a row twice as long, behind one more row."""
    wide = torch.full((*tensor.shape, 2), 99).to(tensor.dtype).to(tensor.device)
    wide[..., 0] = tensor
    return wide.flatten(-2)[..., ::2]


def shifted(tensor: Tensor) -> Tensor:
    """Begins at an address that is a multiple of its element's size, and of nothing more."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def overlapping(tensor: Tensor) -> Tensor:
    """Rows that begin one element behind each other."""
    size = sum(extent - 1 for extent in tensor.shape[:-1]) + tensor.shape[-1]
    return torch.as_strided(tensor.flatten()[: max(size, 1)].clone(), tensor.shape, [1] * tensor.ndim)


def odd_strides_of_one(tensor: Tensor) -> Tensor:
    """Dimensions of one element have strides that are a multiple of nothing."""
    strides = [7 if extent == 1 else stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return torch.as_strided(tensor.clone(), tensor.shape, strides)


def negated_in_name(tensor: Tensor) -> Tensor:
    """Memory holds the negatives, as in the imaginary part of a conjugate."""
    return torch._neg_view(-tensor) if tensor.dtype != torch.bool else tensor


# Other ways to hold the values of a tensor: the result has to be that of the values.
WAYS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "sliced": sliced,
    "shifted": shifted,
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "overlapping": overlapping,
    "odd strides of one": odd_strides_of_one,
    "negated in name": negated_in_name,
    "of inference": torch.inference_mode()(lambda tensor: tensor.clone()),
    "a parameter": lambda tensor: nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point()),
    "tagged": lambda tensor: tensor.clone().as_subclass(Tagged),
    "doubling": lambda tensor: tensor.clone().as_subclass(Doubling),
}


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quietly()
def compressed(tensor: Tensor) -> Tensor:
    # As many elements in each row, as it has to have.
    return torch.ones_like(tensor).to_sparse_csr()


def freed(tensor: Tensor) -> Tensor:
    """What sharding leaves of a parameter: a shape over no memory."""
    bare = tensor.clone()
    bare.untyped_storage().resize_(0)
    return bare


# What may be passed for what is no tensor: a size, a name, a flag, an object.
NO_TENSORS: Mapping[str, object] = {
    "None": None, "True": True, "False": False, "zero": 0, "minus one": -1, "a half": 0.5, "two, a float": 2.0,
    "a huge number": 2**70, "a huge number below zero": -(2**70), "NaN": float("nan"), "infinity": float("inf"),
    "complex": 1j, "an integer of NumPy's": np.int64(2), "a flag of NumPy's": np.bool_(True),
    "an array": np.array([1, 2]), "an array of words": np.array(["auto", "fast"]),
    "a tensor": torch.tensor(2), "a longer tensor": torch.tensor([1, 2]), "a dtype": torch.float32,
    "a word": "nonsense", "an empty word": "", "bytes": b"auto", "a list": ["auto"], "a dictionary": {"auto": 1},
    "a class": int, "itself": object(),
}  # fmt: skip
NO_TENSORS_FOR_TENSORS = ("None", "a word", "a half", "NaN", "True", "a huge number", "an integer of NumPy's")
# What may be passed for a tensor: refused, or right by the values where it has the same.
THINGS: Mapping[str, Callable[[Tensor], object]] = {
    **{name: lambda tensor, value=NO_TENSORS[name]: value for name in NO_TENSORS_FOR_TENSORS},
    "a class": lambda tensor: Tensor,
    "a list": lambda tensor: tensor.tolist(),
    "an array": lambda tensor: np.zeros(tuple(tensor.shape), dtype=np.float32),
    "of no dimension": lambda tensor: tensor.flatten()[0] if tensor.numel() else torch.zeros(()),
    "flat": lambda tensor: tensor.flatten(),
    "of one more dimension": lambda tensor: tensor[None],
    "of many dimensions": lambda tensor: tensor.reshape(*(1,) * 20, *tensor.shape),
    "without rows": lambda tensor: tensor[:0],
    "without columns": lambda tensor: tensor[..., :0],
    "empty": lambda tensor: torch.empty(0, dtype=tensor.dtype, device=tensor.device),
    "sparse": lambda tensor: tensor.to_sparse(),
    "compressed": compressed,
    "on meta": lambda tensor: tensor.to("meta"),
    "fake": FakeTensorMode().from_tensor,
    "uninitialized": lambda tensor: nn.UninitializedParameter(requires_grad=False),
    "masked": quietly()(lambda tensor: torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool))),
    "nested": quietly()(lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.strided)),
    "jagged": quietly()(lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.jagged)),
    "quantized": quietly()(lambda tensor: torch.quantize_per_tensor(tensor.float().cpu(), 0.1, 0, torch.qint8)),
    "freed": freed,
    "zeros of no memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device),
    "of bits": lambda tensor: torch.zeros(tensor.shape, dtype=torch.uint8).view(torch.bits8),
    **{
        f"of {str(dtype).removeprefix('torch.')}": quietly()(lambda tensor, dtype=dtype: tensor.to(dtype))
        for dtype in (
            torch.complex64, torch.complex32, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
            torch.uint16, torch.uint32, torch.uint64, torch.float64, torch.float16, torch.bfloat16,
            torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu,
        )
    },
}  # fmt: skip
