"""Specification of Performer attention, dense and in float64.

    A(i, j) = phi(q_i).phi(k_j),   phi(x)_m = exp(sqrt(s) w_m.x - s |x|^2 / 2) / sqrt(M)
    out_i   = sum_j A(i, j) v_j / (sum_j A(i, j) + eps)

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021.
"""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.common.inputs import visible_rows


def naive_performer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    eps: float = 0.0,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and attention weights (B, H, T, S) of Performer attention, both float64.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projections (M, E).
        scale: softmax scale s.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
        eps: added to the normaliser.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.
    """
    query, key, value, projection = (x.double() for x in (query, key, value, projection))
    rows = visible_rows(query, key, value, scale, is_causal, key_lengths, attn_mask=attn_mask)
    query, key, value, _ = rows  # hidden rows are zero: 0 * nan is nan
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    visible = (j <= i) if is_causal else torch.ones(len(i), len(j), dtype=torch.bool, device=query.device)  # [T, S]
    if key_lengths is not None:
        visible = visible & (j < key_lengths.view(-1, 1, 1, 1))  # [B, 1, T, S]
    if attn_mask is not None:
        visible = visible & attn_mask[:, None, None, :]  # [B, 1, T, S]

    # the logarithm of phi: features span hundreds of decades
    scaled = math.sqrt(scale) * projection
    log_query, log_key = (  # [B, H, T, M] and [B, H, S, M]
        x @ scaled.T - scale / 2 * x.square().sum(-1, keepdim=True) - math.log(len(scaled)) / 2 for x in (query, key)
    )
    logits = torch.full_like(query[..., :1], -math.inf)  # log(phi(q).phi(k)), [B, H, T, S] from the first sum on
    for m in range(len(scaled)):
        logits = torch.logaddexp(logits, log_query[..., m, None] + log_key[..., None, :, m])

    logits = logits.masked_fill(~visible, -math.inf)
    normaliser = torch.logaddexp(logits.logsumexp(-1, keepdim=True), logits.new_tensor(eps).log())
    weights = (logits - normaliser).exp().masked_fill(~visible, 0.0)  # zero, not nan, for a query that sees no key
    return rows.mark(weights @ value, weights)
