"""An fp32 gradient as three bf16 parts, whose 3 x 8 bits hold its 24, for products on tensor cores."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import rounded
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, triton_kernel

BF16_PARTS = 3
PARTS_BLOCK = 1024


@triton.jit
def cut_in_parts(grad_ptr, out_ptr, place, tokens, E: tl.constexpr, PARTS: tl.constexpr):
    """Cut the numbers at ``place`` into their parts: see ``parts_kernel``."""
    # Alike for all numbers of a token, so that accesses are wide whatever T is.
    inside = place // E < tokens
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    out_ptr += place // E * (PARTS * E) + place % E
    for part in tl.static_range(PARTS):
        rounding = rounded(grad, out_ptr)
        tl.store(out_ptr + part * E, rounding, mask=inside)
        taken = rounding.to(tl.float32)
        # Infinity has no remainder; minus itself it would be NaN.
        grad = tl.where(tl.abs(taken) == float("inf"), 0.0, grad - taken)


@triton.jit
def repeat(weight_ptr, repeated_ptr, place, WEIGHTS: tl.constexpr, PARTS: tl.constexpr):
    """Copy the weights at ``place`` to each of PARTS copies of them all."""
    inside = place < WEIGHTS
    weight = tl.load(weight_ptr + place, mask=inside)
    for part in tl.static_range(PARTS):
        tl.store(repeated_ptr + part * WEIGHTS + place, weight, mask=inside)


@triton_kernel
def parts_kernel(
    grad_ptr,
    weight_ptr,
    out_ptr,
    repeated_ptr,
    tokens,
    E: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut fp32 numbers into parts that sum to them, and repeat the weight, which is multiplied by each part.

    grad_ptr (T, E) fp32; out_ptr (T, PARTS, E): each part is the rounded remainder after those before. In bf16 the
    parts of 1 + 2^-9 + 2^-20 are 1, 2^-9 and 2^-20. weight_ptr (E, H), WEIGHTS = E*H, or 0 to leave it; repeated_ptr
    (PARTS, E, H). Grid (ceil(T*E / BLOCK) + ceil(WEIGHTS / BLOCK),).
    """
    program = tl.program_id(0)
    cutting = tl.cdiv(tokens.to(tl.int64) * E, BLOCK)
    if program < cutting:
        cut_in_parts(grad_ptr, out_ptr, program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tokens, E, PARTS)
    else:
        copied = (program - cutting).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        repeat(weight_ptr, repeated_ptr, copied, WEIGHTS, PARTS)


def bf16_parts(grad_TE: Tensor, weight_EH: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Three bf16 numbers that sum to each of (T, E) fp32, as (T, 3*E); and the weight three times, (3*E, H)."""
    num_tokens, num_experts = grad_TE.shape
    parts = grad_TE.new_empty((num_tokens, BF16_PARTS * num_experts), dtype=torch.bfloat16)
    repeated = None if weight_EH is None else weight_EH.new_empty((BF16_PARTS * num_experts, weight_EH.shape[1]))
    weights = 0 if weight_EH is None else weight_EH.numel()
    # Without a weight nothing is read or written there.
    pointers = (grad_TE, parts if weight_EH is None else weight_EH, parts, parts if repeated is None else repeated)
    grid = (-(-grad_TE.numel() // PARTS_BLOCK) + -(-weights // PARTS_BLOCK),)
    _parts(grad_TE.device, num_experts, weights)(grid, *pointers, num_tokens)
    return parts, repeated


@lru_cache(LAUNCHERS_KEPT)
def _parts(device: torch.device, num_experts: int, weights: int) -> Launcher:
    constants = {"E": num_experts, "WEIGHTS": weights, "PARTS": BF16_PARTS, "BLOCK": PARTS_BLOCK}
    return Launcher(parts_kernel, device, constants)
