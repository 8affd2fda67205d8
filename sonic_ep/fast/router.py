"""The router: one GEMM and one kernel forward; two GEMMs and at most four kernels and a barrier backward.

Logits and scores are those of the reference to fp32 rounding; choices follow exactly from the logits or, with a
correction or groups, from values that are the reference's to fp32 rounding. Instead of a slow fp32 GEMM in backward,
the logits' gradient is cut into three bf16 parts, whose 3 x 8 bits hold the 24 of an fp32 number, and tensor cores sum
their exact products in fp32.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.autograd_utils import apply_function, once_differentiable, savable, unpack_saved
from sonic_ep.backend import RouterWeights, Routing
from sonic_ep.config import LEAST_SIGMOID_SUM, RouterOptions, ScoreFunction, ScoreOrder
from sonic_ep.distributed.sync_tag import Phase
from sonic_ep.fast.all_reduce import Summand, reserve_sum, sum_over_ranks, sum_parts
from sonic_ep.fast.bf16_parts import bf16_parts
from sonic_ep.fast.device_functions import exact_exp
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, launcher, triton_kernel
from sonic_ep.fast.staging import StagedCall, own_half, row_constants, row_programs, stage_numbers
from sonic_ep.fast.workspace import Workspace

# Below the key of any logit: for experts that do not exist or are chosen already.
NO_CHOICE: tl.constexpr = tl.constexpr(-(2**63))
# The bits of a NaN, above those of infinity; as a mask, all bits of an fp32 number but the sign's.
ALL_BUT_SIGN: tl.constexpr = tl.constexpr(0x7FFFFFFF)
LEAST_SUM: tl.constexpr = tl.constexpr(LEAST_SIGMOID_SUM)


@triton.jit
def key_of(value, expert, E: tl.constexpr):
    """An int64 key that orders the experts of a token: the larger value first, then the lower expert.

    The high half holds the value (fp32): its bits ascend with it where the sign is clear and descend where it is set.
    The low half holds E-1-expert. All NaNs are one, above infinity; -0 is 0. Values 1 2 1 NaN give experts 3 1 0 2.
    """
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ ALL_BUT_SIGN, bits)
    ordered = tl.where(value != value, ALL_BUT_SIGN, ordered)
    return (ordered.to(tl.int64) << 32) | (E - 1 - expert).to(tl.int64)


@triton.jit
def value_of(key):
    """The value of a key of ``key_of``, where every NaN is the same and -0 is 0."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ ALL_BUT_SIGN, ordered).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(logit):
    """1 / (1 + exp(-logit)) in fp32."""
    return tl.div_rn(tl.full(logit.shape, 1.0, tl.float32), 1.0 + exact_exp(-logit))


@triton.jit
def in_best_groups(
    key,
    expert,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):
    """Which experts are in the TOP_GROUPS best of GROUPS groups of SIZE. key: of each expert, (TOKENS, EXPERTS_PADDED).

    A group's value is the sum of its GROUP_TOP largest, added in descending order; of equal ones the lower group comes
    first. Values 4 3 | 2 6 in two groups, the best one, GROUP_TOP=1: the second. With GROUP_TOP=2: 7 and 8, the second.
    """
    tokens: tl.constexpr = key.shape[0]
    group_of = (expert // SIZE)[None, :]
    group = tl.arange(0, GROUPS_PADDED)[None, :]
    totals = tl.zeros((tokens, GROUPS_PADDED), dtype=tl.float32)
    for g in range(GROUPS):
        left = tl.where(group_of == g, key, NO_CHOICE)
        for _ in range(GROUP_TOP):
            best = tl.max(left, axis=1)[:, None]
            totals += tl.where(group == g, value_of(best), 0.0)
            left = tl.where(left == best, NO_CHOICE, left)
    group_key = tl.where(group < GROUPS, key_of(totals, group, GROUPS), NO_CHOICE)
    stays = tl.zeros(key.shape, dtype=tl.int1)
    for _ in range(TOP_GROUPS):
        best = tl.max(group_key, axis=1)[:, None]
        stays = stays | (group_of == GROUPS - 1 - best.to(tl.int32))
        group_key = tl.where(group_key == best, NO_CHOICE, group_key)
    return stays


@triton.jit
def choose_tile(
    program,
    logits_ptr,
    topk_idx_ptr,
    scores_ptr,
    correction_ptr,
    ids_table_ptr,
    scores_table_ptr,
    epoch_ptr,
    rank,
    world_size,
    tokens,
    max_tokens,
    scale,
    STAGED: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    OVER_ALL: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORM: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    BY_SHARE: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):
    """``choose_kernel`` for the tokens from ``program`` * TOKENS on."""
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS_PADDED)
    k_of = tl.arange(0, K_PADDED)
    inside = (token < tokens)[:, None] & (expert < E)[None, :]
    logit = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=inside, other=0.0)
    value = logit
    if not BY_LOGIT:
        largest = tl.max(tl.where((expert < E)[None, :], logit, float("-inf")), axis=1)[:, None]
        if SIGMOID:
            value = sigmoid(logit)
        elif BY_SHARE:
            share_of_all = tl.where((expert < E)[None, :], exact_exp(logit - largest), 0.0)
            value = tl.div_rn(share_of_all, tl.sum(share_of_all, axis=1)[:, None])
        if CORRECTED:
            value += tl.load(correction_ptr + expert, mask=expert < E, other=0.0)[None, :]
    key = tl.where((expert < E)[None, :], key_of(value, expert[None, :], E), NO_CHOICE)
    if GROUPS > 1:
        stays = in_best_groups(key, expert, E // GROUPS, GROUPS, TOP_GROUPS, GROUP_TOP, GROUPS_PADDED)
        key = tl.where(stays, key, NO_CHOICE)
    chosen = tl.full((TOKENS, K_PADDED), NO_CHOICE, tl.int64)
    for k in range(K):
        best = tl.max(key, axis=1)[:, None]
        chosen = tl.where(k_of[None, :] == k, best, chosen)
        key = tl.where(key == best, NO_CHOICE, key)
    real = (k_of < K)[None, :]
    place = token[:, None] * K + k_of[None, :]
    stored = (token < tokens)[:, None] & real
    chosen_expert = (E - 1 - chosen.to(tl.int32)).to(tl.int64)
    if BY_LOGIT:
        chosen_logit = value_of(chosen)
    else:
        chosen_logit = tl.load(logits_ptr + token[:, None] * E + chosen_expert, mask=stored, other=0.0)
    if SIGMOID:
        score = tl.where(real, sigmoid(chosen_logit), 0.0)
        if NORM:
            score = tl.div_rn(score, tl.sum(score, axis=1)[:, None] + LEAST_SUM)
    else:
        if BY_LOGIT:
            top = tl.sum(tl.where(k_of[None, :] == 0, chosen_logit, 0.0), axis=1)[:, None]
        elif OVER_ALL:
            top = largest
        else:
            top = tl.max(tl.where(real, chosen_logit, float("-inf")), axis=1)[:, None]
        share = tl.where(real, exact_exp(chosen_logit - top), 0.0)
        if OVER_ALL:
            whole = tl.sum(tl.where((expert < E)[None, :], exact_exp(logit - top), 0.0), axis=1)[:, None]
        else:
            whole = tl.sum(share, axis=1)[:, None]
        score = tl.div_rn(share, whole)
    tl.store(topk_idx_ptr + place, chosen_expert, mask=stored)
    tl.store(scores_ptr + place, score * scale, mask=stored)
    if STAGED:
        staged_ids_ptr = own_half(ids_table_ptr, epoch_ptr, rank, world_size, epoch_ptr)
        id_or_none = tl.where(stored, chosen_expert, -1).to(tl.int32)
        tl.store(staged_ids_ptr + place, id_or_none, mask=(token < max_tokens)[:, None] & real)
        staged_scores_ptr = own_half(scores_table_ptr, epoch_ptr, rank, world_size, scores_ptr)
        tl.store(staged_scores_ptr + place, score * scale, mask=stored)


@triton_kernel
def choose_kernel(
    logits_ptr,
    topk_idx_ptr,
    scores_ptr,
    correction_ptr,
    rows_ptr,
    ids_table_ptr,
    scores_table_ptr,
    rows_table_ptr,
    epoch_ptr,
    rank,
    world_size,
    tokens,
    max_tokens,
    numbers,
    scale: tl.float32,
    STAGED: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    OVER_ALL: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORM: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    BY_SHARE: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The K best experts of each token, best first, and their scores, by ``RouterConfig``. Grid (ceil(C / TOKENS),).

    logits_ptr (T, E) fp32; topk_idx_ptr (T, K) int64; scores_ptr (T, K) fp32; correction_ptr (E,) fp32 if CORRECTED.
    Scores are ``scale`` times: if SIGMOID, sigmoids, if NORM over their sum + 1e-20; else exp(logit - the largest),
    over its sum over all E experts if OVER_ALL, else over the K chosen. BY_LOGIT: the choice goes by the logits; else
    by values: sigmoids if SIGMOID, shares of the softmax over all if BY_SHARE, else logits, plus the correction.
    GROUPS: 1 if all stay. The K experts are distinct whatever the logits are.

    STAGED: ids and scores also go to this rank's halves, C = ``max_tokens``, with ids of -1 from T on; and so do
    ``numbers`` elements of rows_ptr, by ceil(numbers / BLOCK) further programs. See ``stage_kernel``.

    Logits 0 ln2 0 of one token, K=2: experts 1 0, scores 2/4 1/4 over all and 2/3 1/3 over the chosen; sigmoids 2/3
    1/2, over their sum 4/7 3/7. With a correction of 0 0 1, by logits, shares or sigmoids: experts 2 1.
    """
    program = tl.program_id(0)
    choosing = tl.cdiv(max_tokens, TOKENS)
    # "and" would evaluate both sides.
    if STAGED:  # noqa: SIM102
        if program >= choosing:
            target_ptr = own_half(rows_table_ptr, epoch_ptr, rank, world_size, rows_ptr)
            stage_numbers(program - choosing, rows_ptr, target_ptr, numbers, VECTOR, BLOCK)
    if program < choosing:
        choose_tile(
            program,
            logits_ptr,
            topk_idx_ptr,
            scores_ptr,
            correction_ptr,
            ids_table_ptr,
            scores_table_ptr,
            epoch_ptr,
            rank,
            world_size,
            tokens,
            max_tokens,
            scale,
            STAGED,
            E,
            K,
            OVER_ALL,
            SIGMOID,
            NORM,
            BY_LOGIT,
            BY_SHARE,
            CORRECTED,
            GROUPS,
            TOP_GROUPS,
            GROUP_TOP,
            TOKENS,
            EXPERTS_PADDED,
            K_PADDED,
            GROUPS_PADDED,
        )


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


# Logits that one program holds, unless one token has more: more for each warp take more registers.
TILE_LOGITS = 1024
MOST_WARPS = 16
HALF_PRECISIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The kernel that chooses: one program takes ``tile_tokens`` tokens. itemsize: of what it stages besides."""

    run: Launcher
    tile_tokens: int
    scale: float
    itemsize: int


@dataclass(kw_only=True, eq=False)
class StagedChoice:
    """What ``route`` stages for the layer that follows: its choice, and x (T, H), contiguous. max_tokens: C."""

    choice: Choice
    staged: StagedCall
    x_TH: Tensor
    max_tokens: int


def route(
    x_TH: Tensor, weights: RouterWeights, options: RouterOptions, workspace: Workspace, into: StagedChoice | None = None
) -> Routing:
    """Logits ``x . weight + bias`` (T, E) fp32, the experts of each token and their scores: see ``RouterConfig``.

    Collective in backward, which sums the gradients of weight and bias, and where memory for that sum has to grow.
    """
    weight, bias = weights.weight, weights.bias
    if options.reduce_router_grad:
        trained = weight.numel() if weight.requires_grad else 0
        trained += bias.numel() if bias is not None and bias.requires_grad else 0
        if trained > 0:
            # Also where gradients are off: under reentrant checkpointing a backward follows all the same.
            reserve_sum(workspace, trained)
    if not torch.is_grad_enabled():
        return choose_experts(_logits(x_TH, weight, bias), options, weights.correction, workspace, into)
    logits_TE = apply_function(RouterLogits, savable(x_TH), weight, bias, options, workspace)
    topk_idx_TK, scores_TK = Choose.apply(logits_TE, weights.correction, options, workspace, into)
    staged = None if into is None else into.staged
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK, staged=staged)


def _logits(x_TH: Tensor, router_w_EH: Tensor, router_b_E: Tensor | None) -> Tensor:
    """``x . router_w``, rounded to fp32, plus router_b."""
    if torch.is_autocast_enabled(x_TH.device.type):
        with torch.autocast(x_TH.device.type, enabled=False):
            return _logits(x_TH, router_w_EH, router_b_E)
    logits_TE = product(x_TH, router_w_EH.t(), torch.float32)
    return logits_TE if router_b_E is None else logits_TE.add_(router_b_E)


class RouterLogits(torch.autograd.Function):
    """x (T, H), router_w (E, H) and router_b (E,) or None to logits (T, E) fp32.

    The options say whether the gradients of router_w and router_b are summed over the group. Separate from ``Choose``
    because a split backward, up to PyTorch 2.12, mixes up the gradients of a function with a weight and several
    results.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        router_w_EH: Tensor,
        router_b_E: Tensor | None,
        options: RouterOptions,
        workspace: Workspace,
    ) -> Tensor:
        """See ``_logits``."""
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.reduced, ctx.workspace = options.reduce_router_grad, workspace
        ctx.tag, ctx.call_lock = workspace.tag, workspace.call_lock
        ctx.x_dtype, ctx.weight_dtype = x_TH.dtype, router_w_EH.dtype
        ctx.bias_dtype = None if router_b_E is None else router_b_E.dtype
        ctx.save_for_backward(x_TH if needs_weight else None, router_w_EH if needs_x else None)
        return _logits(x_TH, router_w_EH, router_b_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the weight and of the bias, each if it is required."""
        x_TH, router_w_EH = unpack_saved(ctx, ctx.workspace.group, ("x", "router_w"))
        left_TE, right_EH = grad_TE, router_w_EH
        if ctx.x_dtype == ctx.weight_dtype == torch.bfloat16 and any(ctx.needs_input_grad[:2]):
            left_TE, right_EH = bf16_parts(grad_TE.contiguous(), router_w_EH)
        # One product over all P * E numbers.
        x_grad = None if right_EH is None else product(left_TE, right_EH, ctx.x_dtype)
        summands = []
        if x_TH is not None:
            by_part, shape = product(left_TE.t(), x_TH, torch.float32), torch.Size((grad_TE.shape[1], x_TH.shape[1]))
            summands.append(Summand(parts=by_part, shape=shape, dtype=ctx.weight_dtype))
        if ctx.needs_input_grad[2]:
            summands.append(Summand(parts=grad_TE.sum(dim=0), shape=grad_TE.shape[1:], dtype=ctx.bias_dtype))
        if ctx.reduced and summands:
            ctx.workspace.enter(Phase.ROUTER, ctx.tag, backward=True)
            sums = iter(sum_over_ranks(summands, ctx.workspace))
        else:
            sums = iter([sum_parts(summand) for summand in summands])
        weight_grad, bias_grad = (next(sums) if needed else None for needed in ctx.needs_input_grad[1:3])
        return x_grad, weight_grad, bias_grad, None, None


class Choose(torch.autograd.Function):
    """Logits (T, E) fp32 to choices (T, K) int64 and their scores (T, K) fp32. Not collective."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        correction_E: Tensor | None,
        options: RouterOptions,
        workspace: Workspace,
        into: StagedChoice | None,
    ) -> tuple[Tensor, Tensor]:
        """Choices, scores."""
        chosen = choose_experts(logits_TE, options, correction_E, workspace, into)
        ctx.mark_non_differentiable(chosen.topk_idx)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.group, ctx.call_lock = options, workspace.group, workspace.call_lock
        ctx.corrected = correction_E is not None
        ctx.save_for_backward(logits_TE, chosen.topk_idx, chosen.topk_scores)
        return chosen.topk_idx, chosen.topk_scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, scores_grad_TK: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient of the logits, (T, E)."""
        logits_TE, topk_idx_TK, scores_TK = unpack_saved(ctx, ctx.group, ("router_logits", "topk_idx", "scores"))
        routing = Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)
        return logits_gradient(routing, scores_grad_TK, ctx.options, corrected=ctx.corrected), None, None, None, None


def choose_experts(
    logits_TE: Tensor,
    options: RouterOptions,
    correction_E: Tensor | None = None,
    workspace: Workspace | None = None,
    into: StagedChoice | None = None,
) -> Routing:
    """The experts and scores of each token from its logits (fp32, contiguous), by the rules of ``RouterConfig``.

    into: where they, and x, are staged besides, in ``workspace``.
    """
    (tokens, num_experts), top_k = logits_TE.shape, options.top_k
    topk_idx_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.int64)
    scores_TK = logits_TE.new_empty((tokens, top_k))
    # Without a correction its pointer is not read.
    correction = logits_TE if correction_E is None else correction_E
    chosen = (logits_TE, topk_idx_TK, scores_TK, correction)
    if into is None or workspace is None:
        choice = choice_of(logits_TE.device, num_experts, options, corrected=correction_E is not None)
        grid, alone = (-(-tokens // choice.tile_tokens),), (0, 1, tokens, tokens, 0, choice.scale)
        choice.run(grid, *chosen, *chosen, topk_idx_TK, *alone)
        return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)
    choice, staged, x_TH, max_tokens, group = into.choice, into.staged, into.x_TH, into.max_tokens, workspace.group
    scores = staged.ids if staged.scores is None else staged.scores
    # Of one rank no peer reads the rows.
    numbers = x_TH.numel() if group.world_size > 1 else 0
    grid = (-(-max_tokens // choice.tile_tokens) + row_programs(numbers, choice.itemsize),)
    tables = (staged.ids.addresses, scores.addresses, staged.rows.addresses, workspace.epoch)
    sizes = (group.rank, group.world_size, tokens, max_tokens, numbers, choice.scale)
    choice.run(grid, *chosen, x_TH, *tables, *sizes)
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK, staged=staged)


def choice_of(
    device: torch.device, num_experts: int, options: RouterOptions, *, corrected: bool, itemsize: int | None = None
) -> Choice:
    """For these options. itemsize: of what it stages besides; None: it stages nothing."""
    groups = {"GROUPS": 1, "TOP_GROUPS": 1, "GROUP_TOP": 1}
    if options.limits_groups:
        groups = {"GROUPS": options.num_groups, "TOP_GROUPS": options.top_groups, "GROUP_TOP": options.group_top}
    constants = _score_constants(options, corrected=corrected) | groups
    constants["BY_SHARE"] = not constants["BY_LOGIT"] and options.score_order is ScoreOrder.SOFTMAX_THEN_TOPK
    constants |= {"CORRECTED": corrected, "GROUPS_PADDED": triton.next_power_of_2(groups["GROUPS"])}
    tile, staged_bytes = _tile_constants(num_experts, options.top_k), itemsize or torch.float32.itemsize
    constants |= {"STAGED": itemsize is not None, **tile, **row_constants(staged_bytes)}
    run = launcher(choose_kernel, device, tuple(constants.items()))
    return Choice(run=run, tile_tokens=tile["TOKENS"], scale=float(options.scale), itemsize=staged_bytes)


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
    tile = _tile_constants(num_experts, options.top_k)
    constants = _score_constants(options, corrected=corrected) | tile
    return Launcher(logits_gradient_kernel, device, constants), tile["TOKENS"]


def _score_constants(options: RouterOptions, *, corrected: bool) -> dict[str, Any]:
    """Constants of both kernels."""
    is_sigmoid, norm = options.score_function is ScoreFunction.SIGMOID, options.norm_topk_probs
    # Shares of all experts, divided by the sum of those of the chosen, are shares of the chosen.
    over_all = not is_sigmoid and options.score_order is ScoreOrder.SOFTMAX_THEN_TOPK and not norm
    by_logit = not (corrected or options.limits_groups)
    return {"OVER_ALL": over_all, "SIGMOID": is_sigmoid, "NORM": is_sigmoid and norm, "BY_LOGIT": by_logit}


def _tile_constants(num_experts: int, top_k: int) -> dict[str, int]:
    """Constants of kernels that take TOKENS tokens a program."""
    experts, k = triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k)
    tokens = max(1, TILE_LOGITS // experts)
    sizes = {"E": num_experts, "K": top_k, "TOKENS": tokens, "EXPERTS_PADDED": experts, "K_PADDED": k}
    return sizes | {"num_warps": min(max(4, tokens * experts // TILE_LOGITS), MOST_WARPS)}


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
