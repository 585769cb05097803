"""Backward kernels: gradients of the queries, of the nodes from the highest level down, and of keys and values.

With normalised weights p, gradient g of the output and delta_i = g_i.out_i, the gradient of a logit is
x_ij = p_ij (g_i.v_j - delta_i), v_j the mean value for a landmark. A landmark b of n keys at the mean c, whose logit
has the part f = t (u_i r_b - t / 2) with u_i = s |q_i|, spread r_b and t = min(u_i r_b, z_b), gives each of its keys

    dk_j = (sum_i s x_ib q_i) / n + 2 (k_j - c) h_b,    h_b = (sum_i x_ib t u_i) / (2 r_b n E)
    dv_j = (sum_i p_ib g_i) / n

and a query s (sum_b x_ib c_b) + s q_i / |q_i| (sum_b x_ib t r_b). A key adds those of its landmarks of all levels:
kernels go from the highest level down, and each landmark passes what it has on to those it was made of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.clusters.causal.triton.fwd import (
    finite_rows,
    offset_of_centre,
    tile_of_nodes,
    visible_nodes,
)
from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import (
    LN2,
    LOG_ZERO,
    NO_KEYS,
    end_of_keys,
    load_rows,
    sequence_ptr,
    store_rows,
)


@triton.jit
def finite_part(x):
    """A tile with zeros in place of the rows that hold what is not finite: zero times nan is nan."""
    return tl.where(finite_rows(x)[:, None], x, 0.0)


@triton.jit
def load_queries(
    i, valid, q_ptr, gradient_ptr, dot_ptr, lse_ptr, stride_qn, stride_gn,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Queries i, gradients of their outputs, deltas and normalisers; without those that see what is not finite."""
    lse = tl.load(lse_ptr + i, mask=valid, other=NO_KEYS)
    sound = lse == lse
    q = load_rows(q_ptr, i, valid & sound, stride_qn, E, BE)
    gradient = load_rows(gradient_ptr, i, valid & sound, stride_gn, D, BD)
    dot = tl.load(dot_ptr + i, mask=valid & sound, other=0.0)
    return q, gradient, dot, tl.where(sound, lse, NO_KEYS)


@triton.jit
def exact_dq(dq, d_sum, q, gradient, k, v, inside, dot, lse, qk_scale, PRECISION: tl.constexpr):
    """Gradient of the queries without the softmax scale, and sums of those of the logits, with a tile of keys added."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale - lse[:, None]
    # masked before the exponential: it may overflow
    weights = tl.exp2(tl.where(inside, logits, LOG_ZERO))
    d_logits = weights * (tl.dot(gradient, tl.trans(v), input_precision=PRECISION) - dot[:, None])
    d_logits = d_logits.to(q.dtype)
    return tl.dot(d_logits, k, dq, input_precision=PRECISION), d_sum + tl.sum(d_logits.to(tl.float32), 1)


@triton.jit
def causal_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, gradient_ptr, dq_ptr, lengths_ptr,
    centre_ptr, delta_ptr, mean_v_ptr, log_count_ptr, spread_ptr, limit_ptr, lse_ptr,  # see `causal_fwd_kernel`
    dot_ptr,  # (G, T) products of gradient and output, written
    far_lse_ptr,  # (G, T) log2 normalisers relative to the logit of the centre, written with LEVELS
    norm_ptr,  # (G, T) norms of the queries times the softmax scale, likewise
    heads, num_queries, num_keys, num_nodes,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, stride_dqb, stride_dqh, stride_dqn,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    NODES: tl.constexpr, EXACT: tl.constexpr, LEVELS: tl.constexpr, REPEATS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of one chunk."""
    grid_dependency_control(PDL, True)
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    k_ptr = sequence_ptr(k_ptr, group // REPEATS, heads // REPEATS, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group // REPEATS, heads // REPEATS, stride_vb, stride_vh)
    i = chunk * C + tl.arange(0, C)
    valid = i < num_queries
    lse = tl.load(lse_ptr + wide * num_queries + i, mask=valid, other=NO_KEYS)
    sound = valid & (lse == lse)
    lse = tl.where(lse == lse, lse, NO_KEYS)
    q = load_rows(sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh), i, sound, stride_qn, E, BE)
    gradient_ptr = sequence_ptr(gradient_ptr, group, heads, stride_gb, stride_gh)
    gradient = load_rows(gradient_ptr, i, sound, stride_gn, D, BD)
    out = load_rows(sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh), i, sound, stride_on, D, BD)
    dot = tl.sum(gradient.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(dot_ptr + wide * num_queries + i, dot, mask=valid)
    j = chunk * C + tl.arange(0, C)
    k = load_rows(k_ptr, j, j < end, stride_kn, E, BE)
    v = load_rows(v_ptr, j, j < end, stride_vn, D, BD)
    # what is not finite is hidden from the queries that are left
    k = finite_part(k)
    v = finite_part(v)
    inside = (j[None, :] <= i[:, None]) & (j < end)[None, :]
    dq = tl.zeros((C, BE), tl.float32)
    d_sum = tl.zeros((C,), tl.float32)
    dq, d_sum = exact_dq(dq, d_sum, q, gradient, k, v, inside, dot, lse, qk_scale, PRECISION)
    if EXACT > 0:
        for part in tl.range(tl.maximum(chunk - EXACT, 0), chunk, num_stages=STAGES):
            j = part * C + tl.arange(0, C)
            k = load_rows(k_ptr, j, j < end, stride_kn, E, BE)
            v = load_rows(v_ptr, j, j < end, stride_vn, D, BD)
            dq, d_sum = exact_dq(dq, d_sum, q, gradient, k, v, (j < end)[None, :], dot, lse, qk_scale, PRECISION)
    # the gradients of all logits of a query add up to zero, so that keys may be relative to any point: a large
    # component that all share would multiply the rounding of these gradients
    e = tl.arange(0, BE)
    centre = tl.load(k_ptr + e, mask=(e < E) & (end > 0), other=0.0).to(tl.float32)
    if LEVELS > 0:
        seen = chunk - EXACT
        centre_ptr += (group // REPEATS) * BE
        centre = tl.where(seen > 0, tl.load(centre_ptr + e), centre)
    dq -= d_sum[:, None] * centre[None, :]
    if LEVELS > 0:
        far_lse = lse - offset_of_centre(q, centre_ptr, seen, qk_scale)
        wide_q = q.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide_q * wide_q, 1)) * scale
        tl.store(far_lse_ptr + wide * num_queries + i, tl.where(sound, far_lse, float("nan")), mask=valid)
        tl.store(norm_ptr + wide * num_queries + i, norm, mask=valid)
        size = (group // REPEATS).to(tl.int64) * 2 * num_nodes * M
        delta_ptr += size * E
        mean_v_ptr += size * D
        log_count_ptr += size
        spread_ptr += size
        limit_ptr += size
        d_norm = tl.zeros((C,), tl.float32)
        levels, pairs, number = visible_nodes(seen, LEVELS)
        for tile in tl.range(0, tl.cdiv(number, NODES), num_stages=STAGES):
            rows, pairs = tile_of_nodes(tile, seen, levels, pairs, number, num_nodes, M, NODES)
            delta = load_rows(delta_ptr, rows, rows, E, E, BE, False)
            mean_v = load_rows(mean_v_ptr, rows, rows, D, D, BD, False)
            log_count = tl.load(log_count_ptr + rows)
            spread = tl.load(spread_ptr + rows)
            limit = tl.load(limit_ptr + rows)
            far = tl.dot(q, tl.trans(delta), input_precision=PRECISION) * qk_scale + log_count[None, :]
            sigma = norm[:, None] * spread[None, :]
            limited = tl.minimum(sigma, limit[None, :])
            far_weights = tl.exp2(far + limited * (sigma - 0.5 * limited) - far_lse[:, None])
            d_far = far_weights * (tl.dot(gradient, tl.trans(mean_v), input_precision=PRECISION) - dot[:, None])
            d_norm += tl.sum(d_far * limited * spread[None, :], 1)
            dq = tl.dot(d_far.to(q.dtype), delta, dq, input_precision=PRECISION)
        share = tl.where(norm > 0.0, d_norm * (LN2 * scale) / tl.where(norm > 0.0, norm, 1.0), 0.0)
        dq += share[:, None] * q.to(tl.float32)
    dq = tl.where(sound[:, None], dq * scale, 0.0)
    store_rows(sequence_ptr(dq_ptr, group, heads, stride_dqb, stride_dqh), dq, i, valid, stride_dqn, E)


@triton.jit
def load_cluster(join_label_ptr, node, b, first, num_joined, M: tl.constexpr):
    """Clusters at the level above of the landmarks b of a node, -1 for none."""
    joined = (b < M) & (node < num_joined)
    return tl.load(join_label_ptr + (first + node) * M + b, mask=joined, other=-1).to(tl.int32)


@triton.jit
def finish_node(
    d_mean_k, d_mean_v, d_spread, label, node, b, size, delta_ptr, count_ptr, spread_ptr,
    of_k_ptr, of_v_ptr, of_scatter_ptr, first, first_above, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store what each landmark b of a node passes on to its keys, from the gradients (BE, M), (BD, M), (M,) of itself.

    of_k, of_v: the gradient of each key without the part that grows with its distance from the centre, and of each
    value; of_scatter: h_b.
    label: of `load_cluster`. WIDTH: that of the keys without padding.
    """
    exists = b < M
    joined = label >= 0
    rows = (first + node) * M + b
    above = (first_above + node // 2) * M + label
    count = tl.load(count_ptr + size + rows, mask=exists, other=0.0)
    spread = tl.load(spread_ptr + size + rows, mask=exists, other=0.0)
    delta = load_rows(delta_ptr + size * E, rows, exists, E, E, BE)
    of_k = load_rows(of_k_ptr + size * E, above, joined, E, E, BE)
    of_v = load_rows(of_v_ptr + size * D, above, joined, D, D, BD)
    of_scatter = tl.load(of_scatter_ptr + size + above, mask=joined, other=0.0)
    share = 1.0 / tl.maximum(count, 1.0)
    # 2 spread n E is that of the natural logarithm, where the gradient of the spread is to base 2
    own = tl.where(spread > 0.0, d_spread * share / tl.where(spread > 0.0, spread, 1.0), 0.0) * (0.5 / WIDTH)
    d_k = tl.trans(d_mean_k) * (share * scale)[:, None] - 2.0 * own[:, None] * finite_part(delta.to(tl.float32))
    store_rows(of_k_ptr + size * E, d_k + of_k.to(tl.float32), rows, exists, E, E)
    d_v = tl.trans(d_mean_v) * share[:, None]
    store_rows(of_v_ptr + size * D, d_v + of_v.to(tl.float32), rows, exists, D, D)
    tl.store(of_scatter_ptr + size + rows, own + of_scatter, mask=exists)


@triton.jit(do_not_specialize=["level", "first", "first_above", "num_joined"])
def causal_bwd_nodes_kernel(
    q_ptr, gradient_ptr,
    delta_ptr, mean_v_ptr, count_ptr, log_count_ptr, spread_ptr, limit_ptr, join_label_ptr,
    far_lse_ptr, dot_ptr, norm_ptr,
    of_k_ptr, of_v_ptr, of_scatter_ptr,  # see `finish_node`, tables as those of the landmarks, written without PIECES
    piece_ptr,  # (G, nodes, PIECES, BE + BD + 1, MP) float32, written with PIECES
    heads, num_queries, num_nodes, num_chunks, level, first, first_above, num_joined,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, REPEATS: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of the landmarks of one node, from the queries that see it, or from one of PIECES parts of these."""
    grid_dependency_control(PDL, False)
    node = tl.program_id(0) // PIECES
    piece = tl.program_id(0) % PIECES
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    size = wide * 2 * num_nodes * M
    b = tl.arange(0, MP)
    exists = b < M
    rows = (first + node) * M + b
    delta = tl.trans(finite_part(load_rows(delta_ptr + size * E, rows, exists, E, E, BE)))
    mean_v = tl.trans(finite_part(load_rows(mean_v_ptr + size * D, rows, exists, D, D, BD)))
    log_count = tl.load(log_count_ptr + size + rows, mask=exists, other=LOG_ZERO)
    limit = tl.load(limit_ptr + size + rows, mask=exists, other=0.0)
    spread = tl.load(spread_ptr + size + rows, mask=exists, other=0.0)
    spread = tl.where(spread < float("inf"), spread, 0.0)
    # before the loop, so that what it points at does not wait for it
    label = load_cluster(join_label_ptr + size, node, b, first, num_joined, M)
    d_mean_k = tl.zeros((BE, MP), tl.float32)
    d_mean_v = tl.zeros((BD, MP), tl.float32)
    # parts whose rows `tl.dot` leaves with the same thread, so that the loop adds without a shuffle
    d_spread = tl.zeros((C // 2, MP), tl.float32)
    # chunks whose queries see the node: 2^level, or twice as many for a node of an even number
    begin = ((node + 2) << level) - 1 + EXACT
    stop = tl.minimum(((node + 4 - node % 2) << level) - 1 + EXACT, num_chunks)
    part = (2 << level) // PIECES
    begin += piece * part
    number = tl.maximum(tl.minimum(stop, begin + part) - begin, 0)
    for step in tl.range(0, number * REPEATS, num_stages=STAGES):
        head = group
        chunk = begin + step
        if REPEATS > 1:
            head = group * REPEATS + step // number
            chunk = begin + step % number
        i = chunk * C + tl.arange(0, C)
        of_head = head.to(tl.int64) * num_queries
        q, gradient, dot, lse = load_queries(
            i, i < num_queries, sequence_ptr(q_ptr, head, heads, stride_qb, stride_qh),
            sequence_ptr(gradient_ptr, head, heads, stride_gb, stride_gh), dot_ptr + of_head, far_lse_ptr + of_head,
            stride_qn, stride_gn, E, BE, D, BD,
        )  # fmt: skip
        norm = tl.load(norm_ptr + of_head + i, mask=i < num_queries, other=0.0)
        logits = tl.dot(q, delta, input_precision=PRECISION) * qk_scale + log_count[None, :]
        sigma = norm[:, None] * spread[None, :]
        limited = tl.minimum(sigma, limit[None, :])
        weights = tl.exp2(logits + limited * (sigma - 0.5 * limited) - lse[:, None])
        d_logits = weights * (tl.dot(gradient, mean_v, input_precision=PRECISION) - dot[:, None])
        d_sigma = tl.reshape(d_logits * limited * norm[:, None], (C // 16, 2, 8, MP))
        d_spread += tl.reshape(tl.sum(d_sigma, 1), (C // 2, MP))
        d_mean_v = tl.dot(tl.trans(gradient), weights.to(q.dtype), d_mean_v, input_precision=PRECISION)
        d_mean_k = tl.dot(tl.trans(q), d_logits.to(q.dtype), d_mean_k, input_precision=PRECISION)
    d_spread = tl.sum(d_spread, 0)
    if PIECES == 1:
        finish_node(
            d_mean_k, d_mean_v, d_spread, label, node, b, size, delta_ptr, count_ptr, spread_ptr,
            of_k_ptr, of_v_ptr, of_scatter_ptr, first, first_above, scale, E, BE, D, BD, M, WIDTH,
        )  # fmt: skip
    else:
        piece_ptr += (wide * tl.num_programs(0) + tl.program_id(0)) * (BE + BD + 1) * MP
        tl.store(piece_ptr + tl.arange(0, BE)[:, None] * MP + b[None, :], d_mean_k)
        tl.store(piece_ptr + (BE + tl.arange(0, BD))[:, None] * MP + b[None, :], d_mean_v)
        tl.store(piece_ptr + (BE + BD) * MP + b, d_spread)


@triton.jit(do_not_specialize=["first", "first_above", "num_joined"])
def causal_bwd_pieces_kernel(
    delta_ptr, count_ptr, spread_ptr, join_label_ptr,
    of_k_ptr, of_v_ptr, of_scatter_ptr, piece_ptr,  # see `causal_bwd_nodes_kernel`
    num_nodes, first, first_above, num_joined, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of one node."""
    grid_dependency_control(PDL, False)
    node = tl.program_id(0)
    wide = tl.program_id(1).to(tl.int64)
    b = tl.arange(0, MP)
    piece_ptr += (wide * tl.num_programs(0) + node) * PIECES * (BE + BD + 1) * MP
    size = wide * 2 * num_nodes * M
    label = load_cluster(join_label_ptr + size, node, b, first, num_joined, M)
    d_mean_k = tl.zeros((BE, MP), tl.float32)
    d_mean_v = tl.zeros((BD, MP), tl.float32)
    d_spread = tl.zeros((MP,), tl.float32)
    for piece in tl.range(0, PIECES, num_stages=2):
        ptr = piece_ptr + piece * (BE + BD + 1) * MP
        d_mean_k += tl.load(ptr + tl.arange(0, BE)[:, None] * MP + b[None, :])
        d_mean_v += tl.load(ptr + (BE + tl.arange(0, BD))[:, None] * MP + b[None, :])
        d_spread += tl.load(ptr + (BE + BD) * MP + b)
    finish_node(
        d_mean_k, d_mean_v, d_spread, label, node, b, size, delta_ptr, count_ptr, spread_ptr,
        of_k_ptr, of_v_ptr, of_scatter_ptr, first, first_above, scale, E, BE, D, BD, M, WIDTH,
    )  # fmt: skip


@triton.jit
def exact_dkdv(dk, dv, k, v, q, gradient, inside, dot, lse, qk_scale, PRECISION: tl.constexpr):
    """Gradients of keys, without the softmax scale, and of values, with those of a tile of queries added."""
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale - lse[None, :]
    weights = tl.exp2(tl.where(inside, logits, LOG_ZERO))
    dv = tl.dot(weights.to(q.dtype), gradient, dv, input_precision=PRECISION)
    d_logits = weights * (tl.dot(v, tl.trans(gradient), input_precision=PRECISION) - dot[None, :])
    return tl.dot(d_logits.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def causal_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, gradient_ptr, dk_ptr, dv_ptr, lengths_ptr,
    label_ptr,  # (G, P C) int8
    centre_ptr, lse_ptr, dot_ptr, of_k_ptr, of_v_ptr, of_scatter_ptr,  # see `causal_bwd_nodes_kernel`
    heads, num_queries, num_keys, num_nodes,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    EXACT: tl.constexpr, REPEATS: tl.constexpr, HAS_LENGTHS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one chunk: from the queries that see it exactly, and from its landmarks.

    ROWS: queries of a tile.
    """
    grid_dependency_control(PDL, False)
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads // REPEATS, num_keys, HAS_LENGTHS)
    j = chunk * C + tl.arange(0, C)
    exists = j < end
    k = load_rows(sequence_ptr(k_ptr, group, heads // REPEATS, stride_kb, stride_kh), j, exists, stride_kn, E, BE)
    v = load_rows(sequence_ptr(v_ptr, group, heads // REPEATS, stride_vb, stride_vh), j, exists, stride_vn, D, BD)
    k = finite_part(k)
    v = finite_part(v)
    dk = tl.zeros((C, BE), tl.float32)
    dv = tl.zeros((C, BD), tl.float32)
    # that of the landmarks first: its loads do not wait for the products then
    if chunk < num_nodes - 1:
        size = wide * 2 * num_nodes * M
        label = tl.load(label_ptr + wide * num_nodes * C + j).to(tl.int32)
        rows = chunk * M + label
        member = label >= 0
        of_scatter = tl.load(of_scatter_ptr + size + rows, mask=member, other=0.0)
        dk = load_rows(of_k_ptr + size * E, rows, member, E, E, BE).to(tl.float32)
        centre = tl.load(centre_ptr + group * BE + tl.arange(0, BE))
        centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
        dk += 2.0 * of_scatter[:, None] * (k.to(tl.float32) - centre[None, :])
        dk *= tl.where(scale == 0.0, 0.0, 1.0 / scale)
        dv = load_rows(of_v_ptr + size * D, rows, member, D, D, BD).to(tl.float32)
    stop = tl.minimum((chunk + EXACT + 1) * C, num_queries)
    for repeat in tl.range(0, REPEATS, num_stages=1):
        head = group * REPEATS + repeat
        of_q = sequence_ptr(q_ptr, head, heads, stride_qb, stride_qh)
        of_gradient = sequence_ptr(gradient_ptr, head, heads, stride_gb, stride_gh)
        of_dot = dot_ptr + head.to(tl.int64) * num_queries
        of_lse = lse_ptr + head.to(tl.int64) * num_queries
        for first in tl.range(chunk * C, stop, ROWS, num_stages=STAGES):
            i = first + tl.arange(0, ROWS)
            q, gradient, dot, lse = load_queries(
                i, i < num_queries, of_q, of_gradient, of_dot, of_lse, stride_qn, stride_gn, E, BE, D, BD
            )
            inside = (j[:, None] <= i[None, :]) & exists[:, None]
            dk, dv = exact_dkdv(dk, dv, k, v, q, gradient, inside, dot, lse, qk_scale, PRECISION)
    dk *= scale
    stored = j < num_keys
    store_rows(sequence_ptr(dk_ptr, group, heads // REPEATS, stride_dkb, stride_dkh), dk, j, stored, stride_dkn, E)
    store_rows(sequence_ptr(dv_ptr, group, heads // REPEATS, stride_dvb, stride_dvh), dv, j, stored, stride_dvn, D)
