"""The two kinds of token stage of a tokens-to-token module (Yuan et al., ICCV 2021, section 3.1).

Both add the *values* to the output of the attention, where other blocks add the input: the stage changes the width from
that of the soft split (147 or 576) to the token width (64), so the residual connection cannot use the input.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import nn

from scatterbrain.ops.performer import performer_attention


class TokenTransformer(nn.Module):
    """Token stage of the `t2t_vit_t_*` variants, with a swappable attention of one head.

    Args:
        dim: width of the incoming tokens.
        token_dim: width of the outgoing tokens, and of query, key and value.
        attention: module `(query, key, value) -> (out, weights)` over (B, N, H, E) tensors. Its softmax scale
            has to be `dim ** -0.5` for published checkpoints, with the input width instead of the head width.
    """

    def __init__(self, dim: int, token_dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, token_dim, attention)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, token_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, token_dim)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Attention of a `TokenTransformer` with its projections: `v + proj(attention(q, k, v))`.

    Args:
        dim: width of the incoming tokens.
        token_dim: width of query, key, value and output.
        attention: see `TokenTransformer`.
    """

    def __init__(self, dim: int, token_dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False)
        self.attention = attention
        self.proj = nn.Linear(token_dim, token_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, token_dim)."""
        query, key, value = rearrange(self.qkv(x), "b n (three h e) -> three b n h e", three=3, h=1)
        out, _ = self.attention(query, key, value)
        return value.squeeze(2) + self.proj(out.squeeze(2))


class TokenPerformer(nn.Module):
    """Token stage of the `t2t_vit_*` variants: a Performer that is part of the trained model.

    Its random projections `w` are stored in the checkpoint, its softmax scale is 1, and 1e-8 is added to the
    normaliser, all as published. It is not the swappable attention.

    Args:
        dim: width of the incoming tokens.
        token_dim: width of the outgoing tokens.
        num_features: number of random features M; the published models have `token_dim // 2`.
        dropout: dropout of the projection and of the MLP; 0.1 as published.
    """

    NORMALISER_EPS = 1e-8

    def __init__(self, dim: int, token_dim: int, num_features: int | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        num_features = token_dim // 2 if num_features is None else num_features
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = nn.Linear(dim, 3 * token_dim)
        self.proj = nn.Linear(token_dim, token_dim)
        self.dp = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim),
            nn.GELU(),
            nn.Linear(token_dim, token_dim),
            nn.Dropout(dropout),
        )
        projection = nn.init.orthogonal_(torch.empty(num_features, token_dim)) * math.sqrt(num_features)
        self.w = nn.Parameter(projection, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, token_dim)."""
        key, query, value = rearrange(self.kqv(self.norm1(x)), "b n (three e) -> three b 1 n e", three=3)
        out = performer_attention(query, key, value, self.w, scale=1.0, eps=self.NORMALISER_EPS)
        x = value.squeeze(1) + self.dp(self.proj(out.squeeze(1)))
        return x + self.mlp(self.norm2(x))
