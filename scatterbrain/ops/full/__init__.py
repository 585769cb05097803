"""Full attention: softmax over all keys, `softmax(s Q K^T) V`."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.backends import choose_backend
from scatterbrain.ops.common.inputs import (
    check_attn_mask,
    check_dropout,
    check_inputs,
    default_scale,
    empty_output,
    visible_rows,
)
from scatterbrain.ops.full.naive import naive_full_attention
from scatterbrain.ops.full.sdpa import sdpa_full_attention

__all__ = ["full_attention", "naive_full_attention"]


def full_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Output (B, H, T, D) of softmax attention over all keys.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        scale: softmax scale; None is E ** -0.5.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S) or (B, 1, 1, S), false for keys to hide anywhere in the sequence.
        dropout_p: probability of dropping a weight (ignored by `naive`).
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.
        backend: `naive` (dense, float64), `torch` (scaled_dot_product_attention), or `auto`, which is `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: shapes, dtypes or options that do not fit.
    """
    query, key, value, key_lengths = check_inputs(
        query, key, value, key_lengths, enable_gqa=enable_gqa, is_causal=is_causal
    )
    attn_mask = check_attn_mask(attn_mask, query, key)
    check_dropout(dropout_p)
    scale = default_scale(query, scale)
    backend = choose_backend(backend)
    if query.shape[0] == 0:
        return empty_output(query, key, value)
    if backend == "naive":
        return naive_full_attention(query, key, value, scale, is_causal, key_lengths, attn_mask)[0].to(query.dtype)
    rows = visible_rows(query, key, value, scale, is_causal, key_lengths, attn_mask=attn_mask)
    return rows.mark(sdpa_full_attention(*rows.tensors(), scale, is_causal, key_lengths, attn_mask, dropout_p))[0]
