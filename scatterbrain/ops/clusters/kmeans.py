"""K-means of queries and keys, from a start without randomness: clusters, their means, and what both share."""

from __future__ import annotations

import math

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.inputs import length_mask
from scatterbrain.ops.common.numerics import accumulation_dtype, gather_rows, tile_budget


def assign_clusters(
    points: torch.Tensor, num_clusters: int, num_steps: int = 4, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Cut the points of each sequence into clusters: k-means (Lloyd's algorithm) from a start without randomness.

    The start: each sequence is cut into `num_clusters` stretches, and the point of a stretch that lies farthest from
    the mean of the sequence is a centre. Few keys far out carry much of a softmax, and centres that start among the
    crowd do not find them in a few steps.

    Args:
        points: (B, H, N, E), queries or keys.
        num_clusters: number of clusters M.
        num_steps: steps of Lloyd's algorithm; 0 keeps the start. A centre that loses its points stays where it is.
        lengths: (B,) integers; points from there on are in no cluster and move no centre.

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
    """Clusters of keys that also have similar values: less is lost where values are averaged.

    Args:
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_clusters: number of clusters M.
        num_steps: steps of Lloyd's algorithm.
        key_lengths: (B,) integers; keys from there on are in no cluster.
        value_weight: weight of the values in the distance, where keys and values are scaled to the same root mean
            square deviation over the sequence; 0 takes the keys alone.

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
        _, deviation = _moments(points, valid)
        mean, value_deviation = _moments(value, valid)
        # where all values are the same but for rounding, that is nothing to cluster by
        size = mean.square().sum(-1, keepdim=True).add(value_deviation.square()).sqrt()
        value_deviation = torch.maximum(value_deviation, 1e-4 * size).clamp_min(torch.finfo(value.dtype).tiny)
        points = torch.cat([points, (value - mean) * (value_weight * deviation / value_deviation)], dim=-1)
    return assign_clusters(points, num_clusters, num_steps, key_lengths)


def assign_query_clusters(
    query: torch.Tensor, num_clusters: int, num_steps: int = 4, query_lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Clusters of queries: as `assign_clusters`, but queries of the padding go to the nearest cluster, not to none.

    Args:
        query: (B, H, T, E).
        num_clusters: number of clusters Q.
        num_steps: steps of Lloyd's algorithm.
        query_lengths: (B,) integers; queries from there on move no centroid. None for all.

    Returns:
        (B, H, T) int64, a cluster in [0, Q).

    Raises:
        UserError: fewer than one cluster, or a negative number of steps.
    """
    return nearest_centroids(query, num_clusters, num_steps, query_lengths)


def cluster_means(points: torch.Tensor, assignment: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Means of the clusters, zero for an empty one: (B, H, N, E) to (B, H, M, E)."""
    # points of no cluster may be anything, and 0 * inf is nan
    points = points.masked_fill((assignment < 0).unsqueeze(-1), 0.0)
    one_hot = _one_hot(assignment, num_clusters, points.dtype)
    # a product, not index_add: sums in the same order on every run
    return one_hot @ points / one_hot.sum(-1, keepdim=True).clamp_min(1.0)


def valid_points(points: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Boolean (B or 1, 1, N), true for the points that exist."""
    if lengths is None:
        return torch.ones(1, 1, points.shape[2], dtype=torch.bool, device=points.device)
    return length_mask(lengths.to(points.device), points.shape[2])[:, None]


def nearest_centroids(
    points: torch.Tensor, num_clusters: int, num_steps: int, lengths: torch.Tensor | None
) -> torch.Tensor:
    """K-means of (B, H, N, E) points. Returns the nearest centre (B, H, N) of every point, also of the padding."""
    for name, number, least in (("num_clusters", num_clusters, 1), ("num_steps", num_steps, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise UserError(f"{name}={number!r} of landmark attention has to be an integer of at least {least}.")
    batch, heads, length, _ = points.shape
    # sequences one after another while the distances of one fill a CPU's cache; a GPU takes many at once
    size = max(1, tile_budget(points) // (length * num_clusters))
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        slices = points.detach().to(accumulation_dtype(points.dtype)).flatten(0, 1).split(size)
        if lengths is None:
            labels = [_cluster_slice(each, None, num_clusters, num_steps) for each in slices]
        else:
            valid = valid_points(points, lengths).expand(batch, heads, length).flatten(0, 1).split(size)
            pairs = zip(slices, valid, strict=True)
            labels = [_cluster_slice(each, mask, num_clusters, num_steps) for each, mask in pairs]
    return torch.cat(labels).view(batch, heads, length)


def _cluster_slice(points: torch.Tensor, valid: torch.Tensor | None, num_clusters: int, num_steps: int) -> torch.Tensor:
    """K-means of (G, N, E) points of which the valid ones (G, N) move centres, or all: (G, N) int64."""
    groups, length, _ = points.shape
    outside = None if valid is None else ~valid
    counts = points.new_full((groups, 1), length, dtype=torch.int64) if valid is None else valid.sum(1, keepdim=True)
    inside = points if outside is None else points.masked_fill(outside.unsqueeze(-1), 0.0)
    mean = (inside.sum(1) / counts.clamp_min(1)).unsqueeze(1)
    # from the mean: |x|^2 - 2 x.c + |c|^2 then loses nothing where all points share a large part
    points = points - mean
    inside = points if outside is None else points.masked_fill(outside.unsqueeze(-1), 0.0)

    # the start: a centre in each of num_clusters stretches, some without a point where the sequence is short
    index = torch.arange(length, device=points.device).expand(groups, -1)
    stretch = (index * num_clusters // counts.clamp_min(1)).clamp_max(num_clusters - 1)
    distance = inside.square().sum(-1)
    if outside is not None:
        distance.masked_fill_(outside, -1.0)
    farthest = distance.new_full((groups, num_clusters), -math.inf).scatter_reduce(1, stretch, distance, "amax")
    is_farthest = (distance == farthest.gather(1, stretch)) & (distance >= 0)
    candidate = index.masked_fill(~is_farthest, length)
    first = index.new_full(farthest.shape, length).scatter_reduce(1, stretch, candidate, "amin")
    # the first point again where there is none
    centres = gather_rows(inside, first.masked_fill(first == length, 0))

    for _ in range(num_steps):
        labels = _nearest(inside, centres)
        one_hot = _one_hot(labels if outside is None else labels.masked_fill(outside, -1), num_clusters, points.dtype)
        members = one_hot.sum(-1, keepdim=True)
        centres = torch.where(members > 0, (one_hot @ inside) / members.clamp_min(1.0), centres)
    return _nearest(points, centres)


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The nearest of the centres (G, M, E) of each point (G, N, E): (G, N) int64."""
    norms = centres.square().sum(-1)
    return torch.baddbmm(norms.unsqueeze(1), points, centres.transpose(1, 2), alpha=-2.0).argmin(-1)


def _one_hot(assignment: torch.Tensor, num_clusters: int, dtype: torch.dtype) -> torch.Tensor:
    """(..., N) to (..., M, N), a column of zeros for no cluster."""
    shape = (*assignment.shape[:-1], num_clusters, assignment.shape[-1])
    one_hot = torch.zeros(shape, dtype=dtype, device=assignment.device)
    ones = (assignment >= 0).to(dtype).unsqueeze(-2)
    return one_hot.scatter_(-2, assignment.clamp_min(0).unsqueeze(-2), ones)


def _moments(x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, H, 1, E) of the valid points (B, H, N, E), and their root mean square distance from it (B, H, 1, 1)."""
    outside = ~valid.unsqueeze(-1)
    count = valid.sum(-1)[..., None, None].clamp_min(1)
    mean = x.masked_fill(outside, 0.0).sum(2, keepdim=True) / count
    centred = (x - mean).masked_fill(outside, 0.0)
    return mean, (centred.square().sum((2, 3), keepdim=True) / count).sqrt()
