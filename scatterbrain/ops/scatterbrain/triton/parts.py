"""Pieces that the Triton kernels share: tiles of rows, log features, and sums over keys in a running reference.

Everything is in powers of two, since `exp2` and `log2` are what the hardware has: `log` in a name is a logarithm to
base 2, and scales come in multiplied by log2(e).

Shapes inside a kernel: BM queries or BN keys in a tile, BE and BD widths E and D rounded up to powers of two, MP
features M rounded up. Columns past E, D and M hold zeros, or features of weight zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Stand-in for the logarithm of nothing: finite, so that differences of two of them are not nan.
FLOOR = tl.constexpr(-1e30)
# Position of keys that do not exist: in no window.
FAR = tl.constexpr(1 << 30)


@triton.jit
def group_offset(group, heads, stride_batch, stride_head):
    """Offset of the first row of sequence `group = batch * H + head`, in 64 bits."""
    return (group // heads).to(tl.int64) * stride_batch + (group % heads).to(tl.int64) * stride_head


@triton.jit
def load_rows(pointer, rows, valid, stride, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a (N, width) matrix as a tile; zeros where `valid` is false (`MASKED`) and past the width."""
    where = pointer + rows[:, None] * stride + columns[None, :]
    within = (columns < WIDTH)[None, :]
    if MASKED and WIDTH == PADDED:
        tile = tl.load(where, mask=valid[:, None], other=0.0)
    elif MASKED:
        tile = tl.load(where, mask=valid[:, None] & within, other=0.0)
    elif WIDTH == PADDED:
        tile = tl.load(where)
    else:
        tile = tl.load(where, mask=within, other=0.0)
    return tile


@triton.jit
def store_rows(pointer, tile, rows, valid, stride, columns, WIDTH: tl.constexpr):
    """Store a tile's valid rows and columns, in the dtype of the pointer."""
    where = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(where, tile.to(pointer.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_projection(pointer, E: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """Rows (R, E) of the random features, transposed: (BE, MP). With M = 2 R the second half has the other sign."""
    column = tl.arange(0, BE)
    feature = tl.arange(0, MP)
    row = tl.where(feature < R, feature, feature - R)
    valid = (column < E)[:, None] & (feature < M)[None, :]
    rows = tl.load(pointer + row[None, :] * E + column[:, None], mask=valid, other=0.0)
    return tl.where((feature < R)[None, :], rows, -rows)


@triton.jit
def load_projection_rows(
    pointer, E: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr
):
    """The same as (MP, BE). Loaded again: as a transposed view, Triton 3.6 multiplied something else on Hopper."""
    column = tl.arange(0, BE)
    feature = tl.arange(0, MP)
    row = tl.where(feature < R, feature, feature - R)
    valid = (feature < M)[:, None] & (column < E)[None, :]
    rows = tl.load(pointer + row[:, None] * E + column[None, :], mask=valid, other=0.0)
    return tl.where((feature < R)[:, None], rows, -rows)


@triton.jit
def half_norms(x, half_scale):
    """`s |x|^2 / 2` of each row, in log2: (rows,)."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1) * half_scale


@triton.jit
def log_features(x, norms, projection, slope, PRECISION: tl.constexpr):
    """`log phi(x)` without `log(M) / 2`: (rows, MP), with `half_norms` and the slope sqrt(s) log2(e)."""
    return tl.dot(x, projection, input_precision=PRECISION) * slope - norms[:, None]


@triton.jit
def in_window(keys, queries, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether key j lies in the window of query i: see `ops.common.windows`. Arguments broadcast against each other."""
    # one comparison in place of two: a negative distance is a huge unsigned number
    return (keys - queries + LEFT).to(tl.uint32, bitcast=True) < LEFT + RIGHT


@triton.jit
def no(x):
    """Logical not: the interpreter of Triton 3.2 has no `~` for booleans."""
    return x == 0


@triton.jit
def normalised(x):
    """Log features (rows, MP) as factors of at most 1, and the logarithm (rows,) that they are relative to."""
    reference = tl.maximum(tl.max(x, 1), FLOOR)
    return tl.exp2(x - reference[:, None]), reference
