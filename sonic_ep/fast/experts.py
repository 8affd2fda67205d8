"""What experts do to rows between their GEMMs: the activation, its gradients, and those of biases.

Every function takes rows in canonical order and leaves those behind ``plan.group_ends[-1]`` unspecified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic_ep.backend import Experts
from sonic_ep.fast.activation_kernels import activate_backward_kernel, activate_kernel
from sonic_ep.fast.bias_kernels import add_bias_dots_kernel, sum_groups_kernel
from sonic_ep.fast.device import ROW_WARPS, launch, pieces, power_of_two, programs_over
from sonic_ep.fast.rows import columns
from sonic_ep.plan import RoutingPlan

# Columns of an activation that a program takes at a time: 4 of each half a thread.
MOST_ACTIVATED = 512
# Elements of the rows that an interpreted program takes at a time: its steps are what takes the time, not their size.
# On a GPU it takes one row, whose columns are enough.
INTERPRETED_TILE = 4096
# A tile of the sums over experts: long enough in columns for whole sectors, in rows for loads in flight.
SUMMED_ROWS, SUMMED_COLUMNS = 64, 64
# The pointwise part of each activation, by the name that kernels know.
POINTWISE = {
    "swiglu": "silu",
    "geglu": "gelu",
    "reglu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "relu_sq": "relu_sq",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenGradient:
    """What backward makes of dA between its GEMMs.

    hidden: dH (R, F). weighted: A' = score * A (R, I), which takes the memory of dA. dots: (R,) fp32, <dA, A>.
    """

    hidden: Tensor
    weighted: Tensor
    dots: Tensor


def activate(hidden_RF: Tensor, experts: Experts, plan: RoutingPlan) -> Tensor:
    """``act(h)``, (R, I), of the pre-activation (R, F)."""
    out_RI = hidden_RF.new_empty((hidden_RF.shape[0], experts.w2.shape[2]))
    launch(
        activate_kernel,
        (programs_over(hidden_RF.shape[0], hidden_RF.device),),
        hidden_RF,
        out_RI,
        *_bounds(plan),
        device=hidden_RF.device,
        **_activation_constants(experts, hidden_RF.device),
    )
    return out_RI


def activate_backward(
    hidden_RF: Tensor, grad_RI: Tensor, scores_WCK: Tensor, experts: Experts, plan: RoutingPlan
) -> HiddenGradient:
    """Gradients through score and activation. ``grad_RI``, dA before its weight, is overwritten."""
    hidden_grad_RF = torch.empty_like(hidden_RF)
    dots_R = hidden_RF.new_empty(hidden_RF.shape[0], dtype=torch.float32)
    launch(
        activate_backward_kernel,
        (programs_over(hidden_RF.shape[0], hidden_RF.device),),
        hidden_RF,
        grad_RI,
        scores_WCK,
        plan.slot_of_row,
        hidden_grad_RF,
        dots_R,
        *_bounds(plan),
        device=hidden_RF.device,
        **_activation_constants(experts, hidden_RF.device),
    )
    return HiddenGradient(hidden=hidden_grad_RF, weighted=grad_RI, dots=dots_R)


def add_bias_dots(out_grad_RH: Tensor, bias_eH: Tensor, dots_R: Tensor, plan: RoutingPlan) -> None:
    """Add to each row's score gradient what the bias of its expert contributes, ``<d(out), bias>``, in place."""
    launch(
        add_bias_dots_kernel,
        (programs_over(dots_R.shape[0], dots_R.device),),
        out_grad_RH,
        bias_eH,
        dots_R,
        *_bounds(plan),
        device=dots_R.device,
        **_row_constants(bias_eH),
    )


def sum_groups(rows_RF: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
    """The sum of each expert's rows, (e, F), each weighted with its score if there are scores; exact zeros for none."""
    width = rows_RF.shape[1]
    sums_eF = rows_RF.new_empty((plan.experts_per_rank, width))
    launch(
        sum_groups_kernel,
        (plan.experts_per_rank, pieces(width, SUMMED_COLUMNS)),
        rows_RF,
        # Without scores the pointer is not read.
        rows_RF if scores_WCK is None else scores_WCK,
        plan.slot_of_row,
        sums_eF,
        plan.group_ends,
        plan.row_capacity,
        width,
        device=rows_RF.device,
        HAS_SCORES=scores_WCK is not None,
        ROWS=SUMMED_ROWS,
        COLUMNS=SUMMED_COLUMNS,
        num_warps=ROW_WARPS,
    )
    return sums_eF


def _bounds(plan: RoutingPlan) -> tuple[Tensor, int, int]:
    """What ``valid_rows`` takes."""
    return plan.group_ends, plan.experts_per_rank, plan.row_capacity


def _row_constants(bias_eH: Tensor) -> dict[str, int]:
    held, width = bias_eH.shape
    return {
        "H": width,
        "ROWS": _rows_at_once(columns(width), bias_eH.device),
        "COLUMNS": columns(width),
        "EXPERTS_PADDED": power_of_two(held),
        "num_warps": ROW_WARPS,
    }


def _rows_at_once(columns_at_once: int, device: torch.device) -> int:
    return 1 if device.type == "cuda" else max(1, INTERPRETED_TILE // columns_at_once)


def _activation_constants(experts: Experts, device: torch.device) -> dict[str, int | bool | str]:
    intermediate = experts.w2.shape[2]
    columns_at_once = min(power_of_two(intermediate), MOST_ACTIVATED)
    return {
        "GATED": experts.activation.gated,
        "INTERLEAVED": experts.layout.name == "interleaved",
        "POINTWISE": POINTWISE[experts.activation.name],
        "I": intermediate,
        "ROWS": _rows_at_once(columns_at_once, device),
        "COLUMNS": columns_at_once,
        "num_warps": ROW_WARPS,
    }
