"""What is known of calls that differ only in values, addresses and numbers of tokens: they are checked once.

A call's key holds every fact that its checks look at, except two that every call looks at: how many tokens there are,
and whether memory was freed. So a call whose key is known need not be checked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sonic_ep import compat
from sonic_ep.activation import Activation, GateLayout
from sonic_ep.autograd_utils import bytes_reached
from sonic_ep.config import RouterOptions

RECORDS_KEPT = 64
Facts = tuple[tuple[str, object], ...]


class CallRecord:
    """What is known of all calls with one key. Holds no tensor of theirs.

    key: None where calls like this one are checked every time. known: whether a call has passed the checks, and nothing
    of it had to be copied. facts: what ranks compare; digest: of the facts, once it was needed. x_trained: whether
    backward may ask for the gradient of x. joins: x has no tokens, and requires one to join other ranks' backward.
    options, activation, layout: what the checks found. plan: what a backend keeps for the next call, or None.
    """

    __slots__ = ("activation", "digest", "facts", "joins", "key", "known", "layout", "options", "plan", "x_trained")

    def __init__(self, key: tuple[object, ...] | None = None, facts: Facts = ()) -> None:
        self.key = key
        self.known = False
        self.facts = facts
        self.digest: int | None = None
        self.x_trained = False
        self.joins = False
        self.options: RouterOptions | None = None
        self.activation: Activation | None = None
        self.layout: GateLayout | None = None
        self.plan: Any = None


class CallMemory:
    """The records of one object's calls, ``RECORDS_KEPT`` at most, until ``close``."""

    def __init__(self) -> None:
        self._records: dict[tuple[object, ...], CallRecord] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._records)

    def recall(
        self, name: str, rows: Sequence[Any], weights: Sequence[Any], options: tuple[object, ...]
    ) -> tuple[CallRecord, list[int]]:
        """The record of calls like this one, a new one if there is none, and the number of rows of each of ``rows``.

        rows: tensors (..., H), whose number of rows may differ from call to call. weights: tensors, None, or tuples of
        tensors. options: all else that the checks look at.
        """
        counts: list[int] = []
        try:
            grad_mode = torch.is_grad_enabled()
            key = (name, grad_mode, torch.is_inference_mode_enabled(), *options, *map(type, options))
            of_rows, of_weights = _facts_of_rows(rows, counts, grad_mode), _facts_of_weights(weights, grad_mode)
            if of_rows is None or of_weights is None or compat.in_forward_mode():
                return CallRecord(), counts
            key += (*of_rows, *of_weights)
            record = self._records.get(key)
        # An argument without strides, memory or hash: the checks say what is wrong with it.
        except (RuntimeError, TypeError, IndexError, ZeroDivisionError):
            return CallRecord(), counts
        return record or CallRecord(key), counts

    def keep(self, record: CallRecord) -> None:
        """Check no more calls like this one, which has passed the checks without a copy. Nothing after ``close``."""
        if record.key is None or self._closed:
            return
        if len(self._records) >= RECORDS_KEPT:
            self._records.clear()
        record.known = True
        self._records[record.key] = record

    def close(self) -> None:
        """Forget all, and keep nothing from now on."""
        self._closed = True
        self._records.clear()


# Every call asks all of this, and each question to a tensor takes a tenth of a microsecond: so there is no function for
# each tensor, and whether one was made in inference mode is asked in grad mode only, where it would be copied.


def _facts_of_rows(tensors: Sequence[Any], counts: list[int], grad_mode: bool) -> list[object] | None:
    """Of contiguous tensors (..., H), apart from how many rows they have, which ``counts`` gets. None for others."""
    facts: list[object] = [compat.any_autocast_enabled()]
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or not tensor.is_contiguous():
            return None
        shape, numel = tensor.shape, tensor.numel()
        offset = tensor.storage_offset()
        if tensor.untyped_storage().nbytes() < tensor.nbytes + (offset and offset * tensor.itemsize):
            return None
        if tensor.is_neg() or compat.is_zero_without_memory(tensor):
            return None
        counts.append(numel // shape[-1])
        facts += (kind, tensor.dtype, tensor.device, len(shape), shape[-1], numel == 0, tensor.requires_grad)
        facts.append(grad_mode and tensor.is_inference())
    if facts[0]:
        facts.append(torch.is_autocast_enabled(tensors[0].device.type))
    return facts


def _facts_of_weights(tensors: Sequence[Any], grad_mode: bool) -> list[object] | None:
    """Of tensors of any strides, None, and tuples of them. None for others, and where memory was freed."""
    facts: list[object] = []
    for tensor in tensors:
        kind = type(tensor)
        if tensor is None:
            facts.append(None)
        elif kind is tuple:
            parts = _facts_of_weights(tensor, grad_mode)
            if parts is None:
                return None
            facts += (len(tensor), *parts)
        else:
            if kind is not Tensor and kind is not Parameter:
                return None
            in_order, offset = tensor.is_contiguous(), tensor.storage_offset()
            reached = tensor.nbytes if in_order else bytes_reached(tensor)
            if tensor.untyped_storage().nbytes() < reached + (offset and offset * tensor.itemsize):
                return None
            if tensor.is_neg() or compat.is_zero_without_memory(tensor):
                return None
            # Of one expert strides may be any, and the tensor is in order all the same.
            facts += (kind, tensor.dtype, tensor.device, tensor.shape, tensor.stride())
            facts += (tensor.requires_grad, grad_mode and tensor.is_inference())
    return facts
