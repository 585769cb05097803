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
def visible_nodes(seen, LEVELS: tl.constexpr):
    """Levels of which a query sees nodes, the bits of those of which it sees two, and the number of nodes that it sees.

    seen: number of chunks that the query sees through landmarks.
    """
    levels = 0
    number = 0
    for level in tl.static_range(LEVELS):
        levels += tl.where(seen + 1 >= (2 << level), 1, 0)
        number += tl.where(seen + 1 >= (2 << level), 1 + ((seen + 1) >> level) % 2, 0)
    return levels, (seen + 1) & ((1 << levels) - 1), number


@triton.jit
def tile_of_nodes(tile, seen, levels, pairs, number, num_nodes, M: tl.constexpr, NODES: tl.constexpr):
    """Rows in the table of a tile of NODES nodes that a query sees, 16 at least, filled up with a node without keys.

    Arguments are those of `visible_nodes` and its results. First the last nodes of all levels, then those before them
    where two are visible. Returns the pairs that are left, too.
    """
    size: tl.constexpr = NODES * M if NODES * M > 16 else 16
    b = tl.arange(0, size)
    rows = (num_nodes - 1) * M + b % M
    for part in tl.static_range(NODES):
        node = tile * NODES + part
        is_last = node < levels
        # the lowest bit of `pairs`, from the exponent of a float
        lowest = ((pairs & -pairs).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        level = tl.where(is_last, node, tl.maximum(lowest, 0))
        pairs = tl.where(is_last, pairs, pairs & (pairs - 1))
        node = 2 * num_nodes - ((2 * num_nodes) >> level) + ((seen + 1) >> level) - tl.where(is_last, 2, 3)
        rows = tl.where((b // M == part) & (tile * NODES + part < number), (node - part) * M + b, rows)
    return rows, pairs


@triton.jit
def finite_rows(x):
    """Which rows of a tile hold numbers alone."""
    # the products are nan for the others
    return tl.sum(x.to(tl.float32) * 0.0, 1) == 0.0


@triton.jit
def offset_of_centre(q, centre_ptr, seen, qk_scale):
    """Logits (rows,) of the centre of the keys; 0 for queries of the first chunks, which may not see all of it."""
    centre = tl.load(centre_ptr + tl.arange(0, q.shape[1]))
    offset = tl.sum(q.to(tl.float32) * centre[None, :], 1) * qk_scale
    return tl.where(seen > 0, offset, 0.0)


@triton.jit
def causal_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lengths_ptr,
    centre_ptr, delta_ptr, mean_v_ptr, log_count_ptr, spread_ptr, limit_ptr,  # see `nodes.py`
    lse_ptr,  # (G, T) log2 normaliser of each query, with STATISTICS
    heads, num_queries, num_keys, num_nodes,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    qk_scale, scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    NODES: tl.constexpr, EXACT: tl.constexpr, LEVELS: tl.constexpr, REPEATS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    MASKED: tl.constexpr, STATISTICS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The queries of one chunk.

    NODES: nodes of a tile; EXACT: chunks before it that they see exactly; LEVELS: those of the last chunk; REPEATS:
    heads of the queries for each head of the keys; MASKED: earlier chunks may have hidden keys.
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
    # logits are relative to that of the centre
    seen = chunk - EXACT
    offset = tl.zeros((C,), tl.float32)
    if LEVELS > 0:
        offset = offset_of_centre(q, centre_ptr + (group // REPEATS) * BE, seen, qk_scale)
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
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale - offset[:, None]
    logits = tl.where(inside, logits, LOG_ZERO)
    running_max = tl.maximum(tl.max(logits, 1), NO_MAXIMUM)
    weights = tl.exp2(logits - running_max[:, None])
    total = tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    if EXACT > 0:
        for part in tl.range(tl.maximum(chunk - EXACT, 0), chunk, num_stages=STAGES):
            j = part * C + tl.arange(0, C)
            k = load_rows(k_ptr, j, j < end, stride_kn, E, BE)
            v = load_rows(v_ptr, j, j < end, stride_vn, D, BD)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale - offset[:, None]
            if MASKED:
                logits = tl.where((j < end)[None, :], logits, LOG_ZERO)
            new_max = tl.maximum(running_max, tl.max(logits, 1))
            decay = tl.exp2(running_max - new_max)
            weights = tl.exp2(logits - new_max[:, None])
            total = total * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
            running_max = new_max
    if LEVELS > 0:
        size = (group // REPEATS).to(tl.int64) * 2 * num_nodes * M
        delta_ptr += size * E
        mean_v_ptr += size * D
        log_count_ptr += size
        spread_ptr += size
        limit_ptr += size
        wide_q = q.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide_q * wide_q, 1)) * scale
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
        lse = tl.where(end > 0, offset + running_max + tl.log2(total), NO_KEYS)
        lse = tl.where(broken, float("nan"), lse)
        tl.store(lse_ptr + wide * num_queries + i, lse, mask=valid)
