"""Specification of adaptive attention for given clusters and supports, dense and in float64; see README.md."""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.common.inputs import visible_rows
from scatterbrain.ops.common.windows import window_mask


def naive_adaptive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_assignment: torch.Tensor,
    query_assignment: torch.Tensor,
    taken: torch.Tensor,
    window: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and attention weights (B, H, T, S) of adaptive attention, both float64.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        key_assignment: cluster of each key (B, H, S), -1 for none.
        query_assignment: cluster of each query (B, H, T).
        taken: boolean (B, H, Q, M), the key clusters that a query cluster weights exactly.
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`; 0 for none.
        scale: softmax scale s.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
    """
    query, key, value = (x.double() for x in (query, key, value))
    rows = visible_rows(query, key, value, scale, key_lengths=key_lengths)
    query, key, value, _ = rows  # hidden rows are zero: 0 * nan is nan
    visible = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    if key_lengths is not None:
        visible = torch.arange(key.shape[2], device=key.device) < key_lengths.view(-1, 1, 1, 1)  # [B, 1, 1, S]

    centroids = torch.zeros_like(key)  # c_b(j) of every key j
    for cluster in range(taken.shape[3]):
        members = (key_assignment == cluster).unsqueeze(-1)  # [B, H, S, 1]
        mean = (key * members).sum(2, keepdim=True) / members.sum(2, keepdim=True).clamp_min(1)
        centroids = torch.where(members, mean, centroids)
    exact = scale * query @ key.transpose(-2, -1)
    low_rank = scale * query @ centroids.transpose(-2, -1)
    is_exact = exact_pairs(key_assignment, query_assignment, taken, window)
    logits = torch.where(is_exact, exact, low_rank).masked_fill(~visible, -math.inf)
    weights = logits.softmax(-1).masked_fill(~visible, 0.0)  # zero, not nan, for a query that sees no key
    return rows.mark(weights @ value, weights)


def exact_pairs(
    key_assignment: torch.Tensor, query_assignment: torch.Tensor, taken: torch.Tensor, window: int
) -> torch.Tensor:
    """Boolean (B, H, T, S), true for the pairs with exact weights: those of the window and of clusters taken.

    Args:
        key_assignment: cluster of each key (B, H, S), -1 for none.
        query_assignment: cluster of each query (B, H, T).
        taken: boolean (B, H, Q, M).
        window: width W of the window; 0 for none.
    """
    num_queries, num_keys = query_assignment.shape[2], key_assignment.shape[2]
    of_query = taken.gather(2, query_assignment.unsqueeze(-1).expand(-1, -1, -1, taken.shape[3]))  # [B, H, T, M]
    of_key = key_assignment.clamp_min(0).unsqueeze(2).expand(-1, -1, num_queries, -1)
    by_content = of_query.gather(3, of_key) & (key_assignment >= 0).unsqueeze(2)
    return by_content | window_mask(num_queries, num_keys, window, key_assignment.device)
