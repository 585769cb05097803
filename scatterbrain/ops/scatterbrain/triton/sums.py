"""Sums over the keys of features times values, and over the queries in the backward pass: partial, then combined.

The sums are kept as averages, one for each feature, beside the logarithm of their weight: `mean[d, m] =
sum_j phi_jm y_jd / sum_j phi_jm` and `log_weight[m] = log sum_j phi_jm`. So nothing overflows in half precision,
however long the sequence, and features may span any range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import follow
from scatterbrain.ops.scatterbrain.triton.parts import (
    FLOOR,
    group_offset,
    half_norms,
    load_projection,
    load_rows,
    log_features,
    no,
)

# Entries of the list of marked tiles that a program clears at a time.
CLEARED = tl.constexpr(128)
# Sums of factors past this are taken again: the sums of values may have overflowed.
LARGEST = tl.constexpr(1e15)


@triton.jit
def logs_of_rows(
    rows,
    valid,
    x_base,
    x_row,
    shift_base,
    marked_base,
    projection,
    slope,
    half_scale,
    E: tl.constexpr,
    BE: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    EVEN: tl.constexpr,
    QUERIES: tl.constexpr,
    LOG_M: tl.constexpr,
    MARKS: tl.constexpr,
    MARK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Log features of some rows, FLOOR for those that are left out; what they lie below x.w; which are counted."""
    x = load_rows(x_base, rows, valid, x_row, tl.arange(0, BE), E, BE, not EVEN)
    norms = half_norms(x, half_scale)
    counted = valid
    if QUERIES:
        norms += tl.load(shift_base + rows, mask=valid, other=0.0) + LOG_M
        if MARKS:
            marked = tl.load(marked_base + rows // MARK_ROWS, mask=valid, other=0)
            counted = counted & (marked == 0)
    logs = log_features(x, norms, projection, slope, PRECISION)
    if QUERIES:
        logs = tl.where(counted[:, None] & (tl.arange(0, MP) < M)[None, :], logs, FLOOR)
    elif not EVEN:
        logs = tl.where(counted[:, None], logs, FLOOR)
    return logs, norms, counted


@triton.jit
def sums_of_chunk(
    start,
    end,
    tiles,
    largest,
    x_base,
    y_base,
    out_base,
    shift_base,
    delta_base,
    norm_base,
    marked_base,
    x_row,
    y_row,
    out_row,
    projection,
    slope,
    half_scale,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    QUERIES: tl.constexpr,
    NORMS: tl.constexpr,
    LOG_M: tl.constexpr,
    MARKS: tl.constexpr,
    MARK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Sums of factors times y, of factors and of factors times delta, relative to 2^largest.

    ONLINE: relative to a running maximum, which is returned. Without it they are relative to `largest`, and threads
    have nothing to exchange but at the end.
    """
    d = tl.arange(0, BD)
    sums = tl.zeros((BD, MP), tl.float32)
    if ONLINE:
        weight = tl.zeros((MP,), tl.float32)
        extra = tl.zeros((MP,), tl.float32)
    else:
        weight = tl.zeros((BN, MP), tl.float32)
        extra = tl.zeros((BN, MP) if QUERIES else (MP,), tl.float32)
    # two stages at least: with one, Triton's pipeliner gave wrong results
    for tile in tl.range(0, tiles, num_stages=STAGES):
        rows = start + tile * BN + tl.arange(0, BN)
        valid = rows < end
        y = load_rows(y_base, rows, valid, y_row, d, D, BD, not EVEN)
        logs, norms, counted = logs_of_rows(
            rows,
            valid,
            x_base,
            x_row,
            shift_base,
            marked_base,
            projection,
            slope,
            half_scale,
            E,
            BE,
            M,
            MP,
            EVEN,
            QUERIES,
            LOG_M,
            MARKS,
            MARK_ROWS,
            PRECISION,
        )
        if NORMS:
            tl.store(norm_base + rows, norms, mask=valid)
        if QUERIES:
            out = load_rows(out_base, rows, valid, out_row, d, D, BD, not EVEN)
            delta = tl.sum(out.to(tl.float32) * y.to(tl.float32), 1)
            tl.store(delta_base + rows, delta, mask=valid)
        if ONLINE:
            new_largest = tl.maximum(largest, tl.max(logs, 0))
            decay = tl.exp2(largest - new_largest)
            largest = new_largest
            sums *= decay[None, :]
        factors = tl.exp2(logs - largest[None, :])
        if QUERIES or not EVEN:
            factors = tl.where(counted[:, None], factors, 0.0)
        factors = factors.to(y.dtype)
        sums = tl.dot(tl.trans(y), factors, sums, input_precision=PRECISION)
        # of the rounded factors, so that averages are exact averages
        wide = factors.to(tl.float32)
        if ONLINE:
            weight = weight * decay + tl.sum(wide, 0)
            if QUERIES:
                extra = extra * decay + tl.sum(wide * delta[:, None], 0)
        else:
            weight += wide
            if QUERIES:
                extra += wide * delta[:, None]
    if not ONLINE:
        weight = tl.sum(weight, 0)
        if QUERIES:
            extra = tl.sum(extra, 0)
    return sums, weight, extra, largest


# `tiles` is not specialised: with a single tile known at compile time there is no loop, and Triton 3.6 then let the
# product of 64 x 64 and 64 x 16 read past the shared memory on a Hopper GPU.
@triton.jit(do_not_specialize=["tiles"])
def feature_sums_kernel(
    x_pointer,  # (B, H, N, E) keys, or queries
    y_pointer,  # (B, H, N, D) values, or gradients of the output
    out_pointer,  # (B, H, N, D) output: with QUERIES, its products with y are `delta`
    projection_pointer,
    lengths_pointer,  # (B,) key lengths
    shift_pointer,  # (G, N) with QUERIES: log normaliser of each query
    delta_pointer,  # (G, N) with QUERIES: written here
    norm_pointer,  # (G, N) with NORMS, written here: `half_norms`, with QUERIES what their log features lie below q.w
    marked_pointer,  # (G, tiles of MARK_ROWS) with MARKS: tiles of queries left out
    marked_sequences_pointer,  # (1 + 2 G,) with MARKS, without QUERIES: cleared, for the attention kernel to come
    marked_list_pointer,  # (1 + G tiles,) the same
    arrivals_pointer,  # (ARRIVALS,) set to zero, for the marked tiles
    mean_pointer,  # (G, chunks, BD, MP)
    weight_pointer,  # (G, chunks, MP)
    extra_pointer,  # (G, chunks, MP) with QUERIES: average of delta
    max_pointer,  # (G, chunks, MP) unless FINAL
    heads,
    length,
    num_marks,  # tiles of MARK_ROWS queries of a sequence
    chunk,
    tiles,  # of a chunk
    x_batch,
    x_head,
    x_row,
    y_batch,
    y_head,
    y_row,
    out_batch,
    out_head,
    out_row,
    slope,
    half_scale,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    QUERIES: tl.constexpr,
    NORMS: tl.constexpr,
    LOG_M: tl.constexpr,
    MARKS: tl.constexpr,
    MARK_ROWS: tl.constexpr,
    ARRIVALS: tl.constexpr,
    FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    ONLINE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of rows of one sequence. FINAL: there is one chunk, and its averages are the result.

    ONLINE: factors are relative to a running maximum; without it only where there is no other way. Float16 has not the
    range.
    """
    follow(OVERLAP, True)
    index = tl.program_id(0)
    group = tl.program_id(1)
    d = tl.arange(0, BD)
    f = tl.arange(0, MP)
    x_base = x_pointer + group_offset(group, heads, x_batch, x_head)
    y_base = y_pointer + group_offset(group, heads, y_batch, y_head)
    end = length
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths_pointer + group // heads).to(tl.int32), length)
    start = index * chunk
    end = tl.minimum(start + chunk, end)
    row_base = group.to(tl.int64) * length
    out_base = out_pointer + group_offset(group, heads, out_batch, out_head)
    if not QUERIES and MARKS:
        tl.store(marked_sequences_pointer + 1 + tl.num_programs(1) + group, 0, mask=index == 0)
        tl.store(marked_sequences_pointer, 0, mask=(index == 0) & (group == 0))
        mark = index * CLEARED
        while mark < num_marks:
            marks = mark + tl.arange(0, CLEARED)
            tl.store(marked_list_pointer + 1 + group * num_marks + marks, 0, mask=marks < num_marks)
            mark += tl.num_programs(0) * CLEARED
        tl.store(marked_list_pointer, 0, mask=(index == 0) & (group == 0))
    if ARRIVALS > 0:
        items = tl.arange(0, ARRIVALS)
        tl.store(arrivals_pointer + items, tl.zeros_like(items), mask=(items >= 0) & (index == 0) & (group == 0))

    projection = load_projection(projection_pointer, E, BE, R, M, MP)
    shift_base = shift_pointer + row_base
    marked_base = marked_pointer + group * num_marks
    if not ONLINE:
        # factors relative to the largest of the first tile, which nearly always is near enough the largest of all
        rows = start + tl.arange(0, BN)
        logs, _, _ = logs_of_rows(
            rows,
            rows < end,
            x_base,
            x_row,
            shift_base,
            marked_base,
            projection,
            slope,
            half_scale,
            E,
            BE,
            M,
            MP,
            EVEN,
            QUERIES,
            LOG_M,
            MARKS,
            MARK_ROWS,
            PRECISION,
        )
        sums, weight, extra, largest = sums_of_chunk(
            start,
            end,
            tiles,
            tl.max(logs, 0),
            x_base,
            y_base,
            out_base,
            shift_base,
            delta_pointer + row_base,
            norm_pointer + row_base,
            marked_base,
            x_row,
            y_row,
            out_row,
            projection,
            slope,
            half_scale,
            E,
            BE,
            D,
            BD,
            M,
            MP,
            BN,
            EVEN,
            QUERIES,
            NORMS,
            LOG_M,
            MARKS,
            MARK_ROWS,
            PRECISION,
            STAGES,
            False,
        )
        again = tl.max(no(weight < LARGEST).to(tl.int32), 0) > 0
    else:
        again = True
        sums = tl.zeros((BD, MP), tl.float32)
        weight = tl.zeros((MP,), tl.float32)
        extra = tl.zeros((MP,), tl.float32)
        largest = tl.full((MP,), FLOOR, tl.float32)
    if again:
        sums, weight, extra, largest = sums_of_chunk(
            start,
            end,
            tiles,
            tl.full((MP,), FLOOR, tl.float32),
            x_base,
            y_base,
            out_base,
            shift_base,
            delta_pointer + row_base,
            norm_pointer + row_base,
            marked_base,
            x_row,
            y_row,
            out_row,
            projection,
            slope,
            half_scale,
            E,
            BE,
            D,
            BD,
            M,
            MP,
            BN,
            EVEN,
            QUERIES,
            NORMS,
            LOG_M,
            MARKS,
            MARK_ROWS,
            PRECISION,
            STAGES,
            True,
        )

    slot = group * tl.num_programs(0) + index
    mean_base = mean_pointer + slot.to(tl.int64) * (BD * MP) + d[:, None] * MP + f[None, :]
    if FINAL:
        scale = tl.where(weight > 0, 1.0 / weight, 0.0)
        log_weight = tl.where(weight > 0, largest + tl.log2(tl.maximum(weight, 1e-30)), FLOOR)
        tl.store(mean_base, (sums * scale[None, :]).to(mean_pointer.dtype.element_ty))
        tl.store(weight_pointer + slot * MP + f, log_weight)
        if QUERIES:
            tl.store(extra_pointer + slot * MP + f, extra * scale)
    else:
        tl.store(mean_base, sums)
        tl.store(weight_pointer + slot * MP + f, weight)
        tl.store(max_pointer + slot * MP + f, largest)
        if QUERIES:
            tl.store(extra_pointer + slot * MP + f, extra)


@triton.jit
def combine_kernel(
    sums_pointer,
    weights_pointer,
    extras_pointer,
    max_pointer,
    mean_pointer,  # (G, BD, MP), in the dtype of the attention
    weight_pointer,  # (G, MP)
    extra_pointer,  # (G, MP)
    chunks,
    BD: tl.constexpr,
    DB: tl.constexpr,
    MP: tl.constexpr,
    CB: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All chunks of a sequence, for DB of the BD columns; many chunks are read side by side, CB at a time."""
    follow(OVERLAP, False)
    slab = tl.program_id(0)
    group = tl.program_id(1)
    c = tl.arange(0, CB)
    d = slab * DB + tl.arange(0, DB)
    f = tl.arange(0, MP)
    first = group.to(tl.int64) * chunks
    largest = tl.full((MP,), FLOOR, tl.float32)
    # `while`: Triton's pipeliner, which takes `for` loops, reads past the end here
    start = 0
    while start < chunks:
        valid = (start + c < chunks)[:, None]
        where = (first + start + c)[:, None] * MP + f[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(max_pointer + where, mask=valid, other=FLOOR), 0))
        start += CB
    sums = tl.zeros((DB, MP), tl.float32)
    weight = tl.zeros((MP,), tl.float32)
    extra = tl.zeros((MP,), tl.float32)
    start = 0
    while start < chunks:
        valid = (start + c < chunks)[:, None]
        where = (first + start + c)[:, None] * MP + f[None, :]
        factor = tl.exp2(tl.load(max_pointer + where, mask=valid, other=FLOOR) - largest[None, :])
        weight += tl.sum(tl.load(weights_pointer + where, mask=valid, other=0.0) * factor, 0)
        if HAS_EXTRA:
            extra += tl.sum(tl.load(extras_pointer + where, mask=valid, other=0.0) * factor, 0)
        tile = (first + start + c)[:, None, None] * (BD * MP) + d[None, :, None] * MP + f[None, None, :]
        part = tl.load(sums_pointer + tile, mask=valid[:, :, None], other=0.0)
        sums += tl.sum(part * factor[:, None, :], 0)
        start += CB
    scale = tl.where(weight > 0, 1.0 / weight, 0.0)
    tl.store(
        mean_pointer + group.to(tl.int64) * (BD * MP) + d[:, None] * MP + f[None, :],
        (sums * scale[None, :]).to(mean_pointer.dtype.element_ty),
    )
    if slab == 0:
        log_weight = tl.where(weight > 0, largest + tl.log2(tl.maximum(weight, 1e-30)), FLOOR)
        tl.store(weight_pointer + group * MP + f, log_weight)
        if HAS_EXTRA:
            tl.store(extra_pointer + group * MP + f, extra * scale)


@triton.jit
def running_sums_kernel(
    sums_pointer,
    weights_pointer,
    extras_pointer,
    max_pointer,
    mean_pointer,  # (G, chunks + 1, BD, MP)
    weight_pointer,  # (G, chunks + 1, MP)
    extra_pointer,  # (G, chunks + 1, MP)
    chunks,
    BD: tl.constexpr,
    DB: tl.constexpr,
    MP: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    REVERSE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """State c: the chunks before c, or with REVERSE the chunks from c on. For causal masking."""
    follow(OVERLAP, False)
    slab = tl.program_id(0)
    group = tl.program_id(1)
    d = slab * DB + tl.arange(0, DB)
    f = tl.arange(0, MP)
    sums = tl.zeros((DB, MP), tl.float32)
    weight = tl.zeros((MP,), tl.float32)
    extra = tl.zeros((MP,), tl.float32)
    largest = tl.full((MP,), FLOOR, tl.float32)
    step = 0
    while step <= chunks:
        state = step
        if REVERSE:
            state = chunks - step
        slot = group.to(tl.int64) * (chunks + 1) + state
        scale = tl.where(weight > 0, 1.0 / weight, 0.0)
        tl.store(
            mean_pointer + slot * (BD * MP) + d[:, None] * MP + f[None, :],
            (sums * scale[None, :]).to(mean_pointer.dtype.element_ty),
        )
        if slab == 0:
            log_weight = tl.where(weight > 0, largest + tl.log2(tl.maximum(weight, 1e-30)), FLOOR)
            tl.store(weight_pointer + slot * MP + f, log_weight)
            if HAS_EXTRA:
                tl.store(extra_pointer + slot * MP + f, extra * scale)
        # the chunk that the next state has beyond this one; past the last there is none
        part = state - 1 if REVERSE else state
        exists = step < chunks
        where = (group.to(tl.int64) * chunks + part) * MP + f
        part_max = tl.load(max_pointer + where, mask=exists, other=FLOOR)
        new_largest = tl.maximum(largest, part_max)
        decay = tl.exp2(largest - new_largest)
        factor = tl.exp2(part_max - new_largest)
        weight = weight * decay + tl.load(weights_pointer + where, mask=exists, other=0.0) * factor
        if HAS_EXTRA:
            extra = extra * decay + tl.load(extras_pointer + where, mask=exists, other=0.0) * factor
        tile = (group.to(tl.int64) * chunks + part) * (BD * MP) + d[:, None] * MP + f[None, :]
        sums = sums * decay[None, :] + tl.load(sums_pointer + tile, mask=exists, other=0.0) * factor[None, :]
        largest = new_largest
        step += 1
