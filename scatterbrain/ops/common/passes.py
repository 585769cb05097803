"""What one pass of kernels launches and allocates, kept for later calls that are alike. Importing it needs triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from scatterbrain.ops.common.triton_functions import (
    BufferLayout,
    Cache,
    LaunchSequence,
    call_key,
    precision_of_products,
)

# Types of tensors that dispatch nothing themselves.
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


class Pass(NamedTuple):
    """What one call launches and allocates; later calls that are alike use it again.

    Attributes:
        launches: the kernels.
        outputs: sizes and strides of the results.
        layouts: of the buffers: what is kept for the backward pass, if anything is, and the workspace.
        scratch: of one more buffer, which is not needed when the last kernel runs; it may lie in that one's result.
    """

    launches: LaunchSequence
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    layouts: tuple[BufferLayout, ...]
    scratch: BufferLayout | None = None


# Passes by all that they depend on, see `find_pass`.
PASSES: Cache = Cache()


def find_pass(build: Callable[..., Pass], tensors: tuple[torch.Tensor | None, ...], tiles: Any, *options: Any) -> Pass:
    """The pass of a call, from an earlier one that is alike.

    Args:
        build: makes the pass from the tensors and options.
        tensors: arguments of the call.
        tiles: tile settings that replace those of the table, or None.
        *options: its other arguments.
    """
    key = (build, call_key(*tensors), options, precision_of_products(tensors[0].dtype), tiles)
    found = PASSES.get(key)
    if found is None:
        found = PASSES[key] = build(*tensors, *options)
    return found


def allocate(plan: Pass, like: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and buffers of a pass, in the dtype of `like` and where it is."""
    dtype, device = like.dtype, like.device
    outputs = [torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride in plan.outputs]
    return outputs, [layout.empty(device) for layout in plan.layouts]


def by_token(batch: int, heads: int, length: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and strides of (B, H, N, width) as (B, N, H, width): a model joins the heads of a token without a copy."""
    return (batch, heads, length, width), (length * heads * width, width, heads * width, 1)


def describe_outputs(
    like: torch.Tensor, outputs: tuple[tuple[str, int, int], ...]
) -> tuple[tuple, dict[str, torch.Tensor]]:
    """Sizes and strides of outputs (name, length, width), and such tensors without memory.

    Args:
        like: (B, H, ..., ...), in the dtype of the outputs.
        outputs: names, lengths and widths.
    """
    layouts = tuple(by_token(*like.shape[:2], length, width) for _, length, width in outputs)
    tensors = {
        name: torch.empty_strided(*layout, dtype=like.dtype, device="meta")
        for (name, _, _), layout in zip(outputs, layouts, strict=True)
    }
    return layouts, tensors


def padded_width(width: int) -> int:
    """Sizes of a matrix product: powers of two, 16 at least."""
    return max(16, power_of_two(width))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`; Triton's own takes the host ten times as long."""
    return 1 << (number - 1).bit_length()
