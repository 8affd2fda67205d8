"""The gradient of the choice of experts: from that of the scores to that of the logits, by one kernel."""

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from sonic_ep.backend import Routing
from sonic_ep.config import RouterOptions
from sonic_ep.fast.choice import score_constants, sigmoid, tile_constants
from sonic_ep.fast.device_functions import exact_exp
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, triton_kernel


@triton_kernel
def logits_gradient_kernel(
    logits_ptr,
    topk_idx_ptr,
    scores_ptr,
    scores_grad_ptr,
    out_ptr,
    tokens,
    scale: tl.float32,
    E: tl.constexpr,
    K: tl.constexpr,
    OVER_ALL: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORM: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """d(logits) from d(scores). Grid (ceil(T / TOKENS),). The constants are those of ``choose_kernel``.

    logits_ptr (T, E), scores_ptr and scores_grad_ptr (T, K), out_ptr (T, E): fp32; topk_idx_ptr (T, K) int64.
    With scores s, their gradient g and G = sum over k of g * s / scale, a chosen logit gets

        softmax                     s * (g - G); if OVER_ALL, others get -p * G, p being ``scale`` times their share;
                                    else as s times the sum over j of s_j / scale * (g - g_j), where nothing cancels
        SIGMOID                     s * g * sigmoid(-logit)
        SIGMOID and NORM            s * (g - G) * sigmoid(-logit)

    and others get 0. Scores 2/4 1/4 of three experts, OVER_ALL, g = 1 0: the chosen get 1/4 -1/8, the other -1/8.
    Sigmoids 2/3 1/2, g = 1 0: 2/9 0; over their sum, scores 4/7 3/7: 4/49 -6/49.
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
    given = tl.load(scores_grad_ptr + slot, mask=real, other=0.0)
    total = tl.div_rn(tl.sum(score * given, axis=1), tl.full((TOKENS,), scale, tl.float32))
    for k in range(K):
        chosen = tl.load(topk_idx_ptr + token * K + k, mask=there, other=-1)
        own = tl.load(scores_grad_ptr + token * K + k, mask=there, other=0.0)
        if SIGMOID:
            if NORM:
                own -= total
            logit_of_chosen = tl.load(logits_ptr + token * E + chosen, mask=there, other=0.0)
            own = tl.load(scores_ptr + token * K + k, mask=there, other=0.0) * own * sigmoid(-logit_of_chosen)
        elif not OVER_ALL:
            centred = tl.sum(score * (own[:, None] - given), axis=1)
            centred = tl.div_rn(centred, tl.full((TOKENS,), scale, tl.float32))
            own = tl.load(scores_ptr + token * K + k, mask=there, other=0.0) * centred
        grad = tl.where(expert[None, :] == chosen[:, None], own[:, None], grad)
    if OVER_ALL:
        logit = tl.load(logits_ptr + place, mask=inside, other=0.0)
        if BY_LOGIT:
            # The best logit's share is 1 over the sum that divides every share.
            best = tl.load(topk_idx_ptr + token * K, mask=there, other=0)
            top = tl.load(logits_ptr + token * E + best, mask=there, other=0.0)
            unit = tl.load(scores_ptr + token * K, mask=there, other=0.0)
        else:
            top = tl.max(tl.where((expert < E)[None, :], logit, float("-inf")), axis=1)
            whole = tl.sum(tl.where((expert < E)[None, :], exact_exp(logit - top[:, None]), 0.0), axis=1)
            unit = tl.div_rn(tl.full((TOKENS,), scale, tl.float32), whole)
        grad = exact_exp(logit - top[:, None]) * unit[:, None] * (grad - total[:, None])
    tl.store(out_ptr + place, grad, mask=inside)


def logits_gradient(
    routing: Routing, scores_grad_TK: Tensor, options: RouterOptions, *, corrected: bool = False
) -> Tensor:
    """d(logits) from the gradient of the scores, (T, E) fp32. corrected: the choice went by a correction, too."""
    logits_TE = routing.logits
    grad_TE, (tokens, num_experts) = torch.empty_like(logits_TE), logits_TE.shape
    given = (logits_TE, routing.topk_idx, routing.topk_scores, scores_grad_TK.contiguous())
    run, tile_tokens = _logits_gradient(logits_TE.device, num_experts, options, corrected)
    run((-(-tokens // tile_tokens),), *given, grad_TE, tokens, float(options.scale))
    return grad_TE


@lru_cache(LAUNCHERS_KEPT)
def _logits_gradient(
    device: torch.device, num_experts: int, options: RouterOptions, corrected: bool
) -> tuple[Launcher, int]:
    tile = tile_constants(num_experts, options.top_k)
    constants = score_constants(options, corrected=corrected) | tile
    return Launcher(logits_gradient_kernel, device, constants), tile["TOKENS"]
