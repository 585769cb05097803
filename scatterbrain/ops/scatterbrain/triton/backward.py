"""Backward kernels.

P are the normalised weights, g the gradients of their logarithms:

    P_ij = A_ij / sum_j A_ij      t_ij = do_i.v_j - delta_i,  delta_i = do_i.out_i      g_ij = P_ij t_ij

Inside the window log A is s q.k. Outside it is log sum_m phi_im phi_jm, so that with a_im = phi_im / sum_j A_ij the
gradient of the log features is

    of the queries   a_im    sum_j phi_jm t_ij = a_im  [do_i.(sum_j phi_jm v_j) - delta_i (sum_j phi_jm)]
    of the keys      phi_jm  sum_i a_im t_ij   = phi_jm [v_j.(sum_i a_im do_i) - (sum_i a_im delta_i)]

with the sums over the pairs outside the window. As in the forward pass the sums over everything are taken once, and
the window's pairs are taken off again; and tiles of queries that were marked there are left out of all sums and enter
by pairs. With causal masking everything but the sums over whole chunks is taken by pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import follow
from scatterbrain.ops.scatterbrain.triton.pairs import marked_item, splits_of_keys, sum_of_parts
from scatterbrain.ops.scatterbrain.triton.parts import (
    FLOOR,
    group_offset,
    half_norms,
    in_window,
    load_projection,
    load_projection_rows,
    load_rows,
    log_features,
    no,
    normalised,
    store_rows,
)

# Largest exponent of the factor that turns products of normalised features into weights. Beyond it the product itself
# has left float32.
MAX_EXPONENT = tl.constexpr(120.0)
MARKS_AT_A_TIME = tl.constexpr(128)


@triton.jit
def delta_kernel(
    out_pointer,
    gradient_pointer,
    delta_pointer,
    heads,
    num_queries,
    out_batch,
    out_head,
    out_row,
    g_batch,
    g_head,
    g_row,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`delta` where no sums over queries are taken: without a low-rank part."""
    follow(OVERLAP, True)
    group = tl.program_id(1)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = i < num_queries
    d = tl.arange(0, BD)
    out = load_rows(out_pointer + group_offset(group, heads, out_batch, out_head), i, valid, out_row, d, D, BD, True)
    gradient = load_rows(
        gradient_pointer + group_offset(group, heads, g_batch, g_head), i, valid, g_row, d, D, BD, True
    )
    delta = tl.sum(out.to(tl.float32) * gradient.to(tl.float32), 1)
    tl.store(delta_pointer + group.to(tl.int64) * num_queries + i, delta, mask=valid)


@triton.jit
def add_pairs_to_queries(
    first,
    last,
    i,
    q,
    g,
    features,
    level,
    normaliser,
    delta,
    dq,
    d_logs,
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
    """Add what the keys from `first` to before `last` give to the gradients of the queries i: new dq and d_logs."""
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    start = first
    while start < last:
        j = start + tl.arange(0, BN)
        exists = j < last
        k = load_rows(k_base, j, exists, k_row, e, E, BE, True)
        v = load_rows(v_base, j, exists, v_row, d, D, BD, True)
        inside = in_window(j[None, :], i[:, None], LEFT, RIGHT)
        visible = exists[None, :]
        if IS_CAUSAL:
            visible = visible & (j[None, :] <= i[:, None])
        exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        exact = tl.where(inside & visible, exact - normaliser[:, None], FLOOR)
        t = tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        dq += tl.dot((tl.exp2(exact) * t).to(q.dtype), k, input_precision=PRECISION)
        key_logs = log_features(k, half_norms(k, half_scale), projection, slope, PRECISION)
        key_features, key_level = normalised(key_logs)
        exponent = tl.minimum(level[:, None] + key_level[None, :] - normaliser[:, None], MAX_EXPONENT)
        ratio = tl.where(visible & no(inside), tl.exp2(exponent) * t, 0.0)
        d_logs += features * tl.dot(ratio, key_features, input_precision=FEATURE_PRECISION)
        start += BN
    return dq, d_logs


@triton.jit
def gradient_of_log_features(
    x,
    dx,
    d_logs,
    projection_pointer,
    slope,
    half_scale,
    unlog,
    E: tl.constexpr,
    BE: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of rows x: dx and what comes through their log features, whose gradient is d_logs."""
    d_logs = tl.where((tl.arange(0, MP) < M)[None, :], d_logs, 0.0)
    rows = load_projection_rows(projection_pointer, E, BE, R, M, MP)
    dx += tl.dot(d_logs.to(x.dtype), rows, input_precision=PRECISION) * (slope * unlog)
    return dx - x.to(tl.float32) * (tl.sum(d_logs, 1) * (2 * half_scale * unlog))[:, None]


@triton.jit
def query_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    g_pointer,  # (B, H, T, D) gradient of the output
    dq_pointer,
    projection_pointer,
    lengths_pointer,
    mean_pointer,  # of the keys, as in the forward pass
    weight_pointer,
    norm_pointer,  # of the keys
    normaliser_pointer,
    delta_pointer,
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
    g_batch,
    g_head,
    g_row,
    dq_batch,
    dq_head,
    dq_row,
    slope,
    half_scale,
    scale,
    log_m,
    unlog,  # ln(2): gradients are taken in natural units
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
    STAGES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOW_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of queries. Marked tiles come out wrong, and are written again by `marked_query_gradient_kernel`."""
    follow(OVERLAP, False)
    tile = tl.program_id(0)
    # from the last sequence to the first: of those, what the sums over the queries have read is still in the cache
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
    g_base = g_pointer + group_offset(group, heads, g_batch, g_head)
    dq_base = dq_pointer + group_offset(group, heads, dq_batch, dq_head)
    row_base = group.to(tl.int64) * num_queries

    i = tile * BM + tl.arange(0, BM)
    valid = i < num_queries
    if LOW_RANK:
        projection = load_projection(projection_pointer, E, BE, R, M, MP)
    q = load_rows(q_base, i, valid, q_row, e, E, BE, True)
    g = load_rows(g_base, i, valid, g_row, d, D, BD, True)
    normaliser = tl.load(normaliser_pointer + row_base + i, mask=valid, other=-FLOOR)
    delta = tl.load(delta_pointer + row_base + i, mask=valid, other=0.0)
    dq = tl.zeros((BM, BE), tl.float32)
    if LOW_RANK:
        logs = log_features(q, half_norms(q, half_scale), projection, slope, PRECISION) - log_m
        logs = tl.where((f < M)[None, :], logs, FLOOR)
        # what the sums give: over all keys, or over the chunks before the window
        slot = group.to(tl.int64)
        if IS_CAUSAL:
            state = tl.minimum(tl.maximum(tile * BM - LEFT, 0) // chunk, chunks)
            slot = slot * (chunks + 1) + state
        mean = tl.load(mean_pointer + slot * (BD * MP) + d[:, None] * MP + f[None, :])
        weight = tl.load(weight_pointer + slot * MP + f)
        factors = tl.exp2(logs + weight[None, :] - normaliser[:, None])
        d_sums = tl.dot(g, mean, input_precision=PRECISION) - delta[:, None]

    if LOW_RANK and IS_CAUSAL:
        features, level = normalised(logs)
        dq, d_logs = add_pairs_to_queries(
            state * chunk,
            tl.minimum(end, tile * BM + BM),
            i,
            q,
            g,
            features,
            level,
            normaliser,
            delta,
            dq,
            factors * d_sums,
            k_base,
            v_base,
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
    else:
        for part in tl.range(0, WINDOW_TILES, num_stages=STAGES):
            j = tile * BM - LEFT + part * BN + tl.arange(0, BN)
            exists = (j >= 0) & (j < end)
            k = load_rows(k_base, j, exists, k_row, e, E, BE, True)
            v = load_rows(v_base, j, exists, v_row, d, D, BD, True)
            inside = in_window(j[None, :], i[:, None], LEFT, RIGHT) & exists[None, :]
            if IS_CAUSAL:
                inside = inside & (j[None, :] <= i[:, None])
            exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            exact = tl.where(inside, exact - normaliser[:, None], FLOOR)
            t = tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None]
            dq += tl.dot((tl.exp2(exact) * t).to(q.dtype), k, input_precision=PRECISION)
            if LOW_RANK:
                norms = tl.load(norm_pointer + group.to(tl.int64) * num_keys + j, mask=exists, other=0.0)
                key_logs = log_features(k, norms, projection, slope, PRECISION) - weight[None, :]
                # rows without a key may be infinite, and are met by zeros
                key_factors = tl.where(exists[:, None], tl.exp2(key_logs), 0.0).to(q.dtype)
                inner = tl.where(inside, t, 0.0).to(q.dtype)
                d_sums -= tl.dot(inner, key_factors, input_precision=PRECISION)
        if LOW_RANK:
            d_logs = factors * d_sums
    dq *= scale * unlog
    if LOW_RANK:
        dq = gradient_of_log_features(
            q, dq, d_logs, projection_pointer, slope, half_scale, unlog, E, BE, R, M, MP, PRECISION
        )
    store_rows(dq_base, dq, i, valid, dq_row, e, E)


@triton.jit
def marked_query_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    g_pointer,  # (B, H, T, D) gradient of the output
    dq_pointer,
    projection_pointer,
    lengths_pointer,
    normaliser_pointer,
    delta_pointer,
    marked_list_pointer,  # (1 + G tiles,) see `attention_kernel`
    arrivals_pointer,  # (parts / 2,) zero before
    dq_part_pointer,  # (parts, BM, BE)
    d_logs_part_pointer,  # (parts, BM, MP)
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
    g_batch,
    g_head,
    g_row,
    dq_batch,
    dq_head,
    dq_row,
    slope,
    half_scale,
    scale,
    log_m,
    unlog,
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
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The marked tiles, from pairs; the keys are split over programs as in `marked_kernel`."""
    follow(OVERLAP, False)
    subtiles: tl.constexpr = MARK_ROWS // BM
    num_items = tl.load(marked_list_pointer) * subtiles
    splits = splits_of_keys(num_items, num_parts, MAX_SPLITS)
    unit = tl.program_id(0)
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
        row_base = group.to(tl.int64) * num_queries
        i = first_query + r
        valid = i < num_queries
        q = load_rows(q_pointer + group_offset(group, heads, q_batch, q_head), i, valid, q_row, e, E, BE, True)
        g = load_rows(g_pointer + group_offset(group, heads, g_batch, g_head), i, valid, g_row, d, D, BD, True)
        normaliser = tl.load(normaliser_pointer + row_base + i, mask=valid, other=-FLOOR)
        delta = tl.load(delta_pointer + row_base + i, mask=valid, other=0.0)
        logs = log_features(q, half_norms(q, half_scale), projection, slope, PRECISION) - log_m
        features, level = normalised(tl.where((f < M)[None, :], logs, FLOOR))
        share = (num_keys + splits * BN - 1) // (splits * BN) * BN
        dq, d_logs = add_pairs_to_queries(
            split * share,
            tl.minimum(end, split * share + share),
            i,
            q,
            g,
            features,
            level,
            normaliser,
            delta,
            tl.zeros((BM, BE), tl.float32),
            tl.zeros((BM, MP), tl.float32),
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
            rows = unit * BM + r
            tl.store(dq_part_pointer + rows[:, None] * BE + e[None, :], dq)
            tl.store(d_logs_part_pointer + rows[:, None] * MP + f[None, :], d_logs)
            tl.debug_barrier()
            last = tl.atomic_add(arrivals_pointer + item, 1) == splits - 1
            if last:
                dq = sum_of_parts(dq_part_pointer, item * splits, splits, e, BM, BE)
                d_logs = sum_of_parts(d_logs_part_pointer, item * splits, splits, f, BM, MP)
        if last:
            dq = gradient_of_log_features(
                q,
                dq * (scale * unlog),
                d_logs,
                projection_pointer,
                slope,
                half_scale,
                unlog,
                E,
                BE,
                R,
                M,
                MP,
                PRECISION,
            )
            store_rows(dq_pointer + group_offset(group, heads, dq_batch, dq_head), dq, i, valid, dq_row, e, E)
        unit += tl.num_programs(0)


@triton.jit
def add_pairs_to_keys(
    i,
    valid,
    j,
    exists,
    k,
    v,
    features,
    key_level,
    dk,
    dv,
    d_logs,
    q_base,
    g_base,
    q_row,
    g_row,
    normaliser_base,
    delta_base,
    projection,
    slope,
    half_scale,
    scale,
    log_m,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
):
    """Add what the queries i give to the gradients of the keys j, pair by pair: new dk, dv and d_logs."""
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    q = load_rows(q_base, i, valid, q_row, e, E, BE, True)
    g = load_rows(g_base, i, valid, g_row, d, D, BD, True)
    normaliser = tl.load(normaliser_base + i, mask=valid, other=-FLOOR)
    delta = tl.load(delta_base + i, mask=valid, other=0.0)
    inside = in_window(j[:, None], i[None, :], LEFT, RIGHT)
    visible = exists[:, None] & valid[None, :]
    if IS_CAUSAL:
        visible = visible & (j[:, None] <= i[None, :])
    exact = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    exact = tl.exp2(tl.where(inside & visible, exact - normaliser[None, :], FLOOR))
    t = tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :]
    dk += tl.dot((exact * t).to(q.dtype), q, input_precision=PRECISION)
    logs = log_features(q, half_norms(q, half_scale), projection, slope, PRECISION) - log_m
    logs = tl.where((f < M)[None, :], logs, FLOOR)
    query_features, query_level = normalised(logs)
    exponent = tl.minimum(key_level[:, None] + query_level[None, :] - normaliser[None, :], MAX_EXPONENT)
    ratio = tl.where(visible & no(inside), tl.exp2(exponent), 0.0)
    estimate = tl.dot(features, tl.trans(query_features), input_precision=FEATURE_PRECISION) * ratio
    dv += tl.dot((exact + estimate).to(g.dtype), g, input_precision=PRECISION)
    d_logs += features * tl.dot(ratio * t, query_features, input_precision=FEATURE_PRECISION)
    return dk, dv, d_logs


@triton.jit
def key_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    g_pointer,
    dk_pointer,
    dv_pointer,
    projection_pointer,
    lengths_pointer,
    mean_pointer,  # of the queries: averages of the output's gradient
    weight_pointer,
    extra_pointer,  # averages of delta
    norm_pointer,  # of the queries: what their normalised log features lie below q.w
    normaliser_pointer,
    delta_pointer,
    marked_pointer,
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
    g_batch,
    g_head,
    g_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
    slope,
    half_scale,
    scale,
    log_m,
    unlog,
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
    STAGES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOW_RANK: tl.constexpr,
    MARKS: tl.constexpr,
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
    MARK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Gradients of BN keys and their values: the window's queries in tiles of BM, the others by sums."""
    follow(OVERLAP, False)
    tile = tl.program_id(0)
    group = tl.program_id(1)
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    end = num_keys
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths_pointer + group // heads).to(tl.int32), num_keys)
    q_base = q_pointer + group_offset(group, heads, q_batch, q_head)
    k_base = k_pointer + group_offset(group, heads, k_batch, k_head)
    v_base = v_pointer + group_offset(group, heads, v_batch, v_head)
    g_base = g_pointer + group_offset(group, heads, g_batch, g_head)
    row_base = group.to(tl.int64) * num_queries
    num_marks = (num_queries + MARK_ROWS - 1) // MARK_ROWS

    j = tile * BN + tl.arange(0, BN)
    exists = j < end
    k = load_rows(k_base, j, exists, k_row, e, E, BE, True)
    v = load_rows(v_base, j, exists, v_row, d, D, BD, True)
    dk = tl.zeros((BN, BE), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    # queries that a window of this tile may hold
    first = tl.maximum(tile * BN - RIGHT + 1, 0)
    last = tl.minimum(tile * BN + BN + LEFT, num_queries)
    if IS_CAUSAL:
        first = tl.minimum(tile * BN, num_queries)
    if LOW_RANK:
        projection = load_projection(projection_pointer, E, BE, R, M, MP)
        logs = log_features(k, half_norms(k, half_scale), projection, slope, PRECISION)
        logs = tl.where((f < M)[None, :], logs, FLOOR)
        slot = group.to(tl.int64)
        if IS_CAUSAL:
            # the chunks of queries that are all past the windows of these keys
            state = tl.minimum((tile * BN + BN + LEFT + chunk - 1) // chunk, chunks)
            last = tl.minimum(state * chunk, num_queries)
            slot = slot * (chunks + 1) + state
        mean = tl.load(mean_pointer + slot * (BD * MP) + d[:, None] * MP + f[None, :])
        weight = tl.load(weight_pointer + slot * MP + f)
        extra = tl.load(extra_pointer + slot * MP + f)
        factors, level = normalised(logs + weight[None, :])
        factors = tl.where((level > FLOOR / 2)[:, None], factors, 0.0)
        unit = tl.exp2(tl.minimum(level, MAX_EXPONENT))
        rounded = factors.to(v.dtype)
        dv += tl.dot(rounded, tl.trans(mean), input_precision=PRECISION) * unit[:, None]
        d_sums = tl.dot(v, mean, input_precision=PRECISION) - extra[None, :]
        if IS_CAUSAL:
            d_logs = factors * d_sums * unit[:, None]
            features, key_level = normalised(logs)

    if LOW_RANK and IS_CAUSAL:
        start = first
        while start < last:
            i = start + tl.arange(0, BM)
            valid = i < last
            dk, dv, d_logs = add_pairs_to_keys(
                i,
                valid,
                j,
                exists,
                k,
                v,
                features,
                key_level,
                dk,
                dv,
                d_logs,
                q_base,
                g_base,
                q_row,
                g_row,
                normaliser_pointer + row_base,
                delta_pointer + row_base,
                projection,
                slope,
                half_scale,
                scale,
                log_m,
                E,
                BE,
                D,
                BD,
                M,
                MP,
                LEFT,
                RIGHT,
                True,
                PRECISION,
                FEATURE_PRECISION,
            )
            start += BM
    else:
        for part in tl.range(0, WINDOW_TILES, num_stages=STAGES):
            i = tile * BN - RIGHT + 1 + part * BM + tl.arange(0, BM)
            valid = (i >= 0) & (i < num_queries)
            q = load_rows(q_base, i, valid, q_row, e, E, BE, True)
            g = load_rows(g_base, i, valid, g_row, d, D, BD, True)
            normaliser = tl.load(normaliser_pointer + row_base + i, mask=valid, other=-FLOOR)
            delta = tl.load(delta_pointer + row_base + i, mask=valid, other=0.0)
            inside = in_window(j[:, None], i[None, :], LEFT, RIGHT) & exists[:, None] & valid[None, :]
            if IS_CAUSAL:
                inside = inside & (j[:, None] <= i[None, :])
            if MARKS:
                # marked queries enter below, all of them by pairs
                skipped = tl.load(marked_pointer + group * num_marks + i // MARK_ROWS, mask=valid, other=0)
                valid = valid & (skipped == 0)
                inside = inside & valid[None, :]
            exact = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            weights = tl.exp2(tl.where(inside, exact - normaliser[None, :], FLOOR))
            t = tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :]
            dk += tl.dot((weights * t).to(q.dtype), q, input_precision=PRECISION)
            if LOW_RANK:
                norms = tl.load(norm_pointer + row_base + i, mask=valid, other=0.0)
                query_logs = log_features(q, norms, projection, slope, PRECISION) - weight[None, :]
                query_factors = tl.exp2(tl.where((f < M)[None, :], query_logs, FLOOR))
                query_factors = tl.where(valid[:, None], query_factors, 0.0).to(q.dtype)
                estimate = tl.dot(rounded, tl.trans(query_factors), input_precision=PRECISION) * unit[:, None]
                weights -= tl.where(inside, estimate, 0.0)
                d_sums -= tl.dot(tl.where(inside, t, 0.0).to(q.dtype), query_factors, input_precision=PRECISION)
            dv += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        if LOW_RANK:
            d_logs = factors * d_sums * unit[:, None]

    dk *= scale * unlog
    if LOW_RANK:
        d_logs = tl.where(exists[:, None], d_logs, 0.0)
        dk = gradient_of_log_features(
            k, dk, d_logs, projection_pointer, slope, half_scale, unlog, E, BE, R, M, MP, PRECISION
        )
    within = j < num_keys
    dk = tl.where(exists[:, None], dk, 0.0)
    dv = tl.where(exists[:, None], dv, 0.0)
    store_rows(dk_pointer + group_offset(group, heads, dk_batch, dk_head), dk, j, within, dk_row, e, E)
    store_rows(dv_pointer + group_offset(group, heads, dv_batch, dv_head), dv, j, within, dv_row, d, D)


@triton.jit
def marked_key_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    g_pointer,
    dk_pointer,
    dv_pointer,
    projection_pointer,
    lengths_pointer,
    normaliser_pointer,
    delta_pointer,
    marked_pointer,
    marked_sequences_pointer,  # (1 + 2 G,) see `attention_kernel`
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
    g_batch,
    g_head,
    g_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
    slope,
    half_scale,
    scale,
    log_m,
    unlog,
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
    PRECISION: tl.constexpr,
    FEATURE_PRECISION: tl.constexpr,
    MARK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What marked queries add to the gradients of all keys, from pairs. Nearly always there are none."""
    follow(OVERLAP, False)
    num_tiles = (num_keys + BN - 1) // BN
    units = tl.load(marked_sequences_pointer) * num_tiles
    unit = tl.program_id(0)
    if unit >= units:
        return
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    num_marks = (num_queries + MARK_ROWS - 1) // MARK_ROWS
    projection = load_projection(projection_pointer, E, BE, R, M, MP)
    while unit < units:
        group = tl.load(marked_sequences_pointer + 1 + unit // num_tiles)
        tile = unit % num_tiles
        end = num_keys
        if HAS_LENGTHS:
            end = tl.minimum(tl.load(lengths_pointer + group // heads).to(tl.int32), num_keys)
        q_base = q_pointer + group_offset(group, heads, q_batch, q_head)
        g_base = g_pointer + group_offset(group, heads, g_batch, g_head)
        dk_base = dk_pointer + group_offset(group, heads, dk_batch, dk_head)
        dv_base = dv_pointer + group_offset(group, heads, dv_batch, dv_head)
        row_base = group.to(tl.int64) * num_queries
        j = tile * BN + tl.arange(0, BN)
        exists = j < end
        k = load_rows(k_pointer + group_offset(group, heads, k_batch, k_head), j, exists, k_row, e, E, BE, True)
        v = load_rows(v_pointer + group_offset(group, heads, v_batch, v_head), j, exists, v_row, d, D, BD, True)
        logs = log_features(k, half_norms(k, half_scale), projection, slope, PRECISION)
        features, key_level = normalised(tl.where((f < M)[None, :], logs, FLOOR))
        dk = tl.zeros((BN, BE), tl.float32)
        dv = tl.zeros((BN, BD), tl.float32)
        d_logs = tl.zeros((BN, MP), tl.float32)
        block = 0
        while block < num_marks:
            # looked at side by side: one after another, they would cost more than all that there is to compute
            mark_index = block + tl.arange(0, MARKS_AT_A_TIME)
            marks = tl.load(marked_pointer + group * num_marks + mark_index, mask=mark_index < num_marks, other=0)
            mark = tl.min(tl.where(marks != 0, mark_index, num_marks), 0)
            while mark < num_marks:
                start = mark * MARK_ROWS
                stop = tl.minimum(start + MARK_ROWS, num_queries)
                while start < stop:
                    i = start + tl.arange(0, BM)
                    valid = i < stop
                    dk, dv, d_logs = add_pairs_to_keys(
                        i,
                        valid,
                        j,
                        exists,
                        k,
                        v,
                        features,
                        key_level,
                        dk,
                        dv,
                        d_logs,
                        q_base,
                        g_base,
                        q_row,
                        g_row,
                        normaliser_pointer + row_base,
                        delta_pointer + row_base,
                        projection,
                        slope,
                        half_scale,
                        scale,
                        log_m,
                        E,
                        BE,
                        D,
                        BD,
                        M,
                        MP,
                        LEFT,
                        RIGHT,
                        False,
                        PRECISION,
                        FEATURE_PRECISION,
                    )
                    start += BM
                mark = tl.min(tl.where((marks != 0) & (mark_index > mark), mark_index, num_marks), 0)
            block += MARKS_AT_A_TIME
        d_logs = tl.where(exists[:, None], d_logs, 0.0)
        dk = gradient_of_log_features(
            k, dk * (scale * unlog), d_logs, projection_pointer, slope, half_scale, unlog, E, BE, R, M, MP, PRECISION
        )
        dk += load_rows(dk_base, j, exists, dk_row, e, E, BE, True).to(tl.float32)
        dv += load_rows(dv_base, j, exists, dv_row, d, D, BD, True).to(tl.float32)
        store_rows(dk_base, dk, j, exists, dk_row, e, E)
        store_rows(dv_base, dv, j, exists, dv_row, d, D)
        unit += tl.num_programs(0)
