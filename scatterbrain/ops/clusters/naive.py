"""Specifications of landmark attention for given clusters, dense and in float64; README.md states the maths."""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.common.inputs import visible_rows


def naive_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    window: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and attention weights (B, H, T, S) of landmark attention, both float64.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        assignment: cluster of each key (B, H, S), -1 for none.
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`; 0 for none.
        scale: softmax scale s.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.
    """
    query, key, value = (x.double() for x in (query, key, value))
    rows = visible_rows(query, key, value, scale, key_lengths=key_lengths, attn_mask=attn_mask)
    logits = _landmark_logits(rows.query, rows.key, assignment, window, scale)
    return rows.mark(*_attend(logits, rows.value, _visible(key, key_lengths, attn_mask)))


def naive_landmark_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    assignment: torch.Tensor,
    window: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logarithms (B, H, T) of the sums of the weights of landmark attention, float64; -inf where no key is visible.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        assignment: cluster of each key (B, H, S), -1 for none.
        window: width W of the window, see `naive_landmark_attention`; 0 for none.
        scale: softmax scale s.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.
    """
    query, key = query.double(), key.double()
    rows = visible_rows(query, key, key, scale, key_lengths=key_lengths, attn_mask=attn_mask)
    visible = _visible(key, key_lengths, attn_mask)
    blind = ~visible.any(-1, keepdim=True)
    logits = _landmark_logits(rows.query, rows.key, assignment, window, scale).masked_fill(~visible, -math.inf)
    # the gradient of a sum over nothing would be nan
    lse = logits.masked_fill(blind, 0.0).logsumexp(-1, keepdim=True).masked_fill(blind, -math.inf)
    return rows.mark(lse)[0].squeeze(-1)


def _landmark_logits(
    query: torch.Tensor, key: torch.Tensor, assignment: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """Logarithms (B, H, T, S) of the weights A(i, j); hidden rows are zero: 0 * nan is nan."""
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    in_window = (-(window // 2) <= j - i) & (j - i < (window + 1) // 2)  # [T, S]
    centroids = torch.zeros_like(key)  # c_b(j) of every key j
    for cluster in range(int(assignment.max()) + 1):
        members = (assignment == cluster).unsqueeze(-1)  # [B, H, S, 1]
        mean = (key * members).sum(2, keepdim=True) / members.sum(2, keepdim=True).clamp_min(1)
        centroids = torch.where(members, mean, centroids)
    exact = scale * query @ key.transpose(-2, -1)
    low_rank = scale * query @ centroids.transpose(-2, -1)
    return torch.where(in_window, exact, low_rank)


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
    attn_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and attention weights (B, H, T, S) of paired landmark attention, both float64.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        key_assignment: cluster of each key (B, H, S), -1 for none.
        query_assignment: cluster of each query (B, H, T).
        num_exact: number of keys W, those of the largest p_a.k, that each query cluster weights exactly.
        scale: softmax scale s.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
        query_lengths: (B,) integers; queries i >= query_lengths[b] do not enter the means p_a. None for all.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.
        query_mask: boolean (B, T); nor do queries where it is false. None for all.
    """
    query, key, value = (x.double() for x in (query, key, value))
    rows = visible_rows(query, key, value, scale, key_lengths=key_lengths, attn_mask=attn_mask)
    query, key, value, _ = rows  # hidden rows are zero: 0 * nan is nan
    visible = _visible(key, key_lengths, attn_mask)  # [B or 1, 1, 1, S]
    counted = _visible(query, query_lengths, query_mask).squeeze(2)  # [B or 1, 1, T]
    exact = scale * query @ key.transpose(-2, -1)
    logits = torch.zeros_like(exact)
    for a in range(int(query_assignment.max()) + 1):
        members = ((query_assignment == a) & counted).unsqueeze(-1)  # [B, H, T, 1]
        p = (query * members).sum(2, keepdim=True) / members.sum(2, keepdim=True).clamp_min(1)  # [B, H, 1, E]
        p_logits = (scale * p @ key.transpose(-2, -1)).masked_fill(~visible, -math.inf)  # s p_a.k_j, [B, H, 1, S]
        is_exact = torch.zeros_like(p_logits, dtype=torch.bool)
        if num_exact:
            is_exact.scatter_(-1, p_logits.detach().topk(min(num_exact, key.shape[2])).indices, True)
        of_cluster = torch.where(is_exact, exact, 0.0)
        for b in range(int(key_assignment.max()) + 1):
            keys = (key_assignment == b).unsqueeze(2) & ~is_exact  # [B, H, 1, S]
            # c_ab; a finite stand-in for -inf, since a cluster may have no key: its mean is then not used
            c = p_logits.masked_fill(~keys, -1e300).softmax(-1) @ key  # [B, H, 1, E]
            of_cluster = torch.where(keys, p_logits + scale * (query - p) @ c.transpose(-2, -1), of_cluster)
        logits = torch.where((query_assignment == a).unsqueeze(-1), of_cluster, logits)
    return rows.mark(*_attend(logits, value, visible))


def _visible(x: torch.Tensor, lengths: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
    """Boolean (B or 1, 1, 1, N), true for the tokens of x (B, H, N, E) that lengths (B,) and mask (B, N) show."""
    n = torch.arange(x.shape[2], device=x.device).view(1, 1, 1, -1)
    visible = torch.ones_like(n, dtype=torch.bool) if lengths is None else n < lengths.view(-1, 1, 1, 1)
    return visible if mask is None else visible & mask[:, None, None]


def _attend(logits: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weights of the softmax over visible keys; zero, not nan, for a query that sees none."""
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1).masked_fill(~visible, 0.0)
    return weights @ value, weights
