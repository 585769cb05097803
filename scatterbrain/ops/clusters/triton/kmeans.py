"""K-means of keys: initial centroids, assignment, and sums over the members of each cluster.

Launched in this order: `start_kernel`, then for each Lloyd step and once more for the final clusters
`cluster_sums_kernel` and, where a sequence is several chunks, `combine_kernel`, after `sum_chunks_kernel` where they
are many. With more landmarks than fit the registers, `assign_kernel` finds the clusters before the sums.

Centroids are kept relative to a centre, the mean of 16 keys spread over the sequence: delta_b = c_b - centre, rounded
to the dtype of the keys. A large component that all keys share is in the centre and costs delta_b no digits. The
squared distance of a key x from c_b is |x|^2 - 2 (x.delta_b + bias_b) with bias_b = -delta_b.(delta_b / 2 + centre), up
to what is the same for all b, so that the nearest centroid has the largest x.delta_b + bias_b.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import grid_dependency_control
from scatterbrain.ops.scatterbrain.triton.common import LOG_ZERO, end_of_keys, load_rows, sequence_ptr


@triton.jit
def farthest_key(k, mean, j, first, last):
    """Position of the first of the keys j (rows, E) that are farthest from a mean, and that squared distance."""
    offset = k - mean[None, :]
    # two keys are equally far from their mean, and rounding must not choose between them
    distance = tl.where(last - first == 2, 0.0, tl.sum(offset * offset, 1))
    distance = tl.where(j < last, distance, -1.0)
    largest = tl.max(distance, 0)
    return tl.min(tl.where(distance == largest, j, last), 0), largest


@triton.jit
def store_centroids(
    delta, centre, delta_ptr, bias_ptr, b, used, num_landmarks, E: tl.constexpr, MP: tl.constexpr, BE: tl.constexpr
):
    """Store centroids b, relative to the centre and rounded, (BE, landmarks), of one sequence, and their bias.

    No key is nearest to those that are not used.
    """
    e = tl.arange(0, BE)
    exists = b < num_landmarks
    delta = delta.to(delta_ptr.dtype.element_ty)
    tl.store(delta_ptr + b[None, :] * E + e[:, None], delta, mask=exists[None, :] & (e < E)[:, None])
    delta = delta.to(tl.float32)
    bias = -tl.sum(delta * (0.5 * delta + centre[:, None]), 0)
    tl.store(bias_ptr + b, tl.where(exists & used, bias, LOG_ZERO), mask=b < MP)


@triton.jit
def sample_of_sequence(
    end, num_landmarks, EVERY: tl.constexpr, LEAST: tl.constexpr, PER_CLUSTER: tl.constexpr, HAS_LENGTHS: tl.constexpr
):
    """EVERY, or LEAST where a sequence has fewer than PER_CLUSTER points for each landmark."""
    every = EVERY
    if HAS_LENGTHS and EVERY > LEAST:
        every = tl.where(end < PER_CLUSTER * num_landmarks, LEAST, EVERY)
    return every


@triton.jit
def stretch_of_landmark(landmark, end, num_landmarks):
    """First position of a landmark's stretch of `end` keys, ceil(landmark end / M), and the one behind its last.

    The stretch of a landmark past the last is empty.
    """
    # end = M whole + rest, so that no product needs 64 bits
    whole = end // num_landmarks
    rest = end - whole * num_landmarks
    first = landmark * whole + (landmark * rest + num_landmarks - 1) // num_landmarks
    last = (landmark + 1) * whole + ((landmark + 1) * rest + num_landmarks - 1) // num_landmarks
    return first, tl.where(landmark < num_landmarks, last, first)


@triton.jit
def farthest_in_tile(k, first, last, k_ptr, end, E: tl.constexpr, BE: tl.constexpr):
    """Key (BE,) of a stretch in one tile (rows, BE) farthest from its mean; if that is empty, of the sequence."""
    k = k.to(tl.float32)
    j = first + tl.arange(0, k.shape[0])
    row, _ = farthest_key(k, tl.sum(k, 0) * (1.0 / tl.maximum(last - first, 1).to(tl.float32)), j, first, last)
    key = tl.sum(tl.where((j == row)[:, None], k, 0.0), 0)
    if first >= last:
        e = tl.arange(0, BE)
        key = tl.load(k_ptr + e, mask=(e < E) & (end > 0), other=0.0).to(tl.float32)
    return key


@triton.jit
def farthest_of_tiles(k_ptr, first, last, end, stride_kn, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr):
    """Key (BE,) of a stretch, read BN keys at a time, that is farthest from its mean."""
    e = tl.arange(0, BE)
    j = first + tl.arange(0, BN)
    total = tl.zeros((BE,), tl.float32)
    for n in range(0, last - first, BN):
        total += tl.sum(load_rows(k_ptr, j + n, j + n < last, stride_kn, E, BE).to(tl.float32), 0)
    mean = total * (1.0 / tl.maximum(last - first, 1).to(tl.float32))
    farthest = -1.0
    row = 0
    for n in range(0, last - first, BN):
        k = load_rows(k_ptr, j + n, j + n < last, stride_kn, E, BE).to(tl.float32)
        place, distance = farthest_key(k, mean, j + n, first, last)
        row = tl.where(distance > farthest, place, row)
        farthest = tl.maximum(farthest, distance)
    return tl.load(k_ptr + row * stride_kn + e, mask=(e < E) & (row < end), other=0.0).to(tl.float32)


@triton.jit
def store_start(
    part, group, k_ptr, lengths_ptr, centre_ptr, delta_ptr, bias_ptr,
    heads, num_keys, num_landmarks, stride_kb, stride_kh, stride_kn,
    E: tl.constexpr, BE: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, ONE_TILE: tl.constexpr, PAIR: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, EVERY: tl.constexpr, PER_CLUSTER: tl.constexpr,
):  # fmt: skip
    """Store the initial centroid of a landmark or of a pair of them, see `start_kernel`."""
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    every = sample_of_sequence(end, num_landmarks, EVERY, 1, PER_CLUSTER, HAS_LENGTHS)
    end = (end + every - 1) // every
    stride_kn *= every
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    landmark = 2 * part if PAIR else part
    first, last = stretch_of_landmark(landmark, end, num_landmarks)
    rows = tl.arange(0, BN)
    # all loads before the first reduction, which would wait for each of them
    if ONE_TILE:
        k = load_rows(k_ptr, first + rows, first + rows < last, stride_kn, E, BE)
    if PAIR:
        first_2, last_2 = stretch_of_landmark(landmark + 1, end, num_landmarks)
        k_2 = load_rows(k_ptr, first_2 + rows, first_2 + rows < last_2, stride_kn, E, BE)
    some = (tl.arange(0, 16) * end.to(tl.int64) // 16).to(tl.int32)
    centre = tl.sum(load_rows(k_ptr, some, some < end, stride_kn, E, BE).to(tl.float32), 0) * (1 / 16)
    if ONE_TILE:
        key = farthest_in_tile(k, first, last, k_ptr, end, E, BE)
    else:
        key = farthest_of_tiles(k_ptr, first, last, end, stride_kn, E, BE, BN)
    bias_ptr += group * MP
    if part == 0:
        tl.store(centre_ptr + group * BE + tl.arange(0, BE), centre)
        for block in range(0, MP, 16):
            b = block + tl.arange(0, 16)
            tl.store(bias_ptr + b, tl.full((16,), LOG_ZERO, tl.float32), mask=b >= num_landmarks)
    b = landmark + tl.arange(0, 1)
    delta_ptr += wide * num_landmarks * E
    # a stretch is empty where keys are fewer than landmarks: its centroid is a copy
    store_centroids((key - centre)[:, None], centre, delta_ptr, bias_ptr, b, first < last, num_landmarks, E, MP, BE)
    if PAIR:
        key = farthest_in_tile(k_2, first_2, last_2, k_ptr, end, E, BE)
        delta = (key - centre)[:, None]
        store_centroids(delta, centre, delta_ptr, bias_ptr, b + 1, first_2 < last_2, num_landmarks, E, MP, BE)


@triton.jit
def start_kernel(
    k_ptr, lengths_ptr,
    centre_ptr,  # (G, BE) float32, written
    delta_ptr,  # (G, M, E), written
    bias_ptr,  # (G, MP) float32, written
    heads, num_keys, num_landmarks, stride_kb, stride_kh, stride_kn,
    E: tl.constexpr, BE: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, ONE_TILE: tl.constexpr, PAIR: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, EVERY: tl.constexpr, PER_CLUSTER: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Initial centroid of a landmark: of its stretch of keys, the one farthest from the stretch's mean.

    ONE_TILE: a stretch has at most BN keys.
    PAIR: a program has two landmarks; with ONE_TILE.
    EVERY: take one key of EVERY, the first, in a sequence of at least PER_CLUSTER keys per landmark; else all.
    FIRST: this is the first kernel of a pass.
    """
    grid_dependency_control(PDL, FIRST)
    store_start(
        tl.program_id(0), tl.program_id(1), k_ptr, lengths_ptr, centre_ptr, delta_ptr, bias_ptr,
        heads, num_keys, num_landmarks, stride_kb, stride_kh, stride_kn,
        E, BE, MP, BN, ONE_TILE, PAIR, HAS_LENGTHS, EVERY, PER_CLUSTER,
    )  # fmt: skip


@triton.jit
def nearest(score, MB: tl.constexpr):
    """Column of the largest score of each row (rows, MB), and that score.

    The column takes the lowest bits of a score, so that one maximum finds both; scores that agree in the other bits
    count as equal.
    """
    bits = score.to(tl.int32, bitcast=True)
    packed = (bits & (-MB)) | tl.arange(0, MB)[None, :]
    best = tl.max(packed.to(tl.float32, bitcast=True), 1)
    return best.to(tl.int32, bitcast=True) & (MB - 1), best


@triton.jit
def nearest_centroid(
    k, delta_ptr, bias_ptr, num_landmarks, E: tl.constexpr, BE: tl.constexpr, MB: tl.constexpr, MP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Cluster (rows,) of keys (rows, BE), over blocks of MB landmarks of one sequence."""
    label = tl.zeros((k.shape[0],), tl.int32)
    best = tl.full((k.shape[0],), float("-inf"), tl.float32)
    for block in tl.range(0, MP, MB, num_stages=2):
        b = block + tl.arange(0, MB)
        delta = load_rows(delta_ptr, b, b < num_landmarks, E, E, BE)
        score = tl.dot(k, tl.trans(delta), input_precision=PRECISION) + tl.load(bias_ptr + b)[None, :]
        column, value = nearest(score, MB)
        label = tl.where(value > best, block + column, label)
        best = tl.maximum(best, value)
    return label


@triton.jit
def assign_kernel(
    k_ptr, lengths_ptr,
    delta_ptr,  # (G, M, E)
    bias_ptr,  # (G, MP)
    label_ptr,  # (G, S) int16, written
    heads, num_keys, num_landmarks, stride_kb, stride_kh, stride_kn,
    E: tl.constexpr, BE: tl.constexpr, MB: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, EVERY: tl.constexpr,
    LEAST: tl.constexpr, PER_CLUSTER: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Cluster of each key of a tile, or of one key of EVERY or LEAST, over blocks of MB landmarks.

    EVERY, LEAST: see `cluster_sums_kernel`.
    """
    grid_dependency_control(PDL, False)
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    every = sample_of_sequence(end, num_landmarks, EVERY, LEAST, PER_CLUSTER, HAS_LENGTHS)
    j = (tl.program_id(0) * BN + tl.arange(0, BN)) * every
    k = load_rows(sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh), j, j < end, stride_kn, E, BE)
    delta_ptr += group.to(tl.int64) * num_landmarks * E
    label = nearest_centroid(k, delta_ptr, bias_ptr + group * MP, num_landmarks, E, BE, MB, MP, PRECISION)
    label = tl.where(j < end, label, -1)
    tl.store(label_ptr + group.to(tl.int64) * num_keys + j, label.to(tl.int16), mask=j < num_keys)


@triton.jit
def finish_clusters(
    sum_k, sum_v, count, b, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr, group, num_landmarks,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Store centroids, and with LAST mean values and sizes, from sums (BE, landmarks b) and numbers of members."""
    wide = group.to(tl.int64)
    e = tl.arange(0, BE)
    exists = b < num_landmarks
    centre = tl.load(centre_ptr + group * BE + e)
    share = 1.0 / tl.maximum(count, 1.0)
    delta_ptr += wide * num_landmarks * E
    # a centroid without members does not move
    mask = exists[None, :] & (e < E)[:, None]
    before = tl.load(delta_ptr + b[None, :] * E + e[:, None], mask=mask, other=0.0).to(tl.float32)
    bias_ptr += group * MP
    used = (count > 0) | (tl.load(bias_ptr + b) > LOG_ZERO)
    delta = tl.where((count > 0)[None, :], sum_k * share[None, :] - centre[:, None], before)
    store_centroids(delta, centre, delta_ptr, bias_ptr, b, used, num_landmarks, E, MP, BE)
    if LAST:
        d = tl.arange(0, BD)
        mean_v = (sum_v * share[None, :]).to(mean_v_ptr.dtype.element_ty)
        mean_v_ptrs = mean_v_ptr + wide * num_landmarks * D + b[None, :] * D + d[:, None]
        tl.store(mean_v_ptrs, mean_v, mask=exists[None, :] & (d < D)[:, None])
        tl.store(log_count_ptr + group * MP + b, tl.where(count > 0, tl.log2(tl.maximum(count, 1.0)), LOG_ZERO))


@triton.jit
def store_sums(
    part, parts, group, block, k_ptr, v_ptr, lengths_ptr, label_ptr, sum_ptr, centre_ptr, delta_ptr, bias_ptr,
    mean_v_ptr, log_count_ptr, heads, num_keys, num_landmarks, chunk,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    MB: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, ASSIGN: tl.constexpr, LAST: tl.constexpr,
    FINAL: tl.constexpr, PARTS: tl.constexpr, EVERY: tl.constexpr, LEAST: tl.constexpr, PER_CLUSTER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store the sums of chunk `part` of `parts`, see `cluster_sums_kernel`."""
    wide = group.to(tl.int64)
    end = end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS)
    every = sample_of_sequence(end, num_landmarks, EVERY, LEAST, PER_CLUSTER, HAS_LENGTHS)
    k_ptr = sequence_ptr(k_ptr, group, heads, stride_kb, stride_kh)
    v_ptr = sequence_ptr(v_ptr, group, heads, stride_vb, stride_vh)
    label_ptr += wide * num_keys
    b = tl.arange(0, MB)
    if ASSIGN:
        c = tl.arange(0, MB // PARTS)
        of_sequence = delta_ptr + wide * num_landmarks * E
        delta = tl.trans(load_rows(of_sequence, c, c < num_landmarks, E, E, BE))
        bias = tl.load(bias_ptr + group * MP + c)
        if PARTS == 2:
            c += MB // 2
            other_delta = tl.trans(load_rows(of_sequence, c, c < num_landmarks, E, E, BE))
            other_bias = tl.load(bias_ptr + group * MP + c)
    sum_k = tl.zeros((BE, MB), tl.float32)
    sum_v = tl.zeros((BD, MB), tl.float32)
    first = part * chunk
    last = tl.minimum(first + chunk, (num_keys + every - 1) // every)
    for n in tl.range(first, last, BN, num_stages=STAGES):
        row = n + tl.arange(0, BN)
        j = row * every
        exists = j < end
        k = load_rows(k_ptr, j, exists, stride_kn, E, BE)
        if ASSIGN:
            label, best = nearest(tl.dot(k, delta, input_precision=PRECISION) + bias[None, :], MB // PARTS)
            if PARTS == 2:
                score = tl.dot(k, other_delta, input_precision=PRECISION) + other_bias[None, :]
                other, other_best = nearest(score, MB // 2)
                label = tl.where(other_best > best, other + MB // 2, label)
            label = tl.where(exists, label, -1)
            tl.store(label_ptr + row, label.to(tl.int16), mask=row < last)
        else:
            label = tl.load(label_ptr + j, mask=exists, other=-1).to(tl.int32) - block
        one_hot = (label[:, None] == b[None, :]).to(k.dtype)
        sum_k = tl.dot(tl.trans(k), one_hot, sum_k, input_precision=PRECISION)
        if LAST:
            v = load_rows(v_ptr, j, exists, stride_vn, D, BD)
            sum_v = tl.dot(tl.trans(v), one_hot, sum_v, input_precision=PRECISION)
    # counted many at a time, through memory: a histogram has many barriers
    count = tl.zeros((MB,), tl.int32)
    if ASSIGN:
        tl.debug_barrier()
    for n in tl.range(first, last, 4 * BN):
        row = n + tl.arange(0, 4 * BN)
        label_ptrs = label_ptr + (row if ASSIGN else row * every)
        label = tl.load(label_ptrs, mask=(row < last) & (row * every < end), other=-1).to(tl.int32) - block
        in_block = (label >= 0) & (label < MB)
        # the others count as members of the first cluster, and are taken off again
        count += tl.histogram(tl.where(in_block, label, 0), MB)
        count -= tl.where(b == 0, 4 * BN - tl.sum(in_block.to(tl.int32), 0), 0)
    b += block
    if FINAL:
        finish_clusters(
            sum_k, sum_v, count.to(tl.float32), b, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr, group,
            num_landmarks, E, BE, D, BD, MP, LAST,
        )  # fmt: skip
    else:
        rows: tl.constexpr = BE + BD + 1
        sum_ptr += (wide * parts + part) * (rows * MP)
        tl.store(sum_ptr + tl.arange(0, BE)[:, None] * MP + b[None, :], sum_k)
        if LAST:
            tl.store(sum_ptr + (BE + tl.arange(0, BD))[:, None] * MP + b[None, :], sum_v)
        tl.store(sum_ptr + (BE + BD) * MP + b, count.to(tl.float32))


@triton.jit
def cluster_sums_kernel(
    k_ptr, v_ptr, lengths_ptr,
    label_ptr,  # (G, S) int16: written with ASSIGN, of the keys that it takes one after another; read without ASSIGN
    sum_ptr,  # (G, chunks, BE + BD + 1, MP) float32: sums of keys and, with LAST, values, and numbers; without FINAL
    centre_ptr,  # (G, BE) float32
    delta_ptr,  # (G, M, E), read with ASSIGN, written with FINAL, as the next
    bias_ptr,  # (G, MP) float32
    mean_v_ptr,  # (G, M, D) mean values in the dtype of the values, written with FINAL and LAST
    log_count_ptr,  # (G, MP) log2 of the number of members, LOG_ZERO for none, written with FINAL and LAST
    heads, num_keys, num_landmarks, chunk, step_chunk,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    MB: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, ASSIGN: tl.constexpr, LAST: tl.constexpr,
    FINAL: tl.constexpr, PARTS: tl.constexpr, EVERY: tl.constexpr, LEAST: tl.constexpr, PER_CLUSTER: tl.constexpr,
    STEPS: tl.constexpr, STEP_EVERY: tl.constexpr, STEP_LEAST: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums over the keys of a chunk, and with LAST the values, by cluster, for one block of MB landmarks.

    Sums are products with the one-hot matrix of the clusters: exact products, float32 sums, always in the same order.

    EVERY: take one key of EVERY, the first, or one of LEAST in a sequence of fewer than PER_CLUSTER keys per landmark.
    FINAL: a sequence is one chunk; what `combine_kernel` does is done here.
    PARTS: parts in which the scores of a block are computed, which saves registers.
    STEPS: Lloyd steps that the program makes first, over the keys that STEP_EVERY and STEP_LEAST choose, as EVERY and
        LEAST do, in `step_chunk` rows; with FINAL.
    """
    grid_dependency_control(PDL, False)
    # from the last sequence to the first: what the kernel before has read of the last ones is still in the L2 cache
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    for _ in tl.static_range(STEPS):
        store_sums(
            0, 1, group, 0,
            k_ptr, v_ptr, lengths_ptr, label_ptr, sum_ptr, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr,
            heads, num_keys, num_landmarks, step_chunk,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            E, BE, D, BD, MB, MP, BN, True, False, True, PARTS, STEP_EVERY, STEP_LEAST, PER_CLUSTER, HAS_LENGTHS,
            PRECISION, STAGES,
        )  # fmt: skip
        # the next pass reads the centroids, and overwrites the labels that have been counted
        tl.debug_barrier()
    store_sums(
        tl.program_id(0), tl.num_programs(0), group, tl.program_id(2) * MB,
        k_ptr, v_ptr, lengths_ptr, label_ptr, sum_ptr, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr,
        heads, num_keys, num_landmarks, chunk, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        E, BE, D, BD, MB, MP, BN, ASSIGN, LAST, FINAL, PARTS, EVERY, LEAST, PER_CLUSTER, HAS_LENGTHS, PRECISION,
        STAGES,
    )  # fmt: skip


@triton.jit
def sum_chunks_kernel(
    sum_ptr,  # (G, chunks, ROWS, MP) float32
    chunks,
    SIZE: tl.constexpr,  # ROWS * MP
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add chunk p + CHUNKS, p + 2 CHUNKS, ... to chunk p, for BLOCK elements."""
    grid_dependency_control(PDL, False)
    part = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sum_ptr += tl.program_id(2).to(tl.int64) * chunks * SIZE + element
    exists = element < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for p in tl.range(part, chunks, CHUNKS, num_stages=8):
        total += tl.load(sum_ptr + p * SIZE, mask=exists, other=0.0)
    tl.store(sum_ptr + part * SIZE, total, mask=exists)


@triton.jit
def sum_of_chunks(ptr, chunks, stride, b, ROWS: tl.constexpr, MP: tl.constexpr):
    """Sum (ROWS, landmarks b) of the first chunks of (chunks, ROWS, MP), `stride` elements apart."""
    # little work and long waits: as many loads under way as shared memory holds
    stages: tl.constexpr = 8 if ROWS * b.shape[0] <= 1024 else 4
    total = tl.zeros((ROWS, b.shape[0]), tl.float32)
    for p in tl.range(0, chunks, num_stages=stages):
        total += tl.load(ptr + p * stride + tl.arange(0, ROWS)[:, None] * MP + b[None, :])
    return total


@triton.jit
def combine_sums(
    block, group, sum_ptr, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr, num_landmarks, chunks, slots,
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Store the centroids of BLOCK landmarks, see `combine_kernel`."""
    b = block * BLOCK + tl.arange(0, BLOCK)
    stride: tl.constexpr = (BE + BD + 1) * MP
    sum_ptr += group.to(tl.int64) * slots * stride
    sum_k = sum_of_chunks(sum_ptr, chunks, stride, b, BE, MP)
    sum_v = sum_of_chunks(sum_ptr + BE * MP, chunks, stride, b, BD, MP) if LAST else sum_k
    count = tl.sum(sum_of_chunks(sum_ptr + (BE + BD) * MP, chunks, stride, b, 1, MP), 0)
    finish_clusters(
        sum_k, sum_v, count, b, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr, group, num_landmarks,
        E, BE, D, BD, MP, LAST,
    )  # fmt: skip


@triton.jit
def combine_kernel(
    sum_ptr, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr,  # see `cluster_sums_kernel`
    num_landmarks,
    chunks, slots,  # chunks to add up, of so many in memory
    E: tl.constexpr, BE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Centroids and their bias, and with LAST sizes and mean values, of BLOCK landmarks, from the sums of chunks."""
    grid_dependency_control(PDL, False)
    combine_sums(
        tl.program_id(0), tl.program_id(1), sum_ptr, centre_ptr, delta_ptr, bias_ptr, mean_v_ptr, log_count_ptr,
        num_landmarks, chunks, slots, E, BE, D, BD, MP, BLOCK, LAST,
    )  # fmt: skip
