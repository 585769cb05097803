"""Specification of attention over a sparse support, dense and in float64."""

from __future__ import annotations

import math

import torch


def naive_support_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    support: torch.Tensor,
    scale: float,
    low_rank_logits: torch.Tensor | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
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
        attn_mask: boolean (B, S), false for hidden keys.
    """
    query, key, value = (x.double() for x in (query, key, value))
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    visible = (j <= i) if is_causal else torch.ones(len(i), len(j), dtype=torch.bool, device=query.device)  # [T, S]
    if key_lengths is not None:
        visible = visible & (j < key_lengths.view(-1, 1, 1, 1))  # [B, 1, T, S]
    if attn_mask is not None:
        visible = visible & attn_mask[:, None, None, :]  # [B, 1, T, S]
    support = support.expand(query.shape[0] * query.shape[1], -1, -1).unflatten(0, query.shape[:2])  # [B, H, T, S]
    logits = scale * query @ key.transpose(-2, -1)
    if low_rank_logits is None:
        visible = visible & support
    else:
        logits = torch.where(support, logits, low_rank_logits)
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1).masked_fill(~visible, 0.0)
    return weights @ value, weights
