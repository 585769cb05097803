"""Backward kernels.

P are the normalised weights, g the gradients of their logarithms:

    P_ij = A_ij / sum_j A_ij      t_ij = do_i.v_j - delta_i,  delta_i = do_i.out_i      g_ij = P_ij t_ij

Inside the window log A is s q.k. Outside it is log sum_m phi_im phi_jm, so that with a_im = phi_im / sum_j A_ij the
gradient of the log features is

    of the queries   a_im    sum_j phi_jm t_ij = a_im  [do_i.(sum_j phi_jm v_j) - delta_i (sum_j phi_jm)]
    of the keys      phi_jm  sum_i a_im t_ij   = phi_jm [v_j.(sum_i a_im do_i) - (sum_i a_im delta_i)]

with the sums over the pairs outside the window. As in the forward pass the sums over everything are taken once, and the
window's pairs are subtracted. Fallback tiles of queries are left out of all sums, and `fallback.py` adds their pairs.
With causal masking everything but the sums over whole chunks comes from pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import (
    LN2,
    LOG_ZERO,
    NO_KEYS,
    end_of_keys,
    in_window,
    load_projection,
    load_projection_rows,
    load_rows,
    log_features,
    masked_log_features,
    relative_to_max,
    sequence_ptr,
    store_rows,
)
from scatterbrain.ops.scatterbrain.triton.pairs import (
    MAX_EXPONENT,
    exact_bwd_dk,
    exact_bwd_dq,
    pairs_bwd_dkdv,
    pairs_bwd_dq,
)


@triton.jit
def bwd_preprocess_kernel(
    out_ptr, do_ptr, delta_ptr, heads, num_queries,
    stride_ob, stride_oh, stride_on,
    stride_dob, stride_doh, stride_don,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`delta` of BM queries, without a low-rank part; with one, the sums over queries write it."""
    grid_dependency_control(PDL, True)
    group = tl.program_id(1)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = i < num_queries
    out = load_rows(sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh), i, valid, stride_on, D, BD)
    do = load_rows(sequence_ptr(do_ptr, group, heads, stride_dob, stride_doh), i, valid, stride_don, D, BD)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + group.to(tl.int64) * num_queries + i, delta, mask=valid)


@triton.jit
def log_features_bwd(
    x, dx, d_logs, projection_ptr, feature_scale, norm_scale,
    E: tl.constexpr, R: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of rows x: dx and what comes through their log features, whose gradient is d_logs."""
    BE: tl.constexpr = x.shape[1]
    MP: tl.constexpr = d_logs.shape[1]
    d_logs = tl.where((tl.arange(0, MP) < M)[None, :], d_logs, 0.0)
    rows = load_projection_rows(projection_ptr, E, BE, R, M, MP).to(x.dtype)
    dx += tl.dot(d_logs.to(x.dtype), rows, input_precision=PRECISION) * (feature_scale * LN2)
    return dx - x.to(tl.float32) * (tl.sum(d_logs, 1) * (2 * norm_scale * LN2))[:, None]


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr,
    do_ptr,  # (B, H, T, D) gradient of the output
    dq_ptr, projection_ptr, lengths_ptr,
    mean_ptr,  # sums over the keys, as in the forward pass
    weight_ptr,
    norm_ptr,  # of the keys
    lse_ptr, delta_ptr,
    heads, num_queries, num_keys, chunk, chunks,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn,
    qk_scale, feature_scale, norm_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LOG_M: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW_TILES: tl.constexpr, STAGES: tl.constexpr, HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    LOW_RANK: tl.constexpr, PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries. Fallback tiles come out wrong here; `fallback_bwd_dq_kernel` overwrites them."""
    grid_dependency_control(PDL, False)
    tile = tl.program_id(0)
    # from the last sequence to the first: what the kernel before has read of the last ones is still in the L2 cache
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    do_ptr = sequence_ptr(do_ptr, group, heads, stride_dob, stride_doh)
    dq_ptr = sequence_ptr(dq_ptr, group, heads, stride_dqb, stride_dqh)
    row = group.to(tl.int64) * num_queries

    i = tile * BM + tl.arange(0, BM)
    valid = i < num_queries
    if LOW_RANK:
        projection = load_projection(projection_ptr, E, BE, R, M, MP).to(q_ptr.dtype.element_ty)
    q = load_rows(q_ptr, i, valid, stride_qn, E, BE)
    do = load_rows(do_ptr, i, valid, stride_don, D, BD)
    lse = tl.load(lse_ptr + row + i, mask=valid, other=NO_KEYS)
    delta = tl.load(delta_ptr + row + i, mask=valid, other=0.0)
    dq = tl.zeros((BM, BE), tl.float32)
    if LOW_RANK:
        logs = masked_log_features(q, projection, LOG_M, feature_scale, norm_scale, M, PRECISION)
        # from the sums over all keys, or over the chunks before the window
        slot = group.to(tl.int64)
        if IS_CAUSAL:
            state = tl.minimum(tl.maximum(tile * BM - LEFT, 0) // chunk, chunks)
            slot = slot * (chunks + 1) + state
        mean = tl.load(mean_ptr + slot * (BD * MP) + d[:, None] * MP + f[None, :])
        weight = tl.load(weight_ptr + slot * MP + f)
        factors = tl.exp2(logs + weight[None, :] - lse[:, None])
        d_sums = tl.dot(do, mean, input_precision=PRECISION) - delta[:, None]

    if LOW_RANK and IS_CAUSAL:
        features, feature_max = relative_to_max(logs)
        dq, d_logs = pairs_bwd_dq(
            state * chunk, tl.minimum(end, tile * BM + BM), i, q, do, features, feature_max, lse, delta,
            dq, factors * d_sums, k_ptr, v_ptr, stride_kn, stride_vn, projection, qk_scale, feature_scale, norm_scale,
            E, D, LEFT, RIGHT, BN, True, PRECISION, FEATURE_PRECISION,
        )  # fmt: skip
    else:
        for part in tl.range(0, WINDOW_TILES, num_stages=STAGES):
            j = tile * BM - LEFT + part * BN + tl.arange(0, BN)
            exists = (j >= 0) & (j < end)
            k = load_rows(k_ptr, j, exists, stride_kn, E, BE)
            v = load_rows(v_ptr, j, exists, stride_vn, D, BD)
            inside = in_window(j[None, :], i[:, None], LEFT, RIGHT) & exists[None, :]
            if IS_CAUSAL:
                inside = inside & (j[None, :] <= i[:, None])
            dq, t = exact_bwd_dq(q, do, k, v, inside, lse, delta, dq, qk_scale, PRECISION)
            if LOW_RANK:
                norms = tl.load(norm_ptr + group.to(tl.int64) * num_keys + j, mask=exists, other=0.0)
                key_logs = log_features(k, norms, projection, feature_scale, PRECISION) - weight[None, :]
                # features of rows without a key may be infinite, and are multiplied by zero below
                key_factors = tl.where(exists[:, None], tl.exp2(key_logs), 0.0).to(q.dtype)
                inner = tl.where(inside, t, 0.0).to(q.dtype)
                d_sums -= tl.dot(inner, key_factors, input_precision=PRECISION)
        if LOW_RANK:
            d_logs = factors * d_sums
    dq *= qk_scale * LN2
    if LOW_RANK:
        dq = log_features_bwd(q, dq, d_logs, projection_ptr, feature_scale, norm_scale, E, R, M, PRECISION)
    store_rows(dq_ptr, dq, i, valid, stride_dqn, E)


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, projection_ptr, lengths_ptr,
    mean_ptr,  # sums over the queries: averages of the output's gradient
    weight_ptr,
    delta_mean_ptr,  # averages of delta
    norm_ptr,  # of the queries: what their normalised log features lie below q.w
    lse_ptr, delta_ptr, fallback_ptr,
    heads, num_queries, num_keys, chunk, chunks,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don,
    stride_dkb, stride_dkh, stride_dkn,
    stride_dvb, stride_dvh, stride_dvn,
    qk_scale, feature_scale, norm_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LOG_M: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW_TILES: tl.constexpr, STAGES: tl.constexpr, HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    LOW_RANK: tl.constexpr, HAS_FALLBACK: tl.constexpr, TILE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values: from the window's queries in tiles of BM, and from sums over queries."""
    grid_dependency_control(PDL, False)
    tile = tl.program_id(0)
    group = tl.program_id(1)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    do_ptr = sequence_ptr(do_ptr, group, heads, stride_dob, stride_doh)
    row = group.to(tl.int64) * num_queries
    num_tiles = (num_queries + TILE_ROWS - 1) // TILE_ROWS

    j = tile * BN + tl.arange(0, BN)
    exists = j < end
    k = load_rows(k_ptr, j, exists, stride_kn, E, BE)
    v = load_rows(v_ptr, j, exists, stride_vn, D, BD)
    dk = tl.zeros((BN, BE), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    if LOW_RANK:
        projection = load_projection(projection_ptr, E, BE, R, M, MP).to(q_ptr.dtype.element_ty)
        logs = masked_log_features(k, projection, 0.0, feature_scale, norm_scale, M, PRECISION)
        slot = group.to(tl.int64)
        if IS_CAUSAL:
            # the chunks of queries that are all past the windows of these keys
            state = tl.minimum((tile * BN + BN + LEFT + chunk - 1) // chunk, chunks)
            slot = slot * (chunks + 1) + state
        mean = tl.load(mean_ptr + slot * (BD * MP) + d[:, None] * MP + f[None, :])
        weight = tl.load(weight_ptr + slot * MP + f)
        delta_mean = tl.load(delta_mean_ptr + slot * MP + f)
        factors, factor_max = relative_to_max(logs + weight[None, :])
        factors = tl.where((factor_max > LOG_ZERO / 2)[:, None], factors, 0.0)
        unit = tl.exp2(tl.minimum(factor_max, MAX_EXPONENT))
        rounded = factors.to(v.dtype)
        dv += tl.dot(rounded, tl.trans(mean), input_precision=PRECISION) * unit[:, None]
        d_sums = tl.dot(v, mean, input_precision=PRECISION) - delta_mean[None, :]

    if LOW_RANK and IS_CAUSAL:
        features, feature_max = relative_to_max(logs)
        dk, dv, d_logs = pairs_bwd_dkdv(
            tl.minimum(tile * BN, num_queries), tl.minimum(state * chunk, num_queries), j, exists, k, v,
            features, feature_max, dk, dv, factors * d_sums * unit[:, None], q_ptr, do_ptr, stride_qn, stride_don,
            lse_ptr + row, delta_ptr + row, projection, qk_scale, feature_scale, norm_scale,
            E, D, M, LOG_M, LEFT, RIGHT, BM, True, PRECISION, FEATURE_PRECISION,
        )  # fmt: skip
    else:
        for part in tl.range(0, WINDOW_TILES, num_stages=STAGES):
            i = tile * BN - RIGHT + 1 + part * BM + tl.arange(0, BM)
            valid = (i >= 0) & (i < num_queries)
            q = load_rows(q_ptr, i, valid, stride_qn, E, BE)
            do = load_rows(do_ptr, i, valid, stride_don, D, BD)
            lse = tl.load(lse_ptr + row + i, mask=valid, other=NO_KEYS)
            delta = tl.load(delta_ptr + row + i, mask=valid, other=0.0)
            inside = in_window(j[:, None], i[None, :], LEFT, RIGHT) & exists[:, None] & valid[None, :]
            if IS_CAUSAL:
                inside = inside & (j[:, None] <= i[None, :])
            if HAS_FALLBACK:
                # `fallback_bwd_dkdv_kernel` adds these queries
                skipped = tl.load(fallback_ptr + group * num_tiles + i // TILE_ROWS, mask=valid, other=0)
                valid = valid & (skipped == 0)
                inside = inside & valid[None, :]
            dk, weights, t = exact_bwd_dk(q, do, k, v, inside, lse, delta, dk, qk_scale, PRECISION)
            if LOW_RANK:
                norms = tl.load(norm_ptr + row + i, mask=valid, other=0.0)
                query_logs = log_features(q, norms, projection, feature_scale, PRECISION) - weight[None, :]
                query_factors = tl.exp2(tl.where((f < M)[None, :], query_logs, LOG_ZERO))
                query_factors = tl.where(valid[:, None], query_factors, 0.0).to(q.dtype)
                estimate = tl.dot(rounded, tl.trans(query_factors), input_precision=PRECISION) * unit[:, None]
                weights -= tl.where(inside, estimate, 0.0)
                d_sums -= tl.dot(tl.where(inside, t, 0.0).to(q.dtype), query_factors, input_precision=PRECISION)
            dv += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        if LOW_RANK:
            d_logs = factors * d_sums * unit[:, None]

    dk *= qk_scale * LN2
    if LOW_RANK:
        d_logs = tl.where(exists[:, None], d_logs, 0.0)
        dk = log_features_bwd(k, dk, d_logs, projection_ptr, feature_scale, norm_scale, E, R, M, PRECISION)
    stored = j < num_keys
    dk = tl.where(exists[:, None], dk, 0.0)
    dv = tl.where(exists[:, None], dv, 0.0)
    store_rows(sequence_ptr(dk_ptr, group, heads, stride_dkb, stride_dkh), dk, j, stored, stride_dkn, E)
    store_rows(sequence_ptr(dv_ptr, group, heads, stride_dvb, stride_dvh), dv, j, stored, stride_dvn, D)
