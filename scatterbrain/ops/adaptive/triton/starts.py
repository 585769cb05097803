"""Kernels that find the centroids of keys and of queries in the same launches, of the functions of `kmeans.py`.

The third program id is 0 for keys and 1 for queries. A launch takes the shape of the larger side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.clusters.triton.kmeans import combine_sums, store_start, store_sums
from scatterbrain.ops.common.triton_functions import grid_dependency_control


@triton.jit
def start_both_kernel(
    k_ptr, lengths_ptr, centre_ptr, delta_ptr, bias_ptr,  # see `start_kernel`
    q_ptr, query_lengths_ptr, query_centre_ptr, query_delta_ptr, query_bias_ptr,
    heads, num_keys, num_landmarks, stride_kb, stride_kh, stride_kn,
    length, num_query_landmarks, stride_qb, stride_qh, stride_qn,
    E: tl.constexpr, BE: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, ONE_TILE: tl.constexpr, PAIR: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, EVERY: tl.constexpr, PER_CLUSTER: tl.constexpr,
    QUERY_MP: tl.constexpr, QUERY_BN: tl.constexpr, QUERY_ONE_TILE: tl.constexpr, QUERY_PAIR: tl.constexpr,
    QUERY_HAS_LENGTHS: tl.constexpr, QUERY_EVERY: tl.constexpr, QUERY_PER_CLUSTER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Initial centroid of one or two clusters."""
    grid_dependency_control(PDL, True)
    part = tl.program_id(0)
    group = tl.program_id(1)
    if tl.program_id(2) == 0:
        if (2 * part if PAIR else part) < num_landmarks:
            store_start(
                part, group, k_ptr, lengths_ptr, centre_ptr, delta_ptr, bias_ptr,
                heads, num_keys, num_landmarks, stride_kb, stride_kh, stride_kn,
                E, BE, MP, BN, ONE_TILE, PAIR, HAS_LENGTHS, EVERY, PER_CLUSTER,
            )  # fmt: skip
    else:
        if (2 * part if QUERY_PAIR else part) < num_query_landmarks:
            store_start(
                part, group, q_ptr, query_lengths_ptr, query_centre_ptr, query_delta_ptr, query_bias_ptr,
                heads, length, num_query_landmarks, stride_qb, stride_qh, stride_qn,
                E, BE, QUERY_MP, QUERY_BN, QUERY_ONE_TILE, QUERY_PAIR, QUERY_HAS_LENGTHS, QUERY_EVERY,
                QUERY_PER_CLUSTER,
            )  # fmt: skip


@triton.jit
def sum_both_kernel(
    k_ptr, lengths_ptr, label_ptr, sum_ptr, centre_ptr, delta_ptr, bias_ptr,  # see `cluster_sums_kernel`
    q_ptr, query_lengths_ptr, query_label_ptr, query_sum_ptr, query_centre_ptr, query_delta_ptr, query_bias_ptr,
    heads, num_keys, num_landmarks, chunk, chunks, stride_kb, stride_kh, stride_kn,
    length, num_query_landmarks, query_chunk, query_chunks, stride_qb, stride_qh, stride_qn,
    E: tl.constexpr, BE: tl.constexpr,
    BD: tl.constexpr, MP: tl.constexpr, PARTS: tl.constexpr, FINAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    EVERY: tl.constexpr, LEAST: tl.constexpr, PER_CLUSTER: tl.constexpr,
    QUERY_BD: tl.constexpr, QUERY_MP: tl.constexpr, QUERY_PARTS: tl.constexpr, QUERY_FINAL: tl.constexpr,
    QUERY_HAS_LENGTHS: tl.constexpr, QUERY_EVERY: tl.constexpr, QUERY_LEAST: tl.constexpr,
    QUERY_PER_CLUSTER: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums of the points of a chunk by their nearest centroid, for a step of Lloyd's algorithm."""
    grid_dependency_control(PDL, False)
    part = tl.program_id(0)
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    # centroids alone: the pointers to values, mean values and sizes are placeholders
    if tl.program_id(2) == 0:
        if part < chunks:
            store_sums(
                part, chunks, group, 0, k_ptr, k_ptr, lengths_ptr, label_ptr, sum_ptr, centre_ptr, delta_ptr,
                bias_ptr, delta_ptr, bias_ptr, heads, num_keys, num_landmarks, chunk,
                stride_kb, stride_kh, stride_kn, stride_kb, stride_kh, stride_kn,
                E, BE, E, BD, MP, MP, BN, True, False, FINAL, PARTS, EVERY, LEAST, PER_CLUSTER, HAS_LENGTHS, PRECISION,
                STAGES,
            )  # fmt: skip
    else:
        if part < query_chunks:
            store_sums(
                part, query_chunks, group, 0, q_ptr, q_ptr, query_lengths_ptr, query_label_ptr, query_sum_ptr,
                query_centre_ptr, query_delta_ptr, query_bias_ptr, query_delta_ptr, query_bias_ptr,
                heads, length, num_query_landmarks, query_chunk,
                stride_qb, stride_qh, stride_qn, stride_qb, stride_qh, stride_qn,
                E, BE, E, QUERY_BD, QUERY_MP, QUERY_MP, BN, True, False, QUERY_FINAL, QUERY_PARTS, QUERY_EVERY,
                QUERY_LEAST, QUERY_PER_CLUSTER, QUERY_HAS_LENGTHS, PRECISION, STAGES,
            )  # fmt: skip


@triton.jit
def combine_both_kernel(
    sum_ptr, centre_ptr, delta_ptr, bias_ptr,  # see `combine_kernel`
    query_sum_ptr, query_centre_ptr, query_delta_ptr, query_bias_ptr,
    num_landmarks, chunks, num_query_landmarks, query_chunks,
    E: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, MP: tl.constexpr, FINAL: tl.constexpr,
    QUERY_BD: tl.constexpr, QUERY_MP: tl.constexpr, QUERY_FINAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Centroids from the sums of chunks, of a side that is not FINAL: whose sequences are several chunks."""
    grid_dependency_control(PDL, False)
    block = tl.program_id(0)
    group = tl.program_id(1)
    if tl.program_id(2) == 0:
        if not FINAL and block * BLOCK < MP:
            combine_sums(
                block, group, sum_ptr, centre_ptr, delta_ptr, bias_ptr, delta_ptr, bias_ptr,
                num_landmarks, chunks, chunks, E, BE, E, BD, MP, BLOCK, False,
            )  # fmt: skip
    else:
        if not QUERY_FINAL and block * BLOCK < QUERY_MP:
            combine_sums(
                block, group, query_sum_ptr, query_centre_ptr, query_delta_ptr, query_bias_ptr, query_delta_ptr,
                query_bias_ptr, num_query_landmarks, query_chunks, query_chunks,
                E, BE, E, QUERY_BD, QUERY_MP, BLOCK, False,
            )  # fmt: skip
