"""Forward kernel: softmax over landmarks, with exact weights in place of the landmarks' in a window."""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import (
    LOG_ZERO,
    NO_KEYS,
    end_of_keys,
    in_window,
    load_rows,
    sequence_ptr,
    store_rows,
)
from scatterbrain.ops.scatterbrain.triton.fwd import NO_POSITION, partial_row_sums, row_sums

# Least normaliser, relative to the largest weight. A landmark whose keys are all in the window leaves rounding errors
# of its weight. Where logits differ by thousands these are more than the keys' exact weights, and the difference could
# be zero or negative, or so small that the output is many times the values; elsewhere what remains is larger, see
# README.md. Two bounds: for roundings of weights and mean values, and, for each unit of the largest logit, of logits.
LEAST_TOTAL = tl.constexpr(2.0**-10)
LEAST_TOTAL_BFLOAT16 = tl.constexpr(2.0**-8)
LEAST_TOTAL_OF_LOGIT = tl.constexpr(2.0**-21)


@triton.jit
def window_labels(j, end, label_ptr):
    """Clusters (rows,) of keys j. To be loaded early: the loads of the centroids wait for them."""
    return tl.load(label_ptr + j, mask=(j >= 0) & (j < end), other=0).to(tl.int32)


@triton.jit
def window_rows(
    j, label, end, k_ptr, v_ptr, delta_ptr, stride_kn, stride_vn,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Keys j, their values, the centroids of their clusters (relative to the centre), and positions for `in_window`."""
    exists = (j >= 0) & (j < end)
    delta = load_rows(delta_ptr, label, exists, E, E, BE)
    k = load_rows(k_ptr, j, exists, stride_kn, E, BE)
    v = load_rows(v_ptr, j, exists, stride_vn, D, BD)
    return k, v, delta, tl.where(exists, j, NO_POSITION)


@triton.jit
def words_of_queries(taken_ptr, query_label_ptr, group, i, valid, num_queries, num_landmarks, CLUSTERS: tl.constexpr):
    """Pointers (rows,) to the bits of the clusters that queries i take, of (G, CLUSTERS, words) and (G, T)."""
    cluster = tl.load(query_label_ptr + group.to(tl.int64) * num_queries + i, mask=valid, other=0).to(tl.int32)
    return taken_ptr + (group * CLUSTERS + cluster) * ((num_landmarks + 31) // 32)


@triton.jit
def load_words(word_ptr, num_landmarks, MP: tl.constexpr):
    """The words at pointers (rows,), for `not_taken`: with up to 128 landmarks all four, else what is not read."""
    last = (num_landmarks - 1) >> 5
    first = tl.load(word_ptr)
    second, third, fourth = first, first, first
    if MP <= 128:
        if MP > 32:
            second = tl.load(word_ptr + tl.minimum(1, last))
        if MP > 64:
            third = tl.load(word_ptr + tl.minimum(2, last))
        if MP > 96:
            fourth = tl.load(word_ptr + tl.minimum(3, last))
    return first, second, third, fourth


@triton.jit
def not_taken(word_ptr, first, second, third, fourth, label, MP: tl.constexpr):
    """Whether bits `label` are not set: in words from `load_words`, or at pointers to words with many landmarks.

    Words and labels broadcast against each other.
    """
    column = label >> 5
    if MP <= 128:
        # by selection: a load of each element takes longer
        word = first
        if MP > 32:
            word = tl.where(column == 1, second, word)
        if MP > 64:
            word = tl.where(column == 2, third, word)
        if MP > 96:
            word = tl.where(column == 3, fourth, word)
    else:
        word = tl.load(word_ptr + column)
    return ((word >> (label & 31)) & 1) == 0


@triton.jit
def landmark_not_taken(
    word_ptr, first, second, third, fourth, b, block, num_landmarks, MB: tl.constexpr, MP: tl.constexpr
):
    """Whether queries (rows,) with these words leave out none of the landmarks b, MB from `block` on: (rows, MB)."""
    if MB == 64 and MP > 64:
        if MP <= 128:
            low = tl.where(block > 0, third, first)
            high = tl.where(block > 0, fourth, second)
        else:
            last = (num_landmarks - 1) >> 5
            low = tl.load(word_ptr + tl.minimum(block >> 5, last))
            high = tl.load(word_ptr + tl.minimum((block >> 5) + 1, last))
        word = tl.where(((b & 32) == 0)[None, :], low[:, None], high[:, None])
        free = ((word >> (b & 31)[None, :]) & 1) == 0
    else:
        # padding may lie past the words
        label = tl.minimum(b, num_landmarks - 1)
        free = not_taken(
            word_ptr[:, None], first[:, None], second[:, None], third[:, None], fourth[:, None], label[None, :], MP
        )
    return free


@triton.jit
def dot_centre(q, centre):
    """Products (rows,) in float32 of queries with the centre of the keys."""
    return tl.sum(q.to(tl.float32) * centre[None, :], 1)


@triton.jit
def window_fwd(
    j, label, i, q, offset, normaliser, acc, running_max, total, end,
    k_ptr, v_ptr, delta_ptr, word_ptr, first, second, third, fourth, stride_kn, stride_vn, qk_scale,
    E: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CLUSTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Put exact weights in place of the landmarks' for the window's keys among j, of clusters `label`, for queries i.

    Returns the new normaliser of the window (rows, 4), accumulator, running maximum, and normaliser of the landmarks.
    """
    k, v, delta, position = window_rows(
        j, label, end, k_ptr, v_ptr, delta_ptr, stride_kn, stride_vn, E, q.shape[1], D, acc.shape[1]
    )
    inside = in_window(position[None, :], i[:, None], LEFT, RIGHT)
    if CLUSTERS > 0:
        inside = inside & not_taken(
            word_ptr[:, None], first[:, None], second[:, None], third[:, None], fourth[:, None], label[None, :], MP
        )
    exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale - offset[:, None]
    exact = tl.where(inside, exact, LOG_ZERO)
    estimate = tl.dot(q, tl.trans(delta), input_precision=PRECISION) * qk_scale
    new_max = tl.maximum(running_max, tl.max(exact, 1))
    decay = tl.exp2(running_max - new_max)
    weights = tl.exp2(exact - new_max[:, None]) - tl.exp2(estimate - new_max[:, None])
    weights = tl.where(inside, weights, 0.0)
    normaliser = normaliser * decay[:, None] + partial_row_sums(weights)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return normaliser, acc, new_max, total * decay


@triton.jit
def band_keys(first_key, ROWS: tl.constexpr, BAND: tl.constexpr):
    """Positions (ROWS / 16 * BAND,) of the keys of each 16 of ROWS queries, the first of all from `first_key` on."""
    groups: tl.constexpr = ROWS // 16
    j = first_key + tl.arange(0, groups)[:, None] * 16 + tl.arange(0, BAND)[None, :]
    return tl.reshape(j, (groups * BAND,))


@triton.jit
def band_fwd(
    j, label, i, q, offset, acc, running_max, total, end,
    k_ptr, v_ptr, delta_ptr, word_ptr, first, second, third, fourth, stride_kn, stride_vn, qk_scale,
    E: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CLUSTERS: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same as `window_fwd` for a narrow window, of which every 16 queries see no more than BAND keys.

    Each group of 16 queries has its own keys, see `band_keys`: of a tile of all keys, most are in the window of few of
    the queries.

    Returns the new accumulator, running maximum, and normaliser.
    """
    rows: tl.constexpr = q.shape[0]
    groups: tl.constexpr = rows // 16
    k, v, delta, position = window_rows(
        j, label, end, k_ptr, v_ptr, delta_ptr, stride_kn, stride_vn, E, q.shape[1], D, acc.shape[1]
    )
    position = tl.reshape(position, (groups, 1, BAND))
    inside = in_window(position, tl.reshape(i, (groups, 16, 1)), LEFT, RIGHT)
    if CLUSTERS > 0:
        shape: tl.constexpr = (groups, 16, 1)
        inside = inside & not_taken(
            tl.reshape(word_ptr, shape), tl.reshape(first, shape), tl.reshape(second, shape),
            tl.reshape(third, shape), tl.reshape(fourth, shape), tl.reshape(label, (groups, 1, BAND)), MP,
        )  # fmt: skip
    q = tl.reshape(q, (groups, 16, q.shape[1]))
    k = tl.permute(tl.reshape(k, (groups, BAND, q.shape[2])), (0, 2, 1))
    delta = tl.permute(tl.reshape(delta, (groups, BAND, q.shape[2])), (0, 2, 1))
    v = tl.reshape(v, (groups, BAND, acc.shape[1]))
    exact = tl.dot(q, k, input_precision=PRECISION) * qk_scale - tl.reshape(offset, (groups, 16, 1))
    exact = tl.where(inside, exact, LOG_ZERO)
    estimate = tl.dot(q, delta, input_precision=PRECISION) * qk_scale
    new_max = tl.maximum(running_max, tl.reshape(tl.max(exact, 2), (rows,)))
    reference = tl.reshape(new_max, (groups, 16, 1))
    weights = tl.where(inside, tl.exp2(exact - reference) - tl.exp2(estimate - reference), 0.0)
    decay = tl.exp2(running_max - new_max)
    total = total * decay + tl.reshape(tl.sum(weights, 2), (rows,))
    added = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return acc * decay[:, None] + tl.reshape(added, (rows, acc.shape[1])), new_max, total


@triton.jit
def landmark_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lengths_ptr,
    centre_ptr, delta_ptr, mean_v_ptr, log_count_ptr, label_ptr,  # see `kmeans.py`
    lse_ptr,  # (G, T) log2 normaliser of each query, with STATISTICS
    query_label_ptr,  # (G, T) int16 cluster of each query, with CLUSTERS
    taken_ptr,  # (G, CLUSTERS, words) int32, bits of the key clusters that a query cluster takes, with CLUSTERS
    heads, num_queries, num_keys, num_landmarks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    qk_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MB: tl.constexpr, MP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, WINDOW_TILES: tl.constexpr,
    BAND: tl.constexpr, UNROLLED: tl.constexpr, QUERY_TILES: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    STATISTICS: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """QUERY_TILES tiles of BM queries of one sequence: MB landmarks at a time, then the window's keys.

    Landmarks count all keys of their clusters. A key in the window then adds its exact weight less its landmark's:
    the logit of a landmark is the mean of its members', so that what remains is no small difference of large numbers,
    see README.md.

    BAND: keys that 16 queries see in a narrow window, see `band_fwd`; 0 for tiles of BN keys.
    UNROLLED: WINDOW_TILES, or 0 where these are many: the loop over them is then one at run time.
    CLUSTERS: number of query clusters; 0 for none. Key clusters that that of a query takes are left out, in the window
        too. The log normaliser of a query with nothing left is LOG_ZERO.
    """
    grid_dependency_control(PDL, False)
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    out_ptr = sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh)
    delta_ptr += wide * num_landmarks * E
    mean_v_ptr += wide * num_landmarks * D
    log_count_ptr += group * MP
    label_ptr += wide * num_keys
    rounding: tl.constexpr = LEAST_TOTAL_BFLOAT16 if v_ptr.dtype.element_ty == tl.bfloat16 else LEAST_TOTAL
    if WINDOW_TILES > 0 or STATISTICS:
        centre = tl.load(centre_ptr + group * BE + tl.arange(0, BE))
    if MP == MB:
        b = tl.arange(0, MB)
        landmark = tl.trans(load_rows(delta_ptr, b, b < num_landmarks, E, E, BE))
        mean_v = load_rows(mean_v_ptr, b, b < num_landmarks, D, D, BD)
        log_count = tl.load(log_count_ptr + b)
    for step in tl.range(0, QUERY_TILES, num_stages=STAGES):
        i = (tl.program_id(0) * QUERY_TILES + step) * BM + tl.arange(0, BM)
        valid = i < num_queries
        q = load_rows(q_ptr, i, valid, stride_qn, E, BE)
        first_key = (tl.program_id(0) * QUERY_TILES + step) * BM - LEFT
        if BAND > 0:
            j = band_keys(first_key, BM, BAND)
            label = window_labels(j, end, label_ptr)
        elif WINDOW_TILES > 0:
            j = first_key + tl.arange(0, BN)
            label = window_labels(j, end, label_ptr)
        word_ptr, first, second, third, fourth = taken_ptr, 0, 0, 0, 0
        if CLUSTERS > 0:
            word_ptr = words_of_queries(
                taken_ptr, query_label_ptr, group, i, valid, num_queries, num_landmarks, CLUSTERS
            )
            first, second, third, fourth = load_words(word_ptr, num_landmarks, MP)
        # logits are relative to that of the centre
        if MP == MB:
            logits = tl.dot(q, landmark, input_precision=PRECISION) * qk_scale + log_count[None, :]
            if CLUSTERS > 0:
                free = landmark_not_taken(word_ptr, first, second, third, fourth, b, 0, num_landmarks, MB, MP)
                logits = tl.where(free, logits, LOG_ZERO)
            running_max = tl.maximum(tl.max(logits, 1), LOG_ZERO)
            weights = tl.exp2(logits - running_max[:, None]).to(mean_v.dtype)
            total = row_sums(weights)
            acc = tl.dot(weights, mean_v, input_precision=PRECISION)
        else:
            running_max = tl.full((BM,), LOG_ZERO, tl.float32)
            total = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, BD), tl.float32)
            for block in tl.range(0, MP, MB, num_stages=2):
                b = block + tl.arange(0, MB)
                landmark = tl.trans(load_rows(delta_ptr, b, b < num_landmarks, E, E, BE))
                mean_v = load_rows(mean_v_ptr, b, b < num_landmarks, D, D, BD)
                log_count = tl.load(log_count_ptr + b)
                logits = tl.dot(q, landmark, input_precision=PRECISION) * qk_scale + log_count[None, :]
                if CLUSTERS > 0:
                    free = landmark_not_taken(word_ptr, first, second, third, fourth, b, block, num_landmarks, MB, MP)
                    logits = tl.where(free, logits, LOG_ZERO)
                new_max = tl.maximum(running_max, tl.max(logits, 1))
                decay = tl.exp2(running_max - new_max)
                weights = tl.exp2(logits - new_max[:, None]).to(mean_v.dtype)
                total = total * decay + row_sums(weights)
                acc = tl.dot(weights, mean_v, acc * decay[:, None], input_precision=PRECISION)
                running_max = new_max
        if WINDOW_TILES > 0 or STATISTICS:
            offset = dot_centre(q, centre) * qk_scale
        if BAND > 0:
            acc, running_max, total = band_fwd(
                j, label, i, q, offset, acc, running_max, total, end,
                k_ptr, v_ptr, delta_ptr, word_ptr, first, second, third, fourth,
                stride_kn, stride_vn, qk_scale, E, D, MP, LEFT, RIGHT, CLUSTERS, BAND, PRECISION,
            )  # fmt: skip
        elif WINDOW_TILES > 0:
            normaliser = tl.zeros((BM, 4), tl.float32)
            for _ in tl.static_range(UNROLLED):
                next_label = window_labels(j + BN, end, label_ptr)
                normaliser, acc, running_max, total = window_fwd(
                    j, label, i, q, offset, normaliser, acc, running_max, total, end,
                    k_ptr, v_ptr, delta_ptr, word_ptr, first, second, third, fourth,
                    stride_kn, stride_vn, qk_scale, E, D, MP, LEFT, RIGHT, CLUSTERS, PRECISION,
                )  # fmt: skip
                j += BN
                label = next_label
            for _ in tl.range(UNROLLED, WINDOW_TILES, num_stages=2):
                next_label = window_labels(j + BN, end, label_ptr)
                normaliser, acc, running_max, total = window_fwd(
                    j, label, i, q, offset, normaliser, acc, running_max, total, end,
                    k_ptr, v_ptr, delta_ptr, word_ptr, first, second, third, fourth,
                    stride_kn, stride_vn, qk_scale, E, D, MP, LEFT, RIGHT, CLUSTERS, PRECISION,
                )  # fmt: skip
                j += BN
                label = next_label
            total += tl.sum(normaliser, 1)
        least = tl.minimum(tl.maximum(tl.abs(running_max) * LEAST_TOTAL_OF_LOGIT, rounding), 1.0)
        total = tl.maximum(total, least)
        out = acc * tl.where(end > 0, 1.0 / total, 0.0)[:, None]
        store_rows(out_ptr, out, i, valid, stride_on, D)
        if STATISTICS:
            lse = tl.where(end > 0, offset + running_max + tl.log2(total), NO_KEYS)
            if CLUSTERS > 0:
                lse = tl.where((end > 0) & (running_max < 0.1 * LOG_ZERO), LOG_ZERO, lse)
            tl.store(lse_ptr + wide * num_queries + i, lse, mask=valid)
