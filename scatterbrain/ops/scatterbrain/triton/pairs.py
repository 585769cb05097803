"""Attention from pairs of queries and keys, where sums over all keys will not do: marked tiles, and causal masking.

Outside the window the weight of a pair is `sum_m a_m b_m`, its features each relative to their own largest; nothing is
subtracted. That takes a product for every pair, as full attention does, so it is kept for where it is needed.

Marked tiles are few and each takes as long as a walk over all keys. So the keys are split over several programs for
each tile, the more the fewer tiles there are; the last one to arrive brings their parts together, in order, so that
results do not depend on who is last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import follow
from scatterbrain.ops.scatterbrain.triton.parts import (
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

# Parts of a tile that are read side by side when they are brought together.
PARTS_AT_A_TIME = tl.constexpr(16)


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
    mean_pointer,  # (G, chunks + 1, BD, MP), running sums, see `scatterbrain.ops.scatterbrain.triton.sums`
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
def splits_of_keys(num_items, num_parts, MAX_SPLITS: tl.constexpr):
    """Parts that the keys of each marked tile are split into: as many as there is memory for, or 1, without any."""
    return tl.maximum(tl.minimum(num_parts // tl.maximum(num_items, 1), MAX_SPLITS), 1)


@triton.jit
def sum_of_parts(
    pointer,  # (parts, BM, WIDTH)
    first,
    splits,
    columns,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,
    levels_pointer=None,  # (parts, BM) what each part is relative to; None where all are to the same
    level=None,
):
    """Sum of the parts from `first` on, in their order: (BM, WIDTH), relative to `level` where they have their own."""
    r = tl.arange(0, BM)
    sums = tl.zeros((BM, WIDTH), tl.float32)
    start = 0
    while start < splits:
        # written out: a tile of three dimensions would be summed through shared memory
        for step in tl.static_range(PARTS_AT_A_TIME):
            rows = (first + start + step) * BM + r
            exists = (r >= 0) & (start + step < splits)
            # `.cg`: what others wrote is not in this processor's own cache
            part = tl.load(
                pointer + rows[:, None] * WIDTH + columns[None, :],
                mask=exists[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            if levels_pointer is not None:
                levels = tl.load(levels_pointer + rows, mask=exists, other=FLOOR, cache_modifier=".cg")
                part *= tl.exp2(levels[:, None] - level[:, None])
            sums += part
        start += PARTS_AT_A_TIME
    return sums


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
    arrivals_pointer,  # (parts / 2,) zero before
    sums_pointer,  # (parts, BM, BD) parts of the tiles, those of a tile one after another
    part_pointer,  # (2, parts, BM) their normalisers, and what they are relative to
    heads,
    num_queries,
    num_keys,
    num_parts,
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
    MAX_SPLITS: tl.constexpr,
    MARK_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The marked tiles, from pairs."""
    follow(OVERLAP, False)
    subtiles: tl.constexpr = MARK_ROWS // BM
    padded_splits: tl.constexpr = triton.next_power_of_2(MAX_SPLITS)
    num_items = tl.load(marked_list_pointer) * subtiles
    splits = splits_of_keys(num_items, num_parts, MAX_SPLITS)
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
            levels_pointer = part_pointer + num_parts * BM
            rows = unit * BM + r
            tl.store(sums_pointer + rows[:, None] * BD + d[None, :], sums)
            tl.store(part_pointer + rows, normaliser)
            tl.store(levels_pointer + rows, largest)
            # the parts of all threads are written before one of them says so
            tl.debug_barrier()
            last = tl.atomic_add(arrivals_pointer + item, 1) == splits - 1
            if last:
                every = tl.arange(0, padded_splits)
                exists = (every < splits)[:, None]
                everywhere = (item * splits + every)[:, None] * BM + r[None, :]
                levels = tl.load(levels_pointer + everywhere, mask=exists, other=FLOOR, cache_modifier=".cg")
                parts = tl.load(part_pointer + everywhere, mask=exists, other=0.0, cache_modifier=".cg")
                largest = tl.max(levels, 0)
                normaliser = tl.sum(parts * tl.exp2(levels - largest[None, :]), 0)
                sums = sum_of_parts(sums_pointer, item * splits, splits, d, BM, BD, levels_pointer, largest)
        if last:
            store_result(
                i, valid, end, normaliser, sums, largest, out_base, out_row, normaliser_base, D, BD, STATISTICS
            )
        unit += tl.num_programs(0)
