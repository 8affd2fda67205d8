"""The language model of ``pretrain_fsdp.py``: a small transformer in plain PyTorch, that knows nothing of ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sonic_ep import MoE

BYTES, HIDDEN, HEADS, LAYERS = 256, 64, 4, 2
EXPERTS, TOP_K, INTERMEDIATE = 8, 2, 128


class Block(nn.Module):
    """Causal self-attention and a MoE layer, each on a normalised input and added to it: (B, S, H) to (B, S, H)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.moe_norm = nn.RMSNorm(HIDDEN)
        # FSDP reduces the router's gradient over all ranks.
        self.moe = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, reduce_router_grad=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        query, key, value = self.qkv(self.attention_norm(x_BSH)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BSH = x_BSH + self.out(mixed.transpose(1, 2).flatten(2))
        y_BSH: Tensor = x_BSH + self.moe(self.moe_norm(x_BSH)).y
        return y_BSH


class LanguageModel(nn.Module):
    """Bytes (B, S) int64 to the logits (B, S, 256) of the byte that follows each."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, HIDDEN)
        self.positions = nn.Embedding(context, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, BYTES, bias=False)

    def forward(self, bytes_BS: Tensor) -> Tensor:
        """(B, S) to (B, S, 256)."""
        x_BSH = self.embed(bytes_BS) + self.positions.weight
        for block in self.blocks:
            x_BSH = block(x_BSH)
        logits_BSV: Tensor = self.head(self.norm(x_BSH))
        return logits_BSV
