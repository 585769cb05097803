"""Full softmax attention: `softmax(s Q K^T) V`, O(T S) time; memory O(T + S) in PyTorch's fused kernels."""

from __future__ import annotations

import torch

from scatterbrain.attention.base import AttentionModule
from scatterbrain.ops.full import full_attention, naive_full_attention


class FullAttention(AttentionModule):
    """Softmax attention over all keys; arguments as in `AttentionModule`."""

    takes_attn_mask = True

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return full_attention(query, key, value, **options)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return naive_full_attention(query, key, value, **options)[1]
