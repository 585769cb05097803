"""The tail of a token stage as one Triton kernel. Imported only where it runs: importing it needs triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from scatterbrain.errors import UserError
from scatterbrain.ops.common.triton_functions import (
    device_of,
    field_values,
    gelu,
    grid_dependency_control,
    pdl_options,
    precision_of_products,
)
from src.models.ops.token_tail.folded import FoldedTail


@dataclass(frozen=True)
class Tiles:
    """Settings of the kernel that change its speed and nothing else.

    Attributes:
        rows: rows of a tile, a power of two of at least 16.
        repeats: tiles of one program, which loads the weights once.
        warps: warps of a program.
        stages: tiles in flight where `repeats` is more than 1, at least 2.

    Raises:
        UserError: `stages` out of range.
    """

    rows: int
    repeats: int = 1
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise UserError(f"stages={self.stages} has to be at least 2.")


TILES_HALF = Tiles(rows=64, warps=4)
TILES_FLOAT32 = Tiles(rows=32, warps=8)


@triton.jit
def _weights(weight_ptr, OUT: tl.constexpr, IN: tl.constexpr, OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr):
    """Weights (OUT, IN), transposed and padded with zeros: (IN_BLOCK, OUT_BLOCK)."""
    column = tl.arange(0, OUT_BLOCK)[None, :]
    inner = tl.arange(0, IN_BLOCK)[:, None]
    pointers = weight_ptr + column * IN + inner
    if OUT == OUT_BLOCK and IN == IN_BLOCK:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(column < OUT) & (inner < IN), other=0.0)
    return tile


@triton.jit
def _token_tail_kernel(
    attended_ptr, value_ptr, projection_ptr, first_ptr, second_ptr, biases_ptr, out_ptr,
    num_rows, stride_an, stride_vn, eps,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, WIDTH_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
    WIDEST: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, REPEATS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """REPEATS tiles of ROWS rows; the weights (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN) are loaded once."""
    grid_dependency_control(PDL, False)
    d = tl.arange(0, WIDTH_BLOCK)
    f = tl.arange(0, HIDDEN_BLOCK)
    d_exists = d < WIDTH
    projection = _weights(projection_ptr, WIDTH, WIDTH, WIDTH_BLOCK, WIDTH_BLOCK)
    first = _weights(first_ptr, HIDDEN, WIDTH, HIDDEN_BLOCK, WIDTH_BLOCK)
    second = _weights(second_ptr, WIDTH, HIDDEN, WIDTH_BLOCK, HIDDEN_BLOCK)
    projection_bias = tl.load(biases_ptr + d, mask=d_exists, other=0.0).to(tl.float32)
    first_bias = tl.load(biases_ptr + WIDEST + f, mask=f < HIDDEN, other=0.0).to(tl.float32)
    second_bias = tl.load(biases_ptr + 2 * WIDEST + d, mask=d_exists, other=0.0).to(tl.float32)
    for repeat in tl.range(0, REPEATS, num_stages=STAGES):
        row = (tl.program_id(0) * REPEATS + repeat) * ROWS + tl.arange(0, ROWS)
        exists = (row < num_rows)[:, None] & d_exists[None, :]
        row = row.to(tl.int64)
        attended = tl.load(attended_ptr + (row * stride_an)[:, None] + d[None, :], mask=exists, other=0.0)
        value = tl.load(value_ptr + (row * stride_vn)[:, None] + d[None, :], mask=exists, other=0.0)
        x = tl.dot(attended, projection, input_precision=PRECISION) + projection_bias[None, :] + value.to(tl.float32)
        centred = x - (tl.sum(x, 1) * (1.0 / WIDTH))[:, None]
        if WIDTH != WIDTH_BLOCK:
            centred = tl.where(d_exists[None, :], centred, 0.0)
        std = tl.sqrt(tl.sum(centred * centred, 1) * (1.0 / WIDTH) + eps)
        hidden = (centred / std[:, None]).to(attended.dtype)
        hidden = gelu(tl.dot(hidden, first, input_precision=PRECISION) + first_bias[None, :], EXACT)
        x = x + tl.dot(hidden.to(attended.dtype), second, input_precision=PRECISION) + second_bias[None, :]
        tl.store(out_ptr + (row * WIDTH)[:, None] + d[None, :], x.to(out_ptr.dtype.element_ty), mask=exists)


def _launch(
    attended: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    biases: torch.Tensor,
    eps: float,
    tiles: Tiles | None,
) -> torch.Tensor:
    """The output (..., D) of the kernel; arguments as in `FoldedTail`, attended and value (..., D)."""
    out = attended.new_empty(attended.shape)
    width, hidden = second.shape
    num_rows = out.numel() // width
    if num_rows == 0:
        return out
    attended, value = (_as_rows(x) for x in (attended, value))
    if tiles is None:
        tiles = TILES_FLOAT32 if out.dtype == torch.float32 else TILES_HALF
    with device_of(out):
        _token_tail_kernel[(triton.cdiv(num_rows, tiles.rows * tiles.repeats),)](
            attended,
            value,
            projection,
            first,
            second,
            biases,
            out,
            num_rows,
            attended.stride(0),
            value.stride(0),
            eps,
            WIDTH=width,
            HIDDEN=hidden,
            WIDTH_BLOCK=_block(width),
            HIDDEN_BLOCK=_block(hidden),
            WIDEST=biases.shape[1],
            EXACT=out.dtype == torch.float32,
            ROWS=tiles.rows,
            REPEATS=tiles.repeats,
            STAGES=tiles.stages,
            PRECISION=precision_of_products(out.dtype),
            num_warps=tiles.warps,
            **pdl_options(out.device),
        )
    return out


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., D) as (rows, D) with a contiguous last dimension; a view where the rows have one stride."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(width: int) -> int:
    """Smallest width of a tensor core's operand, a power of two, that holds `width`."""
    return max(16, triton.next_power_of_2(width))


@torch.library.custom_op(
    "scatterbrain::token_tail",
    mutates_args=(),
    schema="(Tensor attended, Tensor value, Tensor projection, Tensor first, Tensor second, Tensor biases, float eps, "
    "int[] tiles) -> Tensor",
)
def token_tail_operator(attended, value, projection, first, second, biases, eps, tiles):
    """The kernel as an operator of PyTorch, for `torch.compile`; arguments as in `_launch`."""
    return _launch(attended, value, projection, first, second, biases, eps, Tiles(*tiles) if tiles else None)


@token_tail_operator.register_fake
def _(attended, value, projection, first, second, biases, eps, tiles):
    return attended.new_empty(attended.shape)


def triton_token_tail(attended: torch.Tensor, value: torch.Tensor, folded: FoldedTail) -> torch.Tensor:
    """The output; arguments as in `token_tail`."""
    arguments = (attended, value, folded.projection, folded.first, folded.second, folded.biases, folded.eps)
    if torch.compiler.is_compiling():
        tiles = () if folded.tiles is None else field_values(folded.tiles)
        return torch.ops.scatterbrain.token_tail(*arguments, tiles)
    # PyTorch's dispatcher would take as long as the launch itself
    return _launch(*arguments, folded.tiles)
