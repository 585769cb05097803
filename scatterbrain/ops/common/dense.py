"""Dense float64 parts of attention, for specifications and for measuring errors; clear, not fast."""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.common.features import log_softmax_features


def dense_logits(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Logits s q.k (B, H, T, S) of queries (B, H, T, E) and keys (B, H, S, E), float64."""
    return scale * query.double() @ key.double().transpose(-2, -1)


def dense_low_rank_logits(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, scale: float, cosh: bool
) -> torch.Tensor:
    """Logarithms of phi(q).phi(k) (B, H, T, S) for queries (B, H, T, E) and keys (B, H, S, E), float64."""
    log_query = log_softmax_features(query.double(), projection.double(), scale, cosh)
    log_key = log_softmax_features(key.double(), projection.double(), scale, cosh)
    # one feature at a time: (B, H, T, S, M) would not fit
    logits = query.new_full((), -math.inf, dtype=torch.float64)
    for feature in range(log_query.shape[-1]):
        logits = torch.logaddexp(logits, log_query[..., feature, None] + log_key[..., None, :, feature])
    return logits
