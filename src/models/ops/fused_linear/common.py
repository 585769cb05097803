"""Device functions that the Triton kernels of the fused linear map share: epilogue, and statistics of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from scatterbrain.ops.common.triton_functions import gelu


@triton.jit
def normalise_and_activate(
    product, mean, rstd, bias_ptr, sums_ptr, column, exists,
    NORMALISE: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """LayerNorm, bias and GELU of a tile of products, for columns `column` where they exist; float32."""
    y = product
    if NORMALISE:
        sums = tl.load(sums_ptr + column, mask=exists, other=0.0).to(tl.float32)
        y = (y - mean[:, None] * sums[None, :]) * rstd[:, None]
    if BIAS:
        y = y + tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y, EXACT)
    return y


@triton.jit
def moments(y, COLUMNS: tl.constexpr):
    """Mean of each row of a tile, and sum of squared differences from it, of the values as they are stored."""
    y = y.to(tl.float32)
    mean = tl.sum(y, 1) * (1.0 / COLUMNS)
    centred = y - mean[:, None]
    return mean, tl.sum(centred * centred, 1)


@triton.jit
def store_moments(statistics_ptr, part, row, rows_exist, num_rows, mean, squares):
    """Store the moments of one part of each row to (parts, 2, rows)."""
    pointers = statistics_ptr + row + 2 * part * num_rows
    tl.store(pointers, mean, mask=rows_exist)
    tl.store(pointers + num_rows, squares, mask=rows_exist)


@triton.jit
def row_statistics(statistics_ptr, row, num_rows, eps, COUNT: tl.constexpr, PARTIALS: tl.constexpr):
    """Mean and reciprocal standard deviation of rows of COUNT values, from the moments of PARTIALS equal parts of each.

    Parts are merged as in Chan, Golub and LeVeque (1979), which takes no difference of squares.
    """
    mean = tl.load(statistics_ptr + row)
    for part in tl.static_range(1, PARTIALS):
        mean += tl.load(statistics_ptr + 2 * part * num_rows + row)
    mean *= 1.0 / PARTIALS
    squares = tl.load(statistics_ptr + num_rows + row)
    if PARTIALS > 1:
        for part in tl.static_range(PARTIALS):
            if part > 0:
                squares += tl.load(statistics_ptr + (2 * part + 1) * num_rows + row)
            difference = tl.load(statistics_ptr + 2 * part * num_rows + row) - mean
            squares += difference * difference * (COUNT // PARTIALS)
    return mean, 1.0 / tl.sqrt(squares * (1.0 / COUNT) + eps)
