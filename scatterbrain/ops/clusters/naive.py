"""Specifications of landmark attention, dense and in float64, for clusters that are given."""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.clusters.kmeans import valid_points
from scatterbrain.ops.common.dense import dense_attention, dense_logits
from scatterbrain.ops.common.inputs import visible_keys
from scatterbrain.ops.common.windows import window_mask


def naive_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    window: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 form of `landmark_attention` for clusters (B, H, S) that are given.

    Returns:
        Output (B, H, T, D) and weights (B, H, T, S), float64.
    """
    key = key.double()
    means = torch.zeros_like(key)  # of the cluster of each key
    for cluster in range(int(assignment.max()) + 1):
        members = (assignment == cluster).unsqueeze(-1)
        mean = (key * members).sum(2, keepdim=True) / members.sum(2, keepdim=True).clamp_min(1)
        means = torch.where(members, mean, means)
    logits = torch.where(
        window_mask(query.shape[2], key.shape[2], window, query.device),
        dense_logits(query, key, scale),
        dense_logits(query, means, scale),
    )
    return dense_attention(logits, visible_keys(query, key, False, key_lengths), value)


def naive_paired_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_assignment: torch.Tensor,
    query_assignment: torch.Tensor,
    num_exact: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 form of `paired_landmark_attention` for clusters (B, H, S) and (B, H, T) that are given.

    Returns:
        Output (B, H, T, D) and weights (B, H, T, S), float64.
    """
    query, key = query.double(), key.double()
    visible = visible_keys(query, key, False, key_lengths)
    counted = valid_points(query, query_lengths)
    exact = dense_logits(query, key, scale)
    logits = torch.zeros_like(exact)
    for group in range(int(query_assignment.max()) + 1):
        members = (query_assignment == group) & counted
        mean = (query * members.unsqueeze(-1)).sum(2, keepdim=True) / members.sum(2)[..., None, None].clamp_min(1)
        seen = dense_logits(mean, key, scale).masked_fill(~visible[:, :, :1], -math.inf)  # (B, H, 1, S)
        chosen = torch.zeros_like(seen, dtype=torch.bool)
        if num_exact:
            chosen.scatter_(-1, seen.detach().topk(min(num_exact, key.shape[2])).indices, True)
        of_group = torch.where(chosen, exact, 0.0)
        for cluster in range(int(key_assignment.max()) + 1):
            keys = (key_assignment == cluster).unsqueeze(2) & ~chosen
            # a finite stand-in where a cluster has no key: nothing of it is used
            weights = seen.masked_fill(~keys, -1e300).softmax(-1)
            tilted = dense_logits(query - mean, weights @ key, scale) + seen
            of_group = torch.where(keys, tilted, of_group)
        logits = torch.where((query_assignment == group).unsqueeze(-1), of_group, logits)
    return dense_attention(logits, visible, value)
