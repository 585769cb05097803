"""Forward kernel: softmax over the keys of a query's chunk and of those before it, and over the landmarks of levels."""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import (
    LOG_ZERO,
    NO_KEYS,
    end_of_keys,
    load_rows,
    sequence_ptr,
    store_rows,
)

# Maximum of a row that has seen no key: weights of hidden keys, 2^LOG_ZERO, are zero relative to it.
NO_MAXIMUM = tl.constexpr(-1e29)


@triton.jit
def num_levels(seen, LEVELS: tl.constexpr):
    """Levels of which a query sees nodes, that sees so many chunks through landmarks: log2(seen + 1), rounded down."""
    number = 0
    for level in tl.static_range(LEVELS):
        number += tl.where(seen + 1 >= (2 << level), 1, 0)
    return number


@triton.jit
def level_rows(seen, level, num_nodes, M: tl.constexpr):
    """Rows in the table of the last two nodes of a level, 16 at least, and which of them a query sees: one node or two.

    seen: number of chunks that the query sees through landmarks.
    """
    left = ((seen + 1) >> level) - 1
    b = tl.arange(0, 2 * M if M > 8 else 16)
    rows = (2 * num_nodes - ((2 * num_nodes) >> level) + left - 2) * M + b
    return rows, ((b >= M) | (left % 2 == 0)) & (b < 2 * M)


@triton.jit
def load_statistics(rows, exists, log_count_ptr, spread_ptr):
    """log2 of the numbers of keys, spreads, and limits of sigma, of the landmarks at these rows of the table."""
    log_count = tl.load(log_count_ptr + rows, mask=exists, other=LOG_ZERO)
    spread = tl.load(spread_ptr + rows, mask=exists, other=0.0)
    return log_count, spread, tl.sqrt(2.0 * tl.maximum(log_count, 0.0))


@triton.jit
def finite_rows(x):
    """Which rows of a tile hold numbers alone."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1), 1) == 0


@triton.jit
def causal_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lengths_ptr,
    mean_k_ptr, mean_v_ptr, log_count_ptr, spread_ptr,  # see `nodes.py`
    lse_ptr,  # (G, T) log2 normaliser of each query, with STATISTICS
    heads, num_queries, num_keys, num_nodes,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    EXACT: tl.constexpr, LEVELS: tl.constexpr, REPEATS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    STATISTICS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The queries of one chunk.

    EXACT: chunks before it that they see exactly; LEVELS: those of the last chunk; REPEATS: heads of the queries for
    each head of the keys.
    """
    grid_dependency_control(PDL, False)
    # the last chunks first: they see most landmarks
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    k_ptr = sequence_ptr(k_ptr, group // REPEATS, heads // REPEATS, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group // REPEATS, heads // REPEATS, stride_vb, stride_vh)
    i = chunk * C + tl.arange(0, C)
    valid = i < num_queries
    q = load_rows(sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh), i, valid, stride_qn, E, BE)
    # its own chunk
    j = chunk * C + tl.arange(0, C)
    k = load_rows(k_ptr, j, j < end, stride_kn, E, BE)
    v = load_rows(v_ptr, j, j < end, stride_vn, D, BD)
    # a product with zero does not hide nan: later values that are not finite are left out, and queries that see them
    # get nan below
    finite = finite_rows(v)
    v = tl.where(finite[:, None], v, 0.0)
    inside = (j[None, :] <= i[:, None]) & (j < end)[None, :]
    broken = tl.max(tl.where(inside & (finite == 0)[None, :], 1, 0), 1) > 0
    logits = tl.where(inside, tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale, LOG_ZERO)
    running_max = tl.maximum(tl.max(logits, 1), NO_MAXIMUM)
    weights = tl.exp2(logits - running_max[:, None])
    total = tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    if EXACT > 0:
        for part in tl.range(tl.maximum(chunk - EXACT, 0), chunk, num_stages=STAGES):
            j = part * C + tl.arange(0, C)
            k = load_rows(k_ptr, j, j < end, stride_kn, E, BE)
            v = load_rows(v_ptr, j, j < end, stride_vn, D, BD)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
            if HAS_LENGTHS:
                logits = tl.where((j < end)[None, :], logits, LOG_ZERO)
            new_max = tl.maximum(running_max, tl.max(logits, 1))
            decay = tl.exp2(running_max - new_max)
            weights = tl.exp2(logits - new_max[:, None])
            total = total * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
            running_max = new_max
    if LEVELS > 0:
        size = (group // REPEATS).to(tl.int64) * 2 * num_nodes * M
        mean_k_ptr += size * E
        mean_v_ptr += size * D
        seen = chunk - EXACT
        wide_q = q.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide_q * wide_q, 1)) * scale
        for level in tl.range(0, num_levels(seen, LEVELS), num_stages=STAGES):
            rows, exists = level_rows(seen, level, num_nodes, M)
            mean_k = load_rows(mean_k_ptr, rows, exists, E, E, BE)
            mean_v = load_rows(mean_v_ptr, rows, exists, D, D, BD)
            log_count, spread, limit = load_statistics(rows, exists, log_count_ptr + size, spread_ptr + size)
            far = tl.dot(q, tl.trans(mean_k), input_precision=PRECISION) * qk_scale + log_count[None, :]
            sigma = norm[:, None] * spread[None, :]
            limited = tl.minimum(sigma, limit[None, :])
            far += limited * (sigma - 0.5 * limited)
            new_max = tl.maximum(running_max, tl.max(far, 1))
            decay = tl.exp2(running_max - new_max)
            far_weights = tl.exp2(far - new_max[:, None])
            total = total * decay + tl.sum(far_weights, 1)
            acc = tl.dot(far_weights.to(mean_v.dtype), mean_v, acc * decay[:, None], input_precision=PRECISION)
            running_max = new_max
    out = acc * tl.where(end > 0, 1.0 / total, 0.0)[:, None]
    out = tl.where(broken[:, None], float("nan"), out)
    store_rows(sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh), out, i, valid, stride_on, D)
    if STATISTICS:
        lse = tl.where(end > 0, running_max + tl.log2(total), NO_KEYS)
        lse = tl.where(broken, float("nan"), lse)
        tl.store(lse_ptr + wide * num_queries + i, lse, mask=valid)
