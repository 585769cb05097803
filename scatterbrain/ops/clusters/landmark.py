"""Landmark attention: exact weights in a local window, the means of key clusters outside it."""

from __future__ import annotations

import math

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.clusters.blocked import blocked_landmark_attention
from scatterbrain.ops.clusters.kmeans import assign_key_clusters, cluster_means
from scatterbrain.ops.clusters.naive import naive_landmark_attention
from scatterbrain.ops.common.backends import choose_backend
from scatterbrain.ops.common.inputs import check_dropout, check_inputs, default_scale, empty_output, visible_rows
from scatterbrain.ops.common.numerics import accumulation_dtype, at_most
from scatterbrain.ops.common.windows import window_bounds


def landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int = 0,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    num_steps: int = 1,
    value_weight: float = 0.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Output (B, H, T, D) of attention with weights exp(s q.k) in a local window and exp(s q.c_b) outside it.

    c_b is the mean of the cluster b of the key; README.md in this folder states the maths.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M.
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`; 0 for none.
        scale: softmax scale s; None is E ** -0.5.
        is_causal: has to be false.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        num_steps: iterations of Lloyd's algorithm, see `assign_clusters`.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`.
        dropout_p: probability of dropping a weight (ignored by `naive`); that of a landmark for a query is dropped for
            all of its keys.
        backend: `naive` (dense, float64), `torch` (by blocks, linear in T) or `auto`, which is `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: causal, or shapes, dtypes or options that do not fit.
    """
    query, key, value, key_lengths = check_inputs(query, key, value, key_lengths)
    check_dropout(dropout_p)
    window_bounds(window)
    refuse_causal(is_causal)
    scale = default_scale(query, scale)
    backend = choose_backend(backend)
    if query.shape[0] == 0:
        return empty_output(query, key, value)
    assignment = assign_key_clusters(key, value, num_landmarks, num_steps, key_lengths, value_weight)
    num_landmarks = at_most(num_landmarks, key.shape[2])
    if backend == "naive":
        return naive_landmark_attention(query, key, value, assignment, window, scale, key_lengths)[0].to(query.dtype)
    rows = visible_rows(query, key, value, scale, key_lengths=key_lengths)
    out, _ = blocked_landmark_attention(
        *rows[:3], assignment, num_landmarks, window, scale=scale, key_lengths=key_lengths, dropout_p=dropout_p
    )
    return rows.mark(out)[0]


def log_landmark_features(
    query: torch.Tensor, key: torch.Tensor, assignment: torch.Tensor, num_clusters: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of the features phi(q)_b = exp(s q.c_b) of queries and phi(k_j) = one-hot of b(j) of keys.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        assignment: clusters of the keys (B, H, S), -1 for none.
        num_clusters: number of clusters M.
        scale: softmax scale s.

    Returns:
        (B, H, T, M), differentiable in query and key, and (B, H, S, M), 0 for the cluster of a key and -inf elsewhere.
        In float32, or float64 for float64 inputs.
    """
    dtype = accumulation_dtype(query.dtype)
    log_key = query.new_full((*assignment.shape, num_clusters), -math.inf, dtype=dtype)
    log_key.masked_fill_(assignment.unsqueeze(-1) == torch.arange(num_clusters, device=key.device), 0.0)
    means = cluster_means(key.to(dtype), assignment, num_clusters)
    return query.to(dtype) @ (means * scale).transpose(-2, -1), log_key


def refuse_causal(is_causal: bool) -> None:
    """Check that landmark attention is not causal: its landmarks are means over all keys.

    Raises:
        UserError: it is.
    """
    if is_causal:
        raise UserError(
            "Landmark attention cannot be causal: landmarks are means over all keys, so later keys would influence "
            "earlier queries. Choose a local window or random features (local, performer, sblocal)."
        )
