"""Kernels that make the nodes: clusters of the keys of a chunk, and clusters of the landmarks of two nodes.

Mean keys are kept relative to a centre, the mean of some keys of the first chunk, which every query that sees landmarks
sees too. A large component that all keys share is in the centre and costs the rounded means no digits. The squared
distance of a key x from a mean c = delta + centre is |x|^2 - 2 (x.delta - delta.(delta / 2 + centre)), up to what is
the same for all means. With HAS_VALUES distances of values count too, see `value_factor`, and mean values are relative
to that of the node.

Landmarks of a sequence lie in one table: those of level l begin at node 2 P - (2 P >> l), P = n - w for n chunks of
which a query sees w before its own exactly. Level l has (P >> l) - 1 nodes. Node P - 1, after those of level 0, has no
keys: it fills up tiles of nodes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.clusters.triton.kmeans import nearest
from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import LOG_ZERO, end_of_keys, load_rows, sequence_ptr, store_rows
from scatterbrain.ops.scatterbrain.triton.fwd import row_sums

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def centre_kernel(
    k_ptr, lengths_ptr,
    centre_ptr,  # (G, BE) float32, written
    heads, num_keys, stride_kb, stride_kh, stride_kn,
    E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, HAS_LENGTHS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Centre of one sequence: the mean of 16 keys that are spread over the first chunk, 0 without keys."""
    grid_dependency_control(PDL, True)
    group = tl.program_id(0)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    step: tl.constexpr = C // 16
    row = tl.maximum(tl.minimum(tl.arange(0, 16) * step + step // 2, end - 1), 0)
    k = load_rows(sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh), row, row < end, stride_kn, E, BE)
    tl.store(centre_ptr + group * BE + tl.arange(0, BE), tl.sum(k.to(tl.float32), 0) * (1 / 16))


@triton.jit
def value_factor(start, start_v, used, value_weight):
    """Mean (BD,) of the values of initial centroids (MP, BD), and factor of distances of values beside those of keys.

    It is `value_weight` times the ratio of the standard deviations, 0 where that is not finite; see `with_values`.
    """
    share = tl.where(used, share_of(tl.sum(used.to(tl.float32), 0)), 0.0)[:, None]
    apart = start - tl.sum(share * start, 0)[None, :]
    of_keys = tl.sum(tl.sum(share * apart * apart, 1), 0)
    mean = tl.sum(share * start_v, 0)
    apart_v = start_v - mean[None, :]
    of_values = tl.sum(tl.sum(share * apart_v * apart_v, 1), 0)
    of_values = tl.maximum(of_values, 1e-8 * (of_values + tl.sum(mean * mean, 0)))
    is_normal = (of_values > 1.2e-38) & (of_values < 3e38)
    factor = value_weight * tl.sqrt(of_keys) / tl.sqrt(tl.where(is_normal, of_values, 1.0))
    return mean, tl.where(is_normal, factor, 0.0)


@triton.jit
def value_score(values, delta, centre, factor, PRECISION: tl.constexpr):
    """What values (P, BD) add to the scores of means (MP, BD), which are relative to the centre (BD,)."""
    # half of a difference of two values has no overflow
    half = (0.5 * delta).to(values.dtype)
    wide = half.to(tl.float32)
    score = tl.dot(values, tl.trans(half), input_precision=PRECISION)
    score -= tl.sum(wide * (wide + centre[None, :]), 1)[None, :]
    # one factor after the other, as their product may overflow; values that are not finite have the factor 0
    return tl.where(factor > 0.0, score * (2.0 * factor) * factor, 0.0)


@triton.jit
def assign(
    points, values, weight, delta, delta_v, used, centre, centre_v, factor, M: tl.constexpr, STEPS: tl.constexpr,
    CENTRED: tl.constexpr, HAS_VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Clusters of weighted points (P, BE), weight 0 for none, from initial centroids (MP, BE): M, and of these some.

    Centroids are relative to the centre (BE,), and with CENTRED points too. With HAS_VALUES distances are those of
    values (P, BD) as well, with initial centroids delta_v (MP, BD) relative to centre_v (BD,) and a factor.

    Returns the clusters (P,), -1 for none, their weights (P, MP) in the dtype of the points, and sums of these (MP,).
    """
    clusters = tl.arange(0, delta.shape[0])
    for step in tl.static_range(STEPS + 1):
        rounded = delta.to(points.dtype)
        wide = rounded.to(tl.float32)
        bias = 0.5 * wide if CENTRED else 0.5 * wide + centre[None, :]
        bias = tl.where(used, -tl.sum(wide * bias, 1), LOG_ZERO)
        score = tl.dot(points, tl.trans(rounded), input_precision=PRECISION) + bias[None, :]
        if HAS_VALUES:
            score += value_score(values, delta_v, centre_v, factor, PRECISION)
        label, _ = nearest(score, delta.shape[0])
        # more than M only for points that are not finite
        label = tl.where((weight > 0.0) & (label < M), label, -1)
        weights = tl.where(label[:, None] == clusters[None, :], weight[:, None], 0.0).to(points.dtype)
        total = row_sums(tl.trans(weights))
        if step < STEPS:
            mean = tl.dot(tl.trans(weights), points, input_precision=PRECISION) * share_of(total)[:, None]
            if not CENTRED:
                mean -= centre[None, :]
            delta = tl.where((total > 0.0)[:, None], mean, delta)
            if HAS_VALUES:
                mean_v = tl.dot(tl.trans(weights), values, input_precision=PRECISION) * share_of(total)[:, None]
                delta_v = tl.where((total > 0.0)[:, None], mean_v - centre_v[None, :], delta_v)
    return label, weights, total


@triton.jit
def share_of(total):
    """1 / total, 1 where it is zero."""
    return 1.0 / tl.where(total > 0.0, total, 1.0)


@triton.jit
def chunk_nodes_kernel(
    k_ptr, v_ptr, lengths_ptr,
    centre_ptr,  # see `centre_kernel`
    delta_ptr,  # (G, 2 P M, E) mean keys relative to the centre, rows of level 0 written, as of the next
    mean_v_ptr,  # (G, 2 P M, D) mean values
    count_ptr,  # (G, 2 P M) float32 numbers of keys
    scatter_ptr,  # (G, 2 P M) float32 sums of the squared distances of the keys from their mean
    label_ptr,  # (G, P C) int8, cluster of each key, written; -1 in node P - 1
    heads, num_keys, num_nodes, value_weight,  # num_nodes: P
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, STRETCH: tl.constexpr, STEPS: tl.constexpr, HAS_VALUES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Landmarks of one chunk. STRETCH: keys of a stretch, C / M, whose first is an initial centroid.

    HAS_VALUES: cluster keys and values, with `value_weight`.
    """
    grid_dependency_control(PDL, False)
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    centre = tl.load(centre_ptr + group * BE + tl.arange(0, BE))
    end = tl.minimum(end, tl.where(chunk < num_nodes - 1, (chunk + 1) * C, 0))
    j = chunk * C + tl.arange(0, C)
    exists = j < end
    k = load_rows(k_ptr, j, exists, stride_kn, E, BE)
    v = load_rows(v_ptr, j, exists, stride_vn, D, BD)
    b = tl.arange(0, MP)
    first = chunk * C + b * STRETCH
    used = (b < M) & (first < end)
    weight = tl.where(exists, 1.0, 0.0)
    delta = load_rows(k_ptr, first, used, stride_kn, E, BE).to(tl.float32) - centre[None, :]
    delta_v, centre_v, factor = 0.0, 0.0, 0.0
    if HAS_VALUES:
        delta_v = load_rows(v_ptr, first, used, stride_vn, D, BD).to(tl.float32)
        centre_v, factor = value_factor(delta, delta_v, used, value_weight)
        delta_v -= centre_v[None, :]
    label, weights, count = assign(
        k, v, weight, delta, delta_v, used, centre, centre_v, factor, M, STEPS, False, HAS_VALUES, PRECISION
    )
    share = share_of(count)
    delta = tl.dot(tl.trans(weights), k, input_precision=PRECISION) * share[:, None] - centre[None, :]
    mean_v = tl.dot(tl.trans(weights), v, input_precision=PRECISION) * share[:, None]
    offset = k.to(tl.float32) - centre[None, :]
    norms = tl.sum(offset * offset, 1)
    scatter = tl.sum(weights.to(tl.float32) * norms[:, None], 0) - count * tl.sum(delta * delta, 1)
    rows = chunk * M + b
    size = wide * 2 * num_nodes * M
    store_rows(delta_ptr + size * E, delta, rows, b < M, E, E)
    store_rows(mean_v_ptr + size * D, mean_v, rows, b < M, D, D)
    tl.store(count_ptr + size + rows, count, mask=b < M)
    tl.store(scatter_ptr + size + rows, scatter, mask=b < M)
    tl.store(label_ptr + wide * num_nodes * C + j, label.to(tl.int8))


@triton.jit(do_not_specialize=["num_nodes", "first_before", "first"])
def join_nodes_kernel(
    delta_ptr, mean_v_ptr, count_ptr, scatter_ptr,  # see `chunk_nodes_kernel`; rows of this level written
    join_label_ptr,  # (G, 2 P M) int8, cluster of each landmark of the level before in its node of this level, written
    num_nodes, first_before, first, weight_scale, value_weight,  # first nodes of the levels in the table; 1 / 2^level
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    PP: tl.constexpr, STEPS: tl.constexpr, HAS_VALUES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Landmarks of one node, from the 2 M of the two nodes that it joins. PP: 2 M, 16 at least."""
    grid_dependency_control(PDL, False)
    node = tl.program_id(0)
    size = tl.program_id(1).to(tl.int64) * 2 * num_nodes * M
    delta_ptr += size * E
    mean_v_ptr += size * D
    count_ptr += size
    scatter_ptr += size
    before = (first_before + 2 * node) * M
    p = tl.arange(0, PP)
    exists = p < 2 * M
    points = load_rows(delta_ptr, before + p, exists, E, E, BE)
    v = load_rows(mean_v_ptr, before + p, exists, D, D, BD)
    count = tl.load(count_ptr + before + p, mask=exists, other=0.0)
    scatter = tl.load(scatter_ptr + before + p, mask=exists, other=0.0)
    b = tl.arange(0, MP)
    left = tl.load(count_ptr + before + 2 * b, mask=b < M, other=0.0)
    right = tl.load(count_ptr + before + 2 * b + 1, mask=b < M, other=0.0)
    # of two points the lighter one
    takes_right = (right > 0.0) & ((left == 0.0) | (right < left))
    used = left + right > 0.0
    weight = count * weight_scale
    lightest = before + 2 * b + takes_right.to(tl.int32)
    start = load_rows(delta_ptr, lightest, b < M, E, E, BE).to(tl.float32)
    start_v, centre_v, factor = 0.0, 0.0, 0.0
    if HAS_VALUES:
        start_v = load_rows(mean_v_ptr, lightest, b < M, D, D, BD).to(tl.float32)
        centre_v, factor = value_factor(start, start_v, used, value_weight)
        start_v -= centre_v[None, :]
    label, weights, total = assign(
        points, v, weight, start, start_v, used, 0.0, centre_v, factor, M, STEPS, True, HAS_VALUES, PRECISION
    )
    share = share_of(total)
    delta = tl.dot(tl.trans(weights), points, input_precision=PRECISION) * share[:, None]
    mean_v = tl.dot(tl.trans(weights), v, input_precision=PRECISION) * share[:, None]
    wide_points = points.to(tl.float32)
    norms = tl.sum(wide_points * wide_points, 1)
    number = tl.sum(tl.where(label[:, None] == b[None, :], count[:, None], 0.0), 0)
    # of the parts about their means, and of these about the new one
    # with the rounded weights of the mean, as the difference would not cancel with others
    scatter = norms + scatter * share_of(count)
    scatter = tl.sum(weights.to(tl.float32) * scatter[:, None], 0) * share - tl.sum(delta * delta, 1)
    rows = (first + node) * M + b
    store_rows(delta_ptr, delta, rows, b < M, E, E)
    store_rows(mean_v_ptr, mean_v, rows, b < M, D, D)
    tl.store(count_ptr + rows, number, mask=b < M)
    tl.store(scatter_ptr + rows, scatter * number, mask=b < M)
    tl.store(join_label_ptr + size + before + p, label.to(tl.int8), mask=exists)


@triton.jit
def landmark_statistics_kernel(
    count_ptr, scatter_ptr,  # see `chunk_nodes_kernel`
    log_count_ptr,  # log2 of the numbers of keys, LOG_ZERO for a landmark without keys, written
    spread_ptr,  # root mean square distances of the keys from their mean, over sqrt(E / log2(e)), written
    limit_ptr,  # limits sqrt(2 log2 n) of sigma for n keys, written
    size, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logarithms and spreads of BLOCK landmarks of `size`. WIDTH: width of the keys without padding."""
    grid_dependency_control(PDL, False)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < size
    count = tl.load(count_ptr + row, mask=exists, other=0.0)
    scatter = tl.load(scatter_ptr + row, mask=exists, other=0.0)
    count_or_one = tl.maximum(count, 1.0)
    log_count = tl.log2(count_or_one)
    tl.store(log_count_ptr + row, tl.where(count > 0.0, log_count, LOG_ZERO), mask=exists)
    tl.store(limit_ptr + row, tl.sqrt(2.0 * log_count), mask=exists)
    tl.store(spread_ptr + row, tl.sqrt(tl.maximum(scatter, 0.0) * (LOG2E / WIDTH) / count_or_one), mask=exists)
