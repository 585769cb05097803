"""The fused linear map over many rows on Hopper GPUs: a persistent kernel whose tiles the copy engine brings.

The products of a T2T-ViT's backbone are short (K of 384: six steps), so that filling the pipeline and what follows the
product take as long as the product itself. Programs that stay and go from tile to tile load the next tile while they
finish the last one, and tensor descriptors leave the addresses of each element to the copy engine.

Imported only where it runs: importing it needs Triton 3.4 or newer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from scatterbrain.ops.common.triton_functions import grid_dependency_control, num_sms, pdl_options
from src.models.ops.fused_linear.parts import after_product, moments, row_statistics, store_moments

# What was fastest on an H100 at 25,000 and 100,000 rows for every map of the backbone, among tiles of 64 to 256 rows
# and 64 or 128 columns, 4 or 8 warps, 1 or 2 programs, 3 or 4 stages.
ROWS, COLUMNS, INNER, WARPS, STAGES, PROGRAMS = 128, 128, 64, 4, 3, 2
# Fewer rows leave programs without a tile.
MIN_ROWS = 2048
# The copy engine reads from multiples of so many bytes.
_ALIGNMENT = 16


@triton.jit
def _finish_half(
    product,
    mean,
    reciprocal_deviation,
    bias_ptr,
    sums_ptr,
    residual_descriptor,
    out_descriptor,
    first_row,
    first_column,
    COLUMNS: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """What follows the product, and the store of half a tile. Returns the half's moments."""
    column = first_column + tl.arange(0, COLUMNS)
    y = after_product(
        product, mean, reciprocal_deviation, bias_ptr, sums_ptr, column, column >= 0, NORMALISE, BIAS, GELU, False
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
    bias_ptr,
    sums_ptr,
    statistics_ptr,  # (PARTIALS, 2, rows) of x, with NORMALISE
    out_statistics_ptr,  # (OUT_FEATURES // COLUMNS, 2, rows), with STATISTICS
    num_rows,
    eps,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PARTIALS: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of ROWS x COLUMNS outputs, those of the same rows one after another, so that x is read from memory once.

    FLATTEN: one loop over the steps of all tiles, in place of a loop of its own in each.
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
        reciprocal_deviation = mean
        if NORMALISE:
            mean, reciprocal_deviation = row_statistics(statistics_ptr, row, num_rows, eps, IN_FEATURES, PARTIALS)
        # by halves: half the registers, and half the memory on the way out
        left, right = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, half)), (0, 2, 1)))
        left_mean, left_squares = _finish_half(
            left,
            mean,
            reciprocal_deviation,
            bias_ptr,
            sums_ptr,
            residual_descriptor,
            out_descriptor,
            first_row,
            first_column,
            half,
            NORMALISE,
            BIAS,
            GELU,
            RESIDUAL,
        )
        right_mean, right_squares = _finish_half(
            right,
            mean,
            reciprocal_deviation,
            bias_ptr,
            sums_ptr,
            residual_descriptor,
            out_descriptor,
            first_row,
            first_column + half,
            half,
            NORMALISE,
            BIAS,
            GELU,
            RESIDUAL,
        )
        if STATISTICS:
            # merged as in `row_statistics`
            distance = right_mean - left_mean
            squares = left_squares + right_squares + distance * distance * (half / 2)
            part = tile % column_tiles
            store_moments(out_statistics_ptr, part, row, rows_exist, num_rows, left_mean + 0.5 * distance, squares)


def _has_copy_engine(device: torch.device) -> bool:
    """Whether the kernel was measured on such a device: a Hopper GPU."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _as_rows(x: torch.Tensor) -> torch.Tensor | None:
    """(..., N) as (rows, N) without a copy, as the copy engine can reach it; None where that cannot be."""
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
    gelu_follows: bool,
) -> bool:
    """Run the kernel if it is made for such a map; arguments as in `src.models.ops.fused_linear.triton`, x (rows, K).

    Args:
        x: (rows, K).
        weight: (N, 1, K).
        bias: (N,), or None.
        sums: (N,); None without a LayerNorm.
        residual: of the output's shape, or None.
        statistics: of the rows of x; None without a LayerNorm.
        out: (..., N).
        out_statistics: where those of the output go, or None.
        eps: of the LayerNorm.
        gelu_follows: whether there is a GELU.

    Returns:
        Whether it ran; nothing was written where it did not.
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
        and _has_copy_engine(x.device)
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
        GELU=gelu_follows,
        RESIDUAL=residual is not None,
        PARTIALS=1 if statistics is None else statistics.shape[0],
        STATISTICS=out_statistics is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INNER=INNER,
        STAGES=STAGES,
        # with a residual, whose loads are in the way of the next tile's, it is slower
        FLATTEN=residual is None,
        num_warps=WARPS,
        **pdl_options(x.device),
    )
    return True
