"""Tokens-to-token module: three soft splits with a token stage after each of the first two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# (kernel, stride, padding) of the three soft splits; together they reduce the image 16 times.
SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
TOKEN_DIM = 64
STAGE_DIMS = (3 * 7 * 7, TOKEN_DIM * 3 * 3)
TOTAL_STRIDE = 16


def stage_lengths(image_size: int) -> tuple[int, int]:
    """Number of tokens in the two token stages, (3136, 784) for images of 224 pixels."""
    return (image_size // 4) ** 2, (image_size // 8) ** 2


class TokensToToken(nn.Module):
    """Image to tokens: soft split, stage 1, soft split, stage 2, soft split, linear projection.

    Args:
        stage1: module (B, (size/4)^2, 147) -> (B, (size/4)^2, 64).
        stage2: module (B, (size/8)^2, 576) -> (B, (size/8)^2, 64).
        embed_dim: width of the outgoing tokens.
        image_size: height and width of the images in pixels; a multiple of 16.
    """

    def __init__(self, stage1: nn.Module, stage2: nn.Module, embed_dim: int, image_size: int = 224) -> None:
        super().__init__()
        self.attention1 = stage1
        self.attention2 = stage2
        self.project = nn.Linear(STAGE_DIMS[1], embed_dim)
        self.image_size = image_size
        self.num_patches = (image_size // TOTAL_STRIDE) ** 2

    @staticmethod
    def _soft_split(x: torch.Tensor, split: int) -> torch.Tensor:
        """Overlapping patches of a feature map (B, C, height, width) as tokens (B, N, C * kernel^2)."""
        kernel, stride, padding = SOFT_SPLITS[split]
        return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, image_size, image_size) to tokens (B, (image_size/16)^2, embed_dim)."""
        tokens = self.attention1(self._soft_split(x, 0))
        x = rearrange(tokens, "b (h w) c -> b c h w", h=self.image_size // 4)
        tokens = self.attention2(self._soft_split(x, 1))
        x = rearrange(tokens, "b (h w) c -> b c h w", h=self.image_size // 8)
        return self.project(self._soft_split(x, 2))
