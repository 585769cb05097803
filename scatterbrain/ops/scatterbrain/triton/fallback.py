"""Kernels for fallback tiles: queries whose window estimates cancel all digits, computed again from pairs.

There are few such tiles, and each takes a loop over all keys. So the keys of a tile are split over several programs,
the more the fewer tiles there are, as in split-K products. The last program to finish, by an atomic counter, adds up
the partial results in the order of the keys, so that results are the same bit by bit from run to run.

The grids are persistent: a few programs per SM, which exit at once where there is no fallback tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.bwd import log_features_bwd
from scatterbrain.ops.scatterbrain.triton.common import (
    LN2,
    LOG_ZERO,
    NO_KEYS,
    end_of_keys,
    load_projection,
    load_rows,
    masked_log_features,
    relative_to_max,
    sequence_ptr,
    store_rows,
)
from scatterbrain.ops.scatterbrain.triton.pairs import pairs_bwd_dkdv, pairs_bwd_dq, pairs_fwd, store_output

# Partial results of a tile that are in flight at a time when they are added up.
SPLITS_AT_A_TIME = tl.constexpr(16)
# Flags of query tiles that a program reads at a time.
FLAGS_AT_A_TIME = tl.constexpr(128)


@triton.jit
def splits_of_keys(num_items, num_parts, MAX_SPLITS: tl.constexpr):
    """Number of splits of the keys of each tile: as many as there is memory for, or 1, which needs none."""
    return tl.maximum(tl.minimum(num_parts // tl.maximum(num_items, 1), MAX_SPLITS), 1)


@triton.jit
def work_item(
    unit, splits, fallback_list_ptr, num_queries, num_keys,
    BM: tl.constexpr, BN: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Index of a tile of BM queries, its sequence, first query, and first key and number of keys of this split.

    An entry of the list is a tile of TILE_ROWS queries, a multiple of BM.
    """
    num_tiles = (num_queries + TILE_ROWS - 1) // TILE_ROWS
    subtiles: tl.constexpr = TILE_ROWS // BM
    item = unit // splits
    split = unit % splits
    tile = tl.load(fallback_list_ptr + 1 + item // subtiles)
    first_query = (tile % num_tiles) * TILE_ROWS + (item % subtiles) * BM
    keys = (num_keys + splits * BN - 1) // (splits * BN) * BN
    return item, tile // num_tiles, first_query, split * keys, keys


@triton.jit
def sum_of_splits(
    ptr,  # (parts, BM, WIDTH)
    first, splits, BM: tl.constexpr, WIDTH: tl.constexpr,
    max_ptr=None,  # (parts, BM) maximum that each part is relative to; None where all are to the same
    total_max=None,
):  # fmt: skip
    """Sum (BM, WIDTH) of the parts from `first` on, in their order, relative to `total_max` if each has a maximum."""
    r = tl.arange(0, BM)
    columns = tl.arange(0, WIDTH)
    sums = tl.zeros((BM, WIDTH), tl.float32)
    start = 0
    while start < splits:
        # unrolled: a tile of three dimensions would be summed through shared memory
        for step in tl.static_range(SPLITS_AT_A_TIME):
            rows = (first + start + step) * BM + r
            exists = (r >= 0) & (start + step < splits)
            # `.cg` reads from the L2 cache: other SMs wrote this, and the L1 cache is not coherent
            part = tl.load(
                ptr + rows[:, None] * WIDTH + columns[None, :], mask=exists[:, None], other=0.0, cache_modifier=".cg"
            )
            if max_ptr is not None:
                part_max = tl.load(max_ptr + rows, mask=exists, other=LOG_ZERO, cache_modifier=".cg")
                part *= tl.exp2(part_max[:, None] - total_max[:, None])
            sums += part
        start += SPLITS_AT_A_TIME
    return sums


@triton.jit
def fallback_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, projection_ptr, lengths_ptr,
    lse_ptr,  # (G, T) log normaliser of each query, with STATISTICS
    fallback_list_ptr,  # (1 + G tiles,) see `attention_fwd_kernel`
    counters_ptr,  # (parts / 2,) programs that have finished a tile; zero before
    acc_part_ptr,  # (parts, BM, BD) partial outputs, the parts of a tile one after another
    normaliser_part_ptr,  # (2, parts, BM) their normalisers, and the maxima that they are relative to
    heads, num_queries, num_keys, num_parts,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    qk_scale, feature_scale, norm_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LOG_M: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MAX_SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, HAS_LENGTHS: tl.constexpr, STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Output and log normalisers of the fallback tiles."""
    grid_dependency_control(PDL, False)
    padded_splits: tl.constexpr = triton.next_power_of_2(MAX_SPLITS)
    num_items = tl.load(fallback_list_ptr) * (TILE_ROWS // BM)
    splits = splits_of_keys(num_items, num_parts, MAX_SPLITS)
    unit = tl.program_id(0)
    if unit >= num_items * splits:
        return
    d = tl.arange(0, BD)
    r = tl.arange(0, BM)
    projection = load_projection(projection_ptr, E, BE, R, M, MP).to(q_ptr.dtype.element_ty)
    while unit < num_items * splits:
        item, group, first_query, first_key, keys = work_item(
            unit, splits, fallback_list_ptr, num_queries, num_keys, BM, BN, TILE_ROWS
        )
        end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
        i = first_query + r
        valid = i < num_queries
        q = load_rows(sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh), i, valid, stride_qn, E, BE)
        logs = masked_log_features(q, projection, LOG_M, feature_scale, norm_scale, M, PRECISION)
        features, feature_max = relative_to_max(logs)
        normaliser, acc, running_max = pairs_fwd(
            first_key, tl.minimum(end, first_key + keys), i, q, features, feature_max,
            tl.zeros((BM,), tl.float32), tl.zeros((BM, BD), tl.float32), tl.full((BM,), LOG_ZERO, tl.float32),
            sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh),
            sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh),
            stride_kn, stride_vn, projection, qk_scale, feature_scale, norm_scale,
            E, D, LEFT, RIGHT, BN, False, PRECISION, FEATURE_PRECISION,
        )  # fmt: skip
        is_last = splits == 1
        if splits > 1:
            max_part_ptr = normaliser_part_ptr + num_parts * BM
            rows = unit * BM + r
            tl.store(acc_part_ptr + rows[:, None] * BD + d[None, :], acc)
            tl.store(normaliser_part_ptr + rows, normaliser)
            tl.store(max_part_ptr + rows, running_max)
            # all threads have written their part before one of them counts it
            tl.debug_barrier()
            is_last = tl.atomic_add(counters_ptr + item, 1) == splits - 1
            if is_last:
                split = tl.arange(0, padded_splits)
                exists = (split < splits)[:, None]
                every_row = (item * splits + split)[:, None] * BM + r[None, :]
                maxima = tl.load(max_part_ptr + every_row, mask=exists, other=LOG_ZERO, cache_modifier=".cg")
                parts = tl.load(normaliser_part_ptr + every_row, mask=exists, other=0.0, cache_modifier=".cg")
                running_max = tl.max(maxima, 0)
                normaliser = tl.sum(parts * tl.exp2(maxima - running_max[None, :]), 0)
                acc = sum_of_splits(acc_part_ptr, item * splits, splits, BM, BD, max_part_ptr, running_max)
        if is_last:
            store_output(
                i, valid, end, normaliser, acc, running_max, sequence_ptr(out_ptr, group, heads, stride_ob, stride_oh),
                stride_on, lse_ptr + group.to(tl.int64) * num_queries, D, STATISTICS,
            )  # fmt: skip
        unit += tl.num_programs(0)


@triton.jit
def fallback_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, projection_ptr, lengths_ptr, lse_ptr, delta_ptr,
    fallback_list_ptr,  # (1 + G tiles,) see `attention_fwd_kernel`
    counters_ptr,  # (parts / 2,) zero before
    dq_part_ptr,  # (parts, BM, BE)
    d_logs_part_ptr,  # (parts, BM, MP)
    heads, num_queries, num_keys, num_parts,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn,
    qk_scale, feature_scale, norm_scale,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LOG_M: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MAX_SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries of fallback tiles; work is split as in `fallback_fwd_kernel`."""
    grid_dependency_control(PDL, False)
    num_items = tl.load(fallback_list_ptr) * (TILE_ROWS // BM)
    splits = splits_of_keys(num_items, num_parts, MAX_SPLITS)
    unit = tl.program_id(0)
    if unit >= num_items * splits:
        return
    e = tl.arange(0, BE)
    f = tl.arange(0, MP)
    r = tl.arange(0, BM)
    projection = load_projection(projection_ptr, E, BE, R, M, MP).to(q_ptr.dtype.element_ty)
    while unit < num_items * splits:
        item, group, first_query, first_key, keys = work_item(
            unit, splits, fallback_list_ptr, num_queries, num_keys, BM, BN, TILE_ROWS
        )
        end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
        row = group.to(tl.int64) * num_queries
        i = first_query + r
        valid = i < num_queries
        q = load_rows(sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh), i, valid, stride_qn, E, BE)
        do = load_rows(sequence_ptr(do_ptr, group, heads, stride_dob, stride_doh), i, valid, stride_don, D, BD)
        lse = tl.load(lse_ptr + row + i, mask=valid, other=NO_KEYS)
        delta = tl.load(delta_ptr + row + i, mask=valid, other=0.0)
        logs = masked_log_features(q, projection, LOG_M, feature_scale, norm_scale, M, PRECISION)
        features, feature_max = relative_to_max(logs)
        dq, d_logs = pairs_bwd_dq(
            first_key, tl.minimum(end, first_key + keys), i, q, do, features, feature_max, lse, delta,
            tl.zeros((BM, BE), tl.float32), tl.zeros((BM, MP), tl.float32),
            sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh),
            sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh),
            stride_kn, stride_vn, projection, qk_scale, feature_scale, norm_scale,
            E, D, LEFT, RIGHT, BN, False, PRECISION, FEATURE_PRECISION,
        )  # fmt: skip
        is_last = splits == 1
        if splits > 1:
            rows = unit * BM + r
            tl.store(dq_part_ptr + rows[:, None] * BE + e[None, :], dq)
            tl.store(d_logs_part_ptr + rows[:, None] * MP + f[None, :], d_logs)
            tl.debug_barrier()
            is_last = tl.atomic_add(counters_ptr + item, 1) == splits - 1
            if is_last:
                dq = sum_of_splits(dq_part_ptr, item * splits, splits, BM, BE)
                d_logs = sum_of_splits(d_logs_part_ptr, item * splits, splits, BM, MP)
        if is_last:
            dq = log_features_bwd(
                q, dq * (qk_scale * LN2), d_logs, projection_ptr, feature_scale, norm_scale, E, R, M, PRECISION
            )
            store_rows(sequence_ptr(dq_ptr, group, heads, stride_dqb, stride_dqh), dq, i, valid, stride_dqn, E)
        unit += tl.num_programs(0)


@triton.jit
def fallback_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, projection_ptr, lengths_ptr, lse_ptr, delta_ptr,
    fallback_ptr,  # (G, query tiles)
    fallback_sequences_ptr,  # (1 + 2 G,) see `attention_fwd_kernel`
    heads, num_queries, num_keys,
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
    TILE_ROWS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add what the queries of fallback tiles give to the gradients of all keys and values of their sequences."""
    grid_dependency_control(PDL, False)
    key_tiles = (num_keys + BN - 1) // BN
    units = tl.load(fallback_sequences_ptr) * key_tiles
    unit = tl.program_id(0)
    if unit >= units:
        return
    num_tiles = (num_queries + TILE_ROWS - 1) // TILE_ROWS
    projection = load_projection(projection_ptr, E, BE, R, M, MP).to(q_ptr.dtype.element_ty)
    while unit < units:
        group = tl.load(fallback_sequences_ptr + 1 + unit // key_tiles)
        end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
        row = group.to(tl.int64) * num_queries
        j = unit % key_tiles * BN + tl.arange(0, BN)
        exists = j < end
        k = load_rows(sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh), j, exists, stride_kn, E, BE)
        v = load_rows(sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh), j, exists, stride_vn, D, BD)
        logs = masked_log_features(k, projection, 0.0, feature_scale, norm_scale, M, PRECISION)
        features, feature_max = relative_to_max(logs)
        dk = tl.zeros((BN, BE), tl.float32)
        dv = tl.zeros((BN, BD), tl.float32)
        d_logs = tl.zeros((BN, MP), tl.float32)
        first_tile = 0
        while first_tile < num_tiles:
            # many flags in one load: one after another, they would take longer than the few tiles themselves
            tiles = first_tile + tl.arange(0, FLAGS_AT_A_TIME)
            flags = tl.load(fallback_ptr + group * num_tiles + tiles, mask=tiles < num_tiles, other=0)
            tile = tl.min(tl.where(flags != 0, tiles, num_tiles), 0)
            while tile < num_tiles:
                start = tile * TILE_ROWS
                dk, dv, d_logs = pairs_bwd_dkdv(
                    start, tl.minimum(start + TILE_ROWS, num_queries), j, exists, k, v, features, feature_max,
                    dk, dv, d_logs, sequence_ptr(q_ptr, group, heads, stride_qb, stride_qh),
                    sequence_ptr(do_ptr, group, heads, stride_dob, stride_doh), stride_qn, stride_don,
                    lse_ptr + row, delta_ptr + row, projection, qk_scale, feature_scale, norm_scale,
                    E, D, M, LOG_M, LEFT, RIGHT, BM, False, PRECISION, FEATURE_PRECISION,
                )  # fmt: skip
                tile = tl.min(tl.where((flags != 0) & (tiles > tile), tiles, num_tiles), 0)
            first_tile += FLAGS_AT_A_TIME
        d_logs = tl.where(exists[:, None], d_logs, 0.0)
        dk = log_features_bwd(
            k, dk * (qk_scale * LN2), d_logs, projection_ptr, feature_scale, norm_scale, E, R, M, PRECISION
        )
        dk_rows = sequence_ptr(dk_ptr, group, heads, stride_dkb, stride_dkh)
        dv_rows = sequence_ptr(dv_ptr, group, heads, stride_dvb, stride_dvh)
        dk += load_rows(dk_rows, j, exists, stride_dkn, E, BE).to(tl.float32)
        dv += load_rows(dv_rows, j, exists, stride_dvn, D, BD).to(tl.float32)
        store_rows(dk_rows, dk, j, exists, stride_dkn, E)
        store_rows(dv_rows, dv, j, exists, stride_dvn, D)
        unit += tl.num_programs(0)
