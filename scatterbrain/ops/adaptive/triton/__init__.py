"""Adaptive attention for CUDA. See README.md of the folder above."""

from __future__ import annotations

import torch

from scatterbrain.ops.adaptive.definition import AdaptivePlan, exact_keys
from scatterbrain.ops.clusters import triton as landmarks
from scatterbrain.ops.clusters.triton import are_read_in_place, with_even_rows
from scatterbrain.ops.clusters.triton.tiles import tiles_override
from scatterbrain.ops.common.calls import CALLS

# With more query clusters, the search for the one of a tile no longer fits the registers.
MAX_QUERY_LANDMARKS = 256
# Places of queries take the bits of a number that those of a tile leave.
MAX_QUERIES = 2**24


def unsupported(
    query: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    window: int,
    dropout_p: float = 0.0,
) -> str | None:
    """Why the kernels cannot run a call; None where they can.

    Args:
        query: (B, H, T, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M.
        num_query_landmarks: number of query clusters Q.
        window: width W, 0 for none.
        dropout_p: probability of dropping a weight.
    """
    reason = landmarks.unsupported(query, value, num_landmarks, window, dropout_p)
    if reason is not None:
        return reason
    if num_query_landmarks > MAX_QUERY_LANDMARKS:
        return f"it takes up to {MAX_QUERY_LANDMARKS} query landmarks, and these are {num_query_landmarks}"
    if query.shape[2] >= MAX_QUERIES:
        return f"it takes fewer than {MAX_QUERIES} queries, and these are {query.shape[2]}"
    return None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    density: float,
    window: int,
    *,
    scale: float,
    tolerance: float | None = None,
    num_steps: int = 1,
    key_lengths: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
    assignment: torch.Tensor | None = None,
    plan: AdaptivePlan | None = None,
) -> torch.Tensor:
    """Adaptive attention by fused kernels.

    Args:
        query: (B, H, T, E); slices of a fused qkv are read without a copy where 16 divides their widths and strides.
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M, at most S.
        num_query_landmarks: number of query clusters Q, at most T.
        density: largest share of the visible keys that a query cluster takes.
        window: width W; 0 for no window.
        scale: softmax scale.
        tolerance: estimated share of a query cluster's weight that landmarks may misplace; None for all that fits.
        num_steps: Lloyd steps.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        query_lengths: (B,) integers; queries i >= query_lengths[b] move no centroid.
        assignment: (B, H, S) integers, cluster of each key, -1 for hidden keys; None to find clusters.
        plan: clusters and supports, with -1 for the clusters of hidden keys. None to find them; else what only they
            depend on is not used.

    Returns:
        (B, H, T, D) in the dtype of `query`, contiguous as (B, T, H, D), zero for a query that sees no key.
    """
    from scatterbrain.ops.adaptive.triton.operator import attend, find_plan, find_statistics
    from scatterbrain.ops.adaptive.triton.tables import fill_tables

    num_exact = exact_keys(density, key.shape[2]) if plan is None else plan.num_exact
    if num_exact == 0:
        assignment = assignment if plan is None else plan.key_assignment
        options = {"key_lengths": key_lengths, "assignment": assignment}
        return landmarks.attention(
            query, key, value, num_landmarks, window, scale=scale, num_steps=num_steps, **options
        )[0]
    width = value.shape[3]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    query, key, value = (with_even_rows(x) for x in (query, key, value))
    key_lengths, query_lengths = (
        x if x is None else x.to(query.device).contiguous() for x in (key_lengths, query_lengths)
    )
    with torch.no_grad():
        if plan is None:
            labels = None if assignment is None else assignment.to(torch.int16).contiguous()
            options = (num_landmarks, num_query_landmarks, float(density), tolerance, scale, num_steps, needs_grad)
            statistics, tables = find_plan(query, key, value, key_lengths, query_lengths, labels, *options)
        else:
            num_query_landmarks, num_landmarks = plan.taken.shape[2:]
            labels, tables = fill_tables(plan, sorts_keys=needs_grad)
            statistics = find_statistics(key, value, key_lengths, labels, num_landmarks)
    options = (num_landmarks, num_query_landmarks, num_exact, window, scale)
    out = attend(query, key, value, key_lengths, labels, statistics, tables, *options)
    return out if width == value.shape[3] else out[..., :width]


def remember(
    known_as: tuple,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    density: float,
    window: int,
    tolerance: float | None,
    scale: float,
    num_steps: int,
) -> None:
    """Let calls that are like a checked one run the kernels at once, if these take its tensors as they are.

    Args:
        known_as: key of the call in `CALLS`.
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M, at most S.
        num_query_landmarks: number of query clusters Q, at most T.
        density: largest share of the keys that a query cluster takes.
        window: width W; 0 for no window.
        tolerance: estimated share of a query cluster's weight that landmarks may misplace; None for all that fits.
        scale: softmax scale.
        num_steps: Lloyd steps.
    """
    from scatterbrain.ops.adaptive.triton.operator import OPERATOR
    from scatterbrain.ops.adaptive.triton.plan import plan_pass
    from scatterbrain.ops.common.passes import Call

    tensors = query, key, value
    num_exact = exact_keys(density, key.shape[2])
    if num_exact == 0:
        landmarks.remember(known_as, *tensors, num_landmarks, window, scale, num_steps)
    elif are_read_in_place(*tensors):
        records = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        options = (num_landmarks, num_query_landmarks, float(density), tolerance, scale, num_steps, records)
        earlier = (plan_pass, (*tensors, None, None, None), tiles_override(), options)
        options = (num_landmarks, num_query_landmarks, num_exact, window, scale)
        CALLS[known_as] = Call(OPERATOR, (*tensors, None, None), options, records, earlier)
