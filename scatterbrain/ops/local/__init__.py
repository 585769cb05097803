"""Local attention: softmax over a window of W keys around each query."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.backends import PYTORCH_AND_TRITON, choose_backend
from scatterbrain.ops.common.inputs import (
    check_attn_mask,
    check_dropout,
    check_inputs,
    check_window,
    default_scale,
    empty_output,
    visible_rows,
)
from scatterbrain.ops.local.naive import naive_local_attention
from scatterbrain.ops.scatterbrain import triton as fused
from scatterbrain.ops.scatterbrain.blocked import blocked_attention

__all__ = ["local_attention", "naive_local_attention"]


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Output (B, H, T, D) of softmax attention over the keys `-(W // 2) <= j - i < (W + 1) // 2`.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        window: width W >= 1 in keys.
        scale: softmax scale; None is E ** -0.5.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S) or (B, 1, 1, S), false for keys to hide anywhere in the sequence.
        dropout_p: probability of dropping a weight (ignored by `naive`).
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.
        backend: `naive` (dense, float64), `torch` (by blocks, linear in T), `triton` (fused CUDA kernels, see
            `scatterbrain.ops.scatterbrain.triton`), or `auto`: `triton` where it runs and is fast, else `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: shapes, dtypes or options that do not fit.
    """
    query, key, value, key_lengths = check_inputs(
        query, key, value, key_lengths, enable_gqa=enable_gqa, is_causal=is_causal
    )
    attn_mask = check_attn_mask(attn_mask, query, key)
    check_window(window)
    check_dropout(dropout_p)
    scale = default_scale(query, scale)
    backend = choose_backend(
        backend,
        PYTORCH_AND_TRITON,
        unsupported=fused.unsupported(query, value, dropout_p=dropout_p, attn_mask=attn_mask),
        prefer_kernels=fused.is_fast(query, value),
    )
    if query.shape[0] == 0:
        return empty_output(query, key, value)
    if backend == "naive":
        out, _ = naive_local_attention(query, key, value, window, scale, is_causal, key_lengths, attn_mask)
        return out.to(query.dtype)
    options = {"scale": scale, "is_causal": is_causal, "key_lengths": key_lengths}
    if backend == "triton":
        return fused.attention(query, key, value, window, **options)
    options["attn_mask"] = attn_mask
    rows = visible_rows(query, key, value, window=window, **options)
    return rows.mark(blocked_attention(*rows.tensors(), window, dropout_p=dropout_p, **options))[0]
