"""The experts in plain torch: a loop over this rank's experts, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.backend import Experts


def apply_experts(rows_RH: Tensor, group_ends_e: Tensor, experts: Experts) -> Tensor:
    """``y = act(rows . w1 + b1) . w2 + b2`` of each row by its own expert, (R, H); zeros past the valid rows.

    rows_RH (R, H) in canonical order, group_ends_e (e,). Reads the host. Rows past ``group_ends_e[-1]`` are not read.
    Expert i takes rows group_ends_e[i-1] up to group_ends_e[i]: with ends [2, 2, 5] expert 1 has none, and its
    gradients are exact zeros.
    """
    sizes = _group_sizes(group_ends_e)
    groups = rows_RH.split([*sizes, rows_RH.shape[0] - sum(sizes)])
    outputs = [_apply_expert(group_NH, experts, expert) for expert, group_NH in enumerate(groups[:-1])]
    # New zeros, not the rows behind the valid ones: those may hold anything.
    return torch.cat([*outputs, rows_RH.new_zeros(groups[-1].shape)])


def _group_sizes(group_ends_e: Tensor) -> list[int]:
    return torch.diff(group_ends_e, prepend=group_ends_e.new_zeros(1)).tolist()


def _apply_expert(rows_NH: Tensor, experts: Experts, expert: int) -> Tensor:
    b1 = None if experts.b1 is None else experts.b1[expert]
    b2 = None if experts.b2 is None else experts.b2[expert]
    hidden = F.linear(rows_NH, experts.w1[expert], b1)
    return F.linear(experts.activation(hidden, experts.layout), experts.w2[expert], b2)
