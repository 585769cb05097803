"""Causal landmark attention: the function that checks its arguments and chooses the implementation."""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError, check_switch, check_value_weight, check_whole_number
from scatterbrain.ops.clusters.causal import triton as fused
from scatterbrain.ops.clusters.causal.blocked import blocked_causal_landmark_attention
from scatterbrain.ops.clusters.causal.levels import causal_clusters, exact_chunks
from scatterbrain.ops.clusters.causal.naive import naive_causal_landmark_attention
from scatterbrain.ops.clusters.triton import is_fast
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
from scatterbrain.ops.common.numerics import accumulation_dtype

# Keys of a chunk: short ones keep landmarks of few keys near, and long ones make larger products.
CHUNK = 64


def causal_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int = 0,
    *,
    chunk: int = CHUNK,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    num_steps: int = 1,
    value_weight: float = 0.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) of causal attention that is exact near the query and takes landmarks of earlier chunks.

    A query sees the keys j <= i of its own chunk and of the chunks that a window reaches exactly, and the means of
    clusters of the keys before. README.md in this folder states the maths.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: landmarks M of a node; a query sees one or two nodes of each of log2(S / C) levels.
        window: width W of the window `-(W // 2) <= j - i <= 0`, at least; 0 for the query's own chunk alone.
        chunk: keys C of a chunk.
        scale: softmax scale s; None is E ** -0.5.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S) or (B, 1, 1, S), false for keys to hide anywhere in the sequence.
        num_steps: iterations of Lloyd's algorithm.
        value_weight: weight lambda of the values in the clustering of keys, where the keys and values of a node have
            the same variance, up to 1e6; 0 clusters the keys alone.
        dropout_p: probability of dropping a weight (ignored by `naive`); that of a landmark for a query is dropped for
            all of its keys.
        return_lse: also return the logarithms of the normaliser.
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.
        backend: `naive` (dense, float64), `torch` (by blocks, in time T (W + M log T)), `triton` (fused CUDA kernels,
            see `scatterbrain.ops.clusters.causal.triton`), or `auto`: `triton` where it runs and is fast, else `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key. With `return_lse` also the natural
        logarithms (B, H, T) of the sums of the weights, differentiable, in float32, or float64 for float64 inputs; -inf
        for a query that sees no key.

    Raises:
        UserError: shapes, dtypes or options that do not fit.
    """
    options = num_landmarks, window, chunk, scale, key_lengths, attn_mask, num_steps, value_weight, dropout_p
    return attend_and_remember(None, query, key, value, *options, return_lse, enable_gqa, backend)


def attend_and_remember(
    known_as: tuple | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    chunk: int,
    scale: float | None,
    key_lengths: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    num_steps: int,
    value_weight: float,
    dropout_p: float,
    return_lse: bool,
    enable_gqa: bool,
    backend: str,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Results of `causal_landmark_attention`, whose arguments these are.

    With a key `known_as` in `CALLS`, of a call without masks and `return_lse`, later calls that are like this one run
    the kernels at once where these ran it.
    """
    given = query, key, value
    query, key, value, key_lengths, repeats = _check_groups(query, key, value, key_lengths, enable_gqa)
    attn_mask = check_attn_mask(attn_mask, query, key)
    check_dropout(dropout_p)
    check_causal_sizes(num_landmarks, window, chunk, num_steps)
    check_value_weight(value_weight)
    scale = default_scale(query, scale)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    reason = fused.unsupported(query, value, num_landmarks, chunk, dropout_p, return_lse and needs_grad, attn_mask)
    backend = choose_backend(backend, PYTORCH_AND_TRITON, unsupported=reason, prefer_kernels=is_fast(query))
    if query.shape[0] == 0:
        out = empty_output(query, *(x.repeat_interleave(repeats, 1) for x in (key, value)))
        return (out, out.sum(-1).to(accumulation_dtype(query.dtype))) if return_lse else out
    if backend == "triton":  # the kernels keep away from what is hidden themselves
        options = {"scale": scale, "num_steps": num_steps, "value_weight": value_weight}
        options |= {"key_lengths": key_lengths, "return_lse": return_lse}
        out, lse = fused.attention(query, key, value, num_landmarks, window, chunk, **options)
        is_given = all(x is y for x, y in zip(given, (query, key, value), strict=True))
        if known_as is not None and is_given:
            fused.remember(known_as, *given, num_landmarks, window, chunk, scale, num_steps, value_weight)
        return (out, lse) if return_lse else out
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    masks = {"key_lengths": key_lengths, "attn_mask": attn_mask}
    rows = visible_rows(query, key, value, scale, True, **masks)
    if backend == "naive":
        options = {"num_queries": query.shape[2], "num_steps": num_steps}
        options |= {"value": rows.value[:, ::repeats], "value_weight": value_weight}
        clusters = causal_clusters(rows.key[:, ::repeats], num_landmarks, window, chunk, **options, **masks)
        clusters = clusters.repeat_interleave(repeats, 2)
        out, _, lse = naive_causal_landmark_attention(query, key, value, clusters, window, chunk, scale, **masks)
        out, lse = out.to(query.dtype), lse.to(accumulation_dtype(query.dtype))
    else:
        options = {"scale": scale, "num_steps": num_steps, "value_weight": value_weight}
        options |= {"dropout_p": dropout_p, "with_lse": return_lse}
        mask = visible_keys(key_lengths, attn_mask, key.shape[2])
        out, lse = blocked_causal_landmark_attention(
            *(rows.query, rows.key[:, ::repeats], rows.value[:, ::repeats]),
            *(num_landmarks, window, chunk),
            key_mask=mask,
            **options,
        )
        (out,) = rows.mark(out)
        if return_lse:
            lse = rows.mark(lse.unsqueeze(-1))[0].squeeze(-1)
    return (out, lse) if return_lse else out


def _check_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    enable_gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
    """Results of `check_inputs` with Hkv heads of keys and values as they are, and the heads of queries for each."""
    check_tensors(query=query, key=key, value=value)
    check_switch("enable_gqa", enable_gqa)
    heads, of_keys = (x.shape[1] if x.dim() == 4 else 0 for x in (query, key))
    if not (enable_gqa and 0 < of_keys < heads and heads % of_keys == 0):
        return *check_inputs(query, key, value, key_lengths, enable_gqa=enable_gqa), 1
    some, key, value, key_lengths = check_inputs(query[:, :of_keys], key, value, key_lengths)
    return query.to(some.dtype), key, value, key_lengths, heads // of_keys


def check_causal_sizes(num_landmarks: int, window: int, chunk: int, num_steps: int) -> None:
    """Check the sizes of causal landmark attention.

    Raises:
        UserError: one is out of range, or there are more landmarks than keys in a chunk.
    """
    check_whole_number("num_landmarks", num_landmarks, 1)
    check_whole_number("chunk", chunk, 1)
    check_whole_number("num_steps", num_steps, 0)
    exact_chunks(window, chunk)
    if num_landmarks > chunk:
        raise UserError(
            f"num_landmarks={num_landmarks} is more than the {chunk} keys of a chunk. Causal landmark attention has "
            "landmarks for each chunk: choose fewer, or a larger chunk."
        )
