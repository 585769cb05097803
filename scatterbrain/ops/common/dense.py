"""Dense float64 forms that the operators' specifications are written in. They define, they are not fast."""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.common.features import log_softmax_features


def dense_logits(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """`s q.k` in float64: (B, H, T, E) and (B, H, S, E) to (B, H, T, S)."""
    return scale * query.double() @ key.double().transpose(-2, -1)


def dense_low_rank_logits(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, scale: float, cosh: bool
) -> torch.Tensor:
    """`log(phi(q).phi(k))` in float64: (B, H, T, E) and (B, H, S, E) to (B, H, T, S)."""
    log_query = log_softmax_features(query.double(), projection.double(), scale, cosh)
    log_key = log_softmax_features(key.double(), projection.double(), scale, cosh)
    # a sum over features, one at a time: (B, H, T, S, M) would not fit
    logits = query.new_full((), -math.inf, dtype=torch.float64)
    for feature in range(log_query.shape[-1]):
        logits = torch.logaddexp(logits, log_query[..., feature, None] + log_key[..., None, :, feature])
    return logits


def dense_attention(
    logits: torch.Tensor, visible: torch.Tensor, value: torch.Tensor, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `A / (sum A + eps)` with A = exp(logits) where visible, 0 elsewhere, and their average of the values.

    Args:
        logits: (B, H, T, S) float64.
        visible: boolean mask that broadcasts to it.
        value: (B, H, S, D).
        eps: added to each normaliser.

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
