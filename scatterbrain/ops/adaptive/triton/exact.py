"""Kernels of the exact part: the keys that a query cluster takes, for tiles of its queries, forward and backward.

Queries are taken in the order of their clusters, so that a tile has one list of keys; rows of queries, keys and values
are gathered. The forward kernel merges its sums with those of landmarks and window by their log normalisers. The
backward kernels add to gradients that those of landmarks and window have written; each row belongs to one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import LOG_ZERO, NO_KEYS, load_rows, sequence_ptr, store_rows

# Numbers of queries of a tile are kept with its first one in 32 bits.
MAX_ROWS = tl.constexpr(128)


@triton.jit
def cluster_tile(start_ptr, tile, CLUSTERS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Cluster of a tile of ROWS points in the order of clusters, its first point, and the end of the cluster.

    Cluster a begins at starts[a] of (CLUSTERS + 1,), and its tiles at starts[a] // ROWS + a: they do not overlap, since
    n points need no more than n // ROWS + 1 of them, and they follow from `starts` without a sum. The first point
    of a tile that is not needed lies at the end or behind it.
    """
    cluster = tl.arange(0, BLOCK)
    exists = cluster < CLUSTERS
    # all that is needed at once, so that nothing else waits for a second load
    start = tl.load(start_ptr + cluster, mask=exists, other=0)
    end = tl.load(start_ptr + cluster + 1, mask=exists, other=0)
    begins = exists & (start // ROWS + cluster <= tile)
    found = tl.sum(begins.to(tl.int32), 0) - 1
    start = tl.max(tl.where(begins, start, 0), 0)  # they do not descend
    end = tl.sum(tl.where(cluster == found, end, 0), 0)
    return found, start + (tile - start // ROWS - found) * ROWS, end


@triton.jit
def listed_rows(k_ptr, v_ptr, key_ptr, n, count, stride_kn, stride_vn,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys (BN, BE) n to n + BN of a list, and their values (BN, BD)."""
    place = n + tl.arange(0, BN)
    # past the end of the list, its last key again: hidden rows may hold anything
    j = tl.load(key_ptr + (tl.minimum(place, count - 1) if MASKED else place))
    return load_rows(k_ptr, j, j >= 0, stride_kn, E, BE, False), load_rows(v_ptr, j, j >= 0, stride_vn, D, BD, False)


@triton.jit
def exact_logits(q, k, n, count, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Products (BM, BN) of queries with keys n to n + BN of a list, LOG_ZERO past its end with MASKED."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        logits = tl.where((n + tl.arange(0, k.shape[0]) < count)[None, :], logits, LOG_ZERO)
    return logits


@triton.jit
def exact_step(logits, v, acc, total, running_max, qk_scale, PRECISION: tl.constexpr):
    """Add values v (BN, BD) with weights exp2(qk_scale logits); new accumulator, normaliser and running maximum."""
    new_max = tl.maximum(running_max, tl.max(logits, 1) * qk_scale)
    weights = tl.exp2(logits * qk_scale - new_max[:, None])
    decay = tl.exp2(running_max - new_max)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, new_max


@triton.jit
def exact_fwd_kernel(
    q_ptr, k_ptr, v_ptr,
    out_ptr,  # output of landmarks and window, replaced by that of all
    lse_ptr,  # (G, T) log2 normaliser of landmarks and window, LOG_ZERO without any, replaced by that of all
    key_ptr,  # (G, CLUSTERS, num_listed) int32, keys that the query clusters take
    count_ptr,  # (G, CLUSTERS) int32, their numbers
    order_ptr,  # (G, T) int32, queries in the order of their clusters
    start_ptr,  # (G, CLUSTERS + 1) int32, where clusters begin in this order
    heads, num_queries, num_listed,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    qk_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Output and log normaliser of BM queries of one cluster: the keys that it takes, merged with what is there."""
    grid_dependency_control(PDL, False)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    cluster, first, end = cluster_tile(start_ptr + group * (CLUSTERS + 1), tl.program_id(0), CLUSTERS, BLOCK, BM)
    # a program mostly waits for loads: each as soon as its address is known
    count = tl.load(count_ptr + group * CLUSTERS + cluster)
    place = first + tl.arange(0, BM)
    valid = place < end
    i = tl.load(order_ptr + wide * num_queries + tl.maximum(tl.minimum(place, end - 1), 0))
    if (first < end) & (count > 0):
        q = load_rows(sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh), i, valid, stride_qn, E, BE, False)
        lse_ptrs = lse_ptr + wide * num_queries + i
        rest = tl.load(lse_ptrs)
        k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
        v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
        key_ptr += (wide * CLUSTERS + cluster) * num_listed
        running_max = tl.full((BM,), LOG_ZERO, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BD), tl.float32)
        whole = count // BN * BN
        last_k, last_v = listed_rows(k_ptr, v_ptr, key_ptr, whole, count, stride_kn, stride_vn, E, BE, D, BD, BN, True)
        for n in tl.range(0, whole, BN, num_stages=STAGES):
            k, v = listed_rows(k_ptr, v_ptr, key_ptr, n, count, stride_kn, stride_vn, E, BE, D, BD, BN, False)
            logits = exact_logits(q, k, n, count, False, PRECISION)
            acc, total, running_max = exact_step(logits, v, acc, total, running_max, qk_scale, PRECISION)
        if whole < count:
            logits = exact_logits(q, last_k, whole, count, True, PRECISION)
            acc, total, running_max = exact_step(logits, last_v, acc, total, running_max, qk_scale, PRECISION)
        exact = running_max + tl.log2(total)
        largest = tl.maximum(exact, rest)
        share, share_of_rest = tl.exp2(exact - largest), tl.exp2(rest - largest)
        normaliser = share + share_of_rest
        out_ptr = sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh)
        out = load_rows(out_ptr, i, valid, stride_on, D, BD, False).to(tl.float32)
        out = out * (share_of_rest / normaliser)[:, None] + acc * (share / (total * normaliser))[:, None]
        store_rows(out_ptr, out, i, valid, stride_on, D)
        tl.store(lse_ptrs, largest + tl.log2(normaliser), mask=valid)


@triton.jit
def exact_bwd_dq_step(logits, k, v, gradient, lse, dot, dq, excess, qk_scale, PRECISION: tl.constexpr):
    """Add the gradient of a tile's logits to those of the queries, and to their sums."""
    weights = tl.exp2(logits * qk_scale - lse[:, None])
    d_weights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION) - dot[:, None]
    d_logits = (weights * d_weights).to(k.dtype)
    excess += tl.sum(d_logits.to(tl.float32), 1)
    return tl.dot(d_logits, k, dq, input_precision=PRECISION), excess


@triton.jit
def exact_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, gradient_ptr,
    dq_ptr,  # gradients through landmarks and window, added to
    centre_ptr, lse_ptr, dot_ptr,  # see `landmark_bwd_dq_kernel`
    key_ptr, count_ptr, order_ptr, start_ptr,  # see `exact_fwd_kernel`
    heads, num_queries, num_listed,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_dqb, stride_dqh, stride_dqn,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of BM queries of one cluster through the keys that it takes."""
    grid_dependency_control(PDL, False)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    cluster, first, end = cluster_tile(start_ptr + group * (CLUSTERS + 1), tl.program_id(0), CLUSTERS, BLOCK, BM)
    count = tl.load(count_ptr + group * CLUSTERS + cluster)
    if (first < end) & (count > 0):
        place = first + tl.arange(0, BM)
        valid = place < end
        i = tl.load(order_ptr + wide * num_queries + tl.minimum(place, end - 1))
        q = load_rows(sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh), i, valid, stride_qn, E, BE, False)
        gradient_ptr = sequence_ptr(gradient_ptr, group, heads, stride_gb, stride_gh)
        gradient = load_rows(gradient_ptr, i, valid, stride_gn, D, BD, False)
        lse = tl.load(lse_ptr + wide * num_queries + i)
        dot = tl.load(dot_ptr + wide * num_queries + i)
        k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
        v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
        key_ptr += (wide * CLUSTERS + cluster) * num_listed
        dq = tl.zeros((BM, BE), tl.float32)
        excess = tl.zeros((BM,), tl.float32)
        whole = count // BN * BN
        for n in tl.range(0, whole, BN, num_stages=STAGES):
            k, v = listed_rows(k_ptr, v_ptr, key_ptr, n, count, stride_kn, stride_vn, E, BE, D, BD, BN, False)
            logits = exact_logits(q, k, n, count, False, PRECISION)
            dq, excess = exact_bwd_dq_step(logits, k, v, gradient, lse, dot, dq, excess, qk_scale, PRECISION)
        if whole < count:
            k, v = listed_rows(k_ptr, v_ptr, key_ptr, whole, count, stride_kn, stride_vn, E, BE, D, BD, BN, True)
            logits = exact_logits(q, k, whole, count, True, PRECISION)
            dq, excess = exact_bwd_dq_step(logits, k, v, gradient, lse, dot, dq, excess, qk_scale, PRECISION)
        # as in `landmark_bwd_dq_kernel`: keys count relative to the centre
        dq -= excess[:, None] * tl.load(centre_ptr + group * BE + tl.arange(0, BE))[None, :]
        dq_ptr = sequence_ptr(dq_ptr, group, heads, stride_dqb, stride_dqh)
        before = load_rows(dq_ptr, i, valid, stride_dqn, E, BE, False).to(tl.float32)
        store_rows(dq_ptr, before + dq * scale, i, valid, stride_dqn, E)


@triton.jit
def query_tiles_kernel(
    taken_ptr,  # (G, CLUSTERS, words) int32, bits of the key clusters that a query cluster takes
    start_ptr,  # (G, CLUSTERS + 1) int32, see `exact_fwd_kernel`
    tile_ptr,  # (G, M, num_tiles) int32, written
    count_ptr,  # (G, M) int32, written
    num_landmarks, num_tiles,
    CLUSTERS: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of up to BM queries of one cluster that take a key cluster.

    For each tile its first place in the order of clusters, times MAX_ROWS, and its number of queries less one.
    """
    grid_dependency_control(PDL, False)
    landmark = tl.program_id(0)
    group = tl.program_id(1)
    words = (num_landmarks + 31) // 32
    cluster = tl.arange(0, BLOCK)
    exists = cluster < CLUSTERS
    word = tl.load(taken_ptr + (group * CLUSTERS + cluster) * words + (landmark >> 5), mask=exists, other=0)
    start_ptr += group * (CLUSTERS + 1) + cluster
    start = tl.load(start_ptr, mask=exists, other=0)
    end = tl.load(start_ptr + 1, mask=exists, other=0)
    number = tl.where(((word >> (landmark & 31)) & 1) != 0, (end - start + BM - 1) // BM, 0)
    place = tl.cumsum(number, 0) - number
    row = group * num_landmarks + landmark
    tl.store(count_ptr + row, tl.sum(number, 0))
    tile_ptr += row.to(tl.int64) * num_tiles + place
    for step in range(tl.max(number, 0)):
        first = start + step * BM
        tile = first * MAX_ROWS + tl.minimum(end - first, BM) - 1
        tl.store(tile_ptr + step, tile, mask=step < number)


@triton.jit
def exact_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, gradient_ptr,
    dk_ptr, dv_ptr,  # gradients through landmarks and window, added to
    lse_ptr, dot_ptr,  # see `landmark_bwd_dq_kernel`
    order_ptr,  # (G, T) int32, queries in the order of their clusters
    key_order_ptr,  # (G, S) int32, keys in the order of their clusters
    key_start_ptr,  # (G, CLUSTERS + 1) int32, where clusters begin in this order
    tile_ptr, count_ptr,  # see `query_tiles_kernel`
    heads, num_queries, num_keys, num_tiles,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of one of CLUSTERS key clusters, and of their values, through the queries that take it."""
    grid_dependency_control(PDL, False)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    cluster, first, end = cluster_tile(key_start_ptr + group * (CLUSTERS + 1), tl.program_id(0), CLUSTERS, BLOCK, BN)
    count = tl.load(count_ptr + group * CLUSTERS + cluster)
    if (first < end) & (count > 0):
        place = first + tl.arange(0, BN)
        valid = place < end
        j = tl.load(key_order_ptr + wide * num_keys + tl.minimum(place, end - 1))
        k = load_rows(sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh), j, valid, stride_kn, E, BE, False)
        v = load_rows(sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh), j, valid, stride_vn, D, BD, False)
        q_ptr = sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh)
        gradient_ptr = sequence_ptr(gradient_ptr, group, heads, stride_gb, stride_gh)
        order_ptr += wide * num_queries
        lse_ptr += wide * num_queries
        dot_ptr += wide * num_queries
        tile_ptr += (wide * CLUSTERS + cluster) * num_tiles
        dk = tl.zeros((BN, BE), tl.float32)
        dv = tl.zeros((BN, BD), tl.float32)
        for tile in tl.range(0, count, num_stages=STAGES):
            packed = tl.load(tile_ptr + tile)
            row = tl.arange(0, BM)
            last = packed % MAX_ROWS
            i = tl.load(order_ptr + packed // MAX_ROWS + tl.minimum(row, last))
            q = load_rows(q_ptr, i, i >= 0, stride_qn, E, BE, False)
            gradient = load_rows(gradient_ptr, i, i >= 0, stride_gn, D, BD, False)
            # weights of queries past the end of the cluster are zero
            lse = tl.where(row <= last, tl.load(lse_ptr + i), NO_KEYS)
            dot = tl.load(dot_ptr + i)
            weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale - lse[None, :])
            dv = tl.dot(weights.to(q.dtype), gradient, dv, input_precision=PRECISION)
            d_weights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION) - dot[None, :]
            dk = tl.dot((weights * d_weights).to(q.dtype), q, dk, input_precision=PRECISION)
        dk_ptr = sequence_ptr(dk_ptr, group, heads, stride_dkb, stride_dkh)
        dv_ptr = sequence_ptr(dv_ptr, group, heads, stride_dvb, stride_dvh)
        dk = load_rows(dk_ptr, j, valid, stride_dkn, E, BE, False).to(tl.float32) + dk * scale
        dv += load_rows(dv_ptr, j, valid, stride_dvn, D, BD, False).to(tl.float32)
        store_rows(dk_ptr, dk, j, valid, stride_dkn, E)
        store_rows(dv_ptr, dv, j, valid, stride_dvn, D)
