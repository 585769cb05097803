"""Kernels that make the nodes: clusters of the keys of a chunk, and clusters of the landmarks of two nodes.

Landmarks of a sequence lie in one table: those of level l begin at node 2 P - (2 P >> l), P = n - w for n chunks of
which a query sees w before its own exactly. Level l has (P >> l) - 1 nodes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.clusters.triton.kmeans import nearest
from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import LOG_ZERO, end_of_keys, load_rows, sequence_ptr, store_rows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def keys_of(log_count):
    """Number of keys of landmarks from its log2, as float32; 0 for LOG_ZERO."""
    return tl.where(log_count < 0.0, 0.0, tl.floor(tl.exp2(tl.maximum(log_count, 0.0)) + 0.5))


@triton.jit
def store_landmarks(
    mean_k, mean_v, count, scatter, rows, exists, mean_k_ptr, mean_v_ptr, log_count_ptr, spread_ptr,
    E: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store landmarks: mean keys and values, log2 of the number of keys, and spread for `landmark_logits`.

    scatter: sums of the squared distances of the keys from their mean. WIDTH: that of the keys without padding.
    """
    store_rows(mean_k_ptr, mean_k, rows, exists, E, E)
    store_rows(mean_v_ptr, mean_v, rows, exists, D, D)
    tl.store(log_count_ptr + rows, tl.where(count > 0.0, tl.log2(tl.maximum(count, 1.0)), LOG_ZERO), mask=exists)
    spread = tl.sqrt(tl.maximum(scatter, 0.0) * (LOG2E / WIDTH) / tl.maximum(count, 1.0))
    tl.store(spread_ptr + rows, spread, mask=exists)


@triton.jit
def assign(points, weight, centroid, used, M: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr):
    """Clusters of weighted points (P, BE), weight 0 for none, from initial centroids (MP, BE): M, and of these some.

    Returns the clusters (P,), -1 for none, their weights (P, MP) in the dtype of the points, and sums of these (MP,).
    """
    clusters = tl.arange(0, centroid.shape[0])
    for step in tl.static_range(STEPS + 1):
        rounded = centroid.to(points.dtype)
        wide = rounded.to(tl.float32)
        bias = tl.where(used, -0.5 * tl.sum(wide * wide, 1), LOG_ZERO)
        score = tl.dot(points, tl.trans(rounded), input_precision=PRECISION) + bias[None, :]
        label, _ = nearest(score, centroid.shape[0])
        # more than M only for points that are not finite
        label = tl.where((weight > 0.0) & (label < M), label, -1)
        weights = tl.where(label[:, None] == clusters[None, :], weight[:, None], 0.0).to(points.dtype)
        total = tl.sum(weights.to(tl.float32), 0)
        if step < STEPS:
            sums = tl.dot(tl.trans(weights), points, input_precision=PRECISION)
            mean = sums / tl.where(total > 0.0, total, 1.0)[:, None]
            centroid = tl.where((total > 0.0)[:, None], mean, centroid)
    return label, weights, total


@triton.jit
def chunk_nodes_kernel(
    k_ptr, v_ptr, lengths_ptr,
    mean_k_ptr,  # (G, 2 P M, E) mean keys, rows of level 0 written, as of the next
    mean_v_ptr,  # (G, 2 P M, D)
    log_count_ptr,  # (G, 2 P M) float32, LOG_ZERO for a landmark without keys
    spread_ptr,  # (G, 2 P M) float32
    label_ptr,  # (G, P C) int8, cluster of each key, written
    heads, num_keys, num_nodes,  # num_nodes: P
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, WIDTH: tl.constexpr, STRETCH: tl.constexpr, STEPS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Landmarks of one chunk. STRETCH: keys of a stretch, which gives one initial centroid."""
    grid_dependency_control(PDL, True)
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    end = tl.minimum(end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS), (chunk + 1) * C)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    j = chunk * C + tl.arange(0, C)
    exists = j < end
    k = load_rows(k_ptr, j, exists, stride_kn, E, BE)
    v = load_rows(v_ptr, j, exists, stride_vn, D, BD)
    # relative to the first key, so that a large common part of the keys costs no digits
    e = tl.arange(0, BE)
    origin = tl.load(k_ptr + chunk * C * stride_kn + e, mask=(e < E) & (chunk * C < end), other=0.0).to(tl.float32)
    b = tl.arange(0, MP)
    first = chunk * C + b * STRETCH
    number = tl.where(b < M, tl.maximum(tl.minimum(end, first + STRETCH) - first, 0), 0)
    centroid = load_rows(k_ptr, first, number > 0, stride_kn, E, BE).to(tl.float32)
    if STRETCH > 2:
        mean = centroid
        for t in range(1, STRETCH):
            mean += load_rows(k_ptr, first + t, t < number, stride_kn, E, BE).to(tl.float32)
        mean = mean / tl.maximum(number, 1).to(tl.float32)[:, None]
        farthest = tl.sum((centroid - mean) * (centroid - mean), 1)
        # two keys are equally far from their mean, and rounding must not choose between them
        for t in range(1, STRETCH):
            row = load_rows(k_ptr, first + t, t < number, stride_kn, E, BE).to(tl.float32)
            distance = tl.sum((row - mean) * (row - mean), 1)
            better = (t < number) & (number != 2) & (distance > farthest)
            centroid = tl.where(better[:, None], row, centroid)
            farthest = tl.where(better, distance, farthest)
    points = tl.where(exists[:, None], k.to(tl.float32) - origin[None, :], 0.0)
    points = points.to(k.dtype)
    # of the rounded points, whose means are taken off: the spread of equal keys is zero
    norms = tl.sum(points.to(tl.float32) * points.to(tl.float32), 1)
    centroid = tl.where((number > 0)[:, None], centroid - origin[None, :], 0.0)
    weight = tl.where(exists, 1.0, 0.0)
    label, weights, count = assign(points, weight, centroid, number > 0, M, STEPS, PRECISION)
    share = 1.0 / tl.maximum(count, 1.0)
    mean_k = tl.dot(tl.trans(weights), points, input_precision=PRECISION) * share[:, None]
    mean_v = tl.dot(tl.trans(weights), v, input_precision=PRECISION) * share[:, None]
    scatter = tl.sum(weights.to(tl.float32) * norms[:, None], 0) - count * tl.sum(mean_k * mean_k, 1)
    rows = chunk * M + b
    size = wide * 2 * num_nodes * M
    store_landmarks(
        mean_k + origin[None, :], mean_v, count, scatter, rows, b < M, mean_k_ptr + size * E, mean_v_ptr + size * D,
        log_count_ptr + size, spread_ptr + size, E, D, WIDTH,
    )  # fmt: skip
    tl.store(label_ptr + wide * num_nodes * C + j, label.to(tl.int8))


@triton.jit(do_not_specialize=["num_nodes", "first_before", "first"])
def join_nodes_kernel(
    mean_k_ptr, mean_v_ptr, log_count_ptr, spread_ptr,  # see `chunk_nodes_kernel`; rows of this level written
    join_label_ptr,  # (G, 2 P M) int8, cluster of each landmark of the level before in its node of this level, written
    num_nodes, first_before, first, weight_scale,  # first nodes of the levels in the table; 1 / 2^level
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    WIDTH: tl.constexpr, PP: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Landmarks of one node, from the 2 M of the two nodes that it joins. PP: 2 M, 16 at least."""
    grid_dependency_control(PDL, False)
    node = tl.program_id(0)
    size = tl.program_id(1).to(tl.int64) * 2 * num_nodes * M
    mean_k_ptr += size * E
    mean_v_ptr += size * D
    log_count_ptr += size
    spread_ptr += size
    before = (first_before + 2 * node) * M
    p = tl.arange(0, PP)
    exists = p < 2 * M
    k = load_rows(mean_k_ptr, before + p, exists, E, E, BE)
    v = load_rows(mean_v_ptr, before + p, exists, D, D, BD)
    count = keys_of(tl.load(log_count_ptr + before + p, mask=exists, other=LOG_ZERO))
    spread = tl.load(spread_ptr + before + p, mask=exists, other=0.0)
    e = tl.arange(0, BE)
    origin = tl.load(mean_k_ptr + before * E + e, mask=e < E, other=0.0).to(tl.float32)
    b = tl.arange(0, MP)
    left = keys_of(tl.load(log_count_ptr + before + 2 * b, mask=b < M, other=LOG_ZERO))
    right = keys_of(tl.load(log_count_ptr + before + 2 * b + 1, mask=b < M, other=LOG_ZERO))
    # of two points the lighter one is farther from their mean
    takes_right = (right > 0.0) & ((left == 0.0) | (right < left))
    start = load_rows(mean_k_ptr, before + 2 * b + takes_right.to(tl.int32), b < M, E, E, BE).to(tl.float32)
    used = left + right > 0.0
    centroid = tl.where(used[:, None], start - origin[None, :], 0.0)
    points = tl.where((count > 0.0)[:, None], k.to(tl.float32) - origin[None, :], 0.0)
    points = points.to(k.dtype)
    norms = tl.sum(points.to(tl.float32) * points.to(tl.float32), 1)
    label, weights, total = assign(points, count * weight_scale, centroid, used, M, STEPS, PRECISION)
    share = 1.0 / tl.where(total > 0.0, total, 1.0)
    mean_k = tl.dot(tl.trans(weights), points, input_precision=PRECISION) * share[:, None]
    mean_v = tl.dot(tl.trans(weights), v, input_precision=PRECISION) * share[:, None]
    member = label[:, None] == b[None, :]
    number = tl.sum(tl.where(member, count[:, None], 0.0), 0)
    # of the parts about their means, and of these about the new one
    # with the rounded weights of the mean, as the difference would not cancel with others
    scatter = spread * spread * (WIDTH / LOG2E) + norms
    scatter = tl.sum(weights.to(tl.float32) * scatter[:, None], 0) * share - tl.sum(mean_k * mean_k, 1)
    scatter *= number
    rows = (first + node) * M + b
    store_landmarks(
        mean_k + origin[None, :], mean_v, number, scatter, rows, b < M, mean_k_ptr, mean_v_ptr, log_count_ptr,
        spread_ptr, E, D, WIDTH,
    )  # fmt: skip
    tl.store(join_label_ptr + size + before + p, label.to(tl.int8), mask=exists)
