"""Sums over the keys of features times values, and over the queries in the backward pass: by chunks, then combined.

The sums are kept as averages, one for each feature, beside the logarithm of their weight: `mean[d, m] =
sum_j phi_jm y_jd / sum_j phi_jm` and `log_weight[m] = log sum_j phi_jm`. So nothing overflows in half precision,
however long the sequence, and features may span any range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import (
    LOG_ZERO,
    end_of_keys,
    half_norms,
    load_projection,
    load_rows,
    log_features,
    logical_not,
    sequence_ptr,
)

# Entries of the list of fallback tiles that a program clears at a time.
CLEARED_AT_A_TIME = tl.constexpr(128)
# Where weights relative to the first tile's maximum sum up to more than this, the sums of values may have overflowed.
MAX_WEIGHT = tl.constexpr(1e15)


@triton.jit
def row_log_features(
    rows, valid, x_ptr, stride_xn, lse_ptr, fallback_ptr, projection, feature_scale, norm_scale,
    E: tl.constexpr, M: tl.constexpr, LOG_M: tl.constexpr, EVEN: tl.constexpr, QUERIES: tl.constexpr,
    HAS_FALLBACK: tl.constexpr, TILE_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log features of rows, LOG_ZERO for rows that do not count; what they lie below x.w; which rows count."""
    x = load_rows(x_ptr, rows, valid, stride_xn, E, projection.shape[0], not EVEN)
    norms = half_norms(x, norm_scale)
    counted = valid
    if QUERIES:
        norms += tl.load(lse_ptr + rows, mask=valid, other=0.0) + LOG_M
        if HAS_FALLBACK:
            fallback = tl.load(fallback_ptr + rows // TILE_ROWS, mask=valid, other=0)
            counted = counted & (fallback == 0)
    logs = log_features(x, norms, projection, feature_scale, PRECISION)
    if QUERIES:
        logs = tl.where(counted[:, None] & (tl.arange(0, projection.shape[1]) < M)[None, :], logs, LOG_ZERO)
    elif not EVEN:
        logs = tl.where(counted[:, None], logs, LOG_ZERO)
    return logs, norms, counted


@triton.jit
def chunk_sums(
    start, end, tiles, feature_max, x_ptr, y_ptr, out_ptr, stride_xn, stride_yn, stride_on,
    lse_ptr, delta_ptr, norm_ptr, fallback_ptr, projection, feature_scale, norm_scale,
    E: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, LOG_M: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr, QUERIES: tl.constexpr, NORMS: tl.constexpr, HAS_FALLBACK: tl.constexpr,
    TILE_ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Sums of weights times y, of weights, and of weights times delta, relative to a maximum, which comes last.

    ONLINE: relative to a running maximum. Without it they are relative to `feature_max`, and threads exchange nothing
    before the end of the loop.
    """
    MP: tl.constexpr = projection.shape[1]
    sums = tl.zeros((BD, MP), tl.float32)
    if ONLINE:
        weight = tl.zeros((MP,), tl.float32)
        delta_sum = tl.zeros((MP,), tl.float32)
    else:
        weight = tl.zeros((BN, MP), tl.float32)
        delta_sum = tl.zeros((BN, MP) if QUERIES else (MP,), tl.float32)
    # two stages at least: with one, Triton's pipeliner gave wrong results
    for tile in tl.range(0, tiles, num_stages=STAGES):
        rows = start + tile * BN + tl.arange(0, BN)
        valid = rows < end
        y = load_rows(y_ptr, rows, valid, stride_yn, D, BD, not EVEN)
        logs, norms, counted = row_log_features(
            rows, valid, x_ptr, stride_xn, lse_ptr, fallback_ptr, projection, feature_scale, norm_scale,
            E, M, LOG_M, EVEN, QUERIES, HAS_FALLBACK, TILE_ROWS, PRECISION,
        )  # fmt: skip
        if NORMS:
            tl.store(norm_ptr + rows, norms, mask=valid)
        if QUERIES:
            out = load_rows(out_ptr, rows, valid, stride_on, D, BD, not EVEN)
            delta = tl.sum(out.to(tl.float32) * y.to(tl.float32), 1)
            tl.store(delta_ptr + rows, delta, mask=valid)
        if ONLINE:
            new_max = tl.maximum(feature_max, tl.max(logs, 0))
            decay = tl.exp2(feature_max - new_max)
            feature_max = new_max
            sums *= decay[None, :]
        features = tl.exp2(logs - feature_max[None, :])
        if QUERIES or not EVEN:
            features = tl.where(counted[:, None], features, 0.0)
        features = features.to(y.dtype)
        sums = tl.dot(tl.trans(y), features, sums, input_precision=PRECISION)
        # of the rounded features, so that averages are exact averages
        wide = features.to(tl.float32)
        if ONLINE:
            weight = weight * decay + tl.sum(wide, 0)
            if QUERIES:
                delta_sum = delta_sum * decay + tl.sum(wide * delta[:, None], 0)
        else:
            weight += wide
            if QUERIES:
                delta_sum += wide * delta[:, None]
    if not ONLINE:
        weight = tl.sum(weight, 0)
        if QUERIES:
            delta_sum = tl.sum(delta_sum, 0)
    return sums, weight, delta_sum, feature_max


@triton.jit
def store_averages(
    sums, weight, delta_sum, feature_max, mean_ptr, weight_ptr, delta_mean_ptr, slot, d, is_first,
    BD: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Store sums of columns d as averages, and where `is_first` also log weights and averages of delta."""
    MP: tl.constexpr = sums.shape[1]
    f = tl.arange(0, MP)
    scale = tl.where(weight > 0, 1.0 / weight, 0.0)
    mean_ptrs = mean_ptr + slot.to(tl.int64) * (BD * MP) + d[:, None] * MP + f[None, :]
    tl.store(mean_ptrs, (sums * scale[None, :]).to(mean_ptr.dtype.element_ty))
    if is_first:
        log_weight = tl.where(weight > 0, feature_max + tl.log2(tl.maximum(weight, 1e-30)), LOG_ZERO)
        tl.store(weight_ptr + slot * MP + f, log_weight)
        if QUERIES:
            tl.store(delta_mean_ptr + slot * MP + f, delta_sum * scale)


# `tiles` is not specialised: with a single tile known at compile time there is no loop, and Triton 3.6 then let the
# product of 64 x 64 and 64 x 16 read past the shared memory on a Hopper GPU.
@triton.jit(do_not_specialize=["tiles"])
def chunk_sums_kernel(
    x_ptr,  # (B, H, N, E) keys, or queries
    y_ptr,  # (B, H, N, D) values, or gradients of the output
    out_ptr,  # (B, H, N, D) output: with QUERIES, its products with y are `delta`
    projection_ptr,
    lengths_ptr,  # (B,) key lengths
    lse_ptr,  # (G, N) with QUERIES: log normaliser of each query
    delta_ptr,  # (G, N) with QUERIES: written here
    norm_ptr,  # (G, N) with NORMS, written here: `half_norms`, with QUERIES what their log features lie below q.w
    fallback_ptr,  # (G, tiles of TILE_ROWS) with HAS_FALLBACK: tiles of queries left out
    fallback_sequences_ptr,  # (1 + 2 G,) with HAS_FALLBACK, without QUERIES: cleared, for `attention_fwd_kernel`
    fallback_list_ptr,  # (1 + G tiles,) the same
    counters_ptr,  # (COUNTERS,) cleared, for the fallback kernels
    mean_ptr,  # (G, chunks, BD, MP)
    weight_ptr,  # (G, chunks, MP)
    delta_mean_ptr,  # (G, chunks, MP) with QUERIES: average of delta
    max_ptr,  # (G, chunks, MP) unless FINAL
    heads,
    length,
    num_tiles,  # of TILE_ROWS queries in a sequence
    chunk,
    tiles,  # of BN rows in a chunk
    stride_xb, stride_xh, stride_xn,
    stride_yb, stride_yh, stride_yn,
    stride_ob, stride_oh, stride_on,
    feature_scale, norm_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LOG_M: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr, HAS_LENGTHS: tl.constexpr, QUERIES: tl.constexpr, NORMS: tl.constexpr,
    HAS_FALLBACK: tl.constexpr, TILE_ROWS: tl.constexpr, COUNTERS: tl.constexpr, FINAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, ONLINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums over one chunk of rows of one sequence. FINAL: there is one chunk, and its averages are the result.

    Weights are relative to the maximum of the chunk's first tile; if their sums grow too large, the chunk is summed
    again relative to a running maximum. ONLINE: at once relative to a running maximum. Float16 lacks the range for
    anything else.
    """
    grid_dependency_control(PDL, True)
    index = tl.program_id(0)
    group = tl.program_id(1)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    x_ptr = sequence_ptr(x_ptr, group, heads, stride_xb, stride_xh)
    y_ptr = sequence_ptr(y_ptr, group, heads, stride_yb, stride_yh)
    end = end_of_keys(lengths_ptr, group, heads, length, HAS_LENGTHS)
    start = index * chunk
    end = tl.minimum(start + chunk, end)
    row = group.to(tl.int64) * length
    out_ptr = sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh)
    if not QUERIES and HAS_FALLBACK:
        tl.store(fallback_sequences_ptr + 1 + tl.num_programs(1) + group, 0, mask=index == 0)
        tl.store(fallback_sequences_ptr, 0, mask=(index == 0) & (group == 0))
        first_tile = index * CLEARED_AT_A_TIME
        while first_tile < num_tiles:
            entries = first_tile + tl.arange(0, CLEARED_AT_A_TIME)
            tl.store(fallback_list_ptr + 1 + group * num_tiles + entries, 0, mask=entries < num_tiles)
            first_tile += tl.num_programs(0) * CLEARED_AT_A_TIME
        tl.store(fallback_list_ptr, 0, mask=(index == 0) & (group == 0))
    if COUNTERS > 0:
        items = tl.arange(0, COUNTERS)
        tl.store(counters_ptr + items, tl.zeros_like(items), mask=(items >= 0) & (index == 0) & (group == 0))

    projection = load_projection(projection_ptr, E, BE, R, M, MP).to(x_ptr.dtype.element_ty)
    lse_ptr += row
    fallback_ptr += group * num_tiles
    again = True
    sums = tl.zeros((BD, MP), tl.float32)
    weight = tl.zeros((MP,), tl.float32)
    delta_sum = tl.zeros((MP,), tl.float32)
    feature_max = tl.full((MP,), LOG_ZERO, tl.float32)
    # first relative to the first tile's maximum, then, if that overflows, to a running maximum
    for online in tl.static_range(ONLINE, 2):
        if again:
            feature_max = tl.full((MP,), LOG_ZERO, tl.float32)
            if not online:
                rows = start + tl.arange(0, BN)
                logs, _, _ = row_log_features(
                    rows, rows < end, x_ptr, stride_xn, lse_ptr, fallback_ptr, projection, feature_scale, norm_scale,
                    E, M, LOG_M, EVEN, QUERIES, HAS_FALLBACK, TILE_ROWS, PRECISION,
                )  # fmt: skip
                feature_max = tl.max(logs, 0)
            sums, weight, delta_sum, feature_max = chunk_sums(
                start, end, tiles, feature_max, x_ptr, y_ptr, out_ptr, stride_xn, stride_yn, stride_on,
                lse_ptr, delta_ptr + row, norm_ptr + row, fallback_ptr, projection, feature_scale, norm_scale,
                E, D, BD, M, LOG_M, BN, EVEN, QUERIES, NORMS, HAS_FALLBACK, TILE_ROWS, PRECISION, STAGES, online,
            )  # fmt: skip
        again = tl.max(logical_not(weight < MAX_WEIGHT).to(tl.int32), 0) > 0

    slot = group * tl.num_programs(0) + index
    if FINAL:
        store_averages(
            sums, weight, delta_sum, feature_max, mean_ptr, weight_ptr, delta_mean_ptr, slot, d, True, BD, QUERIES
        )
    else:
        tl.store(mean_ptr + slot.to(tl.int64) * (BD * MP) + d[:, None] * MP + f[None, :], sums)
        tl.store(weight_ptr + slot * MP + f, weight)
        tl.store(max_ptr + slot * MP + f, feature_max)
        if QUERIES:
            tl.store(delta_mean_ptr + slot * MP + f, delta_sum)


@triton.jit
def combine_chunks_kernel(
    sums_ptr, weights_ptr, delta_sums_ptr, max_ptr,  # of all chunks, see `chunk_sums_kernel`
    mean_ptr,  # (G, BD, MP), in the dtype of the attention
    weight_ptr,  # (G, MP)
    delta_mean_ptr,  # (G, MP) with QUERIES
    chunks,
    BD: tl.constexpr, BLOCK: tl.constexpr, MP: tl.constexpr, CHUNKS: tl.constexpr,
    QUERIES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Averages over all chunks of a sequence, for BLOCK of the BD columns; CHUNKS chunks are read at a time."""
    grid_dependency_control(PDL, False)
    block = tl.program_id(0)
    group = tl.program_id(1)
    c = tl.arange(0, CHUNKS)
    d = block * BLOCK + tl.arange(0, BLOCK)
    f = tl.arange(0, MP)
    first = group.to(tl.int64) * chunks
    feature_max = tl.full((MP,), LOG_ZERO, tl.float32)
    # `while`: Triton's pipeliner, which takes `for` loops, reads past the end here
    start = 0
    while start < chunks:
        valid = (start + c < chunks)[:, None]
        where = (first + start + c)[:, None] * MP + f[None, :]
        feature_max = tl.maximum(feature_max, tl.max(tl.load(max_ptr + where, mask=valid, other=LOG_ZERO), 0))
        start += CHUNKS
    sums = tl.zeros((BLOCK, MP), tl.float32)
    weight = tl.zeros((MP,), tl.float32)
    delta_sum = tl.zeros((MP,), tl.float32)
    start = 0
    while start < chunks:
        valid = (start + c < chunks)[:, None]
        where = (first + start + c)[:, None] * MP + f[None, :]
        factor = tl.exp2(tl.load(max_ptr + where, mask=valid, other=LOG_ZERO) - feature_max[None, :])
        weight += tl.sum(tl.load(weights_ptr + where, mask=valid, other=0.0) * factor, 0)
        if QUERIES:
            delta_sum += tl.sum(tl.load(delta_sums_ptr + where, mask=valid, other=0.0) * factor, 0)
        tile = (first + start + c)[:, None, None] * (BD * MP) + d[None, :, None] * MP + f[None, None, :]
        part = tl.load(sums_ptr + tile, mask=valid[:, :, None], other=0.0)
        sums += tl.sum(part * factor[:, None, :], 0)
        start += CHUNKS
    store_averages(
        sums, weight, delta_sum, feature_max, mean_ptr, weight_ptr, delta_mean_ptr, group, d, block == 0, BD, QUERIES
    )


@triton.jit
def cumulative_sums_kernel(
    sums_ptr, weights_ptr, delta_sums_ptr, max_ptr,  # of all chunks, see `chunk_sums_kernel`
    mean_ptr,  # (G, chunks + 1, BD, MP)
    weight_ptr,  # (G, chunks + 1, MP)
    delta_mean_ptr,  # (G, chunks + 1, MP) with QUERIES
    chunks,
    BD: tl.constexpr, BLOCK: tl.constexpr, MP: tl.constexpr, QUERIES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Averages for causal masking: state c has the keys of the chunks before c, or the queries of those from c on."""
    grid_dependency_control(PDL, False)
    block = tl.program_id(0)
    group = tl.program_id(1)
    d = block * BLOCK + tl.arange(0, BLOCK)
    f = tl.arange(0, MP)
    sums = tl.zeros((BLOCK, MP), tl.float32)
    weight = tl.zeros((MP,), tl.float32)
    delta_sum = tl.zeros((MP,), tl.float32)
    feature_max = tl.full((MP,), LOG_ZERO, tl.float32)
    step = 0
    while step <= chunks:
        state = step
        if QUERIES:
            state = chunks - step
        slot = group.to(tl.int64) * (chunks + 1) + state
        store_averages(
            sums, weight, delta_sum, feature_max, mean_ptr, weight_ptr, delta_mean_ptr, slot, d, block == 0, BD, QUERIES
        )
        # the chunk that the next state has beyond this one; past the last there is none
        part = state - 1 if QUERIES else state
        exists = step < chunks
        where = (group.to(tl.int64) * chunks + part) * MP + f
        part_max = tl.load(max_ptr + where, mask=exists, other=LOG_ZERO)
        new_max = tl.maximum(feature_max, part_max)
        decay = tl.exp2(feature_max - new_max)
        factor = tl.exp2(part_max - new_max)
        weight = weight * decay + tl.load(weights_ptr + where, mask=exists, other=0.0) * factor
        if QUERIES:
            delta_sum = delta_sum * decay + tl.load(delta_sums_ptr + where, mask=exists, other=0.0) * factor
        tile = (group.to(tl.int64) * chunks + part) * (BD * MP) + d[:, None] * MP + f[None, :]
        sums = sums * decay[None, :] + tl.load(sums_ptr + tile, mask=exists, other=0.0) * factor[None, :]
        feature_max = new_max
        step += 1
