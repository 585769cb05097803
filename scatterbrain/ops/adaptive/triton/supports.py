"""Kernels of the choice of supports and of the sorted orders. `plan.py` launches them; README.md has the rule.

The clusters of keys and the centroids of queries are found by kernels of `clusters/triton/kmeans.py` and `starts.py`.
Then, in this order:

- `count_kernel`: clusters of the queries, and how many keys and queries of a tile are in each cluster; beside it the
  landmarks, from the sums of the chunks.
- `moments_kernel`: means and mean squares of the logits of each key cluster, as the centroids of queries see them;
  beside them how many points are in each cluster, and in the tiles before.
- `support_kernel`: the key clusters that each query cluster takes; beside it the positions of keys and of queries in
  the order of their clusters, stable.
- `lists_kernel`: positions of the keys that a query cluster takes.

Only integers are counted by atomic operations, in `tl.histogram`: results are the same bit by bit from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.clusters.triton.kmeans import combine_sums, nearest, nearest_centroid
from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import LOG_ZERO, end_of_keys, load_rows, sequence_ptr

# The share `density` is an integer in units of 2 ** -DENSITY_BITS.
DENSITY_BITS = tl.constexpr(40)


@triton.jit
def sorted_side(is_query, key_label_ptr, query_label_ptr, num_keys, length, num_landmarks, num_query_landmarks):
    """Labels, numbers of points and of clusters, of the keys or of the queries."""
    number = tl.where(is_query, length, num_keys)
    clusters = tl.where(is_query, num_query_landmarks, num_landmarks)
    label_ptr = key_label_ptr
    if is_query:
        label_ptr = query_label_ptr
    label_ptr += tl.program_id(1).to(tl.int64) * number
    return label_ptr, number, clusters


@triton.jit
def load_labels(label_ptr, i, number, clusters):
    """Clusters of points i, -1 for none. A point with NaN may have any label: one past the last counts as the last."""
    label = tl.load(label_ptr + i, mask=i < number, other=-1).to(tl.int32)
    return tl.minimum(label, clusters - 1)


@triton.jit
def count_tile(
    is_query, tile, tiles, q_ptr, query_delta_ptr, query_bias_ptr, key_label_ptr, query_label_ptr, count_ptr,
    heads, num_keys, length, num_landmarks, num_query_landmarks, stride_qb, stride_qh, stride_qn,
    E: tl.constexpr, BE: tl.constexpr, QUERY_MB: tl.constexpr, QUERY_MP: tl.constexpr,
    BINS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store the numbers of the points of a tile in each cluster, of keys or of queries; of queries the clusters too.

    All queries of a sequence have one, those past its length too.
    """
    label_ptr, number, clusters = sorted_side(
        is_query, key_label_ptr, query_label_ptr, num_keys, length, num_landmarks, num_query_landmarks
    )
    group = tl.program_id(1)
    first = tile * BN
    if is_query:
        q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
        query_delta_ptr += group.to(tl.int64) * num_query_landmarks * E
        query_bias_ptr += group * QUERY_MP
        if QUERY_MP == QUERY_MB:
            b = tl.arange(0, QUERY_MB)
            delta = tl.trans(load_rows(query_delta_ptr, b, b < num_query_landmarks, E, E, BE))
            bias = tl.load(query_bias_ptr + b)
        for n in tl.range(first, tl.minimum(first + BN, length), BM, num_stages=STAGES):
            i = n + tl.arange(0, BM)
            q = load_rows(q_ptr, i, i < length, stride_qn, E, BE)
            if QUERY_MP == QUERY_MB:
                label, _ = nearest(tl.dot(q, delta, input_precision=PRECISION) + bias[None, :], QUERY_MB)
            else:
                label = nearest_centroid(
                    q, query_delta_ptr, query_bias_ptr, num_query_landmarks, E, BE, QUERY_MB, QUERY_MP, PRECISION
                )
            label = tl.minimum(label, num_query_landmarks - 1)
            tl.store(label_ptr + i, label.to(tl.int16), mask=i < length)
        # what other threads have stored is read
        tl.debug_barrier()
    i = first + tl.arange(0, BN)
    label = load_labels(label_ptr, i, number, clusters)
    # points without a cluster count as members of the first, and are taken off again
    outside = tl.sum((label < 0).to(tl.int32), 0)
    b = tl.arange(0, BINS)
    count = tl.histogram(tl.maximum(label, 0), BINS) - tl.where(b == 0, outside, 0)
    side = is_query.to(tl.int32) * tl.num_programs(1) + group
    tl.store(count_ptr + (side.to(tl.int64) * tiles + tile) * BINS + b, count)


@triton.jit
def count_kernel(
    q_ptr,
    query_delta_ptr, query_bias_ptr,  # (G, Q, E), (G, QUERY_MP): centroids of the queries
    key_label_ptr,  # (G, S) int16, -1 for none
    query_label_ptr,  # (G, T) int16, written
    count_ptr,  # (2, G, tiles, BINS) int32, written: numbers of the points of a tile in each cluster
    sum_ptr, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr,  # see `combine_kernel`, with COMBINE
    heads, num_keys, length, num_landmarks, num_query_landmarks, tiles, chunks, slots, stride_qb, stride_qh, stride_qn,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
    COMBINE: tl.constexpr, QUERY_MB: tl.constexpr, QUERY_MP: tl.constexpr,
    BINS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Numbers of the points of a tile in each cluster, of keys and of queries; of queries the clusters too.

    COMBINE: other programs do what `combine_kernel` does, which the counts do not need.
    """
    grid_dependency_control(PDL, False)
    part = tl.program_id(0)
    # queries take longest, so that they come first
    kind = tl.program_id(2)
    if kind == 2:
        if COMBINE and part * BLOCK < MP:
            combine_sums(
                part, tl.program_id(1), sum_ptr, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr,
                num_landmarks, chunks, slots, E, BE, D, BD, MP, BLOCK, True,
            )  # fmt: skip
    else:
        if part < tiles:
            count_tile(
                kind == 0, part, tiles, q_ptr, query_delta_ptr, query_bias_ptr, key_label_ptr, query_label_ptr,
                count_ptr, heads, num_keys, length, num_landmarks, num_query_landmarks, stride_qb, stride_qh, stride_qn,
                E, BE, QUERY_MB, QUERY_MP, BINS, BN, BM, PRECISION, STAGES,
            )  # fmt: skip


@triton.jit
def add_up_tiles(count_ptr, total_ptr, side, block, tiles, BINS: tl.constexpr, BB: tl.constexpr, BT: tl.constexpr):
    """Store the number of points of each of BB clusters in all earlier tiles, for each tile, and in all tiles."""
    b = block * BB + tl.arange(0, BB)
    count_ptr += side.to(tl.int64) * tiles * BINS
    total = tl.zeros((BB,), tl.int32)
    for first in range(0, tiles, BT):
        t = first + tl.arange(0, BT)
        ptrs = count_ptr + t[:, None] * BINS + b[None, :]
        exists = (t < tiles)[:, None]
        count = tl.load(ptrs, mask=exists, other=0)
        tl.store(ptrs, tl.cumsum(count, 0) - count + total[None, :], mask=exists)
        total += tl.sum(count, 0)
    tl.store(total_ptr + side * BINS + b, total)


@triton.jit
def order_tile(
    is_query, tile, tiles, key_label_ptr, query_label_ptr, count_ptr, total_ptr,
    key_order_ptr, key_start_ptr, query_order_ptr, query_start_ptr,
    num_keys, length, num_landmarks, num_query_landmarks, BINS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store places of the points of a tile in the order of their clusters, and, of the first, where clusters start."""
    label_ptr, number, clusters = sorted_side(
        is_query, key_label_ptr, query_label_ptr, num_keys, length, num_landmarks, num_query_landmarks
    )
    order_ptr = key_order_ptr
    start_ptr = key_start_ptr
    if is_query:
        order_ptr = query_order_ptr
        start_ptr = query_start_ptr
    group = tl.program_id(1)
    side = is_query.to(tl.int32) * tl.num_programs(1) + group
    b = tl.arange(0, BINS)
    total = tl.load(total_ptr + side * BINS + b)
    first = tile * BN
    if tile == 0:
        start_ptr += group * (clusters + 1)
        zero = tl.arange(0, 1)
        tl.store(start_ptr + zero, zero)
        tl.store(start_ptr + 1 + b, tl.cumsum(total, 0), mask=b < clusters)
    r = tl.arange(0, BN)
    label = load_labels(label_ptr, first + r, number, clusters)
    # the points of the tile in the order of their clusters, those of none last
    packed = tl.sort(tl.where(label >= 0, label, BINS) * BN + r)
    label = packed // BN
    i = first + packed % BN
    has_cluster = label < BINS
    count = tl.histogram(tl.where(has_cluster, label, 0), BINS)
    count -= tl.where(b == 0, BN - tl.sum(has_cluster.to(tl.int32), 0), 0)
    # points of the cluster in earlier tiles, and of earlier clusters in all others: the rest is the place in the tile
    count_ptr += (side.to(tl.int64) * tiles + tile) * BINS
    shift = tl.load(count_ptr + b) + tl.cumsum(total - count, 0) - (total - count)
    # looked up through memory: `tl.gather` is missing before Triton 3.3
    tl.store(count_ptr + b, shift)
    tl.debug_barrier()
    place = r + tl.load(count_ptr + label, mask=has_cluster, other=0)
    # points without a cluster are hidden by a length: they are last already
    place = tl.where(has_cluster, place, i)
    tl.store(order_ptr + group.to(tl.int64) * number + place, i, mask=i < number)


@triton.jit
def store_moments(
    part, chunks, tile, k_ptr, lengths_ptr, label_ptr, centre_ptr, delta_ptr, query_centre_ptr, query_delta_ptr,
    mean_ptr, square_ptr, sampled_ptr,
    heads, num_keys, num_landmarks, num_query_landmarks, chunk, stride_kb, stride_kh, stride_kn,
    E: tl.constexpr, BE: tl.constexpr, MB: tl.constexpr, MP: tl.constexpr, QB: tl.constexpr, BN: tl.constexpr,
    EVERY: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store the moments of chunk `part` of `chunks`, a tile of query clusters and landmarks, see `moments_kernel`."""
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    wide = group.to(tl.int64)
    block = tile % (MP // MB) * MB
    a = tile // (MP // MB) * QB + tl.arange(0, QB)
    b = block + tl.arange(0, MB)
    e = tl.arange(0, BE)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    label_ptr += wide * num_keys
    delta_ptr += wide * num_landmarks * E
    centre = tl.load(centre_ptr + group * BE + e)
    is_cluster = a < num_query_landmarks
    p = load_rows(query_delta_ptr + wide * num_query_landmarks * E, a, is_cluster, E, E, BE).to(tl.float32)
    p += tl.load(query_centre_ptr + group * BE + e)[None, :]
    p = p.to(k_ptr.dtype.element_ty)
    of_centre = tl.sum(p.to(tl.float32) * centre[None, :], 1)
    p = tl.trans(p)
    delta = load_rows(delta_ptr, b, b < num_landmarks, E, E, BE)
    mean = tl.dot(delta, p, input_precision=PRECISION)
    row = wide * num_query_landmarks + a
    if part == 0:
        tl.store(mean_ptr + row[None, :] * MP + b[:, None], mean, mask=is_cluster[None, :])
    # squares of float16 numbers would overflow
    square_type: tl.constexpr = tl.float32 if k_ptr.dtype.element_ty == tl.float32 else tl.bfloat16
    mean = mean.to(square_type)
    square = tl.zeros((MB, QB), tl.float32)
    sampled = tl.zeros((MB,), tl.int32)
    first = part * chunk
    num_rows = (num_keys + EVERY - 1) // EVERY
    for n in tl.range(first, tl.minimum(first + chunk, num_rows), BN, num_stages=STAGES):
        j = (n + tl.arange(0, BN)) * EVERY
        exists = j < end
        k = load_rows(k_ptr, j, exists, stride_kn, E, BE)
        label = tl.load(label_ptr + j, mask=exists, other=-1).to(tl.int32)
        logits = tl.dot(k, p, input_precision=PRECISION) - of_centre[None, :]
        # less the mean of the cluster
        one_hot = (label[:, None] == b[None, :]).to(square_type)
        logits -= tl.dot(one_hot, mean, input_precision=PRECISION)
        is_member = b[:, None] == label[None, :]
        square = tl.dot(is_member.to(square_type), (logits * logits).to(square_type), square, input_precision=PRECISION)
        if EVERY > 1:
            # others count as members of the first cluster of the block, and are taken off again
            in_block = (label >= block) & (label < block + MB)
            sampled += tl.histogram(tl.where(in_block, label - block, 0), MB)
            sampled -= tl.where(b == block, BN - tl.sum(in_block.to(tl.int32), 0), 0)
    square_ptrs = square_ptr + (row * chunks + part)[None, :] * MP + b[:, None]
    tl.store(square_ptrs, square, mask=is_cluster[None, :])
    if EVERY > 1 and tile < MP // MB:
        tl.store(sampled_ptr + (wide * chunks + part) * MP + b, sampled)


@triton.jit
def moments_kernel(
    k_ptr, lengths_ptr,
    label_ptr,  # (G, S) int16
    centre_ptr, delta_ptr,  # (G, BE), (G, M, E): landmarks less their centre
    query_centre_ptr, query_delta_ptr,  # (G, BE), (G, Q, E): centroids of the queries
    mean_ptr,  # (G, Q, MP) float32, written
    square_ptr,  # (G, Q, chunks, MP) float32, written
    sampled_ptr,  # (G, chunks, MP) int32, written with EVERY > 1: numbers of keys in the sums
    count_ptr,  # (2, G, tiles, BINS) int32: numbers of points, replaced by those in the tiles before
    total_ptr,  # (2, G, BINS) int32, written: sizes of the clusters
    heads, num_keys, num_landmarks, num_query_landmarks, chunk, chunks, tiles, stride_kb, stride_kh, stride_kn,
    E: tl.constexpr, BE: tl.constexpr, MB: tl.constexpr, MP: tl.constexpr, QB: tl.constexpr, BN: tl.constexpr,
    EVERY: tl.constexpr, BINS: tl.constexpr, BB: tl.constexpr, BT: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of the centroids of QB query clusters with MB landmarks, and sums of squares over the keys of a chunk.

    `mean` is p_a.(c_b - centre), without the scale of the logits, and `square` the sum of (p_a.(k - c_b))^2 over the
    keys of cluster b. Other programs add up the numbers of points of the tiles, which the moments do not need.

    EVERY: a chunk has the first of each so many keys.
    BLOCKS: pairs of QB query clusters and MB landmarks; 0 for no moments. Their programs come first: the others would
        keep them waiting.
    """
    grid_dependency_control(PDL, False)
    part = tl.program_id(0)
    kind = tl.program_id(2)
    if kind >= BLOCKS:
        if part * BB < BINS:
            side = (kind - BLOCKS) * tl.num_programs(1) + tl.program_id(1)
            add_up_tiles(count_ptr, total_ptr, side, part, tiles, BINS, BB, BT)
    else:
        if BLOCKS > 0 and part < chunks:
            store_moments(
                part, chunks, kind, k_ptr, lengths_ptr, label_ptr, centre_ptr, delta_ptr,
                query_centre_ptr, query_delta_ptr, mean_ptr, square_ptr, sampled_ptr,
                heads, num_keys, num_landmarks, num_query_landmarks, chunk, stride_kb, stride_kh, stride_kn,
                E, BE, MB, MP, QB, BN, EVERY, HAS_LENGTHS, PRECISION, STAGES,
            )  # fmt: skip


@triton.jit
def choose_support(
    cluster, mean_ptr, square_ptr, sampled_ptr, total_ptr, lengths_ptr, end_ptr, word_ptr, exact_count_ptr,
    heads, num_keys, num_landmarks, num_query_landmarks, chunks, density, scale, tolerance,
    MP: tl.constexpr, MS: tl.constexpr, BINS: tl.constexpr, WORDS: tl.constexpr, ROUNDS: tl.constexpr,
    EVERY: tl.constexpr, LEAST_VARIANCE: tl.constexpr, HAS_TOLERANCE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Store the key clusters that a query cluster takes, see `support_kernel`."""
    group = tl.program_id(1)
    row = group.to(tl.int64) * num_query_landmarks + cluster
    b = tl.arange(0, MS)
    exists = b < num_landmarks
    squares = tl.zeros((MS,), tl.float32)
    sampled = tl.zeros((MS,), tl.int32)
    square_ptr += row * chunks * MP + b
    sampled_ptr += group.to(tl.int64) * chunks * MP + b
    for c in tl.range(0, chunks, num_stages=8):
        squares += tl.load(square_ptr + c * MP, mask=exists, other=0.0)
        if EVERY > 1:
            sampled += tl.load(sampled_ptr + c * MP, mask=exists, other=0)
    mean = tl.load(mean_ptr + row * MP + b, mask=exists, other=0.0) * scale
    total_ptr += group * BINS
    size = tl.load(total_ptr + b, mask=exists, other=0)
    members = tl.maximum(size, 1).to(tl.float32)
    if EVERY == 1:
        sampled = size
    variance = tl.maximum(squares / tl.maximum(sampled, 1).to(tl.float32) * (scale * scale), LEAST_VARIANCE)
    # 1 - exp(-variance), by its series where the difference would cancel
    series = variance * (1.0 - variance * (0.5 - variance * (1 / 6 - variance * (1 / 24))))
    share = tl.where(variance < 0.02, series, 1.0 - tl.exp(-variance))
    log_weight = tl.where(size > 0, mean + 0.5 * variance + tl.log(members), float("-inf"))
    log_loss = log_weight + 0.5 * tl.log(share)

    # sorted by descending loss, equal ones by ascending index: signed integers are in the order of such floats
    bits = log_loss.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = ((bits ^ -1).to(tl.int64) << 32) | b.to(tl.int64)
    packed = tl.sort(packed)
    place = packed.to(tl.int32)
    in_order = place < num_landmarks
    size = tl.load(total_ptr + place, mask=in_order, other=0)
    wanted = size > 0
    if HAS_TOLERANCE:
        largest = tl.maximum(tl.max(log_weight, 0), LOG_ZERO)
        weight = tl.sum(tl.exp(log_weight - largest), 0)
        bits = (packed >> 32).to(tl.int32) ^ -1
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        loss = tl.where(wanted, tl.exp(bits.to(tl.float32, bitcast=True) - largest), 0.0)
        # what landmarks would misplace without this cluster and those after it
        wanted = wanted & (tl.cumsum(loss, 0, reverse=True) > tolerance * weight)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    slack: tl.constexpr = 1099512  # 1e-6, see `exact_keys`
    left = ((end.to(tl.int64) * density + slack) >> DENSITY_BITS).to(tl.int32)
    taken = tl.zeros((MS,), tl.int32)
    for _ in tl.static_range(ROUNDS):
        fits = tl.where(wanted & (taken == 0) & (size <= left), size, 0)
        new = (fits > 0) & (tl.cumsum(fits, 0) <= left)
        taken = tl.where(new, size, taken)
        left -= tl.sum(tl.where(new, size, 0), 0)
    # back to the order of the clusters, through memory
    end_ptr += row * MS
    tl.store(end_ptr + place, taken)
    tl.debug_barrier()
    taken = tl.load(end_ptr + b)
    tl.debug_barrier()
    tl.store(end_ptr + b, tl.cumsum(taken, 0))
    tl.store(exact_count_ptr + row, tl.sum(taken, 0))
    flags = tl.reshape((taken > 0).to(tl.int32) << (b & 31), (MS // 32, 32))
    w = tl.arange(0, MS // 32)
    tl.store(word_ptr + row * WORDS + w, tl.sum(flags, 1), mask=w < WORDS)


@triton.jit
def support_kernel(
    mean_ptr, square_ptr, sampled_ptr,  # see `moments_kernel`
    total_ptr,  # (2, G, BINS) int32: sizes of the clusters
    lengths_ptr,
    end_ptr,  # (G, Q, MS) int32, written: ends of the clusters in the list of a query cluster
    word_ptr,  # (G, Q, WORDS) int32, written: bits of the clusters taken
    exact_count_ptr,  # (G, Q) int32, written
    key_label_ptr, query_label_ptr,  # see `count_kernel`
    count_ptr,  # see `moments_kernel`; overwritten
    key_order_ptr, key_start_ptr,  # (G, S), (G, M + 1) int32, written
    query_order_ptr, query_start_ptr,  # (G, T), (G, Q + 1) int32, written
    heads, num_keys, length, num_landmarks, num_query_landmarks, tiles, chunks,
    density,  # in units of 2 ** -DENSITY_BITS
    scale, tolerance,
    MP: tl.constexpr, MS: tl.constexpr, BINS: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr,
    ROUNDS: tl.constexpr, EVERY: tl.constexpr, LEAST_VARIANCE: tl.constexpr, HAS_TOLERANCE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Key clusters that one query cluster takes.

    Other programs store the places of the points of a tile in the order of their clusters, and where clusters start,
    which the choice does not need.

    MS: number of landmarks, padded to a power of two, a multiple of 32.
    EVERY: sums of squares are those of the first of each so many keys.
    """
    grid_dependency_control(PDL, False)
    part = tl.program_id(0)
    kind = tl.program_id(2)
    # orders take longer, so that they come first
    if kind == 2:
        if part < num_query_landmarks:
            choose_support(
                part, mean_ptr, square_ptr, sampled_ptr, total_ptr, lengths_ptr, end_ptr, word_ptr, exact_count_ptr,
                heads, num_keys, num_landmarks, num_query_landmarks, chunks, density, scale, tolerance,
                MP, MS, BINS, WORDS, ROUNDS, EVERY, LEAST_VARIANCE, HAS_TOLERANCE, HAS_LENGTHS,
            )  # fmt: skip
    else:
        if part < tiles:
            order_tile(
                kind == 0, part, tiles, key_label_ptr, query_label_ptr, count_ptr, total_ptr,
                key_order_ptr, key_start_ptr, query_order_ptr, query_start_ptr,
                num_keys, length, num_landmarks, num_query_landmarks, BINS, BN,
            )  # fmt: skip


@triton.jit
def lists_kernel(
    end_ptr,  # (G, Q, MS) int32, see `support_kernel`
    key_order_ptr, key_start_ptr,  # (G, S), (G, M + 1) int32
    exact_key_ptr,  # (G, Q, K) int32, written
    num_keys, num_landmarks, num_query_landmarks, num_exact,
    MS: tl.constexpr, STEPS: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BP places of the list of keys of one query cluster.

    STEPS: logarithm of MS to base 2.
    """
    grid_dependency_control(PDL, False)
    group = tl.program_id(2)
    wide = group.to(tl.int64)
    row = wide * num_query_landmarks + tl.program_id(1)
    place = tl.program_id(0) * BP + tl.arange(0, BP)
    end_ptr += row * MS
    count = tl.load(end_ptr + MS - 1)
    if tl.program_id(0) * BP < count:
        exists = place < count
        # the first cluster that ends behind the place
        cluster = tl.zeros((BP,), tl.int32)
        for step in tl.static_range(STEPS):
            width = MS >> (step + 1)
            end = tl.load(end_ptr + cluster + (width - 1))
            cluster += tl.where(end <= place, width, 0)
        cluster = tl.where(exists, cluster, 0)
        before = tl.load(end_ptr + cluster - 1, mask=cluster > 0, other=0)
        start = tl.load(key_start_ptr + group * (num_landmarks + 1) + cluster)
        key = tl.load(key_order_ptr + wide * num_keys + start + place - before, mask=exists, other=0)
        tl.store(exact_key_ptr + row * num_exact + place, key, mask=exists)
