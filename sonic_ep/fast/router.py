"""The router: one GEMM and one kernel forward, at most two kernels and two GEMMs backward, nothing read on the host.

Logits and scores are those of the reference to fp32 rounding; choices follow exactly from the logits. Instead of a slow
fp32 GEMM in backward, the logits' gradient is cut into three bf16 parts, whose 3 x 8 bits hold the 24 of an fp32
number, and tensor cores sum their exact products in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.autograd_utils import apply_function, once_differentiable, savable, unpack_saved
from sonic_ep.backend import Routing
from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.collectives import reserve_sum, sum_over_ranks
from sonic_ep.fast.device_functions import exact_exp, rounded
from sonic_ep.fast.launch import launch
from sonic_ep.fast.workspace import Workspace

# Below the key of any logit: for experts that do not exist or are chosen already.
NO_CHOICE: tl.constexpr = tl.constexpr(-(2**63))
# The bits of a NaN, above those of infinity; as a mask, all bits of an fp32 number but the sign's.
ALL_BUT_SIGN: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(logit, expert, E: tl.constexpr):
    """An int64 key that orders the experts of a token: the larger logit first, then the lower expert.

    The high half holds the logit (fp32): its bits ascend with it where the sign is clear and descend where it is set.
    The low half holds E-1-expert. All NaNs are one, above infinity; -0 is 0. Logits 1 2 1 NaN give experts 3 1 0 2.
    """
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ ALL_BUT_SIGN, bits)
    ordered = tl.where(logit != logit, ALL_BUT_SIGN, ordered)
    return (ordered.to(tl.int64) << 32) | (E - 1 - expert).to(tl.int64)


@triton.jit
def logit_of(key):
    """The logit of a key of ``key_of``, where every NaN is the same and -0 is 0."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ ALL_BUT_SIGN, ordered).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tokens"])
def choose_kernel(
    logits_ptr,
    topk_idx_ptr,
    scores_ptr,
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    OVER_ALL: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """The K best experts of each token, best first, and their softmax. Grid (ceil(T / TOKENS),).

    logits_ptr (T, E) fp32; topk_idx_ptr (T, K) int64; scores_ptr (T, K) fp32: exp(logit - best), over its sum over all
    E experts if OVER_ALL, else over the K chosen. The K experts are distinct whatever the logits are.

    Logits 0 ln2 0 of one token, K=2: experts 1 0, scores 2/4 1/4 over all and 2/3 1/3 over the chosen.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS_PADDED)
    k_of = tl.arange(0, K_PADDED)
    inside = (token < tokens)[:, None] & (expert < E)[None, :]
    logit = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=inside, other=0.0)
    key = tl.where((expert < E)[None, :], key_of(logit, expert[None, :], E), NO_CHOICE)
    chosen = tl.full((TOKENS, K_PADDED), NO_CHOICE, tl.int64)
    for k in range(K):
        best = tl.max(key, axis=1)[:, None]
        chosen = tl.where(k_of[None, :] == k, best, chosen)
        key = tl.where(key == best, NO_CHOICE, key)
    real = (k_of < K)[None, :]
    chosen_logit = logit_of(chosen)
    top = tl.sum(tl.where(k_of[None, :] == 0, chosen_logit, 0.0), axis=1)[:, None]
    share = tl.where(real, exact_exp(chosen_logit - top), 0.0)
    if OVER_ALL:
        whole = tl.sum(tl.where((expert < E)[None, :], exact_exp(logit - top), 0.0), axis=1)[:, None]
    else:
        whole = tl.sum(share, axis=1)[:, None]
    place = token[:, None] * K + k_of[None, :]
    stored = (token < tokens)[:, None] & real
    tl.store(topk_idx_ptr + place, (E - 1 - chosen.to(tl.int32)).to(tl.int64), mask=stored)
    tl.store(scores_ptr + place, tl.div_rn(share, whole), mask=stored)


@triton.jit(do_not_specialize=["tokens"])
def logits_gradient_kernel(
    logits_ptr,
    topk_idx_ptr,
    scores_ptr,
    scores_grad_ptr,
    out_ptr,
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    OVER_ALL: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """d(logits) from d(scores), through the softmax. Grid (ceil(T / TOKENS),).

    logits_ptr (T, E), scores_ptr and scores_grad_ptr (T, K), out_ptr (T, E): fp32; topk_idx_ptr (T, K) int64.
    With scores s, their gradient g and G = sum over k of g * s, a chosen logit gets s * (g - G); if OVER_ALL, others
    get -p * G, p being their share of the softmax. Scores 2/4 1/4 of three experts, OVER_ALL, g = 1 0: the chosen get
    1/4 -1/8, the other -1/8.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    expert = tl.arange(0, EXPERTS_PADDED)
    inside = there[:, None] & (expert < E)[None, :]
    place = token[:, None] * E + expert[None, :]
    grad = tl.zeros((TOKENS, EXPERTS_PADDED), dtype=tl.float32)
    k_of = tl.arange(0, K_PADDED)
    slot = token[:, None] * K + k_of[None, :]
    real = there[:, None] & (k_of < K)[None, :]
    score = tl.load(scores_ptr + slot, mask=real, other=0.0)
    total = tl.sum(score * tl.load(scores_grad_ptr + slot, mask=real, other=0.0), axis=1)
    for k in range(K):
        chosen = tl.load(topk_idx_ptr + token * K + k, mask=there, other=-1)
        own = tl.load(scores_grad_ptr + token * K + k, mask=there, other=0.0)
        if not OVER_ALL:
            own = tl.load(scores_ptr + token * K + k, mask=there, other=0.0) * (own - total)
        grad = tl.where(expert[None, :] == chosen[:, None], own[:, None], grad)
    if OVER_ALL:
        # The best logit's share is 1 over the sum that divides every share.
        best = tl.load(topk_idx_ptr + token * K, mask=there, other=0)
        top = tl.load(logits_ptr + token * E + best, mask=there, other=0.0)
        unit = tl.load(scores_ptr + token * K, mask=there, other=0.0)
        logit = tl.load(logits_ptr + place, mask=inside, other=0.0)
        grad = exact_exp(logit - top[:, None]) * unit[:, None] * (grad - total[:, None])
    tl.store(out_ptr + place, grad, mask=inside)


@triton.jit(do_not_specialize=["numbers"])
def parts_kernel(grad_ptr, out_ptr, numbers, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Cut fp32 numbers into parts that sum to them. Grid (ceil(numbers / BLOCK),).

    grad_ptr (T, E) fp32, ``numbers`` = T*E; out_ptr (T, PARTS, E): each part is the rounded remainder after those
    before. In bf16 the parts of 1 + 2^-9 + 2^-20 are 1, 2^-9 and 2^-20.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    out_ptr += place // E * (PARTS * E) + place % E
    for part in tl.static_range(PARTS):
        rounding = rounded(grad, out_ptr)
        tl.store(out_ptr + part * E, rounding, mask=inside)
        taken = rounding.to(tl.float32)
        # Infinity has no remainder; minus itself it would be NaN.
        grad = tl.where(tl.abs(taken) == float("inf"), 0.0, grad - taken)


# Logits that one program holds, unless one token has more: more for each warp take more registers.
TILE_LOGITS = 1024
MOST_WARPS = 16
BF16_PARTS = 3
PARTS_BLOCK = 1024
HALF_PRECISIONS = (torch.bfloat16, torch.float16)


def route(x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions, workspace: Workspace) -> Routing:
    """Logits ``x . router_w`` (T, E) fp32, the K largest of each token, and their scores.

    Collective in backward, which sums the weight's gradient, and where shared memory for that sum has to grow.
    """
    if options.reduce_router_grad and router_w_EH.requires_grad:
        # Also where gradients are off: under reentrant checkpointing a backward follows all the same.
        reserve_sum(workspace, router_w_EH.numel())
    if torch.is_grad_enabled():
        x_TH = savable(x_TH)
    logits_TE = apply_function(RouterLogits, x_TH, router_w_EH, options, workspace)
    topk_idx_TK, scores_TK = Choose.apply(logits_TE, options, workspace)
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)


class RouterLogits(torch.autograd.Function):
    """x (T, H) and router_w (E, H) to logits (T, E) fp32. The options say whether router_w's gradient is summed.

    Separate from ``Choose`` because a split backward, up to PyTorch 2.12, mixes up the gradients of a function with a
    weight and several results.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, router_w_EH: Tensor, options: RouterOptions, workspace: Workspace) -> Tensor:
        """``x . router_w``."""
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.reduced, ctx.workspace = options.reduce_router_grad, workspace
        ctx.step, ctx.call_lock = workspace.step, workspace.call_lock
        ctx.x_dtype, ctx.weight_dtype = x_TH.dtype, router_w_EH.dtype
        ctx.save_for_backward(x_TH if needs_weight else None, router_w_EH if needs_x else None)
        with torch.autocast(x_TH.device.type, enabled=False):
            return product(x_TH, router_w_EH.t(), torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of x and of the weight, each if it is required."""
        x_TH, router_w_EH = unpack_saved(ctx, ctx.workspace.group, ("x", "router_w"))
        in_bf16_parts = ctx.x_dtype == ctx.weight_dtype == torch.bfloat16
        grad_TPE = bf16_parts(grad_TE) if in_bf16_parts else grad_TE.unsqueeze(1)
        _, parts, num_experts = grad_TPE.shape
        x_grad = None
        if router_w_EH is not None:
            # One product over all P * E numbers.
            x_grad = product(grad_TPE.flatten(1), router_w_EH.repeat(parts, 1), ctx.x_dtype)
        if x_TH is None:
            return x_grad, None, None, None
        by_part = product(grad_TPE.flatten(1).t(), x_TH, torch.float32)
        weight_grad = by_part.view(parts, num_experts, -1).sum(dim=0)
        if ctx.reduced:
            ctx.workspace.enter(Phase.ROUTER, ctx.step, backward=True)
            weight_grad = sum_over_ranks(weight_grad, ctx.workspace)
        return x_grad, weight_grad.to(ctx.weight_dtype), None, None


class Choose(torch.autograd.Function):
    """Logits (T, E) fp32 to choices (T, K) int64 and their scores (T, K) fp32. Not collective."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, options: RouterOptions, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """Choices, scores."""
        chosen = choose_experts(logits_TE, options)
        ctx.mark_non_differentiable(chosen.topk_idx)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.group, ctx.call_lock = options, workspace.group, workspace.call_lock
        ctx.save_for_backward(logits_TE, chosen.topk_idx, chosen.topk_scores)
        return chosen.topk_idx, chosen.topk_scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, scores_grad_TK: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the logits, (T, E)."""
        logits_TE, topk_idx_TK, scores_TK = unpack_saved(ctx, ctx.group, ("router_logits", "topk_idx", "scores"))
        routing = Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)
        return logits_gradient(routing, scores_grad_TK, ctx.options), None, None


def choose_experts(logits_TE: Tensor, options: RouterOptions) -> Routing:
    """The K largest logits (fp32, contiguous) of each row, descending, equal ones by ascending expert; their scores."""
    num_tokens, top_k = logits_TE.shape[0], options.top_k
    topk_idx_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    scores_TK = logits_TE.new_empty(num_tokens, top_k)
    _over_tokens(choose_kernel, (logits_TE, topk_idx_TK, scores_TK), options)
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)


def logits_gradient(routing: Routing, scores_grad_TK: Tensor, options: RouterOptions) -> Tensor:
    """d(logits) from the gradient of the scores, (T, E) fp32."""
    grad_TE = torch.empty_like(routing.logits)
    given = (routing.logits, routing.topk_idx, routing.topk_scores, scores_grad_TK.contiguous())
    _over_tokens(logits_gradient_kernel, (*given, grad_TE), options)
    return grad_TE


def _over_tokens(kernel: Any, pointers: tuple[Tensor, ...], options: RouterOptions) -> None:
    """Launch ``kernel`` over tiles of tokens; its first argument is the logits (T, E)."""
    (num_tokens, num_experts), device = pointers[0].shape, pointers[0].device
    experts, k = triton.next_power_of_2(num_experts), triton.next_power_of_2(options.top_k)
    tokens = max(1, TILE_LOGITS // experts)
    # Shares of all experts, divided by the sum of those of the chosen, are shares of the chosen.
    over_all = options.score_order is ScoreOrder.SOFTMAX_THEN_TOPK and not options.norm_topk_probs
    constants = {"E": num_experts, "K": options.top_k, "OVER_ALL": over_all}
    padded = {"TOKENS": tokens, "EXPERTS_PADDED": experts, "K_PADDED": k}
    warps = min(max(4, tokens * experts // TILE_LOGITS), MOST_WARPS)
    grid = (triton.cdiv(num_tokens, tokens),)
    launch(kernel, grid, *pointers, num_tokens, device=device, num_warps=warps, **constants, **padded)


def bf16_parts(grad_TE: Tensor) -> Tensor:
    """Three bf16 numbers that sum to each of ``grad_TE`` (T, E) fp32, (T, 3, E)."""
    grad_TE = grad_TE.contiguous()
    (num_tokens, num_experts), numbers, device = grad_TE.shape, grad_TE.numel(), grad_TE.device
    out_TPE = grad_TE.new_empty((num_tokens, BF16_PARTS, num_experts), dtype=torch.bfloat16)
    constants = {"E": num_experts, "PARTS": BF16_PARTS, "BLOCK": PARTS_BLOCK}
    launch(parts_kernel, (triton.cdiv(numbers, PARTS_BLOCK),), grad_TE, out_TPE, numbers, device=device, **constants)
    return out_TPE


def product(left_MK: Tensor, right_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """``left . right``, (M, N), summed in fp32, in ``dtype``: fp32 or that of a factor."""
    if left_MK.numel() == 0:
        return left_MK.new_zeros((left_MK.shape[0], right_KN.shape[1]), dtype=dtype)
    alike = left_MK.dtype == right_KN.dtype and left_MK.dtype in HALF_PRECISIONS
    # On the CPU PyTorch has no product of half precision with an fp32 result.
    if left_MK.device.type != "cuda" or not alike:
        return torch.mm(left_MK.float(), right_KN.float()).to(dtype)
    if dtype == left_MK.dtype:
        return torch.mm(left_MK, right_KN)
    return torch.mm(left_MK, right_KN, out_dtype=dtype)
