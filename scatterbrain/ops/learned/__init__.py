"""Attention with learned features: exact softmax weights in a window, products of trained feature maps elsewhere."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.backends import choose_backend
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
from scatterbrain.ops.common.numerics import accumulation_dtype, no_autocast
from scatterbrain.ops.common.windows import window_bounds
from scatterbrain.ops.learned.naive import naive_learned_feature_attention
from scatterbrain.ops.performer.linear import linear_feature_attention
from scatterbrain.ops.scatterbrain.blocked import blocked_attention

__all__ = [
    "learned_feature_attention",
    "log_learned_features",
    "naive_learned_feature_attention",
    "random_feature_map",
]


class FeatureMap(NamedTuple):
    """Feature map phi(x)_m = exp(w_m.x + b_m - c |x|^2) of queries or keys, for each head or one for all of them.

    Attributes:
        weight: w, (H or 1, M, E).
        bias: b, (H or 1, M).
        norm: c, (H or 1,).
    """

    weight: torch.Tensor
    bias: torch.Tensor
    norm: torch.Tensor


def random_feature_map(projection: torch.Tensor, scale: float, cosh: bool, num_heads: int = 1) -> FeatureMap:
    """The map of positive random features, with which queries and keys estimate exp(s q.k) without bias.

    Args:
        projection: random projections (R, E).
        scale: softmax scale s.
        cosh: take each random projection with both signs: M = 2 R features, else M = R.
        num_heads: number of equal maps H.
    """
    rows = torch.cat([projection, -projection]) if cosh else projection
    bias = rows.new_full((num_heads, len(rows)), -math.log(len(rows)) / 2)
    return FeatureMap((math.sqrt(scale) * rows).repeat(num_heads, 1, 1), bias, rows.new_full((num_heads,), scale / 2))


def log_learned_features(x: torch.Tensor, feature_map: FeatureMap) -> torch.Tensor:
    """Logarithms (B, H, N, M) of the features of queries or keys, in the dtype of `x`.

    Args:
        x: queries or keys (B, H, N, E).
        feature_map: their feature map.
    """
    weight, bias, norm = (part.to(x.dtype) for part in feature_map)
    squares = x.square().sum(-1, keepdim=True)
    return x @ weight.transpose(-2, -1) + bias[:, None] - norm[:, None, None] * squares


def learned_feature_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_map: FeatureMap,
    key_map: FeatureMap,
    window: int = 0,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Output (B, H, T, D) of attention with weights exp(s q.k) in a local window and phi_q(q).phi_k(k) outside it.

    Both are normalised together: Scatterbrain (Chen et al., NeurIPS 2021, algorithm 1) with the trained feature maps of
    Hedgehog (Zhang et al., ICLR 2024) in place of random ones; Performer's linear attention without a window. The maps
    are trained by distillation, or with the network: gradients flow into their tensors.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        query_map: the feature map of the queries.
        key_map: that of the keys, with as many features.
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`; 0 for none.
        scale: softmax scale s of the window; None is E ** -0.5.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S) or (B, 1, 1, S), false for keys to hide anywhere in the sequence.
        dropout_p: probability of dropping a weight, or a key's feature where weights are not formed (ignored by
            `naive`).
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.
        backend: `naive` (dense, float64), `torch` (linear in T), or `auto`, which is `torch`: there are no kernels.

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
    window_bounds(window)  # refuses what is not a window
    _check_maps(query, query_map, key_map)
    scale = default_scale(query, scale)
    if choose_backend(backend) == "naive":
        masks = {"is_causal": is_causal, "key_lengths": key_lengths, "attn_mask": attn_mask}
        out, _ = naive_learned_feature_attention(query, key, value, query_map, key_map, window, scale, **masks)
        return out.to(query.dtype)
    if query.shape[0] == 0:
        return empty_output(query, key, value)
    dtype = query.dtype
    rows = visible_rows(query, key, value, scale, is_causal, key_lengths, attn_mask=attn_mask)
    with no_autocast(query):
        query, key, value = (x.to(accumulation_dtype(dtype)) for x in rows.tensors())
        logs = log_learned_features(query, query_map), log_learned_features(key, key_map)
        if window or is_causal:
            masks = {"is_causal": is_causal, "key_lengths": key_lengths, "attn_mask": attn_mask}
            options = {"scale": scale, "log_features": logs, "bounded": False, "dropout_p": dropout_p}
            out = blocked_attention(query, key, value, window, **options, **masks)
        else:
            mask = visible_keys(key_lengths, attn_mask, key.shape[2])
            out = linear_feature_attention(*logs, value, mask, dropout_p)
    return rows.mark(out.to(dtype))[0]


def _check_maps(query: torch.Tensor, query_map: FeatureMap, key_map: FeatureMap) -> None:
    """Check the shapes of both maps against queries (B, H, T, E).

    Raises:
        UserError: names the tensor, what it has to be and what it is.
    """
    heads, width = query.shape[1], query.shape[3]
    for name, (weight, bias, norm) in (("query_map", query_map), ("key_map", key_map)):
        check_tensors(**{f"{name}.weight": weight, f"{name}.bias": bias, f"{name}.norm": norm})
        shape = tuple(weight.shape)
        if weight.dim() != 3 or shape[0] not in (1, heads) or shape[1] < 1 or shape[2] != width:
            raise UserError(
                f"{name}.weight has to be ({heads} or 1, features, {width}), by the heads and the width of query, got "
                f"{shape}. Train the features for this layer."
            )
        if bias.shape != shape[:2] or norm.shape != shape[:1]:
            raise UserError(
                f"{name}.bias and {name}.norm have to be {shape[:2]} and {shape[:1]}, got {tuple(bias.shape)} and "
                f"{tuple(norm.shape)}."
            )
    if query_map.weight.shape != key_map.weight.shape:
        raise UserError(
            f"query_map.weight {tuple(query_map.weight.shape)} and key_map.weight {tuple(key_map.weight.shape)} have "
            "to be equal in shape: their features are multiplied one by one."
        )
