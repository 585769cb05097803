"""Specification of Scatterbrain attention with a local window."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.dense import dense_attention, dense_logits, dense_low_rank_logits
from scatterbrain.ops.common.inputs import visible_keys
from scatterbrain.ops.common.windows import window_mask


def naive_scatterbrain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    window: int,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 form; arguments as in `scatterbrain_attention`. Returns output and weights (B, H, T, S)."""
    visible = visible_keys(query, key, is_causal, key_lengths)
    logits = torch.where(
        window_mask(query.shape[2], key.shape[2], window, query.device),
        dense_logits(query, key, scale),
        dense_low_rank_logits(query, key, projection, scale, cosh=True),
    )
    return dense_attention(logits, visible, value)
