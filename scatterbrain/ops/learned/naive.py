"""Specification of attention with learned features, dense and in float64.

    A(i, j) = exp(s q_i.k_j)          inside the window of W keys
              phi_q(q_i).phi_k(k_j)   outside it;   phi(x)_m = exp(w_m.x + b_m - c |x|^2)
    out_i   = sum_j A(i, j) v_j / sum_j A(i, j)

Chen et al., "Scatterbrain", NeurIPS 2021, algorithm 1, with the feature maps of Zhang et al., "The Hedgehog & the
Porcupine", ICLR 2024 (arXiv 2402.04347), and a term in |x|^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from scatterbrain.ops.common.inputs import visible_rows


def naive_learned_feature_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_map: Sequence[torch.Tensor],
    key_map: Sequence[torch.Tensor],
    window: int,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and attention weights (B, H, T, S) of attention with learned features, both float64.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        query_map: w (H or 1, M, E), b (H or 1, M) and c (H or 1,) of the queries.
        key_map: those of the keys.
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`; 0 for none.
        scale: softmax scale s.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b]. None hides none.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.
    """
    query, key, value = (x.double() for x in (query, key, value))
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

    # the logarithm of phi, [B, H, T, M] and [B, H, S, M]
    log_query, log_key = (
        x @ w.double().transpose(-2, -1) + b.double()[:, None] - c.double()[:, None, None] * (x * x).sum(-1, True)
        for x, (w, b, c) in ((query, query_map), (key, key_map))
    )
    low_rank = torch.full_like(query[..., :1], -math.inf)  # log(phi(q).phi(k)), [B, H, T, S] from the first sum on
    for m in range(log_query.shape[-1]):
        low_rank = torch.logaddexp(low_rank, log_query[..., m, None] + log_key[..., None, :, m])
    exact = scale * query @ key.transpose(-2, -1)  # log(exp(s q.k)), [B, H, T, S]

    logits = torch.where(in_window, exact, low_rank).masked_fill(~visible, -math.inf)
    weights = logits.softmax(-1).masked_fill(~visible, 0.0)  # zero, not nan, for a query that sees no key
    return rows.mark(weights @ value, weights)
