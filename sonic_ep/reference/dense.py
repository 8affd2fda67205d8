"""The oracle: the layer on one device, as a loop over experts, in any floating dtype.

In fp64 it is the truth; in the dtype of a test it is the "plain PyTorch" whose error bounds that of the backends.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.backend import ExpertWeights
from sonic_ep.config import LEAST_SIGMOID_SUM, RouterConfig, ScoreFunction, ScoreOrder


def dense_base(logits_TE: Tensor, config: RouterConfig) -> Tensor:
    """The base of every expert (T, E) as ``RouterConfig`` has it: logits, shares of their softmax, or sigmoids."""
    if config.score_function is ScoreFunction.SIGMOID:
        return logits_TE.sigmoid()
    return F.softmax(logits_TE, dim=1) if config.score_order is ScoreOrder.SOFTMAX_THEN_TOPK else logits_TE


def dense_scores(logits_TE: Tensor, topk_idx_TK: Tensor, config: RouterConfig) -> Tensor:
    """Scores (T, K) of the chosen experts as ``RouterConfig`` has them, in the dtype of the logits."""
    is_sigmoid = config.score_function is ScoreFunction.SIGMOID
    if not is_sigmoid and (config.norm_topk_probs or config.score_order is ScoreOrder.TOPK_THEN_SOFTMAX):
        # Shares of all experts, divided by the sum of those of the chosen, are these; but all of them may underflow.
        scores_TK = F.softmax(logits_TE.gather(1, topk_idx_TK), dim=1)
    else:
        scores_TK = dense_base(logits_TE, config).gather(1, topk_idx_TK)
    if is_sigmoid and config.norm_topk_probs:
        scores_TK = scores_TK / (scores_TK.sum(dim=1, keepdim=True) + LEAST_SIGMOID_SUM)
    return scores_TK if config.scale == 1 else scores_TK * config.scale


def dense_moe(x_TH: Tensor, topk_idx_TK: Tensor, topk_scores_TK: Tensor, experts: ExpertWeights) -> Tensor:
    """``y[t] = sum over k of score[t, k] * expert(idx[t, k])(x[t])``, (T, H) in the dtype of x.

    ``experts``: all E of them. The sum is in fp32, or fp64 for fp64 scores. An id of -1 drops the slot.
    """
    total_TH = x_TH.new_zeros(x_TH.shape, dtype=torch.promote_types(topk_scores_TK.dtype, torch.float32))
    count = len(experts.w2)

    # Unbound once: indexing would make a gradient of the size of all experts for each of them.
    def of_each(tensor: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * count if tensor is None else tensor.unbind()

    ups = [(w.unbind(), of_each(b)) for w, b in zip(experts.up_weights, experts.up_biases, strict=True)]
    w2, b2 = experts.w2.unbind(), of_each(experts.b2)
    for expert in range(count):
        token_N, choice_N = (topk_idx_TK == expert).nonzero(as_tuple=True)
        x_NH = x_TH[token_N]
        hidden = torch.cat([F.linear(x_NH, weights[expert], biases[expert]) for weights, biases in ups], dim=1)
        y_NH = F.linear(experts.activation(hidden, experts.layout), w2[expert], b2[expert])
        weighted_NH = y_NH.to(total_TH.dtype) * topk_scores_TK[token_N, choice_N, None]
        total_TH = total_TH.index_add(0, token_N, weighted_NH)
    return total_TH.to(x_TH.dtype)
