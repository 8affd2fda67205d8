"""The choice of experts: from logits, ids and scores, by one kernel, which also stages them and x.

Choices follow exactly from the logits or, with a correction or groups, from values that are the reference's to fp32
rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.backend import Routing
from sonic_ep.config import LEAST_SIGMOID_SUM, RouterOptions, ScoreFunction, ScoreOrder
from sonic_ep.fast.device_functions import exact_exp
from sonic_ep.fast.expert_keys import NO_CHOICE, in_best_groups, key_of, value_of
from sonic_ep.fast.launch import Launcher, launcher, triton_kernel
from sonic_ep.fast.staging import StagedCall, own_half, row_constants, row_programs, stage_numbers
from sonic_ep.fast.workspace import Workspace

LEAST_SUM: tl.constexpr = tl.constexpr(LEAST_SIGMOID_SUM)


@triton.jit
def sigmoid(logit):
    """1 / (1 + exp(-logit)) in fp32."""
    return tl.div_rn(tl.full(logit.shape, 1.0, tl.float32), 1.0 + exact_exp(-logit))


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


# Logits that one program holds, unless one token has more: more for each warp take more registers.
TILE_LOGITS = 1024
MOST_WARPS = 16


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
    return Routing(logits=logits_TE, topk_idx=topk_idx_TK, topk_scores=scores_TK)


def choice_of(
    device: torch.device,
    num_experts: int,
    options: RouterOptions,
    *,
    corrected: bool,
    staged: torch.dtype | None = None,
) -> Choice:
    """For these options. staged: dtype of the rows that it stages besides; None: it stages nothing."""
    groups = {"GROUPS": 1, "TOP_GROUPS": 1, "GROUP_TOP": 1}
    if options.limits_groups:
        groups = {"GROUPS": options.num_groups, "TOP_GROUPS": options.top_groups, "GROUP_TOP": options.group_top}
    constants = score_constants(options, corrected=corrected) | groups
    constants["BY_SHARE"] = not constants["BY_LOGIT"] and options.score_order is ScoreOrder.SOFTMAX_THEN_TOPK
    constants |= {"CORRECTED": corrected, "GROUPS_PADDED": triton.next_power_of_2(groups["GROUPS"])}
    tile, itemsize = tile_constants(num_experts, options.top_k), (staged or torch.float32).itemsize
    constants |= {"STAGED": staged is not None, **tile, **row_constants(itemsize)}
    run = launcher(choose_kernel, device, tuple(constants.items()), staged)
    return Choice(run=run, tile_tokens=tile["TOKENS"], scale=float(options.scale), itemsize=itemsize)


def score_constants(options: RouterOptions, *, corrected: bool) -> dict[str, Any]:
    """Constants of both kernels."""
    is_sigmoid, norm = options.score_function is ScoreFunction.SIGMOID, options.norm_topk_probs
    # Shares of all experts, divided by the sum of those of the chosen, are shares of the chosen.
    over_all = not is_sigmoid and options.score_order is ScoreOrder.SOFTMAX_THEN_TOPK and not norm
    by_logit = not (corrected or options.limits_groups)
    return {"OVER_ALL": over_all, "SIGMOID": is_sigmoid, "NORM": is_sigmoid and norm, "BY_LOGIT": by_logit}


def tile_constants(num_experts: int, top_k: int) -> dict[str, int]:
    """Constants of kernels that take TOKENS tokens a program."""
    experts, k = triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k)
    tokens = max(1, TILE_LOGITS // experts)
    sizes = {"E": num_experts, "K": top_k, "TOKENS": tokens, "EXPERTS_PADDED": experts, "K_PADDED": k}
    return sizes | {"num_warps": min(max(4, tokens * experts // TILE_LOGITS), MOST_WARPS)}
