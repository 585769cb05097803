"""Specification of causal landmark attention for given clusters, dense and in float64; README.md states the maths."""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.clusters.causal.levels import exact_chunks
from scatterbrain.ops.common.inputs import visible_keys, visible_rows


def naive_causal_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    window: int,
    chunk: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D), attention weights (B, H, T, S) and log-sum-exp (B, H, T), all float64.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        assignment: cluster of each key in its node at each level (levels, B, H, S), -1 for none; of `causal_clusters`.
        window: width W of the window that queries see exactly.
        chunk: keys C of a chunk.
        scale: softmax scale s.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.
    """
    query, key, value = (x.double() for x in (query, key, value))
    rows = visible_rows(query, key, value, scale, True, key_lengths, attn_mask=attn_mask)
    query, key, value, _ = rows
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    mask = visible_keys(key_lengths, attn_mask, key.shape[2])
    visible = (j <= i).expand(len(query), 1, -1, -1)
    visible = visible if mask is None else visible & mask[:, None, None]
    logits = scale * query @ key.transpose(-2, -1)
    seen = i // chunk - exact_chunks(window, chunk)  # chunks seen through landmarks, of each query
    for level, labels in enumerate(assignment):
        node = j // (chunk << level)
        # the nodes of this level that represent `seen` chunks: the last one, or two
        left = seen.clone()
        for _ in range(level):
            left = torch.div(left - 1, 2, rounding_mode="floor").clamp_min(0)
        taken = (node < left) & (node >= left - 2 + left % 2)  # [T, S]
        logits = torch.where(taken, _landmark_logits(query, key, labels, node, scale), logits)
    logits = logits.masked_fill(~visible, -math.inf)
    blind = ~visible.any(-1, keepdim=True)
    # the softmax of nothing would be nan
    logits = logits.masked_fill(blind, 0.0)
    weights = logits.softmax(-1).masked_fill(~visible, 0.0)
    lse = logits.logsumexp(-1, keepdim=True).masked_fill(blind, -math.inf)
    out, weights, lse = rows.mark(weights @ value, weights, lse)
    return out, weights, lse.squeeze(-1)


def _landmark_logits(
    query: torch.Tensor, key: torch.Tensor, labels: torch.Tensor, node: torch.Tensor, scale: float
) -> torch.Tensor:
    """Logits (B, H, T, S) in which each key is replaced by its cluster: s q.c, and the correction for its spread."""
    same = (labels.unsqueeze(-1) == labels.unsqueeze(-2)) & (node[:, None] == node)  # [B, H, S, S]
    same = (same & (labels >= 0).unsqueeze(-1)).double()
    count = same.sum(-1, keepdim=True).clamp_min(1.0)
    mean = same @ key / count
    variance = same @ (key - mean).square().mean(-1, keepdim=True) / count
    # without the gradient of the square root at zero
    spread = torch.where(variance > 0, variance, 1.0).sqrt().masked_fill(variance == 0, 0.0)
    sigma = scale * torch.linalg.vector_norm(query, dim=-1, keepdim=True) * spread.transpose(-2, -1)
    limited = torch.minimum(sigma, (2 * count.log()).sqrt().transpose(-2, -1))
    return scale * query @ mean.transpose(-2, -1) + limited * (sigma - limited / 2)
