"""Fallback tiles on the CPU: those that the fused kernels recompute exactly because the subtraction cancels."""

from __future__ import annotations

import torch

from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.common.windows import window_bounds
from scatterbrain.ops.scatterbrain.triton.operator import CANCELLATION_LIMIT
from src.analysis.benchmark.tiles import WIDTH, Shape


def fallback_queries(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, window: int, limit: float
) -> torch.Tensor:
    """Queries whose sum over all keys' estimates exceeds their normaliser `limit` times, as the kernels see it.

    Args:
        query: (B, N, E) float64.
        key: (B, N, E) float64.
        projection: random projections (R, E) float64, each taken with both signs.
        window: width W.
        limit: see `scatterbrain.ops.scatterbrain.triton.operator.CANCELLATION_LIMIT`.

    Returns:
        (B, N) bool.
    """
    scale, length = query.shape[-1] ** -0.5, query.shape[1]
    query_logs, key_logs = (log_softmax_features(x, projection, scale, cosh=True) for x in (query, key))
    # log sum_j phi(k_j), then relative to each query's largest term
    sums = query_logs + key_logs.logsumexp(1, keepdim=True)
    running_max = sums.amax(-1, keepdim=True)
    total = (sums - running_max).exp().sum(-1)
    normaliser = total.clone()
    features = (query_logs - running_max).exp()
    key_features = key_logs.exp()
    left, right = window_bounds(window)
    for offset in range(-left, right):
        i = slice(max(0, -offset), min(length, length - offset))
        j = slice(max(0, offset), min(length, length + offset))
        exact = (scale * (query[:, i] * key[:, j]).sum(-1) - running_max[:, i, 0]).exp()
        normaliser[:, i] += exact - (features[:, i] * key_features[:, j]).sum(-1)
    # also true where what is left of the difference is negative
    return ~(total <= limit * normaliser)


def count(shape: Shape, std: float, seed: int, tile: int) -> tuple[int, int]:
    """Queries of one seed whose tile falls back, and tiles of `tile` queries that hold any."""
    generator = torch.Generator().manual_seed(seed)
    projection = draw_projection(shape.projections, WIDTH, seed=seed).bfloat16().double()
    size = (1, shape.length, WIDTH)
    queries = tiles = 0
    for _ in range(shape.batch):
        query, key = ((std * torch.randn(size, generator=generator)).bfloat16().double() for _ in "qk")
        found = fallback_queries(query, key, projection, shape.window, CANCELLATION_LIMIT)[0]
        queries += int(found.sum())
        tiles += len(found.nonzero().div(tile, rounding_mode="floor").unique())
    return queries, tiles
