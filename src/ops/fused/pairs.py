"""Attention from pairs of queries and keys, where sums over all keys will not do: marked tiles, and causal masking.

Outside the window the weight of a pair is `sum_m a_m b_m`, its features each relative to their own largest; nothing is
subtracted. That takes a product for every pair, as full attention does, so it is kept for where it is needed.

Marked tiles are few and each takes as long as a walk over all keys. So the keys are split over several programs for
each tile; the last one to arrive brings their parts together, in order, so that results do not depend on who is last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from src.ops.fused.parts import (
    FLOOR,
    group_offset,
    half_norms,
    in_window,
    load_projection,
    load_rows,
    log_features,
    normalised,
    store_rows,
)
from src.ops.triton_functions import follow

# Parts of a tile that are read side by side when they are brought together.
PARTS_AT_A_TIME = tl.constexpr(8)


@triton.jit
def add_pairs(
    first,
    last,
    i,
    q,
    features,
    level,
    normaliser,
    sums,
    largest,
    k_base,
    v_base,
    k_row,
    v_row,
    projection,
    slope,
    half_scale,
    scale,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BN: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
):
    """Add what the keys from `first` to before `last` give to the queries i: new normaliser, sums and reference."""
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    start = first
    # `while`: Triton's pipeliner, which takes `for` loops, is of no use to branches
    while start < last:
        j = start + tl.arange(0, BN)
        exists = j < last
        k = load_rows(k_base, j, exists, k_row, e, E, BE, True)
        v = load_rows(v_base, j, exists, v_row, d, D, BD, True)
        key_logs = log_features(k, half_norms(k, half_scale), projection, slope, PRECISION)
        key_features, key_level = normalised(key_logs)
        estimate = tl.dot(features, tl.trans(key_features), input_precision=FEATURE_PRECISION)
        logits = tl.where(estimate > 0, tl.log2(tl.maximum(estimate, 1e-37)), FLOOR)
        logits += level[:, None] + key_level[None, :]
        inside = in_window(j[None, :], i[:, None], LEFT, RIGHT)
        exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(inside, exact, logits)
        visible = exists[None, :]
        if IS_CAUSAL:
            visible = visible & (j[None, :] <= i[:, None])
        logits = tl.where(visible, logits, FLOOR)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        decay = tl.exp2(largest - new_largest)
        weights = tl.where(visible, tl.exp2(logits - new_largest[:, None]), 0.0)
        normaliser = normaliser * decay + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision=PRECISION)
        largest = new_largest
        start += BN
    return normaliser, sums, largest


@triton.jit
def store_result(
    i,
    valid,
    end,
    normaliser,
    sums,
    largest,
    out_base,
    out_row,
    normaliser_base,
    D: tl.constexpr,
    BD: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Write a tile's output, and with STATISTICS its log normalisers."""
    blind = (i < 0) | (end <= 0)
    divisor = tl.where(blind, 1.0, normaliser)
    out = tl.where(blind[:, None], 0.0, sums / divisor[:, None])
    store_rows(out_base, out, i, valid, out_row, tl.arange(0, BD), D)
    if STATISTICS:
        log_normaliser = tl.where(blind, -FLOOR, largest + tl.log2(divisor))
        tl.store(normaliser_base + i, log_normaliser, mask=valid)


@triton.jit
def causal_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    out_pointer,
    projection_pointer,
    lengths_pointer,
    mean_pointer,  # (G, chunks + 1, BD, MP), running sums, see `src.ops.fused.sums`
    weight_pointer,  # (G, chunks + 1, MP)
    normaliser_pointer,  # (G, T) log normaliser of each query, with STATISTICS
    heads,
    num_queries,
    num_keys,
    chunk,
    chunks,
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
    HAS_LENGTHS: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Causal attention with a low-rank part: a tile of queries from the sums before its window, and from pairs."""
    follow(OVERLAP, False)
    tile = tl.program_id(0)
    group = tl.program_id(1)
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    end = num_keys
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths_pointer + group // heads).to(tl.int32), num_keys)
    projection = load_projection(projection_pointer, E, BE, R, M, MP)
    i = tile * BM + tl.arange(0, BM)
    valid = i < num_queries
    q = load_rows(q_pointer + group_offset(group, heads, q_batch, q_head), i, valid, q_row, e, E, BE, True)
    logs = log_features(q, half_norms(q, half_scale), projection, slope, PRECISION) - log_m
    logs = tl.where((f < M)[None, :], logs, FLOOR)
    features, level = normalised(logs)
    state = tl.minimum(tl.maximum(tile * BM - LEFT, 0) // chunk, chunks)
    slot = group.to(tl.int64) * (chunks + 1) + state
    mean = tl.load(mean_pointer + slot * (BD * MP) + d[:, None] * MP + f[None, :])
    past = logs + tl.load(weight_pointer + slot * MP + f)[None, :]
    past_features, largest = normalised(past)
    # no key before the window: the features are 1 relative to nothing
    past_features = tl.where((largest > FLOOR / 2)[:, None], past_features, 0.0).to(q.dtype)
    normaliser = tl.sum(past_features.to(tl.float32), 1)
    sums = tl.dot(past_features, tl.trans(mean), input_precision=PRECISION)
    normaliser, sums, largest = add_pairs(
        state * chunk,
        tl.minimum(end, tile * BM + BM),
        i,
        q,
        features,
        level,
        normaliser,
        sums,
        largest,
        k_pointer + group_offset(group, heads, k_batch, k_head),
        v_pointer + group_offset(group, heads, v_batch, v_head),
        k_row,
        v_row,
        projection,
        slope,
        half_scale,
        scale,
        E,
        BE,
        D,
        BD,
        LEFT,
        RIGHT,
        BN,
        True,
        PRECISION,
        FEATURE_PRECISION,
    )
    store_result(
        i,
        valid,
        end,
        normaliser,
        sums,
        largest,
        out_pointer + group_offset(group, heads, out_batch, out_head),
        out_row,
        normaliser_pointer + group.to(tl.int64) * num_queries,
        D,
        BD,
        STATISTICS,
    )


@triton.jit
def marked_item(item, marked_list_pointer, num_marks, BM: tl.constexpr, MARK_ROWS: tl.constexpr):
    """Sequence and first query of the item-th tile of BM queries among the marked ones. BM divides MARK_ROWS."""
    subtiles: tl.constexpr = MARK_ROWS // BM
    mark = tl.load(marked_list_pointer + 1 + item // subtiles)
    return mark // num_marks, (mark % num_marks) * MARK_ROWS + (item % subtiles) * BM


@triton.jit
def marked_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    out_pointer,
    projection_pointer,
    lengths_pointer,
    normaliser_pointer,  # (G, T) log normaliser of each query, with STATISTICS
    marked_list_pointer,  # (1 + G tiles,) see `attention_kernel`
    arrivals_pointer,  # (items,) zero before
    sums_pointer,  # (items, SPLITS, BM, BD) parts of the tiles
    part_pointer,  # (2, items, SPLITS, BM) their normalisers, and what they are relative to
    heads,
    num_queries,
    num_keys,
    items,
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
    SPLITS: tl.constexpr,
    MARK_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The marked tiles, from pairs. With more of them than there is memory for parts, each by a program of its own."""
    follow(OVERLAP, False)
    subtiles: tl.constexpr = MARK_ROWS // BM
    padded_splits: tl.constexpr = triton.next_power_of_2(SPLITS)
    num_items = tl.load(marked_list_pointer) * subtiles
    splits = tl.where(num_items <= items, SPLITS, 1)
    unit = tl.program_id(0)
    # nearly always: nothing to do
    if unit >= num_items * splits:
        return
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    r = tl.arange(0, BM)
    num_marks = (num_queries + MARK_ROWS - 1) // MARK_ROWS
    projection = load_projection(projection_pointer, E, BE, R, M, MP)
    while unit < num_items * splits:
        item = unit // splits
        split = unit % splits
        group, first_query = marked_item(item, marked_list_pointer, num_marks, BM, MARK_ROWS)
        end = num_keys
        if HAS_LENGTHS:
            end = tl.minimum(tl.load(lengths_pointer + group // heads).to(tl.int32), num_keys)
        out_base = out_pointer + group_offset(group, heads, out_batch, out_head)
        normaliser_base = normaliser_pointer + group.to(tl.int64) * num_queries
        i = first_query + r
        valid = i < num_queries
        q = load_rows(q_pointer + group_offset(group, heads, q_batch, q_head), i, valid, q_row, e, E, BE, True)
        logs = log_features(q, half_norms(q, half_scale), projection, slope, PRECISION) - log_m
        features, level = normalised(tl.where((f < M)[None, :], logs, FLOOR))
        share = (num_keys + splits * BN - 1) // (splits * BN) * BN
        normaliser, sums, largest = add_pairs(
            split * share,
            tl.minimum(end, split * share + share),
            i,
            q,
            features,
            level,
            tl.zeros((BM,), tl.float32),
            tl.zeros((BM, BD), tl.float32),
            tl.full((BM,), FLOOR, tl.float32),
            k_pointer + group_offset(group, heads, k_batch, k_head),
            v_pointer + group_offset(group, heads, v_batch, v_head),
            k_row,
            v_row,
            projection,
            slope,
            half_scale,
            scale,
            E,
            BE,
            D,
            BD,
            LEFT,
            RIGHT,
            BN,
            False,
            PRECISION,
            FEATURE_PRECISION,
        )
        last = splits == 1
        if splits > 1:
            part = item * SPLITS + split
            tl.store(sums_pointer + (part * BM + r)[:, None] * BD + d[None, :], sums)
            tl.store(part_pointer + part * BM + r, normaliser)
            tl.store(part_pointer + items * (SPLITS * BM) + part * BM + r, largest)
            # the parts of all threads are written before one of them says so
            tl.debug_barrier()
            last = tl.atomic_add(arrivals_pointer + item, 1) == splits - 1
            if last:
                # `.cg`: what others wrote is not in this processor's own cache
                every = tl.arange(0, padded_splits)
                everywhere = (item * SPLITS + every)[:, None] * BM + r[None, :]
                every_exists = (every < SPLITS)[:, None]
                references = part_pointer + items * (SPLITS * BM)
                every_level = tl.load(references + everywhere, mask=every_exists, other=FLOOR, cache_modifier=".cg")
                every_part = tl.load(part_pointer + everywhere, mask=every_exists, other=0.0, cache_modifier=".cg")
                largest = tl.max(every_level, 0)
                normaliser = tl.sum(every_part * tl.exp2(every_level - largest[None, :]), 0)
                sums = tl.zeros((BM, BD), tl.float32)
                start = 0
                while start < SPLITS:
                    s = start + tl.arange(0, PARTS_AT_A_TIME)
                    where = (item * SPLITS + s)[:, None] * BM + r[None, :]
                    exists = (s < SPLITS)[:, None]
                    levels = tl.load(references + where, mask=exists, other=FLOOR, cache_modifier=".cg")
                    factors = tl.exp2(levels - largest[None, :])
                    parts = tl.load(
                        sums_pointer + where[:, :, None] * BD + d[None, None, :],
                        mask=exists[:, :, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    sums += tl.sum(parts * factors[:, :, None], 0)
                    start += PARTS_AT_A_TIME
        if last:
            store_result(
                i, valid, end, normaliser, sums, largest, out_base, out_row, normaliser_base, D, BD, STATISTICS
            )
        unit += tl.num_programs(0)
