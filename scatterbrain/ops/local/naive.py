"""Specification of local attention, dense and in float64."""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.common.inputs import visible_rows


def naive_local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and attention weights (B, H, T, S) of local attention, both float64.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`.
        scale: softmax scale s.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.
    """
    query, key, value = (x.double() for x in (query, key, value))
    rows = visible_rows(query, key, value, scale, is_causal, key_lengths, window, attn_mask)
    query, key, value, _ = rows  # hidden rows are zero: 0 * nan is nan
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    visible = (-(window // 2) <= j - i) & (j - i < (window + 1) // 2)  # [T, S]
    if is_causal:
        visible = visible & (j <= i)
    if key_lengths is not None:
        visible = visible & (j < key_lengths.view(-1, 1, 1, 1))  # [B, 1, T, S]
    if attn_mask is not None:
        visible = visible & attn_mask[:, None, None, :]  # [B, 1, T, S]
    logits = (scale * query @ key.transpose(-2, -1)).masked_fill(~visible, -math.inf)
    weights = logits.softmax(-1).masked_fill(~visible, 0.0)  # zero, not nan, for a query that sees no key
    return rows.mark(weights @ value, weights)
