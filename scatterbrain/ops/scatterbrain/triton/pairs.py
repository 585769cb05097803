"""Inner loops over pairs of queries and keys: for causal masking, and for the tiles of `fallback.py`.

Outside the window the weight of a pair is `sum_m a_m b_m`, the features of query and key each relative to their own
maximum. Nothing is subtracted. That takes a product for every pair, as full attention does, so these loops run only
where sums over all keys cannot be used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.scatterbrain.triton.common import (
    LOG_ZERO,
    NO_KEYS,
    half_norms,
    in_window,
    load_rows,
    log_features,
    logical_not,
    masked_log_features,
    relative_to_max,
    store_rows,
)

# Largest exponent of the factor that turns products of relative features into weights. Beyond it the product itself
# has left float32.
MAX_EXPONENT = tl.constexpr(120.0)


@triton.jit
def pair_masks(keys, queries, exists, LEFT: tl.constexpr, RIGHT: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Whether pairs lie in the window, and whether the query sees the key. Arguments broadcast against each other."""
    visible = exists
    if IS_CAUSAL:
        visible = visible & (keys <= queries)
    return in_window(keys, queries, LEFT, RIGHT), visible


@triton.jit
def exact_bwd_dq(q, do, k, v, inside, lse, delta, dq, qk_scale, PRECISION: tl.constexpr):
    """New dq with the exact weights `inside` the window, and t = do.v - delta of all pairs (queries, keys)."""
    exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
    exact = tl.where(inside, exact - lse[:, None], LOG_ZERO)
    t = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
    dq += tl.dot((tl.exp2(exact) * t).to(q.dtype), k, input_precision=PRECISION)
    return dq, t


@triton.jit
def exact_bwd_dk(q, do, k, v, inside, lse, delta, dk, qk_scale, PRECISION: tl.constexpr):
    """New dk with the exact weights `inside` the window, these weights, and t = do.v - delta of all (keys, queries)."""
    exact = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
    weights = tl.exp2(tl.where(inside, exact - lse[None, :], LOG_ZERO))
    t = tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :]
    dk += tl.dot((weights * t).to(q.dtype), q, input_precision=PRECISION)
    return dk, weights, t


@triton.jit
def pairs_fwd(
    start, end, i, q, features, feature_max, normaliser, acc, running_max,
    k_ptr, v_ptr, stride_kn, stride_vn, projection, qk_scale, feature_scale, norm_scale,
    E: tl.constexpr, D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BN: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys `start` to `end` to the output of queries i: new normaliser, accumulator and running maximum."""
    # `while`: Triton's pipeliner takes `for` loops, and gains nothing in this one
    while start < end:
        j = start + tl.arange(0, BN)
        exists = j < end
        k = load_rows(k_ptr, j, exists, stride_kn, E, q.shape[1])
        v = load_rows(v_ptr, j, exists, stride_vn, D, acc.shape[1])
        key_logs = log_features(k, half_norms(k, norm_scale), projection, feature_scale, PRECISION)
        key_features, key_max = relative_to_max(key_logs)
        estimate = tl.dot(features, tl.trans(key_features), input_precision=FEATURE_PRECISION)
        logits = tl.where(estimate > 0, tl.log2(tl.maximum(estimate, 1e-37)), LOG_ZERO)
        logits += feature_max[:, None] + key_max[None, :]
        inside, visible = pair_masks(j[None, :], i[:, None], exists[None, :], LEFT, RIGHT, IS_CAUSAL)
        exact = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        logits = tl.where(inside, exact, logits)
        logits = tl.where(visible, logits, LOG_ZERO)
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        decay = tl.exp2(running_max - new_max)
        weights = tl.where(visible, tl.exp2(logits - new_max[:, None]), 0.0)
        normaliser = normaliser * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        running_max = new_max
        start += BN
    return normaliser, acc, running_max


@triton.jit
def store_output(
    i, valid, end, normaliser, acc, running_max, out_ptr, stride_on, lse_ptr,
    D: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Write the output of queries i and, with STATISTICS, their log normalisers."""
    sees_none = (i < 0) | (end <= 0)
    divisor = tl.where(sees_none, 1.0, normaliser)
    out = tl.where(sees_none[:, None], 0.0, acc / divisor[:, None])
    store_rows(out_ptr, out, i, valid, stride_on, D)
    if STATISTICS:
        lse = tl.where(sees_none, NO_KEYS, running_max + tl.log2(divisor))
        tl.store(lse_ptr + i, lse, mask=valid)


@triton.jit
def pairs_bwd_dq(
    start, end, i, q, do, features, feature_max, lse, delta, dq, d_logs,
    k_ptr, v_ptr, stride_kn, stride_vn, projection, qk_scale, feature_scale, norm_scale,
    E: tl.constexpr, D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BN: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys `start` to `end` to the gradients of queries i: new dq and gradient of the log features."""
    while start < end:
        j = start + tl.arange(0, BN)
        exists = j < end
        k = load_rows(k_ptr, j, exists, stride_kn, E, q.shape[1])
        v = load_rows(v_ptr, j, exists, stride_vn, D, do.shape[1])
        inside, visible = pair_masks(j[None, :], i[:, None], exists[None, :], LEFT, RIGHT, IS_CAUSAL)
        dq, t = exact_bwd_dq(q, do, k, v, inside & visible, lse, delta, dq, qk_scale, PRECISION)
        key_logs = log_features(k, half_norms(k, norm_scale), projection, feature_scale, PRECISION)
        key_features, key_max = relative_to_max(key_logs)
        exponent = tl.minimum(feature_max[:, None] + key_max[None, :] - lse[:, None], MAX_EXPONENT)
        ratio = tl.where(visible & logical_not(inside), tl.exp2(exponent) * t, 0.0)
        d_logs += features * tl.dot(ratio, key_features, input_precision=FEATURE_PRECISION)
        start += BN
    return dq, d_logs


@triton.jit
def pairs_bwd_dkdv(
    start, end, j, exists, k, v, features, feature_max, dk, dv, d_logs,
    q_ptr, do_ptr, stride_qn, stride_don, lse_ptr, delta_ptr, projection, qk_scale, feature_scale, norm_scale,
    E: tl.constexpr, D: tl.constexpr, M: tl.constexpr, LOG_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BM: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, FEATURE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add queries `start` to `end` to the gradients of keys j: new dk, dv and gradient of the log features."""
    while start < end:
        i = start + tl.arange(0, BM)
        valid = i < end
        q = load_rows(q_ptr, i, valid, stride_qn, E, k.shape[1])
        do = load_rows(do_ptr, i, valid, stride_don, D, v.shape[1])
        lse = tl.load(lse_ptr + i, mask=valid, other=NO_KEYS)
        delta = tl.load(delta_ptr + i, mask=valid, other=0.0)
        seen = exists[:, None] & valid[None, :]
        inside, visible = pair_masks(j[:, None], i[None, :], seen, LEFT, RIGHT, IS_CAUSAL)
        dk, exact, t = exact_bwd_dk(q, do, k, v, inside & visible, lse, delta, dk, qk_scale, PRECISION)
        query_logs = masked_log_features(q, projection, LOG_M, feature_scale, norm_scale, M, PRECISION)
        query_features, query_max = relative_to_max(query_logs)
        exponent = tl.minimum(feature_max[:, None] + query_max[None, :] - lse[None, :], MAX_EXPONENT)
        ratio = tl.where(visible & logical_not(inside), tl.exp2(exponent), 0.0)
        estimate = tl.dot(features, tl.trans(query_features), input_precision=FEATURE_PRECISION) * ratio
        dv += tl.dot((exact + estimate).to(do.dtype), do, input_precision=PRECISION)
        d_logs += features * tl.dot(ratio * t, query_features, input_precision=FEATURE_PRECISION)
        start += BM
    return dk, dv, d_logs
