"""The language model of ``train_lm.py``: one transformer, and two feed-forwards that take the same place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonic_ep import MoE
from sonic_ep.activation import GATE_LAYOUTS
from sonic_ep.backend import ExpertWeights
from sonic_ep.config import RouterOptions
from sonic_ep.reference.dense import dense_moe, dense_scores

BYTES = 256
POSITION_STD = 0.02
# Given, because the default is the epsilon of the dtype, and the fp64 run would train another model.
NORM_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model's sizes: at most S bytes of context, H, I and E of its layers, K experts a token."""

    experts: int
    top_k: int
    context: int = 64
    hidden: int = 64
    intermediate: int = 128
    heads: int = 4
    layers: int = 2


class FeedForward(nn.Module):
    """A Mixture-of-Experts feed-forward, (B, S, H) to (B, S, H), that keeps the last logits of its router.

    logits_TE: the router's logits of the last call, for the T = B*S tokens, without a gradient, until they are taken.
    """

    logits_TE: Tensor

    def take_logits(self) -> Tensor:
        """The router's last logits, (T, E), which are then no longer kept here."""
        logits_TE = self.logits_TE
        del self.logits_TE
        return logits_TE


class ExpertParallelFeedForward(FeedForward):
    """The layer under test, ``sonic_ep.MoE``. Its calls are collective."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BSH: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        out = self.layer(x_BSH)
        self.logits_TE = out.router_logits.detach()
        y_BSH: Tensor = out.y
        return y_BSH


class DenseFeedForward(FeedForward):
    """The oracle with all E experts, in the dtype of x; of ``layer`` it takes the weights alone.

    choices: the experts (T, K) of each call to come.
    """

    def __init__(self, layer: MoE, choices: Iterator[Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.choices = choices

    def forward(self, x_BSH: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        x_TH = x_BSH.flatten(0, 1)
        logits_TE = F.linear(x_TH, self.layer.router.weight)
        self.logits_TE = logits_TE.detach()
        choices_TK = next(self.choices).to(x_TH.device)
        scores_TK = dense_scores(logits_TE, choices_TK, RouterOptions(top_k=self.layer.router.top_k))
        return dense_moe(x_TH, choices_TK, scores_TK, experts_of(self.layer)).view_as(x_BSH)


def experts_of(layer: MoE) -> ExpertWeights:
    """The weights of ``layer``, as the oracle takes them."""
    return ExpertWeights(
        w1=layer.experts.w1,
        w2=layer.experts.w2,
        b1=layer.experts.b1,
        b2=layer.experts.b2,
        activation=layer.experts.activation,
        layout=GATE_LAYOUTS[layer.experts.gate_layout],
    )


class Attention(nn.Module):
    """Causal self-attention, (B, S, H) to (B, S, H)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.project = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        query, key, value = self.project(x_BSH).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        y_BSH: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y_BSH


class Block(nn.Module):
    """Attention, then the feed-forward, each on a normalised input and added to it."""

    def __init__(self, sizes: Sizes, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.hidden, eps=NORM_EPSILON)
        self.attention = Attention(sizes)
        self.feed_forward_norm = nn.RMSNorm(sizes.hidden, eps=NORM_EPSILON)
        self.feed_forward = feed_forward

    def forward(self, x_BSH: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        y_BSH: Tensor = x_BSH + self.feed_forward(self.feed_forward_norm(x_BSH))
        return y_BSH


class LanguageModel(nn.Module):
    """Bytes (B, S) int64 to the logits (B, S, 256) of the byte that follows each; S is at most the context.

    make_feed_forward: called once a layer, in order, between the draws of the other weights: whatever it makes, the
    same seed gives the same weights.
    """

    def __init__(self, sizes: Sizes, make_feed_forward: Callable[[], FeedForward]) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, sizes.hidden)
        self.position_SH = nn.Parameter(torch.randn(sizes.context, sizes.hidden) * POSITION_STD)
        self.blocks = nn.ModuleList(Block(sizes, make_feed_forward()) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=NORM_EPSILON)
        self.head = nn.Linear(sizes.hidden, BYTES, bias=False)

    def forward(self, bytes_BS: Tensor) -> Tensor:
        """(B, S) to (B, S, 256)."""
        x_BSH = self.embed(bytes_BS) + self.position_SH[: bytes_BS.shape[1]]
        for block in self.blocks:
            x_BSH = block(x_BSH)
        logits_BSV: Tensor = self.head(self.norm(x_BSH))
        return logits_BSV

    def take_router_logits(self) -> Tensor:
        """The routers' logits of the last call, (layers, T, E). Call this once after each forward."""
        return torch.stack([part.take_logits() for part in self.modules() if isinstance(part, FeedForward)])

    def replicated_parameters(self) -> list[nn.Parameter]:
        """The parameters outside of the MoE layers, whose gradients the layers do not sum over the ranks."""
        layers = [part for part in self.modules() if isinstance(part, MoE)]
        settled = {id(parameter) for layer in layers for parameter in layer.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in settled]
