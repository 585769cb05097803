"""Backward kernels: gradients of the queries, of the landmarks, and of keys and values.

With the weights p_ib of landmarks (all members of a cluster), and in the window the exact weights e_ij and the
landmarks' weights a_ij of one key, all normalised, and g the gradient of the output, delta_i = g_i.out_i:

    gradient of a landmark's logit   l_ib = p_ib (g_i.v_b - delta_i) - sum of a_ij (g_i.v_j - delta_i), b(j) = b
    gradient of an exact logit       x_ij = e_ij (g_i.v_j - delta_i)
    queries   dq_i = s (sum_j x_ij k_j + sum_b l_ib c_b)
    keys      dk_j = s (sum_i x_ij q_i + sum_i l_ib q_i / n_b)
    values    dv_j = sum_i (e_ij - a_ij) g_i + sum_i p_ib g_i / n_b
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.clusters.triton.fwd import (
    dot_centre,
    landmark_not_taken,
    load_words,
    not_taken,
    window_labels,
    window_rows,
    words_of_queries,
)
from scatterbrain.ops.clusters.triton.kmeans import sum_of_chunks
from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import (
    LOG_ZERO,
    end_of_keys,
    in_window,
    load_rows,
    sequence_ptr,
    store_rows,
)


@triton.jit
def landmark_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, gradient_ptr, dq_ptr, lengths_ptr,
    centre_ptr, delta_ptr, mean_v_ptr, log_count_ptr, label_ptr, lse_ptr,  # see `landmark_fwd_kernel`
    dot_ptr,  # (G, T) products of gradient and output, written
    offset_ptr,  # (G, T) log2 weight of a key at the centre, written
    query_label_ptr, taken_ptr,  # see `landmark_fwd_kernel`
    heads, num_queries, num_keys, num_landmarks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, stride_dqb, stride_dqh, stride_dqn,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MB: tl.constexpr, MP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, WINDOW_TILES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries, and what the other kernels read of each query."""
    grid_dependency_control(PDL, True)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    delta_ptr += wide * num_landmarks * E
    mean_v_ptr += wide * num_landmarks * D
    label_ptr += wide * num_keys
    centre = tl.load(centre_ptr + group * BE + tl.arange(0, BE))
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = i < num_queries
    q = load_rows(sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh), i, valid, stride_qn, E, BE)
    gradient_ptr = sequence_ptr(gradient_ptr, group, heads, stride_gb, stride_gh)
    gradient = load_rows(gradient_ptr, i, valid, stride_gn, D, BD)
    out = load_rows(sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh), i, valid, stride_on, D, BD)
    dot = tl.sum(gradient.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + wide * num_queries + i, mask=valid, other=-LOG_ZERO)
    offset = dot_centre(q, centre) * qk_scale - lse
    tl.store(dot_ptr + wide * num_queries + i, dot, mask=valid)
    tl.store(offset_ptr + wide * num_queries + i, offset, mask=valid)
    if CLUSTERS > 0:
        word_ptr = words_of_queries(taken_ptr, query_label_ptr, group, i, valid, num_queries, num_landmarks, CLUSTERS)
        first, second, third, fourth = load_words(word_ptr, num_landmarks, MP)
    dq = tl.zeros((BM, BE), tl.float32)
    for block in tl.range(0, MP, MB, num_stages=2):
        b = block + tl.arange(0, MB)
        landmark = load_rows(delta_ptr, b, b < num_landmarks, E, E, BE)
        mean_v = load_rows(mean_v_ptr, b, b < num_landmarks, D, D, BD)
        log_count = tl.load(log_count_ptr + group * MP + b)
        logits = tl.dot(q, tl.trans(landmark), input_precision=PRECISION) * qk_scale + log_count[None, :]
        if CLUSTERS > 0:
            free = landmark_not_taken(word_ptr, first, second, third, fourth, b, block, num_landmarks, MB, MP)
            logits = tl.where(free, logits, LOG_ZERO)
        weights = tl.exp2(logits + offset[:, None])
        d_logits = weights * (tl.dot(gradient, tl.trans(mean_v), input_precision=PRECISION) - dot[:, None])
        dq = tl.dot(d_logits.to(q.dtype), landmark, dq, input_precision=PRECISION)
    if WINDOW_TILES > 0:
        # Gradients of a query's logits add up to zero, but for rounding. Those of exact ones are times keys, not
        # times keys less the centre: what their rounded sum has too much of it is taken off.
        excess = tl.zeros((BM,), tl.float32)
        for part in tl.range(0, WINDOW_TILES, num_stages=2):
            j = tl.program_id(0) * BM - LEFT + part * BN + tl.arange(0, BN)
            label = window_labels(j, end, label_ptr)
            k, v, delta, position = window_rows(
                j, label, end, k_ptr, v_ptr, delta_ptr, stride_kn, stride_vn, E, BE, D, BD
            )
            inside = in_window(position[None, :], i[:, None], LEFT, RIGHT)
            if CLUSTERS > 0:
                inside = inside & not_taken(
                    word_ptr[:, None], first[:, None], second[:, None], third[:, None], fourth[:, None],
                    label[None, :], MP,
                )  # fmt: skip
            exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale - lse[:, None]
            estimate = tl.dot(q, tl.trans(delta), input_precision=PRECISION) * qk_scale + offset[:, None]
            # both masks before the exponential: outside the window it may overflow
            exact = tl.exp2(tl.where(inside, exact, LOG_ZERO))
            estimate = tl.exp2(tl.where(inside, estimate, LOG_ZERO))
            d_weights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION) - dot[:, None]
            d_exact = (exact * d_weights).to(q.dtype)
            excess += tl.sum(d_exact.to(tl.float32), 1)
            dq = tl.dot(d_exact, k, dq, input_precision=PRECISION)
            dq = tl.dot((-estimate * d_weights).to(q.dtype), delta, dq, input_precision=PRECISION)
        dq -= excess[:, None] * centre[None, :]
    store_rows(sequence_ptr(dq_ptr, group, heads, stride_dqb, stride_dqh), dq * scale, i, valid, stride_dqn, E)


@triton.jit
def landmark_bwd_window_kernel(
    q_ptr, v_ptr, gradient_ptr, lengths_ptr,
    delta_ptr, label_ptr,  # see `landmark_fwd_kernel`
    dot_ptr, offset_ptr,  # see `landmark_bwd_dq_kernel`
    sum_ptr,  # (G, chunks, BE + BD + 1, MP) float32, rows of keys written
    query_label_ptr, taken_ptr,  # see `landmark_fwd_kernel`
    heads, num_queries, num_keys, num_landmarks, chunk,
    stride_qb, stride_qh, stride_qn, stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    qk_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MB: tl.constexpr, MP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, WINDOW_TILES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums over the keys of a chunk, by cluster, of - a_ij (g_i.v_j - delta_i) q_i, for one block of MB landmarks."""
    grid_dependency_control(PDL, False)
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    gradient_ptr = sequence_ptr(gradient_ptr, group, heads, stride_gb, stride_gh)
    delta_ptr += wide * num_landmarks * E
    label_ptr += wide * num_keys
    offset_ptr += wide * num_queries
    dot_ptr += wide * num_queries
    b = tl.program_id(2) * MB + tl.arange(0, MB)
    sum_k = tl.zeros((BE, MB), tl.float32)
    first = tl.program_id(0) * chunk
    for n in tl.range(first, tl.minimum(first + chunk, end), BN, num_stages=1):
        j = n + tl.arange(0, BN)
        exists = j < end
        label = tl.load(label_ptr + j, mask=exists, other=-1).to(tl.int32)
        delta = load_rows(delta_ptr, label, exists, E, E, BE)
        v = load_rows(v_ptr, j, exists, stride_vn, D, BD)
        of_keys = tl.zeros((BN, BE), tl.float32)
        for part in tl.range(0, WINDOW_TILES, num_stages=2):
            i = n - RIGHT + 1 + part * BM + tl.arange(0, BM)
            valid = (i >= 0) & (i < num_queries)
            q = load_rows(q_ptr, i, valid, stride_qn, E, BE)
            gradient = load_rows(gradient_ptr, i, valid, stride_gn, D, BD)
            offset = tl.load(offset_ptr + i, mask=valid, other=0.0)
            dot = tl.load(dot_ptr + i, mask=valid, other=0.0)
            inside = in_window(j[:, None], i[None, :], LEFT, RIGHT) & valid[None, :] & exists[:, None]
            if CLUSTERS > 0:
                word_ptr = words_of_queries(
                    taken_ptr, query_label_ptr, group, i, valid, num_queries, num_landmarks, CLUSTERS
                )
                word, second, third, fourth = load_words(word_ptr, num_landmarks, MP)
                inside = inside & not_taken(
                    word_ptr[None, :], word[None, :], second[None, :], third[None, :], fourth[None, :],
                    tl.maximum(label, 0)[:, None], MP,
                )  # fmt: skip
            estimate = tl.dot(delta, tl.trans(q), input_precision=PRECISION) * qk_scale + offset[None, :]
            estimate = tl.exp2(tl.where(inside, estimate, LOG_ZERO))
            d_weights = dot[None, :] - tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
            of_keys = tl.dot((estimate * d_weights).to(q.dtype), q, of_keys, input_precision=PRECISION)
        one_hot = (label[:, None] == b[None, :]).to(v.dtype)
        sum_k = tl.dot(tl.trans(of_keys.to(v.dtype)), one_hot, sum_k, input_precision=PRECISION)
    rows: tl.constexpr = BE + BD + 1
    sum_ptr += (wide * tl.num_programs(0) + tl.program_id(0)) * (rows * MP)
    tl.store(sum_ptr + tl.arange(0, BE)[:, None] * MP + b[None, :], sum_k)


@triton.jit
def landmark_bwd_sums_kernel(
    q_ptr, gradient_ptr,
    delta_ptr, mean_v_ptr, log_count_ptr,  # see `landmark_fwd_kernel`
    dot_ptr, offset_ptr,  # see `landmark_bwd_dq_kernel`
    sum_ptr,  # (G, chunks, BE + BD + 1, MP) float32: rows of keys (with HAS_WINDOW added to) and values written
    query_label_ptr, taken_ptr,  # see `landmark_fwd_kernel`
    heads, num_queries, num_landmarks, chunk,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
    qk_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MB: tl.constexpr, MP: tl.constexpr,
    BM: tl.constexpr, HAS_WINDOW: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sums over the queries of a chunk of p_ib (g_i.v_b - delta_i) q_i and p_ib g_i, for one block of MB landmarks."""
    grid_dependency_control(PDL, False)
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    wide = group.to(tl.int64)
    q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
    gradient_ptr = sequence_ptr(gradient_ptr, group, heads, stride_gb, stride_gh)
    offset_ptr += wide * num_queries
    dot_ptr += wide * num_queries
    b = tl.program_id(2) * MB + tl.arange(0, MB)
    landmark = tl.trans(load_rows(delta_ptr + wide * num_landmarks * E, b, b < num_landmarks, E, E, BE))
    mean_v = tl.trans(load_rows(mean_v_ptr + wide * num_landmarks * D, b, b < num_landmarks, D, D, BD))
    log_count = tl.load(log_count_ptr + group * MP + b)
    rows: tl.constexpr = BE + BD + 1
    sum_ptr += (wide * tl.num_programs(0) + tl.program_id(0)) * (rows * MP)
    sum_k_ptrs = sum_ptr + tl.arange(0, BE)[:, None] * MP + b[None, :]
    sum_k = tl.load(sum_k_ptrs) if HAS_WINDOW else tl.zeros((BE, MB), tl.float32)
    sum_v = tl.zeros((BD, MB), tl.float32)
    first = tl.program_id(0) * chunk
    for n in tl.range(first, tl.minimum(first + chunk, num_queries), BM, num_stages=STAGES):
        i = n + tl.arange(0, BM)
        valid = i < num_queries
        q = load_rows(q_ptr, i, valid, stride_qn, E, BE)
        gradient = load_rows(gradient_ptr, i, valid, stride_gn, D, BD)
        dot = tl.load(dot_ptr + i, mask=valid, other=0.0)
        offset = tl.load(offset_ptr + i, mask=valid, other=LOG_ZERO)
        logits = tl.dot(q, landmark, input_precision=PRECISION) * qk_scale + log_count[None, :]
        if CLUSTERS > 0:
            word_ptr = words_of_queries(
                taken_ptr, query_label_ptr, group, i, valid, num_queries, num_landmarks, CLUSTERS
            )
            word, second, third, fourth = load_words(word_ptr, num_landmarks, MP)
            block = tl.program_id(2) * MB
            free = landmark_not_taken(word_ptr, word, second, third, fourth, b, block, num_landmarks, MB, MP)
            logits = tl.where(free, logits, LOG_ZERO)
        weights = tl.exp2(logits + offset[:, None])
        d_logits = weights * (tl.dot(gradient, mean_v, input_precision=PRECISION) - dot[:, None])
        sum_v = tl.dot(tl.trans(gradient), weights.to(q.dtype), sum_v, input_precision=PRECISION)
        sum_k = tl.dot(tl.trans(q), d_logits.to(q.dtype), sum_k, input_precision=PRECISION)
    tl.store(sum_k_ptrs, sum_k)
    tl.store(sum_ptr + (BE + tl.arange(0, BD))[:, None] * MP + b[None, :], sum_v)


@triton.jit
def landmark_bwd_combine_kernel(
    sum_ptr,  # see `landmark_bwd_sums_kernel`
    log_count_ptr,
    d_landmark_ptr,  # (G, M, E) gradient of each member key of a cluster, written
    d_mean_v_ptr,  # (G, M, D) of each member's value, written
    num_landmarks, chunks, slots, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Gradients that all members of a cluster share, of BLOCK landmarks."""
    grid_dependency_control(PDL, False)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = b < num_landmarks
    stride: tl.constexpr = (BE + BD + 1) * MP
    sum_ptr += wide * slots * stride
    key = sum_of_chunks(sum_ptr, chunks, stride, b, BE, MP)
    value = sum_of_chunks(sum_ptr + BE * MP, chunks, stride, b, BD, MP)
    # LOG_ZERO of an empty cluster, which has no member, would overflow
    share = tl.exp2(-tl.maximum(tl.load(log_count_ptr + group * MP + b), 0.0))
    key_ptrs = d_landmark_ptr + (wide * num_landmarks + b)[None, :] * E + e[:, None]
    value_ptrs = d_mean_v_ptr + (wide * num_landmarks + b)[None, :] * D + d[:, None]
    key = (key * (share * scale)[None, :]).to(d_landmark_ptr.dtype.element_ty)
    value = (value * share[None, :]).to(d_mean_v_ptr.dtype.element_ty)
    tl.store(key_ptrs, key, mask=exists[None, :] & (e < E)[:, None])
    tl.store(value_ptrs, value, mask=exists[None, :] & (d < D)[:, None])


@triton.jit
def landmark_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, gradient_ptr, dk_ptr, dv_ptr, lengths_ptr,
    delta_ptr, label_ptr, lse_ptr, dot_ptr, offset_ptr, d_landmark_ptr, d_mean_v_ptr,
    query_label_ptr, taken_ptr,
    heads, num_queries, num_keys, num_landmarks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, WINDOW_TILES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values: the window's queries, and what all members of a cluster share."""
    grid_dependency_control(PDL, False)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
    gradient_ptr = sequence_ptr(gradient_ptr, group, heads, stride_gb, stride_gh)
    first = tl.program_id(0) * BN
    j = first + tl.arange(0, BN)
    exists = j < end
    label = tl.load(label_ptr + wide * num_keys + j, mask=exists, other=0).to(tl.int32)
    dk = load_rows(d_landmark_ptr + wide * num_landmarks * E, label, exists, E, E, BE).to(tl.float32)
    dv = load_rows(d_mean_v_ptr + wide * num_landmarks * D, label, exists, D, D, BD).to(tl.float32)
    if WINDOW_TILES > 0:
        k = load_rows(sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh), j, exists, stride_kn, E, BE)
        v = load_rows(sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh), j, exists, stride_vn, D, BD)
        delta = load_rows(delta_ptr + wide * num_landmarks * E, label, exists, E, E, BE)
        exact_dk = tl.zeros((BN, BE), tl.float32)
        for part in tl.range(0, WINDOW_TILES, num_stages=2):
            i = first - RIGHT + 1 + part * BM + tl.arange(0, BM)
            valid = (i >= 0) & (i < num_queries)
            q = load_rows(q_ptr, i, valid, stride_qn, E, BE)
            gradient = load_rows(gradient_ptr, i, valid, stride_gn, D, BD)
            lse = tl.load(lse_ptr + wide * num_queries + i, mask=valid, other=0.0)
            offset = tl.load(offset_ptr + wide * num_queries + i, mask=valid, other=0.0)
            dot = tl.load(dot_ptr + wide * num_queries + i, mask=valid, other=0.0)
            inside = in_window(j[:, None], i[None, :], LEFT, RIGHT) & valid[None, :] & exists[:, None]
            if CLUSTERS > 0:
                word_ptr = words_of_queries(
                    taken_ptr, query_label_ptr, group, i, valid, num_queries, num_landmarks, CLUSTERS
                )
                word, second, third, fourth = load_words(word_ptr, num_landmarks, MP)
                inside = inside & not_taken(
                    word_ptr[None, :], word[None, :], second[None, :], third[None, :], fourth[None, :],
                    label[:, None], MP,
                )  # fmt: skip
            exact = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale - lse[None, :]
            estimate = tl.dot(delta, tl.trans(q), input_precision=PRECISION) * qk_scale + offset[None, :]
            exact = tl.exp2(tl.where(inside, exact, LOG_ZERO))
            estimate = tl.exp2(tl.where(inside, estimate, LOG_ZERO))
            d_weights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION) - dot[None, :]
            dv = tl.dot((exact - estimate).to(q.dtype), gradient, dv, input_precision=PRECISION)
            exact_dk = tl.dot((exact * d_weights).to(q.dtype), q, exact_dk, input_precision=PRECISION)
        dk += exact_dk * scale
    in_memory = j < num_keys
    store_rows(sequence_ptr(dk_ptr, group, heads, stride_dkb, stride_dkh), dk, j, in_memory, stride_dkn, E)
    store_rows(sequence_ptr(dv_ptr, group, heads, stride_dvb, stride_dvh), dv, j, in_memory, stride_dvn, D)
