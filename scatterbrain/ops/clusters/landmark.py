"""Landmark attention: exact weights in a local window, the means of key clusters outside it."""

from __future__ import annotations

import math

import torch

from scatterbrain.errors import UserError, check_switch, check_whole_number
from scatterbrain.ops.clusters import triton as fused
from scatterbrain.ops.clusters.blocked import blocked_landmark_attention
from scatterbrain.ops.clusters.causal.attention import CHUNK, attend_and_remember
from scatterbrain.ops.clusters.kmeans import assign_key_clusters, check_steps, cluster_means, valid_points
from scatterbrain.ops.clusters.naive import naive_landmark_attention, naive_landmark_lse
from scatterbrain.ops.clusters.triton.tiles import tiles_override
from scatterbrain.ops.common.backends import PYTORCH_AND_TRITON, choose_backend
from scatterbrain.ops.common.calls import run_again
from scatterbrain.ops.common.inputs import (
    VisibleRows,
    check_attn_mask,
    check_dropout,
    check_inputs,
    check_tensors,
    default_scale,
    empty_output,
    visible_keys,
    visible_rows,
)
from scatterbrain.ops.common.numerics import accumulation_dtype, at_most, is_exporting
from scatterbrain.ops.common.windows import window_bounds


def landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int = 0,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    num_steps: int = 1,
    value_weight: float = 0.0,
    assignment: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) of attention with weights exp(s q.k) in a local window and exp(s q.c_b) outside it.

    c_b is the mean of the cluster b of the key; README.md in this folder states the maths.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M; with `is_causal` of each node.
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`; 0 for none.
        scale: softmax scale s; None is E ** -0.5.
        is_causal: hide the keys j > i: `scatterbrain.ops.clusters.causal.causal_landmark_attention`, which takes no
            `assignment`.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S) or (B, 1, 1, S), false for keys to hide anywhere in the sequence.
        num_steps: iterations of Lloyd's algorithm, see `assign_clusters`.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`; with `is_causal`
            variances are those of a node.
        assignment: cluster of each key (B, H, S) int64 in [0, M), such as a result of `assign_key_clusters` that is
            reused over layers, steps of a sampler or random seeds; `num_steps` and `value_weight` are not used then.
            Those of hidden keys may be any. With `enable_gqa` it is (B, Hkv, S), as the keys. The range is checked on
            the CPU only: the check would synchronise a GPU. None computes the clusters.
        dropout_p: probability of dropping a weight (ignored by `naive`); that of a landmark for a query is dropped for
            all of its keys.
        return_lse: also return the logarithms of the normaliser.
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.
        backend: `naive` (dense, float64), `torch` (by blocks, linear in T), `triton` (fused CUDA kernels, see
            `scatterbrain.ops.clusters.triton`), or `auto`: `triton` where it runs and is fast, else `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key. With `return_lse` also the natural
        logarithms (B, H, T) of the sums of the weights, differentiable, in float32, or float64 for float64 inputs; -inf
        for a query that sees no key.

    Raises:
        UserError: shapes, dtypes or options that do not fit.
    """
    known_as = None
    given = query, key, value
    if key_lengths is None and attn_mask is None and assignment is None and return_lse is False:
        options = num_landmarks, window, scale, is_causal, num_steps, value_weight, dropout_p, enable_gqa, backend
        out, known_as = run_landmarks_again(*given, *options)
        if out is not None:
            return out
    check_switch("is_causal", is_causal)
    if is_causal:
        if assignment is not None:
            raise UserError("Causal landmark attention clusters the keys of each chunk itself: leave out assignment.")
        options = num_landmarks, window, CHUNK, scale, key_lengths, attn_mask, num_steps, value_weight, dropout_p
        return attend_and_remember(known_as, *given, *options, return_lse, enable_gqa, backend)
    given_key = key
    query, key, value, key_lengths = check_inputs(query, key, value, key_lengths, enable_gqa=enable_gqa)
    attn_mask = check_attn_mask(attn_mask, query, key)
    repeats = query.shape[1] // given_key.shape[1]
    check_dropout(dropout_p)
    window_bounds(window)
    scale = default_scale(query, scale)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    reason = fused.unsupported(query, value, num_landmarks, window, dropout_p, return_lse and needs_grad, attn_mask)
    backend = choose_backend(backend, PYTORCH_AND_TRITON, unsupported=reason, prefer_kernels=fused.is_fast(query))
    if query.shape[0] == 0:
        out = empty_output(query, key, value)
        return (out, out.sum(-1).to(accumulation_dtype(query.dtype))) if return_lse else out
    if assignment is not None:
        assignment = _check_assignment(assignment, given_key, num_landmarks, key_lengths, attn_mask)
    elif backend != "triton" or value_weight != 0:  # the kernels find clusters of keys alone themselves
        unique = key[:, ::repeats], value[:, ::repeats]
        assignment = assign_key_clusters(*unique, num_landmarks, num_steps, key_lengths, value_weight, attn_mask)
        num_landmarks = at_most(num_landmarks, key.shape[2])
    if assignment is not None and repeats > 1:
        assignment = assignment.repeat_interleave(repeats, 1)
    if backend == "naive":
        masks = key_lengths, attn_mask
        out = naive_landmark_attention(query, key, value, assignment, window, scale, *masks)[0].to(query.dtype)
        if not return_lse:
            return out
        lse = naive_landmark_lse(query, key, assignment, window, scale, *masks)
        return out, lse.to(accumulation_dtype(query.dtype))
    if backend == "triton" and not (needs_grad and key_lengths is not None):
        rows = VisibleRows(query, key, value, None)  # the kernels skip hidden keys themselves
    else:
        rows = visible_rows(query, key, value, scale, key_lengths=key_lengths, attn_mask=attn_mask)
    if backend == "triton":
        if assignment is None:
            check_steps(num_landmarks, num_steps)
            num_landmarks = at_most(num_landmarks, key.shape[2])
        options = {"key_lengths": key_lengths, "assignment": assignment, "return_lse": return_lse}
        out, lse = fused.attention(*rows.tensors(), num_landmarks, window, scale=scale, num_steps=num_steps, **options)
        is_given = all(x is y for x, y in zip(given, (query, key, value), strict=True))
        if known_as is not None and assignment is None and is_given:
            fused.remember(known_as, *given, num_landmarks, window, scale, num_steps)
    else:
        mask = visible_keys(key_lengths, attn_mask, key.shape[2])
        options = {"scale": scale, "key_mask": mask, "dropout_p": dropout_p, "with_lse": return_lse}
        out, lse = blocked_landmark_attention(*rows.tensors(), assignment, num_landmarks, window, **options)
    (out,) = rows.mark(out)
    return (out, rows.mark(lse.unsqueeze(-1))[0].squeeze(-1)) if return_lse else out


def run_landmarks_again(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    scale: float | None,
    is_causal: bool,
    num_steps: int,
    value_weight: float,
    dropout_p: float,
    enable_gqa: bool,
    backend: str,
    tokens_first: bool = False,
) -> tuple[torch.Tensor | None, tuple | None]:
    """Output of a call of `landmark_attention` like one that has been checked, and its key; each may be None.

    Arguments as there; with `tokens_first` query, key, value and output are (B, N, H, width).
    """
    options = num_landmarks, window, scale, is_causal, num_steps, value_weight, dropout_p, enable_gqa, backend
    return run_again(landmark_attention, (query, key, value), options, tiles_override(), tokens_first)


def _check_assignment(
    assignment: torch.Tensor,
    key: torch.Tensor,
    num_landmarks: int,
    key_lengths: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Given clusters (B, H, S) of the keys, -1 for hidden ones.

    Raises:
        UserError: another shape or dtype, or a cluster out of range.
    """
    check_whole_number("num_landmarks", num_landmarks, 1)
    check_tensors(assignment=assignment)
    if assignment.shape != key.shape[:3] or assignment.dtype != torch.int64 or assignment.device != key.device:
        raise UserError(
            f"assignment has to be int64 of shape {tuple(key.shape[:3])} on {key.device}, a cluster for each key, got "
            f"{assignment.dtype} of shape {tuple(assignment.shape)} on {assignment.device}."
        )
    visible = valid_points(key, key_lengths, attn_mask)
    if assignment.device.type == "cpu" and not (torch.compiler.is_compiling() or is_exporting()):
        bad = visible & ((assignment < 0) | (assignment >= num_landmarks))
        if bad.any():
            raise UserError(
                f"assignment has the cluster {assignment[bad][0].item()}, and the clusters of visible keys have to lie "
                f"in [0, {num_landmarks}), num_landmarks being {num_landmarks}. Take it from assign_key_clusters with "
                "the same num_landmarks, key_lengths and attn_mask."
            )
    return assignment if key_lengths is None and attn_mask is None else assignment.masked_fill(~visible, -1)


def log_landmark_features(
    query: torch.Tensor, key: torch.Tensor, assignment: torch.Tensor, num_clusters: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of the features phi(q)_b = exp(s q.c_b) of queries and phi(k_j) = one-hot of b(j) of keys.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        assignment: clusters of the keys (B, H, S), -1 for none.
        num_clusters: number of clusters M.
        scale: softmax scale s.

    Returns:
        (B, H, T, M), differentiable in query and key, and (B, H, S, M), 0 for the cluster of a key and -inf elsewhere.
        In float32, or float64 for float64 inputs.
    """
    dtype = accumulation_dtype(query.dtype)
    log_key = query.new_full((*assignment.shape, num_clusters), -math.inf, dtype=dtype)
    log_key.masked_fill_(assignment.unsqueeze(-1) == torch.arange(num_clusters, device=key.device), 0.0)
    means = cluster_means(key.to(dtype), assignment, num_clusters)
    return query.to(dtype) @ (means * scale).transpose(-2, -1), log_key
