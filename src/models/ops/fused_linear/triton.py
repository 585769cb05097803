"""The fused linear map as one Triton kernel. Imported only where it runs: importing it needs triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from scatterbrain.errors import UserError
from scatterbrain.ops.common.triton_functions import (
    device_of,
    field_values,
    grid_dependency_control,
    pdl_options,
    precision_of_products,
)
from src.models.ops.fused_linear.common import moments, normalise_and_activate, row_statistics, store_moments
from src.models.ops.fused_linear.folded import FoldedLinear
from src.models.ops.fused_linear.patches import Patches

try:
    from src.models.ops.fused_linear.persistent import launch_persistent
except ImportError:  # Triton before 3.4 has no tensor descriptors on the host

    def launch_persistent(*arguments) -> bool:
        """False: it did not run."""
        return False


@dataclass(frozen=True)
class Tiles:
    """Settings of the kernel that change its speed and nothing else.

    Attributes:
        rows: rows of the output in a tile, a power of two of at least 16.
        columns: columns of the output in a tile, likewise.
        parts: tiles next to one another that a program computes together, 1 to 3: x is read once for all of them.
        inner: steps of the inner dimension, 16, 32, 64 or 128.
        group: tiles of rows whose tiles of columns run one after another, so that the cache serves x and W.
        warps: warps of a program.
        stages: steps of the inner loop in flight, at least 2 (1 gave wrong results on an H100 with Triton 3.6).

    Raises:
        UserError: `parts` or `stages` out of range.
    """

    rows: int
    columns: int
    inner: int
    parts: int = 1
    group: int = 1
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.parts not in (1, 2, 3) or self.stages < 2:
            raise UserError(f"parts={self.parts} has to be 1, 2 or 3, and stages={self.stages} at least 2.")


# Half precision, by (K, N), K counted without padding.
_TILES_HALF: dict[tuple[int, int], Tiles] = {
    (147, 192): Tiles(128, 64, 32, parts=3, warps=4, stages=3),
    (576, 192): Tiles(128, 64, 32, parts=3, warps=4, stages=3),
    (576, 384): Tiles(128, 64, 32, parts=3, warps=8, stages=3),
    # two parts: fewer registers in the epilogue, and two programs fit an SM of an H100
    (384, 1152): Tiles(128, 64, 64, parts=2, group=8, warps=8, stages=3),
    (384, 384): Tiles(128, 128, 64, warps=8, stages=3),
    (1152, 384): Tiles(128, 128, 64, warps=8, stages=3),
}
# Values of x that a program of `_row_statistics_kernel` holds.
_STATISTICS_BLOCK = 4096
# Fewer rows than this leave most of a GPU without a tile of 128 rows.
_FEW_ROWS = 2048


def default_tiles(num_rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> Tiles:
    """Settings for a size: from the table, or a default for tensor cores (half precision) or without them (float32)."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, warps=4, stages=3)
    if num_rows < _FEW_ROWS:
        return Tiles(32, 64, 64, warps=4, stages=4)
    known = _TILES_HALF.get((in_features, out_features))
    if known is not None:
        return known
    return Tiles(128, 128 if out_features > 64 else 64, 64, warps=8 if out_features > 64 else 4, stages=3)


@triton.jit
def _epilogue(
    product, mean, rstd, bias_ptr, sums_ptr, residual_ptrs, out_ptrs, statistics_ptr,
    row, rows_exist, num_rows, first_column,
    OUT_FEATURES: tl.constexpr, COLUMNS: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, EXACT: tl.constexpr, RESIDUAL: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Epilogue: bias, GELU and residual, the store of a tile, and the statistics of its rows."""
    column = first_column + tl.arange(0, COLUMNS)
    exists = column < OUT_FEATURES
    y = normalise_and_activate(product, mean, rstd, bias_ptr, sums_ptr, column, exists, NORMALISE, BIAS, GELU, EXACT)
    stored = rows_exist[:, None] & exists[None, :]
    if RESIDUAL:
        y = y + tl.load(residual_ptrs[:, None] + column[None, :], mask=stored, other=0.0).to(tl.float32)
    y = y.to(out_ptrs.dtype.element_ty)
    tl.store(out_ptrs[:, None] + column[None, :], y, mask=stored)
    if STATISTICS:
        mean, squares = moments(y, COLUMNS)
        store_moments(statistics_ptr, first_column // COLUMNS, row, rows_exist, num_rows, mean, squares)


@triton.jit
def _weight_tile(
    weight_ptr, first_column, offset, within, OUT_FEATURES: tl.constexpr, WEIGHT_ROW: tl.constexpr,
    LENGTH: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Tile (INNER, COLUMNS) of the transposed weights; columns beyond the last repeat it, and are not stored."""
    column = first_column + tl.arange(0, COLUMNS)
    if OUT_FEATURES % COLUMNS != 0:
        column = tl.minimum(column, OUT_FEATURES - 1)
    inner = tl.arange(0, INNER)
    pointers = weight_ptr + (offset + inner)[:, None] + column[None, :] * WEIGHT_ROW
    if LENGTH % INNER == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(within + inner < LENGTH)[:, None], other=0.0)
    return tile


@triton.jit
def _corner_of_patch(row_of_sample, grid_width, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS: tl.constexpr):
    """First line of a patch in the map, and its first element in that line; negative in the padding."""
    top = (row_of_sample // grid_width) * STRIDE - PADDING
    left = ((row_of_sample % grid_width) * STRIDE - PADDING) * CHANNELS
    return top, left


@triton.jit
def _load_segment(x_rows, y, left, columns, height, line):
    """Elements `columns` of one row of the patches: zeros outside the map; past a patch the line continues."""
    position = left[:, None] + columns[None, :]
    inside = (position >= 0) & (position < line) & ((y >= 0) & (y < height))[:, None]
    return tl.load(x_rows[:, None] + (y * line)[:, None] + position, mask=inside, other=0.0)


@triton.jit
def _row_statistics_kernel(
    x_ptr,
    statistics_ptr,  # (2, rows): means, sums of squared differences from them
    num_rows, rows_per_sample, stride_x, height, line, grid_width,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    PATCHES: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Statistics of ROWS rows; names as in `_fused_linear_kernel`, BLOCK is a power of two of at least SEGMENT.

    E[x^2] - E[x]^2 cancels in a nearly flat row. Rows are therefore kept in registers, and their mean is subtracted
    before squaring. Patches are read once, and the value in their middle is subtracted instead: it differs from the
    mean by at most sqrt(K) standard deviations, which bounds the loss of digits.
    """
    grid_dependency_control(PDL, False)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    columns = tl.arange(0, BLOCK)
    counted = (columns < SEGMENT)[None, :]
    if PATCHES:
        top, left = _corner_of_patch(row % rows_per_sample, grid_width, STRIDE, PADDING, CHANNELS)
        x_rows = x_ptr + (row // rows_per_sample).to(tl.int64) * stride_x
        middle = (SEGMENT // 2 + tl.arange(0, 1)) // CHANNELS * CHANNELS
        origin = tl.sum(_load_segment(x_rows, top + SEGMENTS // 2, left, middle, height, line).to(tl.float32), 1)
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        squares_of_columns = tl.zeros((ROWS, BLOCK), tl.float32)
        for segment in tl.static_range(SEGMENTS):
            x = _load_segment(x_rows, top + segment, left, columns, height, line).to(tl.float32)
            x = tl.where(counted, x - origin[:, None], 0.0)
            sums += x
            squares_of_columns += x * x
        total = tl.sum(sums, 1)
        distance = total * (1.0 / (SEGMENTS * SEGMENT))
        mean = origin + distance
        squares = tl.maximum(tl.sum(squares_of_columns, 1) - total * distance, 0.0)
    else:
        pointers = x_ptr + (row.to(tl.int64) * stride_x)[:, None] + columns[None, :]
        x = tl.load(pointers, mask=counted, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) * (1.0 / SEGMENT)
        centred = tl.where(counted, x - mean[:, None], 0.0)
        squares = tl.sum(centred * centred, 1)
    tl.store(statistics_ptr + row, mean, mask=exists)
    tl.store(statistics_ptr + num_rows + row, squares, mask=exists)


@triton.jit
def _fused_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, sums_ptr,
    statistics_ptr,  # (PARTIALS, 2, rows) of x: means, sums of squared differences from them; with NORMALISE
    out_statistics_ptr,  # the same of the output, for each tile of columns; with STATISTICS
    residual_ptr, out_ptr,
    num_rows, rows_per_sample, stride_x, height, line, grid_width,
    stride_rb, stride_rn,  # of the residual, between samples and between rows
    stride_ob, stride_on,  # of the output
    eps,
    OUT_FEATURES: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, LENGTH: tl.constexpr,
    PATCHES: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS: tl.constexpr,
    NORMALISE: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr, RESIDUAL: tl.constexpr,
    PARTIALS: tl.constexpr, STATISTICS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    INNER: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x (PARTS * COLUMNS) outputs.

    stride_x: between rows, or for patches between samples. line: elements of a line of the map, width * C. A row r
    is row r % rows_per_sample of sample r // rows_per_sample. SEGMENT values of x are contiguous, LENGTH is the same
    padded in the weights; SEGMENTS of them make up the inner dimension.
    """
    grid_dependency_control(PDL, False)
    # GROUP tiles of rows by all tiles of columns, then the next GROUP
    program = tl.program_id(0)
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(OUT_FEATURES, PARTS * COLUMNS)
    group = program // (GROUP * column_tiles)
    group_size = tl.minimum(row_tiles - group * GROUP, GROUP)
    within_group = program % (GROUP * column_tiles)
    row_tile = group * GROUP + within_group % group_size
    first_column = (within_group // group_size) * (PARTS * COLUMNS)

    row = row_tile * ROWS + tl.arange(0, ROWS)
    rows_exist = row < num_rows
    # rows beyond the last repeat it, and are not stored: the loads then need no mask
    row = tl.minimum(row, num_rows - 1)
    sample = row // rows_per_sample
    row_of_sample = row % rows_per_sample
    inner = tl.arange(0, INNER)
    if PATCHES:
        top, left = _corner_of_patch(row_of_sample, grid_width, STRIDE, PADDING, CHANNELS)
        x_rows = x_ptr + sample.to(tl.int64) * stride_x
    else:
        x_rows = x_ptr + row.to(tl.int64) * stride_x

    # only the products read x: with statistics from the same loads, Triton 3.6 keeps one buffer of x too few for
    # asynchronous products, and overwrites what they still read
    product0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    if PARTS > 1:
        product1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    if PARTS > 2:
        product2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    STEPS: tl.constexpr = (LENGTH + INNER - 1) // INNER
    WEIGHT_ROW: tl.constexpr = SEGMENTS * LENGTH
    for step in tl.range(0, SEGMENTS * STEPS, num_stages=STAGES):
        if SEGMENTS == 1:
            segment = 0
            within = step * INNER
        else:
            segment = step // STEPS
            within = (step % STEPS) * INNER
        if PATCHES:
            # no mask for the end of a segment: what follows it in the line is multiplied by weights of zero
            x = _load_segment(x_rows, top + segment, left, within + inner, height, line)
        elif SEGMENT % INNER == 0:
            x = tl.load(x_rows[:, None] + (within + inner)[None, :])
        else:
            x = tl.load(
                x_rows[:, None] + (within + inner)[None, :], mask=(within + inner < SEGMENT)[None, :], other=0.0
            )
        offset = segment * LENGTH + within
        weight = _weight_tile(
            weight_ptr, first_column, offset, within, OUT_FEATURES, WEIGHT_ROW, LENGTH, COLUMNS, INNER
        )
        product0 = tl.dot(x, weight, product0, input_precision=PRECISION)
        if PARTS > 1:
            weight = _weight_tile(
                weight_ptr, first_column + COLUMNS, offset, within, OUT_FEATURES, WEIGHT_ROW, LENGTH, COLUMNS, INNER
            )
            product1 = tl.dot(x, weight, product1, input_precision=PRECISION)
        if PARTS > 2:
            weight = _weight_tile(
                weight_ptr, first_column + 2 * COLUMNS, offset, within, OUT_FEATURES, WEIGHT_ROW, LENGTH, COLUMNS, INNER
            )
            product2 = tl.dot(x, weight, product2, input_precision=PRECISION)

    mean = tl.zeros((ROWS,), tl.float32)
    rstd = mean
    if NORMALISE:
        mean, rstd = row_statistics(statistics_ptr, row, num_rows, eps, SEGMENTS * SEGMENT, PARTIALS)
    out_ptrs = out_ptr + sample.to(tl.int64) * stride_ob + row_of_sample.to(tl.int64) * stride_on
    residual_ptrs = out_ptrs
    if RESIDUAL:
        residual_ptrs = residual_ptr + sample.to(tl.int64) * stride_rb + row_of_sample.to(tl.int64) * stride_rn
    _epilogue(
        product0, mean, rstd, bias_ptr, sums_ptr, residual_ptrs, out_ptrs, out_statistics_ptr,
        row, rows_exist, num_rows, first_column,
        OUT_FEATURES, COLUMNS, NORMALISE, BIAS, GELU, EXACT, RESIDUAL, STATISTICS,
    )  # fmt: skip
    if PARTS > 1:
        _epilogue(
            product1, mean, rstd, bias_ptr, sums_ptr, residual_ptrs, out_ptrs, out_statistics_ptr,
            row, rows_exist, num_rows, first_column + COLUMNS,
            OUT_FEATURES, COLUMNS, NORMALISE, BIAS, GELU, EXACT, RESIDUAL, STATISTICS,
        )  # fmt: skip
    if PARTS > 2:
        _epilogue(
            product2, mean, rstd, bias_ptr, sums_ptr, residual_ptrs, out_ptrs, out_statistics_ptr,
            row, rows_exist, num_rows, first_column + 2 * COLUMNS,
            OUT_FEATURES, COLUMNS, NORMALISE, BIAS, GELU, EXACT, RESIDUAL, STATISTICS,
        )  # fmt: skip


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sums: torch.Tensor | None,
    residual: torch.Tensor | None,
    statistics: torch.Tensor | None,
    out: torch.Tensor,
    out_statistics: torch.Tensor | None,
    eps: float,
    segment: int,
    normalise: bool,
    gelu: bool,
    patches: Sequence[int],
    tiles: Tiles | None,
) -> None:
    """Launch the kernel.

    Args:
        x: rows (..., K), or for patches (B, height, width, C).
        weight: (N, segments, length), contiguous.
        bias: (N,), or None.
        sums: (N,), or None.
        residual: of the output's shape, or None.
        statistics: of the rows of x, of `_statistics_shape`; None to compute them here.
        out: (..., N).
        out_statistics: receives those of the output; None or empty for none.
        eps: of the LayerNorm.
        segment: contiguous values of x, at most `length`.
        normalise: apply a LayerNorm.
        gelu: apply a GELU.
        patches: (kernel, stride, padding), empty for rows.
        tiles: settings, None for the default ones.
    """
    out_features, segments, length = weight.shape
    num_rows = out.numel() // out_features
    if num_rows == 0:
        return
    if patches:
        kernel, stride, padding = patches
        _, height, width, channels = x.shape
        line = width * channels
        grid_width = (width + 2 * padding - kernel) // stride + 1
        if x.stride()[1:] != (line, channels, 1):
            x = x.contiguous()
        stride_x = x.stride(0)
    else:
        stride, padding, channels = 1, 0, 1
        height = line = grid_width = 1
        x = x.reshape(-1, x.shape[-1])
        if x.stride(-1) != 1:
            x = x.contiguous()
        stride_x = x.stride(0)
    if not normalise:
        statistics = None
    if out_statistics is not None and out_statistics.numel() == 0:
        out_statistics = None
    layout = (num_rows, out.shape[-2], stride_x, height, line, grid_width)
    constants = {
        "SEGMENTS": segments,
        "SEGMENT": segment,
        "PATCHES": bool(patches),
        "STRIDE": stride,
        "PADDING": padding,
        "CHANNELS": channels,
    }
    with device_of(x):
        if normalise and statistics is None:
            statistics = torch.empty(1, 2, num_rows, dtype=torch.float32, device=x.device)
            block = max(16, triton.next_power_of_2(segment))
            rows = max(1, _STATISTICS_BLOCK // block)
            _row_statistics_kernel[(triton.cdiv(num_rows, rows),)](
                x, statistics, *layout, **constants, BLOCK=block, ROWS=rows, **pdl_options(x.device)
            )
        tensors = (x, weight, bias, sums, residual, statistics, out, out_statistics)
        if tiles is None and not patches and launch_persistent(*tensors, eps, gelu):
            return
        written = _as_samples(out)
        if written is None:
            written = torch.empty(out.shape, dtype=out.dtype, device=out.device).view(-1, *out.shape[-2:])
        added = written
        if residual is not None:
            added = _as_samples(residual)
            if added is None:
                added = _as_samples(residual.contiguous())
        if tiles is None:
            tiles = default_tiles(num_rows, segments * segment, out_features, x.dtype)
        grid = (triton.cdiv(num_rows, tiles.rows) * triton.cdiv(out_features, tiles.columns * tiles.parts),)
        _fused_linear_kernel[grid](
            x,
            weight,
            weight if bias is None else bias,
            weight if sums is None else sums,
            weight if statistics is None else statistics,
            weight if out_statistics is None else out_statistics,
            added,
            written,
            *layout,
            added.stride(0),
            added.stride(1),
            written.stride(0),
            written.stride(1),
            eps,
            **constants,
            OUT_FEATURES=out_features,
            LENGTH=length,
            NORMALISE=normalise,
            BIAS=bias is not None,
            GELU=gelu,
            EXACT=x.dtype == torch.float32,
            RESIDUAL=residual is not None,
            PARTIALS=1 if statistics is None else statistics.shape[0],
            STATISTICS=out_statistics is not None,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            PARTS=tiles.parts,
            INNER=tiles.inner,
            GROUP=tiles.group,
            STAGES=tiles.stages,
            PRECISION=precision_of_products(x.dtype),
            num_warps=tiles.warps,
            **pdl_options(x.device),
        )
    if written.data_ptr() != out.data_ptr():
        out.copy_(written.view(out.shape))


def _as_samples(x: torch.Tensor) -> torch.Tensor | None:
    """(..., rows, N) as (samples, rows, N) without a copy; None where that cannot be."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    if x.dim() == 2:
        return x.unsqueeze(0)
    if x.dim() == 3:
        return x
    try:
        return x.view(-1, *x.shape[-2:])
    except RuntimeError:
        return None


def _statistics_shape(out: Sequence[int], in_features: int, dtype: torch.dtype, tiles: Tiles | None) -> tuple[int, ...]:
    """Shape (tiles of columns, 2, rows) of an output's row statistics: means, and sums of the squares about them.

    (0,) where tiles of columns do not divide the row.
    """
    num_rows, out_features = math.prod(out[:-1]), out[-1]
    columns = (tiles or default_tiles(num_rows, in_features, out_features, dtype)).columns
    return (out_features // columns, 2, num_rows) if out_features % columns == 0 else (0,)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? sums, Tensor? residual, Tensor? statistics, {out}float eps, "
    "int segment, bool normalise, bool gelu, int[] patches, int[] tiles"
)


@torch.library.custom_op(
    "scatterbrain::fused_linear",
    mutates_args=(),
    schema=f"({_ARGUMENTS.format(out='')}, bool with_statistics) -> (Tensor, Tensor)",
)
def fused_linear_operator(
    x,
    weight,
    bias,
    sums,
    residual,
    statistics,
    eps,
    segment,
    normalise,
    gelu,
    patches,
    tiles,
    with_statistics,
):
    """The kernel as an operator of PyTorch, for `torch.compile`; arguments as in `_launch`.

    Returns the output, and the statistics of its rows, empty if not requested or not available.
    """
    settings = Tiles(*tiles) if tiles else None
    out, out_statistics = _outputs(x, weight, segment, patches, settings, with_statistics)
    inputs = (x, weight, bias, sums, residual, statistics)
    _launch(*inputs, out, out_statistics, eps, segment, normalise, gelu, patches, settings)
    return out, out_statistics


@fused_linear_operator.register_fake
def _(
    x,
    weight,
    bias,
    sums,
    residual,
    statistics,
    eps,
    segment,
    normalise,
    gelu,
    patches,
    tiles,
    with_statistics,
):
    return _outputs(x, weight, segment, patches, Tiles(*tiles) if tiles else None, with_statistics)


@torch.library.custom_op(
    "scatterbrain::fused_linear_out",
    mutates_args=("out",),
    schema=f"({_ARGUMENTS.format(out='Tensor(a!) out, ')}) -> ()",
)
def fused_linear_out_operator(
    x, weight, bias, sums, residual, statistics, out, eps, segment, normalise, gelu, patches, tiles
):
    """`fused_linear_operator` that writes to `out`, without statistics of it."""
    settings = Tiles(*tiles) if tiles else None
    _launch(x, weight, bias, sums, residual, statistics, out, None, eps, segment, normalise, gelu, patches, settings)


def _outputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    segment: int,
    patches: Sequence[int],
    tiles: Tiles | None,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for an output and the statistics of its rows, (0,) without."""
    out = x.new_empty(_output_shape(x, weight, patches))
    shape = (0,)
    if with_statistics:
        shape = _statistics_shape(out.shape, weight.shape[1] * segment, x.dtype, tiles)
    return out, x.new_empty(shape, dtype=torch.float32)


def _output_shape(x: torch.Tensor, weight: torch.Tensor, patches: Sequence[int]) -> tuple[int, ...]:
    if not patches:
        return (*x.shape[:-1], weight.shape[0])
    rows, columns = Patches(*patches).grid(x.shape[1], x.shape[2])
    return (x.shape[0], rows * columns, weight.shape[0])


def triton_fused_linear(
    x: torch.Tensor,
    folded: FoldedLinear,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    with_statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and its statistics; arguments as in `fused_linear`, `residual` of the shape of the output."""
    patches = () if folded.patches is None else (folded.patches.kernel, folded.patches.stride, folded.patches.padding)
    settings = (folded.eps, folded.segment, folded.normalise, folded.gelu, patches)
    inputs = (x, folded.weight, folded.bias, folded.sums, residual, statistics)
    if torch.compiler.is_compiling():
        tiles = () if folded.tiles is None else field_values(folded.tiles)
        if out is not None:
            torch.ops.scatterbrain.fused_linear_out(*inputs, out, *settings, tiles)
            return out, None
        out, out_statistics = torch.ops.scatterbrain.fused_linear(*inputs, *settings, tiles, with_statistics)
    else:
        # PyTorch's dispatcher would take as long as the launch itself
        out_statistics = None
        if out is None and with_statistics:
            out, out_statistics = _outputs(x, folded.weight, folded.segment, patches, folded.tiles, True)
        elif out is None:
            out = x.new_empty(folded.output_shape(x))
        _launch(*inputs, out, out_statistics, *settings, folded.tiles)
    return out, None if out_statistics is None or out_statistics.numel() == 0 else out_statistics
