"""Forward kernels: per tile of queries, the sums over keys and the window, exactly where it matters.

`attention_kernel` takes the low-rank part of a query from the sums over *all* keys and puts exact weights in place of
the window's estimates, `exp(s q.k) - phi(q).phi(k)`: one pass over the window, as the paper's algorithm 1. Where the
estimates of the window outweigh everything else, that difference has lost its digits; such tiles are marked, for
`scatterbrain.ops.scatterbrain.triton.pairs` to compute them again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import follow
from scatterbrain.ops.scatterbrain.triton.parts import (
    FAR,
    FLOOR,
    group_offset,
    half_norms,
    in_window,
    load_projection,
    load_projection_rows,
    load_rows,
    no,
    store_rows,
)

# Normalisers past this have overflowed, or nearly.
LARGEST = tl.constexpr(1e33)
# Tiles of a window that are written out one after another, so that the loop over tiles of queries around them is
# pipelined; with more, their keys would not fit the shared memory, and they are looped over.
UNROLLED = tl.constexpr(3)
# Features up to which those of the window's keys are computed with the keys as columns, so that the keys are the same
# operand as in their product with the queries. It takes a second copy of the projection, for which many features leave
# no room in shared memory.
KEYS_AS_COLUMNS = tl.constexpr(32)


@triton.jit
def sums_of_rows(x):
    """Sums (rows,) of a tile that is rounded already, in float32."""
    if x.dtype == tl.float32:
        sums = tl.sum(x, 1)
    else:
        # by the matrix units: each sum 16 times, in place of conversions and many additions
        sums = tl.sum(tl.dot(x, tl.full((x.shape[1], 16), 1.0, x.dtype)), 1) * (1 / 16)
    return sums


@triton.jit
def within_threads(x):
    """Sums (rows, 4) of those columns of x that a product leaves with the same thread: there is nothing to exchange."""
    rows: tl.constexpr = x.shape[0]
    return tl.sum(tl.sum(tl.reshape(x, (rows, x.shape[1] // 8, 4, 2)), 3), 1)


@triton.jit
def window_tile(
    j,
    i,
    q,
    features,
    reference,
    key_start,
    projection,
    normaliser,
    sums,
    largest,
    k_base,
    v_base,
    norm_base,
    k_row,
    v_row,
    end,
    slope,
    scale,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOW_RANK: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS_ARE_COLUMNS: tl.constexpr,
):
    """Add what the window's keys among j give to the queries i: new normaliser, sums and reference of the queries."""
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    exists = (j >= 0) & (j < end)
    k = load_rows(k_base, j, exists, k_row, e, E, BE, True)
    v = load_rows(v_base, j, exists, v_row, d, D, BD, True)
    exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    # keys that do not exist lie in no window
    inside = in_window(tl.where(exists, j, FAR)[None, :], i[:, None], LEFT, RIGHT)
    if IS_CAUSAL:
        inside = inside & (j[None, :] <= i[:, None])
    if LOW_RANK:
        norms = tl.load(norm_base + j, mask=exists, other=0.0)
        if KEYS_ARE_COLUMNS:
            key_logs = tl.dot(projection, tl.trans(k), key_start, input_precision=PRECISION) * slope - norms[None, :]
            factors = tl.exp2(key_logs).to(q.dtype)
        else:
            key_logs = tl.dot(k, projection, key_start, input_precision=PRECISION) * slope - norms[:, None]
            factors = tl.trans(tl.exp2(key_logs).to(q.dtype))
        estimate = tl.dot(features, factors, input_precision=PRECISION)
    if ONLINE:
        exact = tl.where(inside, exact, FLOOR)
        new_largest = tl.maximum(largest, tl.max(exact, 1))
        decay = tl.exp2(largest - new_largest)
        weights = tl.exp2(exact - new_largest[:, None])
        if LOW_RANK:
            weights -= estimate * tl.exp2(reference - new_largest)[:, None]
        weights = tl.where(inside, weights, 0.0)
        normaliser = normaliser * decay[:, None] + within_threads(weights)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision=PRECISION)
        largest = new_largest
    else:
        weights = tl.where(inside, tl.exp2(exact - reference[:, None]) - estimate, 0.0)
        normaliser += within_threads(weights)
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
    return normaliser, sums, largest


@triton.jit
def attention_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    out_pointer,
    projection_pointer,
    lengths_pointer,
    mean_pointer,  # (G, BD, MP), see `scatterbrain.ops.scatterbrain.triton.sums`
    weight_pointer,  # (G, MP)
    norm_pointer,  # (G, S) `half_norms` of the keys, for a low-rank part with a window
    normaliser_pointer,  # (G, T) log normaliser of each query, with STATISTICS
    marked_pointer,  # (G, tiles) int8, 1 where digits were lost
    # (1 + 2 G,) int32, sequences with a marked tile: their number, which, in any order, and of each sequence whether it
    # has one; number and flags zero before
    marked_sequences_pointer,
    marked_list_pointer,  # (1 + G tiles,) int32, number of marked tiles and which, in any order; zero before
    heads,
    num_queries,
    num_keys,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    slope,
    half_scale,
    scale,
    log_m,
    eps,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WINDOW_TILES: tl.constexpr,
    TILES: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOW_RANK: tl.constexpr,
    STATISTICS: tl.constexpr,
    HAS_EPS: tl.constexpr,
    LIMIT: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """TILES tiles of BM queries of one sequence. Causal only without a low-rank part.

    ONLINE: weights are relative to a running maximum, as in FlashAttention. Without it they are relative to the
    largest feature, which takes fewer steps, and a tile in which an exact weight exceeds the float range is marked.
    Float16 has not the range, and without a low-rank part there is no feature.
    """
    follow(OVERLAP, not LOW_RANK)
    # from the last sequence to the first: of those, what the sums over the keys have read is still in the cache
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    end = num_keys
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths_pointer + group // heads).to(tl.int32), num_keys)
    q_base = q_pointer + group_offset(group, heads, q_batch, q_head)
    k_base = k_pointer + group_offset(group, heads, k_batch, k_head)
    v_base = v_pointer + group_offset(group, heads, v_batch, v_head)
    out_base = out_pointer + group_offset(group, heads, out_batch, out_head)
    norm_base = norm_pointer + group.to(tl.int64) * num_keys
    num_tiles = (num_queries + BM - 1) // BM
    if LOW_RANK:
        projection = load_projection(projection_pointer, E, BE, R, M, MP)
        mean = tl.trans(tl.load(mean_pointer + group.to(tl.int64) * (BD * MP) + d[:, None] * MP + f[None, :]))
        weight = tl.load(weight_pointer + group * MP + f)
        # products with the rows of the projection start from here, which leaves out an addition for each
        query_start = (tl.where(f < M, weight - log_m, FLOOR) / slope)[None, :].broadcast_to(BM, MP)
        if MP <= KEYS_AS_COLUMNS:
            key_start = (-weight / slope)[:, None].broadcast_to(MP, BN)
            rows = load_projection_rows(projection_pointer, E, BE, R, M, MP)
        else:
            key_start = (-weight / slope)[None, :].broadcast_to(BN, MP)
            rows = projection

    any_mark = 0
    for step in tl.range(0, TILES, num_stages=STAGES):
        tile = tl.program_id(0) * TILES + step
        i = tile * BM + tl.arange(0, BM)
        valid = i < num_queries
        q = load_rows(q_base, i, valid, q_row, e, E, BE, not EVEN)
        if LOW_RANK:
            products = tl.dot(q, projection, query_start, input_precision=PRECISION)
            largest_log = tl.maximum(tl.max(products, 1) * slope, FLOOR)
            reference = largest_log - half_norms(q, half_scale)
            # from here on in units of 2^reference; the largest feature is 1, so `total` is at least that
            features = tl.exp2(products * slope - largest_log[:, None]).to(q.dtype)
            total = sums_of_rows(features)
            sums = tl.dot(features, mean, input_precision=PRECISION)
            largest = reference
        else:
            # there are no features: anything in their place
            rows = i
            key_start = i
            total = tl.zeros((BM,), tl.float32)
            features = i
            reference = i
            sums = tl.zeros((BM, BD), tl.float32)
            largest = tl.full((BM,), FLOOR, tl.float32)
        # added up for each row at the end: within the loop that would be exchanges between threads in each step
        normaliser = tl.zeros((BM, 4), tl.float32)
        if WINDOW_TILES <= UNROLLED:
            for part in tl.static_range(WINDOW_TILES):
                normaliser, sums, largest = window_tile(
                    tile * BM - LEFT + part * BN + tl.arange(0, BN),
                    i,
                    q,
                    features,
                    reference,
                    key_start,
                    rows,
                    normaliser,
                    sums,
                    largest,
                    k_base,
                    v_base,
                    norm_base,
                    k_row,
                    v_row,
                    end,
                    slope,
                    scale,
                    E,
                    BE,
                    D,
                    BD,
                    LEFT,
                    RIGHT,
                    IS_CAUSAL,
                    LOW_RANK,
                    ONLINE,
                    PRECISION,
                    MP <= KEYS_AS_COLUMNS,
                )
        else:
            for part in tl.range(0, WINDOW_TILES, num_stages=2):
                normaliser, sums, largest = window_tile(
                    tile * BM - LEFT + part * BN + tl.arange(0, BN),
                    i,
                    q,
                    features,
                    reference,
                    key_start,
                    rows,
                    normaliser,
                    sums,
                    largest,
                    k_base,
                    v_base,
                    norm_base,
                    k_row,
                    v_row,
                    end,
                    slope,
                    scale,
                    E,
                    BE,
                    D,
                    BD,
                    LEFT,
                    RIGHT,
                    IS_CAUSAL,
                    LOW_RANK,
                    ONLINE,
                    PRECISION,
                    MP <= KEYS_AS_COLUMNS,
                )

        first = tl.zeros_like(i) if LOW_RANK else tl.maximum(i - LEFT, 0)
        blind = first >= end
        # the sums over all keys, in the units that the window's weights are in by now
        total = total * tl.exp2(reference - largest) if LOW_RANK else total
        normaliser = total + tl.sum(normaliser, 1)
        divisor = normaliser
        if HAS_EPS:
            divisor += eps * tl.exp2(-largest)
        # a reciprocal for each row: divisions of all elements would be a tenth of the kernel
        out = sums * tl.where(blind, 0.0, 1.0 / divisor)[:, None]
        store_rows(out_base, out, i, valid, out_row, d, D)
        if STATISTICS:
            # a large normaliser stands for no key: every weight relative to it is zero
            log_normaliser = tl.where(blind, -FLOOR, largest + tl.log2(tl.where(blind, 1.0, divisor)))
            tl.store(normaliser_pointer + group.to(tl.int64) * num_queries + i, log_normaliser, mask=valid)
        if LOW_RANK and WINDOW_TILES > 0:
            # also true for a sum that came out negative, infinite or nan
            kept = (total <= LIMIT * normaliser) & (normaliser < LARGEST)
            lost = valid & no(kept | blind)
            mark = tl.max(lost.to(tl.int32), 0)
            tl.store(marked_pointer + group * num_tiles + tile, mark.to(tl.int8), mask=tile < num_tiles)
            place = tl.atomic_add(marked_list_pointer, 1, mask=mark > 0)
            tl.store(marked_list_pointer + 1 + place, group * num_tiles + tile, mask=mark > 0)
            any_mark = tl.maximum(any_mark, mark)
    if LOW_RANK and WINDOW_TILES > 0:
        sequences = tl.num_programs(1)
        before = tl.atomic_max(marked_sequences_pointer + 1 + sequences + group, any_mark, mask=any_mark > 0)
        first = (any_mark > 0) & (before == 0)
        place = tl.atomic_add(marked_sequences_pointer, 1, mask=first)
        tl.store(marked_sequences_pointer + 1 + place, group, mask=first)
