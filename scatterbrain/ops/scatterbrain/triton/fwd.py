"""Forward kernels: per tile of queries, the low-rank part from sums over keys, and the window from pairs.

`attention_fwd_kernel` takes the low-rank part of a query from the sums over *all* keys and puts exact weights in place
of the window's estimates, `exp(s q.k) - phi(q).phi(k)`: one pass over the window, as the paper's algorithm 1. Where the
estimates of the window outweigh everything else, that difference cancels; such tiles of queries are flagged, and
`fallback.py` computes them again. `causal_fwd_kernel` is for causal masking with a low-rank part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import (
    LOG_ZERO,
    NO_KEYS,
    end_of_keys,
    half_norms,
    in_window,
    load_projection,
    load_projection_rows,
    load_rows,
    logical_not,
    masked_log_features,
    relative_to_max,
    sequence_ptr,
    store_rows,
)
from scatterbrain.ops.scatterbrain.triton.pairs import pairs_fwd, store_output

# Normalisers past this have overflowed, or nearly.
MAX_NORMALISER = tl.constexpr(1e33)
# Up to this many key tiles of a window the loop over them is unrolled, so that the loop over query tiles around it is
# pipelined; with more, their keys would not fit the shared memory.
MAX_UNROLLED = tl.constexpr(3)
# Up to this many features, those of the window's keys are computed with the keys as columns, so that the keys are the
# same operand as in their product with the queries. It takes a second copy of the projection, for which more features
# leave no room in shared memory.
MAX_KEYS_AS_COLUMNS = tl.constexpr(32)
# Position of keys that do not exist: in no window.
NO_POSITION = tl.constexpr(1 << 30)


@triton.jit
def row_sums(x):
    """Sums (rows,) in float32 of a tile that is rounded already."""
    if x.dtype == tl.float32:
        sums = tl.sum(x, 1)
    else:
        # by the tensor cores: each sum 16 times, in place of conversions and many additions
        sums = tl.sum(tl.dot(x, tl.full((x.shape[1], 16), 1.0, x.dtype)), 1) * (1 / 16)
    return sums


@triton.jit
def partial_row_sums(x):
    """Sums (rows, 4), each of the columns that `tl.dot` leaves with the same thread, so without a shuffle."""
    rows: tl.constexpr = x.shape[0]
    return tl.sum(tl.sum(tl.reshape(x, (rows, x.shape[1] // 8, 4, 2)), 3), 1)


@triton.jit
def window_fwd(
    j, i, q, features, feature_max, key_start, projection, normaliser, acc, running_max,
    k_ptr, v_ptr, norm_ptr, stride_kn, stride_vn, end, qk_scale, feature_scale,
    E: tl.constexpr, D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, IS_CAUSAL: tl.constexpr,
    LOW_RANK: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr, KEYS_AS_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the window's keys among j to the output of queries i: new normaliser, accumulator and running maximum."""
    exists = (j >= 0) & (j < end)
    k = load_rows(k_ptr, j, exists, stride_kn, E, q.shape[1])
    v = load_rows(v_ptr, j, exists, stride_vn, D, acc.shape[1])
    exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
    inside = in_window(tl.where(exists, j, NO_POSITION)[None, :], i[:, None], LEFT, RIGHT)
    if IS_CAUSAL:
        inside = inside & (j[None, :] <= i[:, None])
    if LOW_RANK:
        norms = tl.load(norm_ptr + j, mask=exists, other=0.0)
        if KEYS_AS_COLUMNS:
            products = tl.dot(projection, tl.trans(k), key_start, input_precision=PRECISION)
            key_features = tl.exp2(products * feature_scale - norms[None, :]).to(q.dtype)
        else:
            products = tl.dot(k, projection, key_start, input_precision=PRECISION)
            key_features = tl.trans(tl.exp2(products * feature_scale - norms[:, None]).to(q.dtype))
        estimate = tl.dot(features, key_features, input_precision=PRECISION)
    if ONLINE:
        exact = tl.where(inside, exact, LOG_ZERO)
        new_max = tl.maximum(running_max, tl.max(exact, 1))
        decay = tl.exp2(running_max - new_max)
        weights = tl.exp2(exact - new_max[:, None])
        if LOW_RANK:
            weights -= estimate * tl.exp2(feature_max - new_max)[:, None]
        weights = tl.where(inside, weights, 0.0)
        normaliser = normaliser * decay[:, None] + partial_row_sums(weights)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        running_max = new_max
    else:
        weights = tl.where(inside, tl.exp2(exact - feature_max[:, None]) - estimate, 0.0)
        normaliser += partial_row_sums(weights)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return normaliser, acc, running_max


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, projection_ptr, lengths_ptr,
    mean_ptr,  # (G, BD, MP), see `sums.py`
    weight_ptr,  # (G, MP)
    norm_ptr,  # (G, S) `half_norms` of the keys, for a low-rank part with a window
    lse_ptr,  # (G, T) log normaliser of each query, with STATISTICS
    fallback_ptr,  # (G, query tiles) int8, 1 for a fallback tile
    # (1 + 2 G,) int32: number of sequences with a fallback tile, which, in any order, and of each sequence whether it
    # has one; number and flags are zero before
    fallback_sequences_ptr,
    fallback_list_ptr,  # (1 + G tiles,) int32: number of fallback tiles, zero before, and which, in any order
    heads, num_queries, num_keys,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    qk_scale, feature_scale, norm_scale, eps,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LOG_M: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW_TILES: tl.constexpr, QUERY_TILES: tl.constexpr, EVEN: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, LOW_RANK: tl.constexpr, STATISTICS: tl.constexpr, HAS_EPS: tl.constexpr,
    LIMIT: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """QUERY_TILES tiles of BM queries of one sequence. Causal only without a low-rank part.

    ONLINE: weights are relative to a running maximum, as in FlashAttention. Without it they are relative to the
    query's largest feature, which takes fewer instructions, and a tile in which an exact weight exceeds the float range
    is flagged. Float16 lacks the range, and without a low-rank part there is no feature.
    """
    grid_dependency_control(PDL, not LOW_RANK)
    # from the last sequence to the first: what the kernel before has read of the last ones is still in the L2 cache
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    out_ptr = sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh)
    norm_ptr += group.to(tl.int64) * num_keys
    num_tiles = (num_queries + BM - 1) // BM
    if LOW_RANK:
        projection = load_projection(projection_ptr, E, BE, R, M, MP).to(q_ptr.dtype.element_ty)
        mean = tl.trans(tl.load(mean_ptr + group.to(tl.int64) * (BD * MP) + d[:, None] * MP + f[None, :]))
        weight = tl.load(weight_ptr + group * MP + f)
        if HAS_LENGTHS:
            # A sequence without keys has LOG_ZERO here, on whose scale a fused multiply-add is off by 2^70. Features
            # would overflow, and the output, zero times their sum, be nan.
            weight = tl.where(end > 0, weight, 0.0)
        # accumulators of the products with the projection start from here, which saves an addition for each element
        query_start = (tl.where(f < M, weight - LOG_M, LOG_ZERO) / feature_scale)[None, :].broadcast_to(BM, MP)
        if MP <= MAX_KEYS_AS_COLUMNS:
            key_start = (-weight / feature_scale)[:, None].broadcast_to(MP, BN)
            key_projection = load_projection_rows(projection_ptr, E, BE, R, M, MP).to(q_ptr.dtype.element_ty)
        else:
            key_start = (-weight / feature_scale)[None, :].broadcast_to(BN, MP)
            key_projection = projection

    any_fallback = 0
    for step in tl.range(0, QUERY_TILES, num_stages=STAGES):
        tile = tl.program_id(0) * QUERY_TILES + step
        i = tile * BM + tl.arange(0, BM)
        valid = i < num_queries
        q = load_rows(q_ptr, i, valid, stride_qn, E, BE, not EVEN)
        if LOW_RANK:
            products = tl.dot(q, projection, query_start, input_precision=PRECISION)
            max_log = tl.maximum(tl.max(products, 1) * feature_scale, LOG_ZERO)
            feature_max = max_log - half_norms(q, norm_scale)
            # from here on in units of 2^feature_max; the largest feature is 1, so `total` is at least that
            features = tl.exp2(products * feature_scale - max_log[:, None]).to(q.dtype)
            total = row_sums(features)
            acc = tl.dot(features, mean, input_precision=PRECISION)
            running_max = feature_max
        else:
            # there are no features; these are placeholders
            key_projection = i
            key_start = i
            total = tl.zeros((BM,), tl.float32)
            features = i
            feature_max = i
            acc = tl.zeros((BM, BD), tl.float32)
            running_max = tl.full((BM,), LOG_ZERO, tl.float32)
        # reduced to one sum for each row at the end: within the loop that would take shuffles in each step
        normaliser = tl.zeros((BM, 4), tl.float32)
        first_key = tile * BM - LEFT
        if WINDOW_TILES <= MAX_UNROLLED:
            for part in tl.static_range(WINDOW_TILES):
                normaliser, acc, running_max = window_fwd(
                    first_key + part * BN + tl.arange(0, BN), i, q, features, feature_max, key_start, key_projection,
                    normaliser, acc, running_max, k_ptr, v_ptr, norm_ptr, stride_kn, stride_vn, end, qk_scale,
                    feature_scale, E, D, LEFT, RIGHT, IS_CAUSAL, LOW_RANK, ONLINE, PRECISION, MP <= MAX_KEYS_AS_COLUMNS,
                )  # fmt: skip
        else:
            for part in tl.range(0, WINDOW_TILES, num_stages=2):
                normaliser, acc, running_max = window_fwd(
                    first_key + part * BN + tl.arange(0, BN), i, q, features, feature_max, key_start, key_projection,
                    normaliser, acc, running_max, k_ptr, v_ptr, norm_ptr, stride_kn, stride_vn, end, qk_scale,
                    feature_scale, E, D, LEFT, RIGHT, IS_CAUSAL, LOW_RANK, ONLINE, PRECISION, MP <= MAX_KEYS_AS_COLUMNS,
                )  # fmt: skip

        first_visible = tl.zeros_like(i) if LOW_RANK else tl.maximum(i - LEFT, 0)
        sees_none = first_visible >= end
        # the sums over all keys, relative to the maximum that the window's weights are relative to by now
        total = total * tl.exp2(feature_max - running_max) if LOW_RANK else total
        normaliser = total + tl.sum(normaliser, 1)
        divisor = normaliser
        if HAS_EPS:
            divisor += eps * tl.exp2(-running_max)
        # a reciprocal for each row: divisions of all elements would be a tenth of the kernel
        out = acc * tl.where(sees_none, 0.0, 1.0 / divisor)[:, None]
        store_rows(out_ptr, out, i, valid, stride_on, D)
        if STATISTICS:
            lse = tl.where(sees_none, NO_KEYS, running_max + tl.log2(tl.where(sees_none, 1.0, divisor)))
            tl.store(lse_ptr + group.to(tl.int64) * num_queries + i, lse, mask=valid)
        if LOW_RANK and WINDOW_TILES > 0:
            # false also for a normaliser that came out negative, infinite or nan
            accurate = (total <= LIMIT * normaliser) & (normaliser < MAX_NORMALISER)
            fallback = tl.max((valid & logical_not(accurate | sees_none)).to(tl.int32), 0)
            tl.store(fallback_ptr + group * num_tiles + tile, fallback.to(tl.int8), mask=tile < num_tiles)
            place = tl.atomic_add(fallback_list_ptr, 1, mask=fallback > 0)
            tl.store(fallback_list_ptr + 1 + place, group * num_tiles + tile, mask=fallback > 0)
            any_fallback = tl.maximum(any_fallback, fallback)
    if LOW_RANK and WINDOW_TILES > 0:
        flag_ptr = fallback_sequences_ptr + 1 + tl.num_programs(1) + group
        before = tl.atomic_max(flag_ptr, any_fallback, mask=any_fallback > 0)
        is_first = (any_fallback > 0) & (before == 0)
        place = tl.atomic_add(fallback_sequences_ptr, 1, mask=is_first)
        tl.store(fallback_sequences_ptr + 1 + place, group, mask=is_first)


@triton.jit
def causal_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, projection_ptr, lengths_ptr,
    mean_ptr,  # (G, chunks + 1, BD, MP), cumulative sums, see `sums.py`
    weight_ptr,  # (G, chunks + 1, MP)
    lse_ptr,  # (G, T) log normaliser of each query, with STATISTICS
    heads, num_queries, num_keys, chunk, chunks,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    qk_scale, feature_scale, norm_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LOG_M: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Causal attention with a low-rank part: one tile of queries, from the sums before its window and from pairs."""
    grid_dependency_control(PDL, False)
    tile = tl.program_id(0)
    group = tl.program_id(1)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    projection = load_projection(projection_ptr, E, BE, R, M, MP).to(q_ptr.dtype.element_ty)
    i = tile * BM + tl.arange(0, BM)
    valid = i < num_queries
    q = load_rows(sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh), i, valid, stride_qn, E, BE)
    logs = masked_log_features(q, projection, LOG_M, feature_scale, norm_scale, M, PRECISION)
    features, feature_max = relative_to_max(logs)
    state = tl.minimum(tl.maximum(tile * BM - LEFT, 0) // chunk, chunks)
    slot = group.to(tl.int64) * (chunks + 1) + state
    mean = tl.load(mean_ptr + slot * (BD * MP) + d[:, None] * MP + f[None, :])
    past_logs = logs + tl.load(weight_ptr + slot * MP + f)[None, :]
    past_features, running_max = relative_to_max(past_logs)
    # no key before the window: the features are 1 relative to nothing
    past_features = tl.where((running_max > LOG_ZERO / 2)[:, None], past_features, 0.0).to(q.dtype)
    normaliser = tl.sum(past_features.to(tl.float32), 1)
    acc = tl.dot(past_features, tl.trans(mean), input_precision=PRECISION)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    normaliser, acc, running_max = pairs_fwd(
        state * chunk, tl.minimum(end, tile * BM + BM), i, q, features, feature_max, normaliser, acc, running_max,
        k_ptr, v_ptr, stride_kn, stride_vn, projection, qk_scale, feature_scale, norm_scale,
        E, D, LEFT, RIGHT, BN, True, PRECISION, FEATURE_PRECISION,
    )  # fmt: skip
    out_ptr = sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh)
    lse_ptr += group.to(tl.int64) * num_queries
    store_output(i, valid, end, normaliser, acc, running_max, out_ptr, stride_on, lse_ptr, D, STATISTICS)
