"""Device functions that the attention kernels share: loads and stores of rows, log features, masks.

Exponentials and logarithms are to base 2, since `exp2` and `log2` are what the hardware has: `log` in a name is `log2`,
and scales are multiplied by log2(e) on the host.

Sizes: BM queries or BN keys in a tile; BE and BD are the widths E and D rounded up to powers of two, MP the number of
features M. Columns past E and D hold zeros, and features past M have weight zero.

Scalars of all kernels, for a softmax scale s: `qk_scale` = s log2(e), `feature_scale` = sqrt(s) log2(e) and
`norm_scale` = s log2(e) / 2.

Signatures and calls keep related arguments on one line: Triton 3.2, the oldest version that is supported, takes no
tuples as arguments of kernels or of functions that they call.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Logarithm of zero: finite, so that the difference of two of them is not nan.
LOG_ZERO = tl.constexpr(-1e30)
# Log normaliser of a query that sees no key: large, so that every weight relative to it is zero.
NO_KEYS = tl.constexpr(1e30)
# Gradients of base-2 logits are multiplied by this.
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence_ptr(ptr, group, heads, stride_b, stride_h):
    """Pointer to the first row of sequence `group = batch * H + head`; the offset has 64 bits."""
    return ptr + ((group // heads).to(tl.int64) * stride_b + (group % heads).to(tl.int64) * stride_h)


@triton.jit
def end_of_keys(lengths_ptr, group, heads, num_keys, HAS_LENGTHS: tl.constexpr):
    """Number of keys of a sequence that are not hidden by its key length."""
    end = num_keys
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths_ptr + group // heads).to(tl.int32), num_keys)
    return end


@triton.jit
def load_rows(ptr, rows, valid, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr = True):
    """Tile (rows, PADDED) of a (N, WIDTH) matrix; zeros past the width and, with MASKED, where `valid` is false."""
    columns = tl.arange(0, PADDED)
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    column_exists = (columns < WIDTH)[None, :]
    if MASKED and WIDTH == PADDED:
        tile = tl.load(ptrs, mask=valid[:, None], other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=valid[:, None] & column_exists, other=0.0)
    elif WIDTH == PADDED:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=column_exists, other=0.0)
    return tile


@triton.jit
def store_rows(ptr, tile, rows, valid, stride, WIDTH: tl.constexpr):
    """Store the valid rows and columns of a tile, in the dtype of the pointer."""
    columns = tl.arange(0, tile.shape[1])
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_projection(ptr, E: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """Random projection (R, E), transposed: (BE, MP). With M = 2 R the second half has the opposite sign."""
    column = tl.arange(0, BE)
    feature = tl.arange(0, MP)
    row = tl.where(feature < R, feature, feature - R)
    valid = (column < E)[:, None] & (feature < M)[None, :]
    rows = tl.load(ptr + row[None, :] * E + column[:, None], mask=valid, other=0.0)
    return tl.where((feature < R)[None, :], rows, -rows)


@triton.jit
def load_projection_rows(ptr, E: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """The same as (MP, BE). Loaded again: as a transposed view, Triton 3.6 multiplied something else on Hopper."""
    column = tl.arange(0, BE)
    feature = tl.arange(0, MP)
    row = tl.where(feature < R, feature, feature - R)
    valid = (feature < M)[:, None] & (column < E)[None, :]
    rows = tl.load(ptr + row[:, None] * E + column[None, :], mask=valid, other=0.0)
    return tl.where((feature < R)[:, None], rows, -rows)


@triton.jit
def half_norms(x, norm_scale):
    """`s |x|^2 / 2` of each row, in log2: (rows,)."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1) * norm_scale


@triton.jit
def log_features(x, norms, projection, feature_scale, PRECISION: tl.constexpr):
    """`log phi(x)` without `- log(M) / 2`, from `half_norms` of x: (rows, MP)."""
    return tl.dot(x, projection, input_precision=PRECISION) * feature_scale - norms[:, None]


@triton.jit
def masked_log_features(x, projection, log_count, feature_scale, norm_scale, M: tl.constexpr, PRECISION: tl.constexpr):
    """`log phi(x)` less `log_count`, LOG_ZERO for features past M: (rows, MP)."""
    logs = log_features(x, half_norms(x, norm_scale), projection, feature_scale, PRECISION) - log_count
    return tl.where((tl.arange(0, projection.shape[1]) < M)[None, :], logs, LOG_ZERO)


@triton.jit
def relative_to_max(logs):
    """`exp2` of logs (rows, MP) relative to the largest of each row, and that maximum (rows,)."""
    row_max = tl.maximum(tl.max(logs, 1), LOG_ZERO)
    return tl.exp2(logs - row_max[:, None]), row_max


@triton.jit
def in_window(keys, queries, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether key j lies in the window of query i: see `ops.common.windows`. Arguments broadcast against each other."""
    # one comparison in place of two: a negative distance is a huge unsigned number
    return (keys - queries + LEFT).to(tl.uint32, bitcast=True) < LEFT + RIGHT


@triton.jit
def logical_not(x):
    """Elementwise not: the interpreter of Triton 3.2 has no `~` for booleans."""
    return x == 0
