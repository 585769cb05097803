"""Paired landmark attention: each cluster of queries has its own summary of every cluster of keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from scatterbrain.errors import UserError
from scatterbrain.ops.clusters.kmeans import assign_key_clusters, assign_query_clusters, cluster_means, valid_points
from scatterbrain.ops.clusters.naive import naive_paired_landmark_attention
from scatterbrain.ops.clusters.tiles import ClusterTiles
from scatterbrain.ops.common.backends import choose_backend
from scatterbrain.ops.common.inputs import (
    check_attn_mask,
    check_dropout,
    check_inputs,
    check_tensors,
    default_scale,
    empty_output,
    visible_rows,
)
from scatterbrain.ops.common.numerics import (
    FLOOR,
    accumulation_dtype,
    at_most,
    gather_rows,
    no_autocast,
    split_rows,
    tile_budget,
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
    attn_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    num_steps: int = 2,
    value_weight: float = 0.5,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Output (B, H, T, D) of attention with the weights exp(s p_a.k) exp(s (q - p_a).c_ab).

    p_a is the mean of the cluster a of the query, and c_ab the mean of the keys of cluster b weighted by exp(s p_a.k);
    README.md in this folder states the maths. The keys of the largest weight for p_a can be exempted from clustering,
    with exact weights. O((T + S) (M + Q + W) (E + D)) time.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M.
        num_query_landmarks: number of query clusters Q.
        num_exact: number of keys W, those of the largest p_a.k, that each query cluster weights exactly.
        scale: softmax scale s; None is E ** -0.5.
        is_causal: has to be false.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        query_lengths: (B,) integers; queries i >= query_lengths[b] move no centroid, so that padding does not influence
            other queries. None for all.
        attn_mask: boolean (B, S) or (B, 1, 1, S), false for keys to hide anywhere in the sequence.
        query_mask: boolean (B, T); queries where it is false move no centroid. None for all.
        num_steps: iterations of Lloyd's algorithm, see `assign_clusters`.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`.
        dropout_p: probability of dropping the weight of a summary or exact key for a query (ignored by `naive`).
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.
        backend: `naive` (dense, float64), `torch` (by tiles, linear in T) or `auto`, which is `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: causal, or shapes, dtypes or options that do not fit.
    """
    given_key = key
    query, key, value, key_lengths = check_inputs(query, key, value, key_lengths, enable_gqa=enable_gqa)
    repeats = query.shape[1] // given_key.shape[1]
    if query_lengths is not None and (query_lengths.shape != query.shape[:1] or query_lengths.is_floating_point()):
        raise UserError(
            f"query_lengths has to be integers of shape ({query.shape[0]},), one for each sample, got "
            f"{query_lengths.dtype} of shape {tuple(query_lengths.shape)}."
        )
    if query_mask is not None:
        check_tensors(query_mask=query_mask)
        if query_mask.shape != (query.shape[0], query.shape[2]) or query_mask.dtype != torch.bool:
            raise UserError(
                f"query_mask has to be boolean of shape ({query.shape[0]}, {query.shape[2]}), true for the queries "
                f"that count, got {query_mask.dtype} of shape {tuple(query_mask.shape)}."
            )
    attn_mask = check_attn_mask(attn_mask, query, key)
    check_dropout(dropout_p)
    if is_causal:
        raise UserError(
            "Paired landmark attention cannot be causal: a summary holds all keys of a cluster, so later keys would "
            "influence earlier queries. Choose sbcluster, local, performer or sblocal."
        )
    if isinstance(num_exact, bool) or not isinstance(num_exact, int) or num_exact < 0:
        raise UserError(f"num_exact={num_exact!r} is not a number of keys; give an integer of at least 0.")
    scale = default_scale(query, scale)
    backend = choose_backend(backend)
    if query.shape[0] == 0:
        return empty_output(query, key, value)
    unique = key[:, ::repeats], value[:, ::repeats]
    key_labels = assign_key_clusters(*unique, num_landmarks, num_steps, key_lengths, value_weight, attn_mask)
    if repeats > 1:
        key_labels = key_labels.repeat_interleave(repeats, 1)
    query_labels = assign_query_clusters(query, num_query_landmarks, num_steps, query_lengths, query_mask)
    num_landmarks, num_exact = (at_most(number, key.shape[2]) for number in (num_landmarks, num_exact))
    num_query_landmarks = at_most(num_query_landmarks, query.shape[2])
    if backend == "naive":
        masks = key_lengths, query_lengths, attn_mask, query_mask
        out, _ = naive_paired_landmark_attention(query, key, value, key_labels, query_labels, num_exact, scale, *masks)
        return out.to(query.dtype)
    rows = visible_rows(query, key, value, scale, key_lengths=key_lengths, attn_mask=attn_mask)
    query, key, value, _ = rows
    with no_autocast(query):
        dtype, (batch, heads) = accumulation_dtype(query.dtype), query.shape[:2]
        centred = valid_points(query, query_lengths, query_mask).expand(query.shape[:3])
        means = cluster_means(query.to(dtype), query_labels.masked_fill(~centred, -1), num_query_landmarks)
        flat = [x.to(dtype).flatten(0, 1) for x in (query, key, value, means)]
        flat += [key_labels.flatten(0, 1), query_labels.flatten(0, 1)]
        # as many sequences at a time as the budget of tiles allows
        columns = num_landmarks + num_query_landmarks + num_exact
        largest = max(
            max(query.shape[2], key.shape[2]) * columns,
            # at most four tiles for each cluster of keys, by the size of tiles
            4 * num_landmarks * num_query_landmarks * (key.shape[3] + value.shape[3]),
        )
        size = max(1, tile_budget(query) // largest)
        slices = zip(*(split_rows(x, size) for x in flat), strict=True)
        out = torch.cat([_paired(*each, num_landmarks, num_exact, scale, dropout_p) for each in slices])
        return rows.mark(out.unflatten(0, (batch, heads)).to(query.dtype))[0]


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
    """Output (G, T, D) of paired landmarks over (G, N, width) sequences with `means` (G, Q, E) of the queries."""
    hidden = (key_labels < 0).unsqueeze(-1)
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

    tiles = ClusterTiles.of(query_labels, means.shape[1])
    centre, log_mass, mean_value = (gather_rows(x, tiles.owner) for x in summaries)
    offset = (tiles.take(query) - gather_rows(means, tiles.owner).unsqueeze(2)) * scale
    logits = offset @ centre.transpose(2, 3) + log_mass.transpose(2, 3)  # (G, n, C, M + W)
    maximum = logits.detach().amax(-1, keepdim=True).clamp_min(FLOOR)
    weights = (logits - maximum).exp()
    blind = hidden.all(1)[:, None, None]
    normaliser = weights.sum(-1, keepdim=True).masked_fill(blind, 1.0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return tiles.put(weights @ mean_value / normaliser)


def _summaries(
    seen: torch.Tensor, key: torch.Tensor, value: torch.Tensor, labels: torch.Tensor, num_landmarks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summary of each key cluster for each query cluster.

    Args:
        seen: logits s p_a.k_j (G, S, Q), -inf for hidden and for exact keys.
        key: (G, S, E).
        value: (G, S, D).
        labels: clusters (G, S), -1 for none.
        num_landmarks: number of clusters M.

    Returns:
        Mean keys c_ab (G, Q, M, E), logarithms of the sums of weights (G, Q, M, 1), mean values (G, Q, M, D).
    """
    tiles = ClusterTiles.of(labels, num_landmarks)
    groups, num_groups, width = key.shape[0], seen.shape[2], key.shape[2]
    tile_seen = tiles.take(seen) + tiles.bias(seen.dtype)  # (G, n, C, Q)

    owner = (tiles.owner + torch.arange(groups, device=key.device)[:, None] * num_landmarks).flatten()
    tile_max = tile_seen.detach().amax(2).flatten(0, 1)  # (G n, Q)
    maximum = tile_max.new_full((groups * num_landmarks, num_groups), FLOOR)
    maximum = maximum.scatter_reduce(0, owner.unsqueeze(1).expand_as(tile_max), tile_max, "amax")
    weights = (tile_seen.flatten(0, 1) - maximum[owner].unsqueeze(1)).exp()
    rows = tiles.take(torch.cat([key, value, torch.ones_like(key[..., :1])], dim=-1)).flatten(0, 1)
    sums = torch.bmm(weights.transpose(1, 2), rows)  # (G n, Q, E + D + 1)
    sums = sums.new_zeros(groups * num_landmarks, *sums.shape[1:]).index_add(0, owner, sums)

    mass = sums[..., -1:]
    # The largest weight of a sum is 1. An empty cluster keeps FLOOR as its maximum, in effect -inf.
    mass = mass.masked_fill(mass == 0, 1.0)
    log_mass = maximum.unsqueeze(-1) + mass.log()
    mean = sums[..., :-1] / mass
    mean, log_mass = (x.unflatten(0, (groups, num_landmarks)).transpose(1, 2) for x in (mean, log_mass))
    return mean[..., :width], log_mass, mean[..., width:]
