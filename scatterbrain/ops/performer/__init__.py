"""Performer: attention with positive random features in place of the softmax kernel."""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.backends import PYTORCH_AND_TRITON, choose_backend
from scatterbrain.ops.common.inputs import (
    check_attn_mask,
    check_dropout,
    check_inputs,
    check_tensors,
    default_scale,
    empty_output,
    visible_keys,
    visible_rows,
)
from scatterbrain.ops.performer.linear import linear_performer_attention
from scatterbrain.ops.performer.naive import naive_performer_attention
from scatterbrain.ops.scatterbrain import triton as fused
from scatterbrain.ops.scatterbrain.blocked import blocked_attention

__all__ = ["naive_performer_attention", "performer_attention"]


def performer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Output (B, H, T, D) of attention with the weights `phi(q).phi(k) / (sum_j phi(q).phi(k_j) + eps)`.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projections (M, E), see `scatterbrain.draw_projection`.
        scale: softmax scale; None is E ** -0.5.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S) or (B, 1, 1, S), false for keys to hide anywhere in the sequence.
        dropout_p: probability of dropping a key's feature from the sum of the values (ignored by `naive`).
        eps: added to the normaliser, not with `is_causal`; 1e-8 in the Performer stages of the published T2T-ViT.
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.
        backend: `naive` (dense, float64), `torch` (linear in T and S), `triton` (fused CUDA kernels, see
            `scatterbrain.ops.scatterbrain.triton`), or `auto`: `triton` where it runs and is fast, else `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: shapes, dtypes or options that do not fit.
    """
    check_tensors(projection=projection)
    query, key, value, key_lengths = check_inputs(query, key, value, key_lengths, projection, enable_gqa, is_causal)
    attn_mask = check_attn_mask(attn_mask, query, key)
    check_dropout(dropout_p)
    scale = default_scale(query, scale)
    if eps < 0 or (eps > 0 and is_causal):
        raise UserError(f"eps={eps} has to be at least 0, and 0 with is_causal.")
    backend = choose_backend(
        backend,
        PYTORCH_AND_TRITON,
        unsupported=fused.unsupported(query, value, projection, dropout_p=dropout_p, attn_mask=attn_mask),
        prefer_kernels=fused.is_fast(query, value, projection),
    )
    if query.shape[0] == 0:
        return empty_output(query, key, value)
    if backend == "naive":
        masks = {"is_causal": is_causal, "key_lengths": key_lengths, "attn_mask": attn_mask}
        out, _ = naive_performer_attention(query, key, value, projection, scale, eps=eps, **masks)
        return out.to(query.dtype)
    # Scatterbrain with an empty window
    options = {"scale": scale, "projection": projection, "is_causal": is_causal, "key_lengths": key_lengths}
    if backend == "triton":
        return fused.attention(query, key, value, 0, eps=eps, **options)
    rows = visible_rows(query, key, value, scale, is_causal, key_lengths, attn_mask=attn_mask)
    if is_causal:
        out = blocked_attention(*rows.tensors(), 0, attn_mask=attn_mask, dropout_p=dropout_p, **options)
    else:
        mask = visible_keys(key_lengths, attn_mask, key.shape[2])
        out = linear_performer_attention(*rows.tensors(), projection, scale, mask, dropout_p, eps)
    return rows.mark(out)[0]
