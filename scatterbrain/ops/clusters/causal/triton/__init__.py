"""Causal landmark attention for CUDA, forward and backward. See README.md of the folder above."""

from __future__ import annotations

import torch

from scatterbrain.ops.clusters.triton import LEAST_TRITON, are_read_in_place, with_even_rows
from scatterbrain.ops.common.backends import no_kernels, too_large
from scatterbrain.ops.common.calls import CALLS

# With wider heads, tiles no longer fit the registers and shared memory of an SM.
MAX_WIDTH = 128
CHUNKS = (16, 32, 64, 128)
LANDMARKS = (1, 2, 4, 8, 16, 32, 64)


def unsupported(
    query: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    chunk: int,
    dropout_p: float = 0.0,
    needs_gradient_of_lse: bool = False,
    attn_mask: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels cannot run a call; None where they can.

    Args:
        query: (B, H, T, E).
        value: (B, H, S, D).
        num_landmarks: landmarks M of a node.
        chunk: keys C of a chunk.
        dropout_p: probability of dropping a weight.
        needs_gradient_of_lse: whether autograd records log-sum-exp.
        attn_mask: boolean mask of the keys, or None.
    """
    reason = no_kernels(query, LEAST_TRITON) or too_large(query, value)
    if reason is not None:
        return reason
    width = max(query.shape[3], value.shape[3])
    if width > MAX_WIDTH:
        return f"it takes heads of a width up to {MAX_WIDTH}, and these have {width}"
    for name, size, sizes in (("chunk", chunk, CHUNKS), ("num_landmarks", num_landmarks, LANDMARKS)):
        if size not in sizes:
            return f"it takes a {name} of {', '.join(map(str, sizes[:-1]))} or {sizes[-1]}, and this is {size}"
    if dropout_p > 0:
        return "it has no dropout"
    if attn_mask is not None:
        return "it takes key_lengths and no attn_mask"
    if needs_gradient_of_lse:
        return "its log-sum-exp has no gradient"
    return None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    chunk: int,
    *,
    scale: float,
    num_steps: int,
    value_weight: float = 0.0,
    key_lengths: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal landmark attention by fused kernels.

    Args:
        query: (B, H, T, E); slices of a fused qkv are read without a copy where 16 divides their widths and strides.
        key: (B, Hkv, S, E), each head for H / Hkv consecutive heads of the queries.
        value: (B, Hkv, S, D).
        num_landmarks: landmarks M of a node, one of `LANDMARKS`.
        window: width W of the window.
        chunk: keys C of a chunk, one of `CHUNKS`.
        scale: softmax scale.
        num_steps: Lloyd steps.
        value_weight: weight of the values in the clustering.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        return_lse: return the log normalisers, without gradient, too.

    Returns:
        (B, H, T, D) in the dtype of `query`, contiguous as (B, T, H, D), zero for a query that sees no key, nan for one
        that sees what is not finite; and natural logarithms (B, H, T) of the normalisers in float32, or None.
    """
    from scatterbrain.ops.clusters.causal.triton.operator import attend, log_normalisers

    options = num_landmarks, window, chunk, scale, num_steps, value_weight
    arguments = _arguments(query, key, value, key_lengths, *options)
    out, statistics = attend(*arguments, return_lse)
    lse = log_normalisers(statistics, *arguments) if return_lse else None
    return out if out.shape[3] == value.shape[3] else out[..., : value.shape[3]], lse


def remember(
    known_as: tuple,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    chunk: int,
    scale: float,
    num_steps: int,
    value_weight: float,
) -> None:
    """Let calls that are like a checked one run the kernels at once, if these take its tensors as they are.

    Args:
        known_as: key of the call in `CALLS`.
        query: (B, H, T, E).
        key: (B, Hkv, S, E).
        value: (B, Hkv, S, D).
        num_landmarks: landmarks M of a node, one of `LANDMARKS`.
        window: width W of the window.
        chunk: keys C of a chunk, one of `CHUNKS`.
        scale: softmax scale.
        num_steps: Lloyd steps.
        value_weight: weight of the values in the clustering.
    """
    from scatterbrain.ops.clusters.causal.triton.operator import OPERATOR
    from scatterbrain.ops.common.passes import Call

    tensors = query, key, value
    if are_read_in_place(*tensors):
        records = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        arguments = _arguments(*tensors, None, num_landmarks, window, chunk, scale, num_steps, value_weight)
        CALLS[known_as] = Call(OPERATOR, arguments[:4], (*arguments[4:], records), records)


@torch.no_grad()
def find_clusters(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    chunk: int,
    *,
    scale: float,
    num_steps: int,
    value_weight: float = 0.0,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Clusters (levels, B, Hkv, S) of the keys at each level, as `attention` finds them; see `causal_clusters`."""
    from scatterbrain.ops.clusters.causal.triton.operator import clusters_of, run_forward

    options = num_landmarks, window, chunk, scale, num_steps, value_weight
    arguments = _arguments(query, key, value, key_lengths, *options)
    return clusters_of(run_forward(*arguments, False)[1], *arguments)


def _arguments(query, key, value, key_lengths, num_landmarks, window, chunk, scale, num_steps, value_weight) -> tuple:
    """Arguments of the operator, with rows padded to a multiple of 16 elements, so that they are read as vectors."""
    tensors = [with_even_rows(x) for x in (query, key, value)]
    if key_lengths is not None:
        key_lengths = key_lengths.to(query.device).contiguous()
    options = num_landmarks, window, chunk, scale, query.shape[3], num_steps, float(value_weight)
    return (*tensors, key_lengths, *options)
