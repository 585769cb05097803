"""A small transformer on sequences of tokens, with any attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import Mlp
from torch import nn


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the attention is over (B, N, H, dim / H)."""

    def __init__(self, dim: int, heads: int, attention: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention = attention
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim); lengths (B,) or None."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out, _ = self.attention(query, key, value, key_lengths=lengths)
        x = x + self.proj(out.flatten(2))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """Tokens and learned positions, pre-norm blocks, and a linear map of each token or of the first.

    Args:
        attentions: one for each block.
        vocabulary: number of different tokens.
        num_outputs: number of classes.
        length: most tokens N.
        dim: width.
        heads: number of heads.
        each_token: give logits for each token; else for the first one, which is there for that.
        seed: of the weights, which do not depend on the attentions.
    """

    def __init__(
        self,
        attentions: Sequence[nn.Module],
        vocabulary: int,
        num_outputs: int,
        length: int,
        dim: int,
        heads: int,
        each_token: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.each_token = each_token
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, dim)
            self.positions = nn.Parameter(torch.empty(length, dim))
            self.blocks = nn.ModuleList(Block(dim, heads, attention) for attention in attentions)
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, num_outputs)
            for weight in (self.embedding.weight, self.positions):
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, N, classes) for each of the tokens (B, N), or (B, classes); behind `lengths` (B,) is padding."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, lengths)
        return self.head(self.norm(x if self.each_token else x[:, 0]))
