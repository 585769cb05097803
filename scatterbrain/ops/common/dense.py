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


def dense_attention(
    logits: torch.Tensor, visible: torch.Tensor, value: torch.Tensor, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weights `A / (sum A + eps)` of attention with A = exp(logits) where visible and 0 elsewhere.

    Args:
        logits: (B, H, T, S) float64.
        visible: boolean mask that broadcasts to it.
        value: (B, H, S, D).
        eps: added to the normalisers.

    Returns:
        Output (B, H, T, D) and weights (B, H, T, S), float64; zero for a query that sees no key.
    """
    logits = logits.masked_fill(~visible, -math.inf)
    normaliser = logits.logsumexp(-1, keepdim=True)
    if eps > 0:
        normaliser = torch.logaddexp(normaliser, normaliser.new_tensor(math.log(eps)))
    blind = ~visible.any(-1, keepdim=True)
    weights = (logits - normaliser.masked_fill(blind, 0.0)).exp()
    return weights @ value.double(), weights
