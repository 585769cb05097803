"""Specification of full attention."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.dense import dense_attention, dense_logits
from scatterbrain.ops.common.inputs import visible_keys


def naive_full_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 form; arguments as in `full_attention`. Returns output (B, H, T, D) and weights (B, H, T, S)."""
    visible = visible_keys(query, key, is_causal, key_lengths)
    return dense_attention(dense_logits(query, key, scale), visible, value)
