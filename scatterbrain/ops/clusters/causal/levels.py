"""Landmarks of the earlier chunks, in levels: a node of level l holds the keys of 2^l chunks. See README.md."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scatterbrain.errors import UserError, check_value_weight, check_whole_number
from scatterbrain.ops.common.inputs import visible_keys
from scatterbrain.ops.common.numerics import accumulation_dtype, no_autocast, split_rows, tile_budget
from scatterbrain.ops.common.windows import window_bounds


class Level(NamedTuple):
    """Landmarks of the nodes of a level; G sequences, n nodes.

    Attributes:
        key: mean keys (G, n, M, E).
        value: mean values (G, n, M, D).
        count: numbers of keys (G, n, M, 1), 0 for a landmark without keys.
        scatter: sums (G, n, M, 1) of the squared distances of the keys from their mean.
    """

    key: torch.Tensor
    value: torch.Tensor
    count: torch.Tensor
    scatter: torch.Tensor

    def pairs(self, num_pairs: int) -> Level:
        """The first nodes, two and two: (G, num_pairs, 2 M, width)."""
        return Level(*(x[:, : 2 * num_pairs].unflatten(1, (num_pairs, 2)).flatten(2, 3) for x in self))


def exact_chunks(window: int, chunk: int) -> int:
    """Number of chunks before its own that a query sees exactly: those that the windows of its chunk reach.

    Args:
        window: width W of the window `-(W // 2) <= j - i <= 0`.
        chunk: keys C of a chunk.
    """
    return -(-window_bounds(window)[0] // chunk)


def node_counts(num_chunks: int, num_exact: int) -> list[int]:
    """Number of nodes of each level that queries of a sequence see.

    A query of chunk c sees the first p = c - num_exact chunks through landmarks. At each level it takes the last node
    of p where p is odd, the last two where it is even, and the others, an even number, by pairs at the next level: the
    digits of p in bijective base 2. So it sees one or two nodes of each level.

    Args:
        num_chunks: chunks of the sequence.
        num_exact: of `exact_chunks`.
    """
    counts, nodes = [], num_chunks - 1 - num_exact
    while nodes > 0:
        counts.append(nodes)
        nodes = (nodes - 1) // 2
    return counts


def num_visible_nodes(num_chunks: int) -> int:
    """Number of nodes that represent so many chunks, see `node_counts`."""
    return sum(2 - nodes % 2 for nodes in node_counts(num_chunks + 1, 0))


def visible_columns(num_keys: int, num_landmarks: int, window: int, chunk: int) -> float:
    """Mean number of exact keys and landmarks that the queries of a sequence see.

    Args:
        num_keys: length of the sequence.
        num_landmarks: landmarks M of a node.
        window: width W of the window.
        chunk: keys C of a chunk.
    """
    num_exact, total = exact_chunks(window, chunk), 0.0
    for first in range(0, num_keys, chunk):
        far = max(0, first // chunk - num_exact)
        rows = min(chunk, num_keys - first)
        total += rows * (first - far * chunk + (rows + 1) / 2 + num_landmarks * num_visible_nodes(far))
    return total / num_keys


def causal_clusters(
    key: torch.Tensor,
    num_landmarks: int,
    window: int = 0,
    chunk: int = 64,
    *,
    num_queries: int | None = None,
    num_steps: int = 1,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    value_weight: float = 0.0,
) -> torch.Tensor:
    """Cluster of each key at each level, for `naive_causal_landmark_attention`.

    Args:
        key: (B, H, S, E).
        num_landmarks: landmarks M of a node.
        window: width W of the window that queries see exactly, which no landmarks are needed for.
        chunk: keys C of a chunk.
        num_queries: number of queries T; None is S.
        num_steps: iterations of Lloyd's algorithm.
        key_lengths: (B,) integers; keys j >= key_lengths[b] are in no cluster. None for all.
        attn_mask: boolean (B, S); nor are keys where it is false. None for all.
        value: (B, H, S, D), which a `value_weight` needs.
        value_weight: weight lambda of the values in the clustering, see `with_values`.

    Raises:
        UserError: a value out of range, or a `value_weight` without values.

    Returns:
        (levels, B, H, S) int64, a cluster in [0, M) of the key's node, or -1 for none: for hidden keys, and for keys of
        nodes that no query sees.
    """
    batch, heads, num_keys, _ = key.shape
    check_value_weight(value_weight)
    if value is None:
        if value_weight > 0:
            raise UserError(f"value_weight={value_weight} clusters keys and values. Give value, or leave it out.")
        value = key[..., :1]
    key, value = (x.detach().to(accumulation_dtype(x.dtype)) for x in (key, value))
    length = num_keys if num_queries is None else num_queries
    mask = visible_keys(key_lengths, attn_mask, num_keys)
    if mask is not None:  # hidden keys may hold any value
        key, value = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (key, value))
    options = num_landmarks, window, num_steps, value_weight
    _, merges = find_levels(*chunks_of(key, value, mask, chunk, length), *options)
    shape = (batch * heads, -(-max(length, num_keys) // chunk) * chunk)
    node = torch.arange(shape[1], device=key.device) // chunk
    levels: list[torch.Tensor] = []
    for level, labels in enumerate(merges):
        found = labels.new_full(shape, -1)
        size = labels.shape[1] * (chunk << level)
        if level == 0:
            found[:, :size] = labels.flatten(1)
        else:
            # the label before, of one of the two nodes that became one
            before = levels[-1][:, :size]
            half = (node[:size] >> (level - 1)) % 2
            index = (node[:size] >> level) * labels.shape[2] + half * num_landmarks + before.clamp_min(0)
            found[:, :size] = labels.flatten(1).gather(1, index).masked_fill(before < 0, -1)
        levels.append(found)
    found = torch.stack(levels) if levels else key.new_zeros((0, *shape), dtype=torch.int64)
    return found.unflatten(1, (batch, heads))[..., :num_keys]


def chunks_of(
    key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, chunk: int, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys (G, n, C, E), values (G, n, C, D) and visible (G, n, C, 1) in chunks, the last one padded with zeros.

    Args:
        key: (B, H, S, E), zero where it is hidden.
        value: (B, H, S, D), likewise.
        mask: boolean (B, S), true for visible keys; None for all.
        chunk: keys C of a chunk.
        length: number of queries: later keys are left out, and missing ones are hidden.
    """
    batch, heads, num_keys, _ = key.shape
    visible = key.new_ones(1, num_keys, dtype=torch.bool) if mask is None else mask
    visible = visible[:, None, :, None].expand(batch, heads, num_keys, 1)
    tensors = (x[:, :, :length].flatten(0, 1) for x in (key, value, visible))
    size = -(-length // chunk) * chunk
    return tuple(F.pad(x, (0, 0, 0, size - x.shape[1])).unflatten(1, (-1, chunk)) for x in tensors)


def find_levels(
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    num_landmarks: int,
    window: int,
    num_steps: int,
    value_weight: float = 0.0,
) -> tuple[list[Level], list[torch.Tensor]]:
    """Levels that the queries of a sequence see, and the clusters that they are made of.

    Args:
        key: (G, n, C, E).
        value: (G, n, C, D).
        visible: boolean (G, n, C, 1).
        num_landmarks: landmarks M of a node.
        window: width W of the window.
        num_steps: iterations of Lloyd's algorithm.
        value_weight: weight lambda of the values in the clustering.

    Returns:
        The levels, and for each of them the clusters (G, nodes, points) int64, -1 for none: of the keys of its nodes,
        and at higher levels of the 2 M landmarks of the two nodes before.
    """
    check_whole_number("num_landmarks", num_landmarks, 1)
    check_whole_number("num_steps", num_steps, 0)
    levels, labels = [], []
    for count in node_counts(key.shape[1], exact_chunks(window, key.shape[2])):
        if not levels:
            points = Level(key, value, visible.to(key.dtype), torch.zeros_like(key[..., :1]))
            points = Level(*(x[:, :count] for x in points))
        else:
            points = levels[-1].pairs(count)
        labels.append(assign_points(points, num_landmarks, num_steps, value_weight))
        levels.append(join(points, labels[-1], num_landmarks))
    return levels, labels


def join(points: Level, labels: torch.Tensor, num_landmarks: int) -> Level:
    """Landmarks of the nodes whose points have these clusters.

    Args:
        points: keys, or landmarks of the level before: (G, n, P, width).
        labels: cluster of each point (G, n, P), -1 for none.
        num_landmarks: landmarks M of a node.
    """
    one_hot = labels.unsqueeze(-1) == torch.arange(num_landmarks, device=labels.device)
    one_hot = one_hot.to(points.key.dtype)  # (G, n, P, M)
    of_cluster = one_hot.transpose(-1, -2)
    count = of_cluster @ points.count
    share = 1.0 / count.clamp_min(1.0)
    key = of_cluster @ (points.count * points.key) * share
    value = of_cluster @ (points.count * points.value) * share
    # distances from the new mean: the scatter of parts about the mean of their union
    distance = (points.key - one_hot @ key).square().sum(-1, keepdim=True)
    return Level(key, value, count, of_cluster @ (points.scatter + points.count * distance))


def assign_points(points: Level, num_clusters: int, num_steps: int, value_weight: float = 0.0) -> torch.Tensor:
    """Cluster of each point of each node, by k-means weighted with the number of keys of a point.

    A node's P points are cut into M stretches of ceil(P / M), of which each gives an initial centroid: the visible
    point with the fewest keys, of equals the first. Stretches without keys give none. Then `num_steps` times each point
    goes to the nearest centroid, of equals that of the lowest index, and each centroid with points to their weighted
    mean, and each point goes to the nearest centroid once more.

    Args:
        points: keys, or landmarks of the level before: (G, n, P, width), with 0 keys for a hidden point.
        num_clusters: number of clusters M.
        num_steps: iterations of Lloyd's algorithm.
        value_weight: weight lambda of the values in the distances, see `with_values`.

    Returns:
        (G, n, P) int64, a cluster in [0, M), or -1 for a hidden point.
    """
    groups, nodes, size, width = points.key.shape
    width += points.value.shape[3] if value_weight > 0 else 0
    rows = max(1, tile_budget(points.key) // (size * max(num_clusters, width)))
    with torch.no_grad(), no_autocast(points.key):
        dtype = accumulation_dtype(points.key.dtype)
        slices = (split_rows(x.detach().to(dtype).flatten(0, 1), rows) for x in points[:3])
        labels = [_assign(*each, num_clusters, num_steps, value_weight) for each in zip(*slices, strict=True)]
    return torch.cat(labels).view(groups, nodes, size)


def _assign(
    points: torch.Tensor,
    value: torch.Tensor,
    count: torch.Tensor,
    num_clusters: int,
    num_steps: int,
    value_weight: float,
) -> torch.Tensor:
    """Clusters (R, P) of points (R, P, E) with values (R, P, D) and counts (R, P, 1)."""
    stretch = -(-points.shape[1] // num_clusters)
    weight = F.pad(count, (0, 0, 0, stretch * num_clusters - points.shape[1])).unflatten(1, (num_clusters, stretch))
    fewest = (-weight).masked_fill(weight == 0, -math.inf).argmax(2)  # (R, M, 1)
    fewest += stretch * torch.arange(num_clusters, device=points.device)[:, None]
    used = weight.sum(2) > 0
    fewest.masked_fill_(~used, 0)
    if value_weight > 0:
        points = with_values(points, value, fewest, used, value_weight)
    centroids = points.gather(1, fewest.expand(-1, -1, points.shape[2]))
    # relative to a point among them, |x|^2 - 2 x.c + |c|^2 does not cancel where all points share a large component
    centre = centroids[:, :1]
    points, centroids = points - centre, centroids - centre
    unused = ~used.transpose(1, 2)
    clusters = torch.arange(num_clusters, device=points.device)
    for step in range(num_steps + 1):
        bias = (-0.5 * centroids.square().sum(-1).unsqueeze(1)).masked_fill(unused, -math.inf)
        labels = torch.baddbmm(bias, points, centroids.transpose(1, 2)).argmax(-1)
        if step < num_steps:
            weights = (labels.unsqueeze(-1) == clusters).to(points.dtype).mul_(count).transpose(1, 2)  # (R, M, P)
            members = weights.sum(-1, keepdim=True)
            centroids = torch.where(members > 0, weights @ points / members.clamp_min(1.0), centroids)
    return labels.masked_fill(count.squeeze(-1) == 0, -1)


def with_values(
    points: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor, used: torch.Tensor, value_weight: float
) -> torch.Tensor:
    """Points (R, P, E + D) that clusters are found from: keys beside values times a factor.

    The factor of a node is lambda sqrt(variance of the keys / variance of the values) of its initial centroids: with
    lambda = 1 keys and values have about the same share of the distances. Equal values do not count.

    Args:
        points: (R, P, E).
        value: (R, P, D).
        chosen: which of them are initial centroids (R, M, 1).
        used: whether they are (R, M, 1).
        value_weight: lambda.
    """
    share = used.to(points.dtype) / used.sum(1, keepdim=True).clamp_min(1)

    def variance(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (R, 1, width) and variance (R, 1, 1) of the initial centroids."""
        x = x.gather(1, chosen.expand(-1, -1, x.shape[2]))
        mean = (share * x).sum(1, keepdim=True)
        return mean, (share * (x - mean).square().sum(-1, keepdim=True)).sum(1, keepdim=True)

    _, of_keys = variance(points)
    mean, of_values = variance(value)
    # values that are the same up to rounding do not separate clusters
    of_values = torch.maximum(of_values, 1e-8 * (of_values + mean.square().sum(-1, keepdim=True)))
    factor = value_weight * of_keys.sqrt() / of_values.sqrt()
    factor = torch.where(of_values > torch.finfo(value.dtype).tiny, factor, 0.0)
    return torch.cat([points, factor * (value - mean)], -1)
