r"""Landmark attention: a low-rank part that is made from the data, by clusters of keys and of queries.

The keys of a sequence are cut into M clusters; b(j) is the cluster of key j, c_b the mean of a cluster. Two forms:

    landmarks             A(i, j) = exp(s q_i.k_j)                                     in a local window of W keys
                                    exp(s q_i.c_b(j))                                  outside it
    paired landmarks      A(i, j) = exp(s q_i.k_j)                                     for W keys of i's query cluster
                                    exp(s p_a.k_j) exp(s (q_i - p_a).c_ab(j))          for the others

The first is the combination of Chen et al., "Scatterbrain", NeurIPS 2021, algorithm 1, with phi(q)_b = exp(s q.c_b)
and phi(k_j) the one-hot vector of b(j). The second clusters the queries too: a = a(i) is the cluster of query i, p_a
its mean, and c_ab the mean of cluster b as p_a sees it, with weights exp(s p_a.k). It is exact where a query is the
mean of its cluster, and what it leaves out of a logit is s (q_i - p_a).(k_j - c_ab), a product of two distances within
clusters: of second order, where the first form leaves out s q_i.(k_j - c_b). (The same double expansion is behind
fast multipole methods.) A query cluster thus sees M summaries, each a mean key, a mean value and a mass.

Landmarks cost a column of the attention matrix for each query, query clusters one for each key, exact keys one for each
query: M + Q + W columns, next to Q M (E + D + 1) numbers of summaries, which do not grow with the sequence.
Assignments are constants for autograd; gradients flow through means, masses and weights. Clusters look at all keys of
a sequence, so there is no causal form.

Shapes: G = B * H sequences, Q query clusters, N queries or keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from src.ops.blocked import FLOOR, blocked_attention
from src.ops.inputs import (
    accumulation_dtype,
    check_dropout,
    check_inputs,
    default_scale,
    gather_rows,
    length_mask,
    resolve_backend,
    tile_budget,
    visible_keys,
)
from src.ops.naive import dense_attention, dense_logits
from src.ops.windows import window_bounds, window_mask
from src.utils.errors import UserError

__all__ = [
    "assign_clusters",
    "assign_key_clusters",
    "assign_query_clusters",
    "landmark_attention",
    "log_landmark_features",
    "naive_landmark_attention",
    "naive_paired_landmark_attention",
    "paired_landmark_attention",
]


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
    labels = _cluster(points, num_clusters, num_steps, lengths)
    return labels if lengths is None else labels.masked_fill(~_valid_points(points, lengths), -1)


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
        valid = _valid_points(key, key_lengths).expand(key.shape[:3])
        value = value.detach().to(points.dtype)
        _, deviation = _moments(points, valid)
        mean, value_deviation = _moments(value, valid)
        # where all values are the same but for rounding, that is nothing to cluster by
        size = mean.square().sum(-1, keepdim=True).add(value_deviation.square()).sqrt()
        value_deviation = torch.maximum(value_deviation, 1e-4 * size).clamp_min(torch.finfo(value.dtype).tiny)
        points = torch.cat([points, (value - mean) * (value_weight * deviation / value_deviation)], dim=-1)
    return assign_clusters(points, num_clusters, num_steps, key_lengths)


def log_landmark_features(
    query: torch.Tensor, key: torch.Tensor, assignment: torch.Tensor, num_clusters: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of the features phi(q)_b = exp(s q.c_b) and phi(k_j) = one-hot of b(j).

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
    means = _means(key.to(dtype), assignment, num_clusters)
    return query.to(dtype) @ (means * scale).transpose(-2, -1), log_key


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
    num_steps: int = 4,
    value_weight: float = 0.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Weights exp(s q.k) inside a local window and exp(s q.c) outside it, c the mean of the key's cluster.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M.
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`; 0 for none.
        scale: softmax scale s; None is E ** -0.5.
        is_causal: not possible, see Raises.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        num_steps: steps of Lloyd's algorithm, see `assign_clusters`.
        value_weight: weight of the values where keys are clustered, see `assign_key_clusters`.
        dropout_p: probability of dropping a weight (not in the naive form), see `src.ops.blocked`.
        backend: `naive` (dense, float64), `torch` (by blocks, linear in T) or `auto`, which is `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: causal, or shapes, dtypes or options that do not fit.
    """
    check_inputs(query, key, value, key_lengths)
    check_dropout(dropout_p)
    window_bounds(window)
    _refuse_causal(is_causal)
    scale = default_scale(query, scale)
    backend = resolve_backend(backend)
    assignment = assign_key_clusters(key, value, num_landmarks, num_steps, key_lengths, value_weight)
    if backend == "naive":
        return naive_landmark_attention(query, key, value, assignment, window, scale, key_lengths)[0].to(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        log_features = log_landmark_features(query, key, assignment, num_landmarks, scale)
    # What `blocked_attention` asks of features holds for any width: s q.c is the mean of the logits of a cluster, so it
    # is the logarithm of a weight outside the window, or no larger than that of an exact weight inside it.
    return blocked_attention(
        query,
        key,
        value,
        window,
        scale=scale,
        log_features=log_features,
        key_lengths=key_lengths,
        dropout_p=dropout_p,
    )


def paired_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    num_exact: int = 0,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
    num_steps: int = 4,
    value_weight: float = 0.5,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Weights exp(s p.k) exp(s (q - p).c), p the mean of the query's cluster and c that of the key's as p sees it.

    The keys that a query cluster weights most can be taken out of the clusters, with exact weights. O((T + S) (M + Q +
    W) (E + D)) time.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M.
        num_query_landmarks: number of query clusters Q.
        num_exact: number of keys W, those of the largest p.k, that each query cluster weights exactly.
        scale: softmax scale s; None is E ** -0.5.
        is_causal: not possible, see Raises.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        query_lengths: (B,) integers; queries from there on are attended for, but move no landmark. Give it where the
            rest is padding, which otherwise has an influence on the other queries. None for all.
        num_steps: steps of Lloyd's algorithm, see `assign_clusters`.
        value_weight: weight of the values where keys are clustered, see `assign_key_clusters`.
        dropout_p: probability of dropping the weight of a summary or exact key for a query (not in the naive form).
        backend: `naive` (dense, float64), `torch` (by tiles, linear in T) or `auto`, which is `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: causal, or shapes, dtypes or options that do not fit.
    """
    check_inputs(query, key, value, key_lengths)
    if query_lengths is not None and (query_lengths.shape != query.shape[:1] or query_lengths.is_floating_point()):
        raise UserError(
            f"query_lengths has to be integers of shape ({len(query)},), one for each sample, got "
            f"{query_lengths.dtype} of shape {tuple(query_lengths.shape)}."
        )
    check_dropout(dropout_p)
    _refuse_causal(is_causal)
    if isinstance(num_exact, bool) or not isinstance(num_exact, int) or num_exact < 0:
        raise UserError(f"num_exact={num_exact!r} is not a number of keys; give an integer of at least 0.")
    scale = default_scale(query, scale)
    backend = resolve_backend(backend)
    key_labels = assign_key_clusters(key, value, num_landmarks, num_steps, key_lengths, value_weight)
    query_labels = assign_query_clusters(query, num_query_landmarks, num_steps, query_lengths)
    if backend == "naive":
        out, _ = naive_paired_landmark_attention(
            query, key, value, key_labels, query_labels, num_exact, scale, key_lengths, query_lengths
        )
        return out.to(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        dtype, (batch, heads) = accumulation_dtype(query.dtype), query.shape[:2]
        centred = _valid_points(query, query_lengths).expand(query.shape[:3])
        means = _means(query.to(dtype), query_labels.masked_fill(~centred, -1), num_query_landmarks)
        flat = [x.to(dtype).flatten(0, 1) for x in (query, key, value, means)]
        flat += [key_labels.flatten(0, 1), query_labels.flatten(0, 1)]
        # sequences one after another while the tiles of one fill a CPU's cache; a GPU takes many at once
        columns = num_landmarks + num_query_landmarks + num_exact
        largest = max(
            max(query.shape[2], key.shape[2]) * columns,
            # no more than four tiles for each cluster of keys, by the size of tiles
            4 * num_landmarks * num_query_landmarks * (key.shape[3] + value.shape[3]),
        )
        size = max(1, tile_budget(query) // largest)
        slices = zip(*(x.split(size) for x in flat), strict=True)
        out = torch.cat([_paired(*each, num_landmarks, num_exact, scale, dropout_p) for each in slices])
        return out.unflatten(0, (batch, heads)).to(query.dtype)


def assign_query_clusters(
    query: torch.Tensor, num_clusters: int, num_steps: int = 4, query_lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Clusters of queries: as `assign_clusters`, but queries of the padding go to the nearest cluster, not to none."""
    return _cluster(query, num_clusters, num_steps, query_lengths)


def naive_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    window: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 form of `landmark_attention` for clusters (B, H, S) that are given.

    Returns:
        Output (B, H, T, D) and weights (B, H, T, S), float64.
    """
    key = key.double()
    means = torch.zeros_like(key)  # of the cluster of each key
    for cluster in range(int(assignment.max()) + 1):
        members = (assignment == cluster).unsqueeze(-1)
        mean = (key * members).sum(2, keepdim=True) / members.sum(2, keepdim=True).clamp_min(1)
        means = torch.where(members, mean, means)
    logits = torch.where(
        window_mask(query.shape[2], key.shape[2], window, query.device),
        dense_logits(query, key, scale),
        dense_logits(query, means, scale),
    )
    return dense_attention(logits, visible_keys(query, key, False, key_lengths), value)


def naive_paired_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_assignment: torch.Tensor,
    query_assignment: torch.Tensor,
    num_exact: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 form of `paired_landmark_attention` for clusters (B, H, S) and (B, H, T) that are given.

    Returns:
        Output (B, H, T, D) and weights (B, H, T, S), float64.
    """
    query, key = query.double(), key.double()
    visible = visible_keys(query, key, False, key_lengths)
    counted = _valid_points(query, query_lengths)
    exact = dense_logits(query, key, scale)
    logits = torch.zeros_like(exact)
    for group in range(int(query_assignment.max()) + 1):
        members = (query_assignment == group) & counted
        mean = (query * members.unsqueeze(-1)).sum(2, keepdim=True) / members.sum(2)[..., None, None].clamp_min(1)
        seen = dense_logits(mean, key, scale).masked_fill(~visible[:, :, :1], -math.inf)  # (B, H, 1, S)
        chosen = torch.zeros_like(seen, dtype=torch.bool)
        if num_exact:
            chosen.scatter_(-1, seen.detach().topk(min(num_exact, key.shape[2])).indices, True)
        of_group = torch.where(chosen, exact, 0.0)
        for cluster in range(int(key_assignment.max()) + 1):
            keys = (key_assignment == cluster).unsqueeze(2) & ~chosen
            # a finite stand-in where a cluster has no key: nothing of it is used
            weights = seen.masked_fill(~keys, -1e300).softmax(-1)
            tilted = dense_logits(query - mean, weights @ key, scale) + seen
            of_group = torch.where(keys, tilted, of_group)
        logits = torch.where((query_assignment == group).unsqueeze(-1), of_group, logits)
    return dense_attention(logits, visible, value)


def _refuse_causal(is_causal: bool) -> None:
    if is_causal:
        raise UserError(
            "Landmark attention has no causal form: landmarks are means over all keys, so that later keys would have "
            "an influence on earlier queries. Choose a local window or random features (local, performer, sblocal)."
        )


def _valid_points(points: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Boolean (B or 1, 1, N), true for the points that exist."""
    if lengths is None:
        return torch.ones(1, 1, points.shape[2], dtype=torch.bool, device=points.device)
    return length_mask(lengths.to(points.device), points.shape[2])[:, None]


def _moments(x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, H, 1, E) of the valid points (B, H, N, E), and their root mean square distance from it (B, H, 1, 1)."""
    outside = ~valid.unsqueeze(-1)
    count = valid.sum(-1)[..., None, None].clamp_min(1)
    mean = x.masked_fill(outside, 0.0).sum(2, keepdim=True) / count
    centred = (x - mean).masked_fill(outside, 0.0)
    return mean, (centred.square().sum((2, 3), keepdim=True) / count).sqrt()


def _one_hot(assignment: torch.Tensor, num_clusters: int, dtype: torch.dtype) -> torch.Tensor:
    """(..., N) to (..., M, N), a column of zeros for no cluster."""
    shape = (*assignment.shape[:-1], num_clusters, assignment.shape[-1])
    one_hot = torch.zeros(shape, dtype=dtype, device=assignment.device)
    ones = (assignment >= 0).to(dtype).unsqueeze(-2)
    return one_hot.scatter_(-2, assignment.clamp_min(0).unsqueeze(-2), ones)


def _means(points: torch.Tensor, assignment: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Means of the clusters, zero for an empty one: (B, H, N, E) to (B, H, M, E)."""
    # points of no cluster may be anything, and 0 * inf is nan
    points = points.masked_fill((assignment < 0).unsqueeze(-1), 0.0)
    one_hot = _one_hot(assignment, num_clusters, points.dtype)
    # a product, not index_add: sums in the same order on every run
    return one_hot @ points / one_hot.sum(-1, keepdim=True).clamp_min(1.0)


def _cluster(points: torch.Tensor, num_clusters: int, num_steps: int, lengths: torch.Tensor | None) -> torch.Tensor:
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
            valid = _valid_points(points, lengths).expand(batch, heads, length).flatten(0, 1).split(size)
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


@dataclass(frozen=True)
class _Tiles:
    """Points sorted by cluster and cut into tiles of C points, all of one cluster.

    Attributes:
        index: (G, n, C) positions of the points; -1 for none.
        owner: (G, n) the cluster of a tile; any for a tile without points.
        slot: (G, N) where a point lies among the n C places; 0 for a point of no cluster.
    """

    index: torch.Tensor
    owner: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, num_clusters: int) -> _Tiles:
        groups, length = labels.shape
        # half a cluster: the last tiles, on average half empty, then waste little
        size = min(64, max(8, length // (2 * num_clusters) // 8 * 8))
        # so many at most, whatever the clusters: a number that depends on data would stop a GPU
        num_tiles = length // size + min(num_clusters, length)
        labels = labels.where(labels >= 0, num_clusters)
        counts = torch.zeros(groups, num_clusters + 1, dtype=torch.int64, device=labels.device)
        counts = counts.scatter_add(1, labels, torch.ones_like(labels))
        tiles = -(-counts // size)
        tiles[:, -1] = 0
        ends = tiles.cumsum(1)
        first_slot = (ends - tiles) * size
        first_slot[:, -1] = num_tiles * size
        labels, order = labels.sort(dim=1, stable=True)
        rank = torch.arange(length, device=labels.device) - (counts.cumsum(1) - counts).gather(1, labels)
        # points of no cluster share one last place, which is dropped
        slot = (first_slot.gather(1, labels) + rank).clamp_max(num_tiles * size)
        index = torch.full((groups, num_tiles * size + 1), -1, device=labels.device).scatter(1, slot, order)
        tile = torch.arange(num_tiles, device=labels.device).expand(groups, -1).contiguous()
        owner = torch.searchsorted(ends[:, :-1].contiguous(), tile, right=True).clamp_max(num_clusters - 1)
        slot = torch.zeros_like(slot).scatter(1, order, slot.where(labels < num_clusters, 0))
        return cls(index[:, :-1].reshape(groups, num_tiles, size), owner, slot)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of (G, N, F) as tiles (G, n, C, F); any row for no point."""
        return gather_rows(x, self.index.flatten(1).clamp_min(0)).view(*self.index.shape, x.shape[-1])

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """0 where there is a point, -inf for none: (G, n, C, 1)."""
        return torch.zeros_like(self.index, dtype=dtype).masked_fill_(self.index < 0, -math.inf).unsqueeze(-1)

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """Tiles (G, n, C, F) as rows (G, N, F)."""
        return gather_rows(x.flatten(1, 2), self.slot)


def _paired(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    means: torch.Tensor,
    key_labels: torch.Tensor,
    query_labels: torch.Tensor,
    num_landmarks: int,
    num_exact: int,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """Paired landmarks over (G, N, width) sequences with `means` (G, Q, E) of the queries. Returns (G, T, D)."""
    hidden = (key_labels < 0).unsqueeze(-1)
    # hidden keys and values may be anything, and 0 * inf is nan
    key, value = (x.masked_fill(hidden, 0.0) for x in (key, value))
    seen = (key @ (scale * means).transpose(1, 2)).masked_fill(hidden, -math.inf)  # (G, S, Q)
    exact = None
    if num_exact:
        chosen = seen.detach().topk(min(num_exact, key.shape[1]), dim=1).indices  # (G, W, Q)
        # an exact key is a summary of itself
        exact = gather_rows(key, chosen.flatten(1)), seen.gather(1, chosen), gather_rows(value, chosen.flatten(1))
        exact = tuple(x.view(*chosen.shape, -1).transpose(1, 2) for x in exact)
        seen = seen.scatter(1, chosen, -math.inf)
    summaries = _summaries(seen, key, value, key_labels, num_landmarks)
    if exact is not None:
        summaries = tuple(torch.cat(pair, dim=2) for pair in zip(summaries, exact, strict=True))

    tiles = _Tiles.of(query_labels, means.shape[1])
    centre, log_mass, mean_value = (gather_rows(x, tiles.owner) for x in summaries)
    deviation = (tiles.take(query) - gather_rows(means, tiles.owner).unsqueeze(2)) * scale
    logits = deviation @ centre.transpose(2, 3) + log_mass.transpose(2, 3)  # (G, n, C, M + W)
    reference = logits.detach().amax(-1, keepdim=True).clamp_min(FLOOR)
    weights = (logits - reference).exp()
    blind = hidden.all(1)[:, None, None]
    normaliser = weights.sum(-1, keepdim=True).masked_fill(blind, 1.0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return tiles.put(weights @ mean_value / normaliser)


def _summaries(
    seen: torch.Tensor, key: torch.Tensor, value: torch.Tensor, labels: torch.Tensor, num_landmarks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each query cluster sees of each key cluster.

    Args:
        seen: logarithms of the weights (G, S, Q), -inf for keys that are left out.
        key: (G, S, E).
        value: (G, S, D).
        labels: clusters (G, S), -1 for none.
        num_landmarks: number of clusters M.

    Returns:
        Mean key (G, Q, M, E), logarithm of the sum of weights (G, Q, M, 1), mean value (G, Q, M, D).
    """
    tiles = _Tiles.of(labels, num_landmarks)
    groups, num_groups, width = len(key), seen.shape[2], key.shape[2]
    tile_seen = tiles.take(seen) + tiles.bias(seen.dtype)  # (G, n, C, Q)

    owner = (tiles.owner + torch.arange(groups, device=key.device)[:, None] * num_landmarks).flatten()
    tile_max = tile_seen.detach().amax(2).flatten(0, 1)  # (G n, Q)
    reference = tile_max.new_full((groups * num_landmarks, num_groups), FLOOR)
    reference = reference.scatter_reduce(0, owner.unsqueeze(1).expand_as(tile_max), tile_max, "amax")
    weights = (tile_seen.flatten(0, 1) - reference[owner].unsqueeze(1)).exp()
    rows = tiles.take(torch.cat([key, value, torch.ones_like(key[..., :1])], dim=-1)).flatten(0, 1)
    sums = torch.bmm(weights.transpose(1, 2), rows)  # (G n, Q, E + D + 1)
    sums = sums.new_zeros(groups * num_landmarks, *sums.shape[1:]).index_add(0, owner, sums)

    mass = sums[..., -1:]
    # The largest weight of a sum is 1. A cluster without keys keeps its reference FLOOR, which is as good as -inf.
    mass = mass.masked_fill(mass == 0, 1.0)
    log_mass = reference.unsqueeze(-1) + mass.log()
    mean = sums[..., :-1] / mass
    mean, log_mass = (x.unflatten(0, (groups, num_landmarks)).transpose(1, 2) for x in (mean, log_mass))
    return mean[..., :width], log_mass, mean[..., width:]
