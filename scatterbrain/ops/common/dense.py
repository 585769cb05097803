"""Dense float64 forms that the operators' specifications are written in. They define, they are not fast."""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.inputs import visible_keys


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


def naive_support_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    support: torch.Tensor,
    scale: float,
    low_rank_logits: torch.Tensor | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact weights on a sparse support, and outside it those of a low-rank part, or none.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        support: boolean (B * H or 1, T, S).
        scale: softmax scale s.
        low_rank_logits: logarithms of the low-rank weights (B, H, T, S).
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].

    Returns:
        Output (B, H, T, D) and weights (B, H, T, S), float64.
    """
    batch, heads = query.shape[:2]
    support = support.expand(batch * heads, -1, -1).unflatten(0, (batch, heads))
    visible = visible_keys(query, key, is_causal, key_lengths)
    logits = dense_logits(query, key, scale)
    if low_rank_logits is None:
        return dense_attention(logits, visible & support, value)
    return dense_attention(torch.where(support, logits, low_rank_logits), visible, value)


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
