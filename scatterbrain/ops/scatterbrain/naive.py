"""Specification of Scatterbrain attention with a local window: all of its maths, dense and in float64.

    A(i, j) = exp(s q_i.k_j)          inside the window of W keys
              phi(q_i).phi(k_j)       outside it, with M = 2 R positive random features
    out_i   = sum_j A(i, j) v_j / sum_j A(i, j)

Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention", NeurIPS 2021, algorithm 1.
"""

from __future__ import annotations

import math

import torch

from scatterbrain.ops.common.inputs import visible_rows


def naive_scatterbrain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    window: int,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and attention weights (B, H, T, S) of Scatterbrain attention, both float64.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projections (R, E).
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`.
        scale: softmax scale s.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.
    """
    query, key, value, projection = (x.double() for x in (query, key, value, projection))
    rows = visible_rows(query, key, value, scale, is_causal, key_lengths, attn_mask=attn_mask)
    query, key, value, _ = rows  # hidden rows are zero: 0 * nan is nan
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    in_window = (-(window // 2) <= j - i) & (j - i < (window + 1) // 2)  # [T, S]
    visible = (j <= i) if is_causal else torch.ones_like(in_window)
    if key_lengths is not None:
        visible = visible & (j < key_lengths.view(-1, 1, 1, 1))  # [B, 1, T, S]
    if attn_mask is not None:
        visible = visible & attn_mask[:, None, None, :]  # [B, 1, T, S]

    # phi(x) = exp(+-sqrt(s) w.x - s |x|^2 / 2) / sqrt(M), here its logarithm: features span hundreds of decades
    signed = math.sqrt(scale) * torch.cat([projection, -projection])  # [M, E]
    log_query, log_key = (  # [B, H, T, M] and [B, H, S, M]
        x @ signed.T - scale / 2 * x.square().sum(-1, keepdim=True) - math.log(len(signed)) / 2 for x in (query, key)
    )
    low_rank = torch.full_like(query[..., :1], -math.inf)  # log(phi(q).phi(k)), [B, H, T, S] from the first sum on
    for m in range(len(signed)):
        low_rank = torch.logaddexp(low_rank, log_query[..., m, None] + log_key[..., None, :, m])
    exact = scale * query @ key.transpose(-2, -1)  # log(exp(s q.k)), [B, H, T, S]

    logits = torch.where(in_window, exact, low_rank).masked_fill(~visible, -math.inf)
    weights = logits.softmax(-1).masked_fill(~visible, 0.0)  # zero, not nan, for a query that sees no key
    return rows.mark(weights @ value, weights)
