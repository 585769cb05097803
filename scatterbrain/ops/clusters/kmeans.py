"""K-means of queries and keys, with a deterministic initialisation."""

from __future__ import annotations

import math

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.inputs import length_mask
from scatterbrain.ops.common.numerics import (
    accumulation_dtype,
    at_most,
    gather_rows,
    no_autocast,
    split_rows,
    tile_budget,
)


def assign_clusters(
    points: torch.Tensor, num_clusters: int, num_steps: int = 4, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Cluster of each point, by k-means (Lloyd's algorithm) with a deterministic initialisation.

    Each sequence is cut into `num_clusters` segments, and the point of a segment farthest from the mean of the sequence
    is an initial centroid. A few keys far from the mean carry much of a softmax; centroids initialised near the mean
    do not reach them in a few iterations.

    Args:
        points: (B, H, N, E), queries or keys.
        num_clusters: number of clusters M.
        num_steps: iterations of Lloyd's algorithm; 0 keeps the initialisation. A centroid without points does not move.
        lengths: (B,) integers; points i >= lengths[b] are in no cluster and move no centroid. None for all.

    Returns:
        (B, H, N) int64, a cluster in [0, M) or -1 for no cluster. Clusters can be empty.

    Raises:
        UserError: fewer than one cluster, or a negative number of steps.
    """
    labels = nearest_centroids(points, num_clusters, num_steps, lengths)
    return labels if lengths is None else labels.masked_fill(~valid_points(points, lengths), -1)


def assign_key_clusters(
    key: torch.Tensor,
    value: torch.Tensor,
    num_clusters: int,
    num_steps: int = 4,
    key_lengths: torch.Tensor | None = None,
    value_weight: float = 0.5,
) -> torch.Tensor:
    """Cluster of each key, of keys that also have similar values, since values are averaged within a cluster.

    Args:
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_clusters: number of clusters M.
        num_steps: iterations of Lloyd's algorithm.
        key_lengths: (B,) integers; keys j >= key_lengths[b] are in no cluster. None for all.
        value_weight: weight of the values in the distance, with keys and values scaled to the same standard deviation
            over the sequence; 0 clusters the keys alone.

    Returns:
        (B, H, S) int64, a cluster in [0, M) or -1 for no cluster.

    Raises:
        UserError: a value out of range.
    """
    if not value_weight >= 0:
        raise UserError(f"value_weight={value_weight} has to be at least 0; 0 clusters the keys alone.")
    points = key.detach().to(accumulation_dtype(key.dtype))
    if value_weight > 0:
        valid = valid_points(key, key_lengths).expand(key.shape[:3])
        value = value.detach().to(points.dtype)
        _, key_std = _moments(points, valid)
        mean, value_std = _moments(value, valid)
        # values that are the same up to rounding do not separate clusters
        size = mean.square().sum(-1, keepdim=True).add(value_std.square()).sqrt()
        value_std = torch.maximum(value_std, 1e-4 * size).clamp_min(torch.finfo(value.dtype).tiny)
        points = torch.cat([points, (value - mean) * (value_weight * key_std / value_std)], dim=-1)
    return assign_clusters(points, num_clusters, num_steps, key_lengths)


def assign_query_clusters(
    query: torch.Tensor, num_clusters: int, num_steps: int = 4, query_lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Cluster of each query, as `assign_clusters`, but padding is in the nearest cluster, not in none.

    Args:
        query: (B, H, T, E).
        num_clusters: number of clusters Q.
        num_steps: iterations of Lloyd's algorithm.
        query_lengths: (B,) integers; queries i >= query_lengths[b] move no centroid. None for all.

    Returns:
        (B, H, T) int64, a cluster in [0, Q).

    Raises:
        UserError: fewer than one cluster, or a negative number of steps.
    """
    return nearest_centroids(query, num_clusters, num_steps, query_lengths)


def cluster_means(points: torch.Tensor, assignment: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Means (B, H, M, E) of the clusters of points (B, H, N, E), zero for an empty cluster."""
    # points of no cluster may hold any value, and 0 * inf is nan
    points = points.masked_fill((assignment < 0).unsqueeze(-1), 0.0)
    one_hot = _one_hot(assignment, num_clusters, points.dtype)
    # a product, not index_add: deterministic order of sums
    return one_hot @ points / one_hot.sum(-1, keepdim=True).clamp_min(1.0)


def valid_points(points: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Boolean (B or 1, 1, N), true for the points below `lengths` (B,)."""
    if lengths is None:
        return torch.ones(1, 1, points.shape[2], dtype=torch.bool, device=points.device)
    return length_mask(lengths.to(points.device), points.shape[2])[:, None]


def nearest_centroids(
    points: torch.Tensor, num_clusters: int, num_steps: int, lengths: torch.Tensor | None
) -> torch.Tensor:
    """Nearest centroid (B, H, N) of every point (B, H, N, E), padding included; see `assign_clusters`."""
    for name, number, least in (("num_clusters", num_clusters, 1), ("num_steps", num_steps, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise UserError(f"{name}={number!r} of landmark attention has to be an integer of at least {least}.")
    batch, heads, length, _ = points.shape
    # every point is a cluster then
    num_clusters = at_most(num_clusters, length)
    # as many sequences at a time as the budget of tiles allows
    size = max(1, tile_budget(points) // (length * num_clusters))
    with torch.no_grad(), no_autocast(points):
        slices = split_rows(points.detach().to(accumulation_dtype(points.dtype)).flatten(0, 1), size)
        if lengths is None:
            labels = [_cluster_slice(each, None, num_clusters, num_steps) for each in slices]
        else:
            valid = split_rows(valid_points(points, lengths).expand(batch, heads, length).flatten(0, 1), size)
            pairs = zip(slices, valid, strict=True)
            labels = [_cluster_slice(each, mask, num_clusters, num_steps) for each, mask in pairs]
    return torch.cat(labels).view(batch, heads, length)


def _cluster_slice(points: torch.Tensor, valid: torch.Tensor | None, num_clusters: int, num_steps: int) -> torch.Tensor:
    """Nearest centroid (G, N) int64 of points (G, N, E), of which the valid ones (G, N), or all, move centroids."""
    groups, length, _ = points.shape
    outside = None if valid is None else ~valid
    counts = points.new_full((groups, 1), length, dtype=torch.int64) if valid is None else valid.sum(1, keepdim=True)
    inside = points if outside is None else points.masked_fill(outside.unsqueeze(-1), 0.0)
    mean = (inside.sum(1) / counts.clamp_min(1)).unsqueeze(1)
    # relative to the mean, |x|^2 - 2 x.c + |c|^2 does not cancel where all points share a large component
    points = points - mean
    inside = points if outside is None else points.masked_fill(outside.unsqueeze(-1), 0.0)

    # initial centroids: one in each of num_clusters segments, some of them empty where the sequence is short
    index = torch.arange(length, device=points.device).expand(groups, -1)
    segment = (index * num_clusters // counts.clamp_min(1)).clamp_max(num_clusters - 1)
    distance = inside.square().sum(-1)
    if outside is not None:
        distance.masked_fill_(outside, -1.0)
    farthest = distance.new_full((groups, num_clusters), -math.inf).scatter_reduce(1, segment, distance, "amax")
    is_farthest = (distance == farthest.gather(1, segment)) & (distance >= 0)
    candidate = index.masked_fill(~is_farthest, length)
    first = index.new_full(farthest.shape, length).scatter_reduce(1, segment, candidate, "amin")
    # the first point of the sequence for an empty segment
    centroids = gather_rows(inside, first.masked_fill(first == length, 0))

    for _ in range(num_steps):
        labels = _nearest(inside, centroids)
        one_hot = _one_hot(labels if outside is None else labels.masked_fill(outside, -1), num_clusters, points.dtype)
        members = one_hot.sum(-1, keepdim=True)
        centroids = torch.where(members > 0, (one_hot @ inside) / members.clamp_min(1.0), centroids)
    return _nearest(points, centroids)


def _nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index (G, N) int64 of the nearest of the centroids (G, M, E) of each point (G, N, E)."""
    norms = centroids.square().sum(-1)
    return torch.baddbmm(norms.unsqueeze(1), points, centroids.transpose(1, 2), alpha=-2.0).argmin(-1)


def _one_hot(assignment: torch.Tensor, num_clusters: int, dtype: torch.dtype) -> torch.Tensor:
    """One-hot encoding (..., M, N) of clusters (..., N), a column of zeros for no cluster."""
    shape = (*assignment.shape[:-1], num_clusters, assignment.shape[-1])
    one_hot = torch.zeros(shape, dtype=dtype, device=assignment.device)
    ones = (assignment >= 0).to(dtype).unsqueeze(-2)
    return one_hot.scatter_(-2, assignment.clamp_min(0).unsqueeze(-2), ones)


def _moments(x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, H, 1, E) of the valid points (B, H, N, E), and their RMS distance from it (B, H, 1, 1)."""
    outside = ~valid.unsqueeze(-1)
    count = valid.sum(-1)[..., None, None].clamp_min(1)
    mean = x.masked_fill(outside, 0.0).sum(2, keepdim=True) / count
    centred = (x - mean).masked_fill(outside, 0.0)
    return mean, (centred.square().sum((2, 3), keepdim=True) / count).sqrt()
