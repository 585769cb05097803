"""The fused linear map over many rows on Hopper GPUs: a persistent kernel with tensor descriptors (TMA).

The products of a T2T-ViT's backbone are short (K of 384: six steps), so that the pipeline's prologue and the epilogue
take as long as the product itself. A persistent program loads the next tile during the epilogue of the last one, and
the tensor memory accelerator (TMA) computes the addresses of all elements.

Imported only where it runs: importing it needs Triton 3.4 or newer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from scatterbrain.ops.common.triton_functions import grid_dependency_control, num_sms, pdl_options
from src.models.ops.fused_linear.common import moments, normalise_and_activate, row_statistics, store_moments

# What was fastest on an H100 at 25,000 and 100,000 rows for every map of the backbone, among tiles of 64 to 256 rows
# and 64 or 128 columns, 4 or 8 warps, 1 or 2 programs, 3 or 4 stages.
ROWS, COLUMNS, INNER, WARPS, STAGES, PROGRAMS = 128, 128, 64, 4, 3, 2
# With fewer rows, programs have no tile.
MIN_ROWS = 2048
# Alignment that TMA requires, in bytes.
_ALIGNMENT = 16


@triton.jit
def _half_epilogue(
    product, mean, rstd, bias_ptr, sums_ptr, residual_descriptor, out_descriptor, first_row, first_column,
    COLUMNS: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Epilogue and store of half a tile: moments of its rows."""
    column = first_column + tl.arange(0, COLUMNS)
    y = normalise_and_activate(
        product, mean, rstd, bias_ptr, sums_ptr, column, column >= 0, NORMALISE, BIAS, GELU, False
    )
    if RESIDUAL:
        y = y + residual_descriptor.load([first_row, first_column]).to(tl.float32)
    y = y.to(out_descriptor.dtype)
    out_descriptor.store([first_row, first_column], y)
    return moments(y, COLUMNS)


@triton.jit
def _persistent_kernel(
    x_descriptor,  # (rows, IN_FEATURES) in tiles of (ROWS, INNER)
    weight_descriptor,  # (OUT_FEATURES, IN_FEATURES) in tiles of (COLUMNS, INNER)
    residual_descriptor,  # (rows, OUT_FEATURES) in tiles of (ROWS, COLUMNS // 2)
    out_descriptor,  # the same
    bias_ptr, sums_ptr,
    statistics_ptr,  # (PARTIALS, 2, rows) of x, with NORMALISE
    out_statistics_ptr,  # (OUT_FEATURES // COLUMNS, 2, rows), with STATISTICS
    num_rows, eps,
    IN_FEATURES: tl.constexpr, OUT_FEATURES: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, PARTIALS: tl.constexpr, STATISTICS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    FLATTEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS x COLUMNS outputs, those of the same rows one after another, so that x is read from memory once.

    FLATTEN: one loop over the steps of all tiles, in place of two nested loops.
    """
    grid_dependency_control(PDL, False)
    column_tiles: tl.constexpr = OUT_FEATURES // COLUMNS
    half: tl.constexpr = COLUMNS // 2
    tiles = tl.cdiv(num_rows, ROWS) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        first_row = (tile // column_tiles) * ROWS
        first_column = (tile % column_tiles) * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in tl.range(0, IN_FEATURES // INNER, num_stages=STAGES):
            x = x_descriptor.load([first_row, step * INNER])
            weight = weight_descriptor.load([first_column, step * INNER])
            product = tl.dot(x, weight.T, product)
        row = first_row + tl.arange(0, ROWS)
        rows_exist = row < num_rows
        row = tl.minimum(row, num_rows - 1)
        mean = tl.zeros((ROWS,), tl.float32)
        rstd = mean
        if NORMALISE:
            mean, rstd = row_statistics(statistics_ptr, row, num_rows, eps, IN_FEATURES, PARTIALS)
        # in halves: half the registers, and half the shared memory for the store
        left, right = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, half)), (0, 2, 1)))
        left_mean, left_squares = _half_epilogue(
            left, mean, rstd, bias_ptr, sums_ptr, residual_descriptor, out_descriptor, first_row,
            first_column, half, NORMALISE, BIAS, GELU, RESIDUAL,
        )  # fmt: skip
        right_mean, right_squares = _half_epilogue(
            right, mean, rstd, bias_ptr, sums_ptr, residual_descriptor, out_descriptor, first_row,
            first_column + half, half, NORMALISE, BIAS, GELU, RESIDUAL,
        )  # fmt: skip
        if STATISTICS:
            # merged as in `row_statistics`
            distance = right_mean - left_mean
            squares = left_squares + right_squares + distance * distance * (half / 2)
            part = tile % column_tiles
            store_moments(out_statistics_ptr, part, row, rows_exist, num_rows, left_mean + 0.5 * distance, squares)


def _is_hopper(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU, on which alone the kernel was measured."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _as_rows(x: torch.Tensor) -> torch.Tensor | None:
    """(..., N) as (rows, N) without a copy, aligned for TMA; None where that is not possible."""
    if x.data_ptr() % _ALIGNMENT or x.stride(-1) != 1:
        return None
    try:
        x = x.view(-1, x.shape[-1])
    except RuntimeError:
        return None
    return None if x.stride(0) * x.element_size() % _ALIGNMENT or x.stride(0) < x.shape[1] else x


def launch_persistent(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sums: torch.Tensor | None,
    residual: torch.Tensor | None,
    statistics: torch.Tensor | None,
    out: torch.Tensor,
    out_statistics: torch.Tensor | None,
    eps: float,
    gelu: bool,
) -> bool:
    """Whether the kernel ran, which it does for maps and devices that it was measured on; nothing is written otherwise.

    Args:
        x: (rows, K).
        weight: (N, 1, K).
        bias: (N,), or None.
        sums: (N,); None without a LayerNorm.
        residual: of the output's shape, or None.
        statistics: of the rows of x; None without a LayerNorm.
        out: (..., N).
        out_statistics: receives those of the output; None for none.
        eps: of the LayerNorm.
        gelu: apply a GELU.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    fits = (
        x.dtype in (torch.float16, torch.bfloat16)
        and num_rows >= MIN_ROWS
        and weight.shape[1:] == (1, in_features)
        and in_features % INNER == 0
        and out_features % COLUMNS == 0
        and (out_statistics is None or out_statistics.shape[0] == out_features // COLUMNS)
        and _is_hopper(x.device)
    )
    if not fits:
        return False
    x_rows, out_rows = _as_rows(x), _as_rows(out)
    residual_rows = out_rows if residual is None else _as_rows(residual)
    if x_rows is None or out_rows is None or residual_rows is None:
        return False
    halves = [ROWS, COLUMNS // 2]
    programs = PROGRAMS * num_sms(x.device)
    grid = (min(programs, triton.cdiv(num_rows, ROWS) * (out_features // COLUMNS)),)
    _persistent_kernel[grid](
        TensorDescriptor.from_tensor(x_rows, [ROWS, INNER]),
        TensorDescriptor.from_tensor(weight.view(out_features, in_features), [COLUMNS, INNER]),
        TensorDescriptor.from_tensor(residual_rows, halves),
        TensorDescriptor.from_tensor(out_rows, halves),
        weight if bias is None else bias,
        weight if sums is None else sums,
        weight if statistics is None else statistics,
        weight if out_statistics is None else out_statistics,
        num_rows,
        eps,
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        NORMALISE=statistics is not None,
        BIAS=bias is not None,
        GELU=gelu,
        RESIDUAL=residual is not None,
        PARTIALS=1 if statistics is None else statistics.shape[0],
        STATISTICS=out_statistics is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INNER=INNER,
        STAGES=STAGES,
        # slower with a residual, whose loads delay those of the next tile
        FLATTEN=residual is None,
        num_warps=WARPS,
        **pdl_options(x.device),
    )
    return True
