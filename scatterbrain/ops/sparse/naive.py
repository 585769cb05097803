"""Specification of attention over a sparse support, dense and in float64."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.dense import dense_attention, dense_logits
from scatterbrain.ops.common.inputs import visible_keys


def naive_support_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    support: torch.Tensor,
    scale: float,
    low_rank_logits: torch.Tensor | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and weights (B, H, T, S) of attention over a sparse support, both float64.

    Weights outside the support are those of a low-rank part, or zero without one.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        support: boolean (B * H or 1, T, S).
        scale: softmax scale s.
        low_rank_logits: logarithms of the low-rank weights (B, H, T, S); None for no low-rank part.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
    """
    batch, heads = query.shape[:2]
    support = support.expand(batch * heads, -1, -1).unflatten(0, (batch, heads))
    visible = visible_keys(query, key, is_causal, key_lengths)
    logits = dense_logits(query, key, scale)
    if low_rank_logits is None:
        return dense_attention(logits, visible & support, value)
    return dense_attention(torch.where(support, logits, low_rank_logits), visible, value)
