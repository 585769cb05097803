"""Backbone block of T2T-ViT: pre-norm self-attention and MLP (Yuan et al., ICCV 2021, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp
from torch import nn


class SelfAttention(nn.Module):
    """Multi-head self-attention with exact softmax, scale `(dim / num_heads) ** -0.5`.

    Args:
        dim: width of the tokens.
        num_heads: number of heads; must divide `dim`.
        attention_dropout: probability of dropping an attention weight in training.
        projection_dropout: probability of dropping an output channel in training.
    """

    def __init__(
        self, dim: int, num_heads: int, attention_dropout: float = 0.0, projection_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(projection_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim)."""
        query, key, value = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.attention_dropout if self.training else 0.0
        )
        return self.proj_drop(self.proj(rearrange(out, "b h n e -> b n (h e)")))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Args:
        dim: width of the tokens.
        num_heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over `dim`.
        dropout: dropout of projections and MLP.
        attention_dropout: dropout of attention weights.
        drop_path: probability of skipping a branch for a sample (stochastic depth).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, attention_dropout, dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
