"""Scatterbrain: exact softmax weights on a sparse support, random-feature estimates elsewhere."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.backends import PYTORCH_AND_TRITON, choose_backend
from scatterbrain.ops.common.calls import run_again
from scatterbrain.ops.common.inputs import (
    check_attn_mask,
    check_dropout,
    check_inputs,
    check_tensors,
    check_window,
    default_scale,
    empty_output,
    visible_rows,
)
from scatterbrain.ops.scatterbrain import triton as fused
from scatterbrain.ops.scatterbrain.blocked import blocked_attention
from scatterbrain.ops.scatterbrain.naive import naive_scatterbrain_attention
from scatterbrain.ops.scatterbrain.triton.tiles import tiles_override

__all__ = ["naive_scatterbrain_attention", "scatterbrain_attention"]


def scatterbrain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
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
    """Output (B, H, T, D) of attention with weights exp(s q.k) in a local window and phi(q).phi(k) outside it.

    Both are normalised together: Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention", NeurIPS 2021,
    algorithm 1, with a local window as the sparse support and Performer's hyperbolic features as the low-rank part.
    `naive.py` is the specification, README.md in this folder says how it is computed.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projections (R, E), see `scatterbrain.draw_projection`; each is taken with both signs, so the
            number of features is M = 2 R.
        window: width W >= 1 of the window `-(W // 2) <= j - i < (W + 1) // 2`.
        scale: softmax scale s; None is E ** -0.5.
        is_causal: hide the keys j > i, inside and outside the window.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S) or (B, 1, 1, S), false for keys to hide anywhere in the sequence.
        dropout_p: probability of dropping a weight (ignored by `naive`), see
            `scatterbrain.ops.scatterbrain.blocked.blocked_attention`.
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.
        backend: `naive` (dense, float64), `torch` (by blocks, linear in T), `triton` (fused CUDA kernels, see
            `scatterbrain.ops.scatterbrain.triton`), or `auto`: `triton` where it runs and is fast, else `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: shapes, dtypes or options that do not fit; with `auto`, a long sequence on CUDA with more features
            than the kernels take, for which full attention is faster.
    """
    known_as = None
    given = query, key, value
    if key_lengths is None and attn_mask is None:
        options = window, scale, is_causal, dropout_p, enable_gqa, backend
        out, known_as = run_scatterbrain_again(*given, projection, *options)
        if out is not None:
            return out
    check_tensors(projection=projection)
    query, key, value, key_lengths = check_inputs(query, key, value, key_lengths, projection, enable_gqa, is_causal)
    attn_mask = check_attn_mask(attn_mask, query, key)
    check_window(window)
    check_dropout(dropout_p)
    scale = default_scale(query, scale)
    if backend == "auto":
        fused.check_speed(query, key, projection)
    backend = choose_backend(
        backend,
        PYTORCH_AND_TRITON,
        unsupported=fused.unsupported(query, value, projection, cosh=True, dropout_p=dropout_p, attn_mask=attn_mask),
        prefer_kernels=fused.is_fast(query, value, projection, cosh=True),
    )
    if query.shape[0] == 0:
        return empty_output(query, key, value)
    if backend == "naive":
        masks = {"is_causal": is_causal, "key_lengths": key_lengths, "attn_mask": attn_mask}
        out, _ = naive_scatterbrain_attention(query, key, value, projection, window, scale, **masks)
        return out.to(query.dtype)
    options = {
        "scale": scale,
        "projection": projection,
        "cosh": True,
        "is_causal": is_causal,
        "key_lengths": key_lengths,
    }
    if backend == "triton":
        out = fused.attention(query, key, value, window, **options)
        if known_as is not None and all(x is y for x, y in zip(given, (query, key, value), strict=True)):
            fused.remember(known_as, query, key, value, projection, window, scale, is_causal)
        return out
    rows = visible_rows(query, key, value, scale, is_causal, key_lengths, attn_mask=attn_mask)
    return rows.mark(blocked_attention(*rows.tensors(), window, attn_mask=attn_mask, dropout_p=dropout_p, **options))[0]


def run_scatterbrain_again(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    window: int,
    scale: float | None,
    is_causal: bool,
    dropout_p: float,
    enable_gqa: bool,
    backend: str,
    tokens_first: bool = False,
) -> tuple[torch.Tensor | None, tuple | None]:
    """Output of a call of `scatterbrain_attention` like one that has been checked, and its key; each may be None.

    Arguments as there; with `tokens_first` query, key, value and output are (B, N, H, width).
    """
    options = window, scale, is_causal, dropout_p, enable_gqa, backend
    tensors = query, key, value, projection
    return run_again(scatterbrain_attention, tensors, options, tiles_override(), tokens_first)
