"""Specification of local attention."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.dense import dense_attention, dense_logits
from scatterbrain.ops.common.inputs import visible_keys
from scatterbrain.ops.common.windows import window_mask


def naive_local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 form; arguments as in `local_attention`. Returns output (B, H, T, D), weights (B, H, T, S)."""
    visible = visible_keys(query, key, is_causal, key_lengths)
    visible = visible & window_mask(query.shape[2], key.shape[2], window, query.device)
    return dense_attention(dense_logits(query, key, scale), visible, value)
