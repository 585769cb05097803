"""K-means of queries and keys, with a deterministic initialisation."""

from __future__ import annotations

import math

import torch

from scatterbrain.errors import UserError, check_value_weight
from scatterbrain.ops.clusters import triton as fused
from scatterbrain.ops.clusters.steps import KEYS_PER_CLUSTER, sample_of, step_sample
from scatterbrain.ops.common.inputs import visible_keys
from scatterbrain.ops.common.numerics import (
    accumulation_dtype,
    at_most,
    gather_rows,
    is_exporting,
    no_autocast,
    split_rows,
    stable_argsort,
    tile_budget,
)


def assign_clusters(
    points: torch.Tensor, num_clusters: int, num_steps: int = 1, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Cluster of each point, by k-means (Lloyd's algorithm) with a deterministic initialisation.

    Each sequence of n points is cut into M = `num_clusters` stretches, of which stretch m ends before position
    ceil((m + 1) n / M). The point of a stretch farthest from the mean of the stretch is an initial centroid: a few keys
    far from others carry much of a softmax, and centroids that start at means do not reach them in a few iterations.
    The first of equally far points is taken (so the first of a stretch of two), for an empty stretch the first of the
    sequence, and of equally near centroids the one of the lowest index.

    Args:
        points: (B, H, N, E), queries or keys.
        num_clusters: number of clusters M.
        num_steps: iterations of Lloyd's algorithm, on every second point; 0 keeps the initialisation. A centroid
            without points does not move.
        lengths: (B,) integers; points i >= lengths[b] are in no cluster and move no centroid. None for all.

    Returns:
        (B, H, N) int64, a cluster in [0, M) or -1 for no cluster. Clusters can be empty.

    Raises:
        UserError: fewer than one cluster, or a negative number of steps.
    """
    labels, _ = find_centroids(points, num_clusters, num_steps, lengths)
    return labels if lengths is None else labels.masked_fill(~valid_points(points, lengths), -1)


def assign_key_clusters(
    key: torch.Tensor,
    value: torch.Tensor,
    num_clusters: int,
    num_steps: int = 1,
    key_lengths: torch.Tensor | None = None,
    value_weight: float = 0.5,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cluster of each key, of keys that also have similar values, since values are averaged within a cluster.

    Where a cluster has 16 keys or more on average, centroids are found from every fourth key, else from all of them
    (Lloyd's steps from every second one).

    Args:
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_clusters: number of clusters M.
        num_steps: iterations of Lloyd's algorithm.
        key_lengths: (B,) integers; keys j >= key_lengths[b] are in no cluster. None for all.
        value_weight: weight of the values in the distance, with keys and values scaled to the same standard deviation
            over the sequence, up to 1e6; 0 clusters the keys alone.
        attn_mask: boolean (B, S); keys where it is false are in no cluster, and the others are clustered as if they
            were a sequence by themselves. None for all.

    Returns:
        (B, H, S) int64, a cluster in [0, M) or -1 for no cluster.

    Raises:
        UserError: a value out of range.
    """
    check_value_weight(value_weight)
    check_steps(num_clusters, num_steps)
    if attn_mask is not None:
        order, count = visible_first(visible_keys(key_lengths, attn_mask, key.shape[2]))
        key, value = (take_in_order(x.detach(), order) for x in (key, value))
        labels = assign_key_clusters(key, value, num_clusters, num_steps, count, value_weight)
        return put_in_order(labels, order)
    is_fast = value_weight == 0 and fused.is_fast(key)
    if is_fast and not (torch.compiler.is_compiling() or is_exporting()):
        num_clusters = at_most(num_clusters, key.shape[2])
        if fused.unsupported(key, key, num_clusters, 0) is None:
            return fused.find_clusters(key, num_clusters, num_steps, key_lengths)
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
    labels, _ = find_centroids(points, num_clusters, num_steps, key_lengths, KEYS_PER_CLUSTER)
    return labels if key_lengths is None else labels.masked_fill(~valid_points(key, key_lengths), -1)


def assign_query_clusters(
    query: torch.Tensor,
    num_clusters: int,
    num_steps: int = 1,
    query_lengths: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cluster of each query, as `assign_clusters`, but padding is in the nearest cluster, not in none.

    Args:
        query: (B, H, T, E).
        num_clusters: number of clusters Q.
        num_steps: iterations of Lloyd's algorithm.
        query_lengths: (B,) integers; queries i >= query_lengths[b] move no centroid. None for all.
        query_mask: boolean (B, T); queries where it is false move no centroid, and the others are clustered as if they
            were a sequence by themselves. None for all.

    Returns:
        (B, H, T) int64, a cluster in [0, Q).

    Raises:
        UserError: fewer than one cluster, or a negative number of steps.
    """
    if query_mask is None:
        return find_centroids(query, num_clusters, num_steps, query_lengths)[0]
    order, count = visible_first(visible_keys(query_lengths, query_mask, query.shape[2]))
    labels, _ = find_centroids(take_in_order(query.detach(), order), num_clusters, num_steps, count)
    return put_in_order(labels, order)


def visible_first(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, N) of the points that a mask (B, N) shows, then of the others, in their order; and counts (B,)."""
    return stable_argsort((~mask).int()), mask.sum(1)


def take_in_order(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of (B, H, N, E) in an order (B, N)."""
    return gather_rows(x.transpose(1, 2), order).transpose(1, 2)


def put_in_order(labels: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Labels (B, H, N) of `take_in_order`, at the positions that they were taken from."""
    return torch.empty_like(labels).scatter_(2, order.unsqueeze(1).expand_as(labels), labels)


def cluster_means(points: torch.Tensor, assignment: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Means (B, H, M, E) of the clusters of points (B, H, N, E), zero for an empty cluster."""
    (sums,), members = cluster_sums((points.flatten(0, 1),), assignment.flatten(0, 1), num_clusters)
    return (sums / members.clamp_min(1.0)).unflatten(0, points.shape[:2])


# Points that are added one by one to a sum; the sums of these are added in turn, which rounds less.
_POINTS_OF_A_SUM = 256


def cluster_sums(
    points: tuple[torch.Tensor, ...], assignment: torch.Tensor, num_clusters: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sums and numbers of the points of each cluster, in an order of addition that does not change.

    Args:
        points: tensors (G, N, any width), all clustered in the same way. Points of no cluster may hold any value.
        assignment: cluster of each point (G, N), -1 for none.
        num_clusters: number of clusters M.

    Returns:
        A sum (G, M, width) for each tensor, differentiable, and numbers (G, M, 1) in the dtype of the points.
    """
    groups, length = assignment.shape
    like = points[0]
    assignment = assignment.masked_fill(assignment < 0, num_clusters)  # one more cluster, which is dropped
    members = torch.zeros(groups, num_clusters + 1, dtype=torch.int64, device=like.device)
    members = members.scatter_add(1, assignment, torch.ones_like(assignment))[:, :num_clusters, None].to(like.dtype)
    if not adds_in_order(like):
        points = [x.masked_fill((assignment == num_clusters).unsqueeze(-1), 0.0) for x in points]
        labels = torch.arange(num_clusters, device=like.device).unsqueeze(1)
        slices = [(assignment, *points)]
        if not is_exporting():
            size = max(1, tile_budget(like) // (groups * num_clusters))
            slices = zip(*(x.split(size, 1) for x in (assignment, *points)), strict=True)
        sums = [0.0 for _ in points]
        for part, *rows in slices:
            one_hot = (part.unsqueeze(1) == labels).to(like.dtype)
            sums = [total + one_hot @ x for total, x in zip(sums, rows, strict=True)]
        return sums, members
    size = max(_POINTS_OF_A_SUM, 4 * num_clusters)
    num_parts = -(-length // size)
    part = torch.arange(num_parts)[:, None].expand(-1, size).reshape(-1)[:length]
    part = part + torch.arange(groups)[:, None] * num_parts
    index = (part * (num_clusters + 1) + assignment).flatten()
    shape = (groups, num_parts, num_clusters + 1)
    zeros = (x.new_zeros(math.prod(shape), x.shape[2]) for x in points)
    sums = [zero.index_add(0, index, x.flatten(0, 1)) for zero, x in zip(zeros, points, strict=True)]
    return [x.view(*shape, -1).sum(1)[:, :num_clusters] for x in sums], members


def adds_in_order(x: torch.Tensor) -> bool:
    """Whether index_add, the gradient of index_select too, adds in one order: on other devices or compiled, in any."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def valid_points(points: torch.Tensor, lengths: torch.Tensor | None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Boolean (B or 1, 1, N), true for the points below `lengths` (B,) that `mask` (B, N) shows."""
    visible = visible_keys(None if lengths is None else lengths.to(points.device), mask, points.shape[2])
    if visible is None:
        return torch.ones(1, 1, points.shape[2], dtype=torch.bool, device=points.device)
    return visible[:, None]


def check_steps(num_clusters: int, num_steps: int) -> None:
    """Check the sizes of a clustering.

    Raises:
        UserError: fewer than one cluster, or a negative number of steps.
    """
    for name, number, least in (("num_clusters", num_clusters, 1), ("num_steps", num_steps, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise UserError(f"{name}={number!r} of landmark attention has to be an integer of at least {least}.")


def find_centroids(
    points: torch.Tensor,
    num_clusters: int,
    num_steps: int,
    lengths: torch.Tensor | None = None,
    per_cluster: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid (B, H, N) int64 of every point (B, H, N, E), padding included, and the centroids (B, H, M, E).

    Args:
        points: (B, H, N, E).
        num_clusters: number of clusters M.
        num_steps: iterations of Lloyd's algorithm.
        lengths: (B,) integers; points i >= lengths[b] move no centroid. None for all.
        per_cluster: points of a sequence per cluster, without padding, from which on centroids are found from a
            sample of them; None for never.
    """
    check_steps(num_clusters, num_steps)
    batch, heads, length, _ = points.shape
    # every point is a cluster then
    num_clusters = at_most(num_clusters, length)
    # as many sequences at a time as the budget of tiles allows
    size = max(1, tile_budget(points) // (length * num_clusters))
    with torch.no_grad(), no_autocast(points):
        slices = split_rows(points.detach().to(accumulation_dtype(points.dtype)).flatten(0, 1), size)
        counts = [None] * len(slices)
        if lengths is not None:
            lengths = lengths.to(points.device).clamp(0, length).view(-1, 1).expand(batch, heads)
            counts = split_rows(lengths.reshape(-1, 1), size)
        options = (num_clusters, num_steps, per_cluster)
        found = [_cluster_slice(*each, *options) for each in zip(slices, counts, strict=True)]
    labels, centroids = (torch.cat(x) for x in zip(*found, strict=True))
    return labels.view(batch, heads, length), centroids.view(batch, heads, *centroids.shape[1:])


def _cluster_slice(
    points: torch.Tensor, counts: torch.Tensor | None, num_clusters: int, num_steps: int, per_cluster: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid (G, N) of each of the points (G, N, E), and centroids; the first `counts` (G, 1) move them."""
    sample = sample_of(points.shape[1], num_clusters, per_cluster)
    centre, centroids = _move_centroids(points, counts, num_clusters, num_steps, sample)
    if sample > 1 and counts is not None:
        are_few = (counts < per_cluster * num_clusters).unsqueeze(-1)
        of_all = _move_centroids(points, counts, num_clusters, num_steps, 1)
        centre, centroids = (torch.where(are_few, *x) for x in zip(of_all, (centre, centroids), strict=True))
    return _nearest(points - centre, centroids), centroids + centre


def _move_centroids(
    points: torch.Tensor, counts: torch.Tensor | None, num_clusters: int, num_steps: int, sample: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A centre (G, 1, E), and centroids (G, M, E) relative to it, after Lloyd's steps on a sample of the points.

    Args:
        points: (G, N, E).
        counts: numbers of points (G, 1) that count; None for all.
        num_clusters: number of clusters M.
        num_steps: Lloyd's steps.
        sample: the first of so many points is taken.
    """
    sampled = counts
    if counts is not None and sample > 1:
        sampled = (counts + (sample - 1)) // sample
    centroids = _farthest_of_stretches(points[:, ::sample], sampled, num_clusters)
    # relative to a point among them, |x|^2 - 2 x.c + |c|^2 does not cancel where all points share a large component
    centre = centroids.mean(1, keepdim=True)
    every = step_sample(sample)
    some, centroids = points[:, ::every] - centre, centroids - centre
    outside = None
    if counts is not None:
        outside = torch.arange(0, points.shape[1], every, device=points.device) >= counts
    for _ in range(num_steps):
        labels = _nearest(some, centroids)
        if outside is not None:
            labels = labels.masked_fill(outside, -1)
        (sums,), members = cluster_sums((some,), labels, num_clusters)
        centroids = torch.where(members > 0, sums / members.clamp_min(1.0), centroids)
    return centre, centroids


def _farthest_of_stretches(points: torch.Tensor, counts: torch.Tensor | None, num_clusters: int) -> torch.Tensor:
    """Point (G, M, E) of each of M stretches that is farthest from the mean of its stretch.

    Stretch m of n points is the positions ceil(m n / M) to ceil((m + 1) n / M) - 1. The first of points at the same
    distance is taken, so the first of two, and for an empty stretch the first of the sequence.

    Args:
        points: (G, N, E).
        counts: number of points (G, 1) of each sequence that count, None for all.
        num_clusters: number of stretches M.
    """
    groups, length, _ = points.shape
    all_full = counts is None and length % num_clusters == 0
    if counts is None:
        counts = torch.full((1, 1), length, device=points.device)
    bounds = -(-torch.arange(num_clusters + 1, device=points.device) * counts // num_clusters)  # (G or 1, M + 1)
    first, end = bounds[:, :-1, None], bounds[:, 1:, None]
    position = first + torch.arange(-(-length // num_clusters), device=points.device)
    outside = (position >= end).unsqueeze(-1)  # (G or 1, M, L, 1)
    index = position.clamp_max(length - 1).expand(groups, -1, -1)
    stretch = gather_rows(points, index.flatten(1)).unflatten(1, index.shape[1:])
    if not all_full:
        stretch = stretch.masked_fill(outside, 0.0)
    mean = stretch.sum(2, keepdim=True) / (end - first).clamp_min(1).unsqueeze(-1)
    distance = (stretch - mean).square_().sum(-1).masked_fill(outside.squeeze(-1), -1.0)
    # two points are equally far from their mean, and rounding must not choose between them
    distance = distance.masked_fill(end - first == 2, 0.0)
    farthest = first + distance.argmax(-1, keepdim=True)
    return gather_rows(points, farthest.masked_fill(first == end, 0).squeeze(-1))


def _nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index (G, N) int64 of the nearest of the centroids (G, M, E) of each point (G, N, E); of equals the lowest."""
    norms, transposed = centroids.square().sum(-1).unsqueeze(1), centroids.transpose(1, 2)
    size = max(1, tile_budget(points) // (points.shape[0] * centroids.shape[1]))
    slices = (points,) if is_exporting() else points.split(size, 1)
    return torch.cat([_argmin(torch.baddbmm(norms, x, transposed, alpha=-2.0)) for x in slices], 1)


def _argmin(x: torch.Tensor) -> torch.Tensor:
    """Index (G, N) int64 of the least of (G, N, M), which is overwritten; of equals the lowest, and any for nan."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_exporting():
        return x.argmin(-1)
    # in half the time of argmin: 0 for the least and M for others, plus the index
    x = x.sub_(x.amin(-1, keepdim=True)).sign_().mul_(x.shape[-1])
    x = x.add_(torch.arange(x.shape[-1], dtype=x.dtype)).amin(-1)
    return x.nan_to_num_(0.0).long()


def _moments(x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, H, 1, E) of the valid points (B, H, N, E), and their RMS distance from it (B, H, 1, 1)."""
    outside = ~valid.unsqueeze(-1)
    count = valid.sum(-1)[..., None, None].clamp_min(1)
    mean = x.masked_fill(outside, 0.0).sum(2, keepdim=True) / count
    centred = (x - mean).masked_fill(outside, 0.0)
    return mean, (centred.square().sum((2, 3), keepdim=True) / count).sqrt()
