"""The kernels of the router: from logits to choices and scores, and from gradients of those back to the logits'."""

from __future__ import annotations

import triton
import triton.language as tl

from sonic_ep.fast.device import exact_exp, rounded

# Below the key of any logit: stands for experts that do not exist, and for those that are chosen already.
NO_CHOICE: tl.constexpr = tl.constexpr(-(2**63))
# The bits of a NaN, above those of infinity; as a mask, all bits of an fp32 number but the sign's.
ALL_BUT_SIGN: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(logit, expert, E: tl.constexpr):
    """An int64 that orders experts of one token, best first largest: by logit, then lower expert first.

    logit fp32, expert int32. The high half holds the logit: bits of fp32 numbers ascend with them where the sign is
    clear and descend where it is set. The low half holds E-1-expert. All NaN are one, above infinity; -0 is 0. Of four
    experts with logits 1.0 2.0 1.0 NaN the order is 3 1 0 2.
    """
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ ALL_BUT_SIGN, bits)
    ordered = tl.where(logit != logit, ALL_BUT_SIGN, ordered)
    return (ordered.to(tl.int64) << 32) | (E - 1 - expert).to(tl.int64)


@triton.jit
def logit_of(key):
    """The logit that ``key_of`` was given, except that all NaN are one and -0 is 0."""
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

    logits_ptr (T, E) fp32; topk_idx_ptr (T, K) int64; scores_ptr (T, K) fp32: exp(logit - best) over the sum of that
    over all E experts if OVER_ALL, else over the K chosen. Whatever the logits are, the K experts are distinct.

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
    With s the scores, g their gradient and G the sum of g * s over k, a chosen logit gets s * (g - G); if OVER_ALL,
    the others get -p * G, p being their own share of the softmax. Scores 2/4 1/4 over all three, g = 1 0: the chosen
    get 1/4 -1/8, the other -1/8.
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
        # The best logit's own share is 1 over the sum that all shares have in common.
        best = tl.load(topk_idx_ptr + token * K, mask=there, other=0)
        top = tl.load(logits_ptr + token * E + best, mask=there, other=0.0)
        unit = tl.load(scores_ptr + token * K, mask=there, other=0.0)
        logit = tl.load(logits_ptr + place, mask=inside, other=0.0)
        grad = exact_exp(logit - top[:, None]) * unit[:, None] * (grad - total[:, None])
    tl.store(out_ptr + place, grad, mask=inside)


@triton.jit(do_not_specialize=["numbers"])
def parts_kernel(grad_ptr, out_ptr, numbers, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Cut fp32 numbers into parts that sum to them. Grid (ceil(numbers / BLOCK),).

    grad_ptr (T, E) fp32, ``numbers`` = T*E; out_ptr (T, PARTS, E): each part the rounding, to the dtype of out, of what
    the parts before have left over. Of 1 + 2^-9 + 2^-20 in bf16 the parts are 1, 2^-9 and 2^-20.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    out_ptr += place // E * (PARTS * E) + place % E
    for part in tl.static_range(PARTS):
        rounding = rounded(grad, out_ptr)
        tl.store(out_ptr + part * E, rounding, mask=inside)
        taken = rounding.to(tl.float32)
        # Infinity leaves nothing over; less itself it would leave NaN.
        grad = tl.where(tl.abs(taken) == float("inf"), 0.0, grad - taken)
