"""The experts in plain torch: a loop over this rank's experts, gradients by autograd."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.autograd_utils import is_transposed
from sonic_ep.backend import ExpertWeights


def apply_experts(rows_RH: Tensor, group_ends_e: Tensor, experts: ExpertWeights) -> Tensor:
    """``act(rows . w1 + b1) . w2 + b2`` of each row by its own expert, (R, H); zeros past the valid rows.

    Rows are in canonical order; those past ``group_ends_e[-1]`` are not read. Reads the host.
    """
    hidden_RF = up_projection(rows_RH, group_ends_e, experts.up_weights, experts.up_biases)
    return apply_second_half(hidden_RF, group_ends_e, experts)


def up_projection(
    rows_RH: Tensor, group_ends_e: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """``rows . w1 + b1``, (R, 2I or I); of split weights gates first, then ups."""
    parts = [grouped_linear(rows_RH, group_ends_e, *given) for given in zip(weights, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def apply_second_half(hidden_RF: Tensor, group_ends_e: Tensor, experts: ExpertWeights) -> Tensor:
    """Activation and down-projection, (R, 2I or I) to (R, H)."""
    return grouped_linear(experts.activation(hidden_RF, experts.layout), group_ends_e, experts.w2, experts.b2)


def grouped_linear(rows_RH: Tensor, group_ends_e: Tensor, weight_eFH: Tensor, bias_eF: Tensor | None) -> Tensor:
    """Each row times the weight of its own expert, of any strides, (R, F); zeros past the valid rows. Reads the host.

    Expert i has rows group_ends_e[i-1] to group_ends_e[i]: with ends [2, 2, 5], expert 1 has none and its weight's
    gradient is exact zeros.
    """
    sizes = sizes_of_groups(group_ends_e)
    unused = rows_RH.shape[0] - sum(sizes)
    groups = rows_RH.split([*sizes, unused])[:-1]
    biases = [None] * len(groups) if bias_eF is None else list(bias_eF)
    outputs = [F.linear(*operands) for operands in zip(groups, matrices_of(weight_eFH), biases, strict=True)]
    # Zeros of our own: rows past the valid ones may hold anything.
    return torch.cat([*outputs, rows_RH.new_zeros(unused, weight_eFH.shape[1])])


def matrices_of(weight_eFH: Tensor) -> list[Tensor]:
    """The weight of each expert, (F, H). The gradient of a transposed weight is transposed, too."""
    if is_transposed(weight_eFH):
        return [of_expert.t() for of_expert in weight_eFH.mT.unbind()]
    return list(weight_eFH.unbind())


def sizes_of_groups(group_ends_e: Tensor) -> list[int]:
    """Rows of each expert: ends [2, 2, 5] mean 2, 0 and 3 rows. Reads the host."""
    sizes: list[int] = torch.diff(group_ends_e, prepend=group_ends_e.new_zeros(1)).tolist()
    return sizes
