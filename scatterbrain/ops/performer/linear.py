"""Performer attention in linear time: `phi(Q) (phi(K)^T V)`, in log space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.numerics import FLOOR, accumulation_dtype, no_autocast


def linear_performer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 0.0,
) -> torch.Tensor:
    """Output (B, H, T, D) of Performer attention in O((T + S) M); arguments as in `performer_attention`.

    `key_mask` is boolean (B, S), true for visible keys, or None for all.
    """
    with no_autocast(query):
        dtype = query.dtype
        query, key, value = (x.to(accumulation_dtype(dtype)) for x in (query, key, value))
        log_key = log_softmax_features(key, projection, scale, cosh=False)
        log_query = log_softmax_features(query, projection, scale, cosh=False)
        return linear_feature_attention(log_query, log_key, value, key_mask, dropout_p, eps).to(dtype)


def linear_feature_attention(
    log_query: torch.Tensor,
    log_key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 0.0,
) -> torch.Tensor:
    """Output (B, H, T, D) of linear attention with positive features, given as logarithms, of any size.

    `log_query` is (B, H, T, M) and `log_key` (B, H, S, M), of one dtype with `value` (B, H, S, D); the other arguments
    are those of `linear_performer_attention`.

    Each feature of the keys is divided by its maximum over the keys, and the same feature of the queries multiplied by
    it. Each feature's sum then lies between 1 and S, and the largest product of a query is 1: nothing overflows, and
    only negligible weights underflow.
    """
    if key_mask is not None:
        log_key = log_key.masked_fill(~key_mask[:, None, :, None], -math.inf)
    key_max = log_key.detach().amax(2, keepdim=True).clamp_min(FLOOR)
    key_features = (log_key - key_max).exp()
    log_query = log_query + key_max
    query_max = log_query.detach().amax(-1, keepdim=True)
    query_features = (log_query - query_max).exp()

    normaliser = query_features @ key_features.sum(2).unsqueeze(-1)
    if eps > 0:
        # relative to the same maxima; inf where eps outweighs every key, and the output is then 0
        normaliser = normaliser + eps * (-query_max).exp()
    if key_mask is not None:
        # 0 / 1 in place of 0 / 0 for a sample without keys: zero, and so are the gradients
        normaliser = normaliser.masked_fill(~key_mask.any(1)[:, None, None, None], 1.0)
    if dropout_p > 0:
        key_features = F.dropout(key_features, dropout_p)
    return query_features @ (key_features.transpose(-2, -1) @ value) / normaliser
