"""Specification of attention over a sparse support, dense and in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


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


def block_means(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """Means (..., N / block, E) of blocks of tokens (..., N, E); the last block may be shorter."""
    starts = torch.arange(0, tensor.shape[-2], block, device=tensor.device)
    sizes = (tensor.shape[-2] - starts).clamp_max(block).to(tensor.dtype)
    padded = F.pad(tensor, (0, 0, 0, -tensor.shape[-2] % block))
    return padded.unflatten(-2, (-1, block)).sum(-2) / sizes.unsqueeze(-1)


def naive_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_blocks: int,
    scale: float,
    taylor: bool,
    block: int = 64,
) -> torch.Tensor:
    """Output (B, H, N, D) float64 of attention that is exact on the key blocks of largest mean product: a baseline.

    Each block of queries sees the `num_blocks` blocks of keys whose mean has the largest product with its own mean.
    Without `taylor`, no other key has a weight: the sparse part of SLA (Zhang et al., 2025, arXiv 2509.24006). With it,
    PISA (Li et al., 2026, arXiv 2602.01077): the other keys have the weight of their block's mean, and one term of
    first order, which the normaliser does not see, is added for all of them: G s q.X / N, where G is their share of the
    weight and X the sum over all keys of (k - mean of its block) v^T.

    Args:
        query: (B, H, N, E).
        key: (B, H, N, E).
        value: (B, H, N, D).
        num_blocks: blocks of keys that are exact.
        scale: softmax scale s.
        taylor: whether the other blocks have a weight.
        block: tokens of a block.
    """
    query, key, value = (x.double() for x in (query, key, value))
    labels = torch.arange(key.shape[2], device=key.device) // block
    means = block_means(key, block)
    scores = block_means(query, block) @ means.transpose(-2, -1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(num_blocks).indices, True)
    support = chosen[..., labels, :][..., labels]  # [B, H, N, N]
    means = means[..., labels, :]
    mean_logits = scale * query @ means.transpose(-2, -1) if taylor else None
    out, weights = naive_support_attention(query, key, value, support.flatten(0, 1), scale, mean_logits)
    if not taylor:
        return out
    outside = weights.masked_fill(support, 0.0).sum(-1, keepdim=True)
    return out + outside * scale / len(labels) * (query @ ((key - means).transpose(-2, -1) @ value))
