"""Specification of Performer attention."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.dense import dense_attention, dense_low_rank_logits
from scatterbrain.ops.common.inputs import visible_keys


def naive_performer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 form; arguments as in `performer_attention`. Returns output and weights (B, H, T, S)."""
    visible = visible_keys(query, key, is_causal, key_lengths)
    logits = dense_low_rank_logits(query, key, projection, scale, cosh=False)
    return dense_attention(logits, visible, value, eps)
