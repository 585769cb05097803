"""Landmark attention for CUDA, with or without a window, forward and backward. See README.md of the folder above."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scatterbrain.ops.common.backends import no_kernels, too_large
from scatterbrain.ops.common.calls import CALLS

# With wider heads, more landmarks or wider windows, tiles no longer fit the registers and shared memory of an SM.
MAX_WIDTH = 128
MAX_LANDMARKS = 1024
MAX_WINDOW = 512
# The compiler of Triton 3.2 ends the process on these kernels, that of 3.3 fails on some of them.
LEAST_TRITON = (3, 4)
# Rows are read 16 bytes at a time, and Triton knows of strides only whether 16 divides them.
ROW_MULTIPLE = 16


def unsupported(
    query: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    dropout_p: float = 0.0,
    needs_gradient_of_lse: bool = False,
    attn_mask: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels cannot run a call; None where they can.

    Args:
        query: (B, H, T, E).
        value: (B, H, S, D).
        num_landmarks: number of clusters M.
        window: width W, 0 for none.
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
    if num_landmarks > MAX_LANDMARKS:
        return f"it takes up to {MAX_LANDMARKS} landmarks, and these are {num_landmarks}"
    if window > MAX_WINDOW:
        return f"it takes windows of up to {MAX_WINDOW} keys, and this one has {window}"
    if dropout_p > 0:
        return "it has no dropout"
    if attn_mask is not None:
        return "it takes key_lengths and no attn_mask"
    if needs_gradient_of_lse:
        return "its log-sum-exp has no gradient"
    return None


def is_fast(query: torch.Tensor) -> bool:
    """Whether `backend="auto"` should take the kernels, where they can run: on a GPU, with tensor cores."""
    return query.is_cuda and (query.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    *,
    scale: float,
    num_steps: int,
    key_lengths: torch.Tensor | None = None,
    assignment: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Landmark attention by fused kernels.

    Args:
        query: (B, H, T, E); slices of a fused qkv are read without a copy where 16 divides their widths and strides.
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of clusters M, at most S.
        window: width W; 0 for no window.
        scale: softmax scale.
        num_steps: Lloyd steps.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        assignment: (B, H, S) integers, cluster of each key, -1 for hidden keys; None to find clusters.
        return_lse: return the log normalisers, without gradient, too.

    Returns:
        (B, H, T, D) in the dtype of `query`, contiguous as (B, T, H, D), zero for a query that sees no key; and
        natural logarithms (B, H, T) of the normalisers in float32, or None.
    """
    from scatterbrain.ops.clusters.triton.operator import attend, log_normalisers

    width = value.shape[3]
    query, key, value = (with_even_rows(x) for x in (query, key, value))
    if key_lengths is not None:
        key_lengths = key_lengths.to(query.device).contiguous()
    if assignment is not None:
        assignment = assignment.to(torch.int16).contiguous()
    arguments = (query, key, value, key_lengths, assignment, num_landmarks, window, scale, num_steps)
    out, statistics = attend(*arguments, return_lse)
    lse = log_normalisers(statistics, *arguments) if return_lse else None
    return out if width == value.shape[3] else out[..., :width], lse


def remember(
    known_as: tuple,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    scale: float,
    num_steps: int,
) -> None:
    """Let calls that are like a checked one run the kernels at once, if these take its tensors as they are.

    Args:
        known_as: key of the call in `CALLS`.
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of clusters M, at most S.
        window: width W; 0 for no window.
        scale: softmax scale.
        num_steps: Lloyd steps.
    """
    from scatterbrain.ops.clusters.triton.operator import OPERATOR
    from scatterbrain.ops.common.passes import Call

    tensors = query, key, value
    if are_read_in_place(*tensors):
        records = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        options = num_landmarks, window, scale, num_steps, records
        CALLS[known_as] = Call(OPERATOR, (*tensors, None, None), options, records)


def are_read_in_place(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these tensors (B, H, N, width) without a copy."""
    from scatterbrain.ops.clusters.triton.operator import with_vector_loads

    return all(with_vector_loads(with_even_rows(x.detach())).data_ptr() == x.data_ptr() for x in tensors)


@torch.no_grad()
def find_clusters(
    key: torch.Tensor, num_landmarks: int, num_steps: int, key_lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Clusters (B, H, S) int64 of the keys (B, H, S, E), -1 for hidden keys, as `attention` finds them."""
    from scatterbrain.ops.clusters.triton.operator import run_clusters

    if key_lengths is not None:
        key_lengths = key_lengths.to(key.device).contiguous()
    return run_clusters(with_even_rows(key.detach()), key_lengths, num_landmarks, num_steps).long()


def with_even_rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of (B, H, N, E), padded with zeros to a multiple of 16 elements, so that they are read as vectors."""
    excess = -x.shape[-1] % ROW_MULTIPLE
    return F.pad(x, (0, excess)) if excess else x
