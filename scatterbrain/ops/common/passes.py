"""What one pass of kernels launches and allocates, kept for later calls that are alike. Importing it needs triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from scatterbrain.ops.common.calls import Cache, call_key
from scatterbrain.ops.common.triton_functions import BufferLayout, LaunchSequence, precision_of_products

# Size and strides of a tensor.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


class Pass(NamedTuple):
    """What one call launches and allocates; later calls that are alike use it again.

    Attributes:
        launches: the kernels.
        outputs: sizes and strides of the results (B, H, N, width), and of the same memory as (B, N, H, width).
        layouts: of the buffers: what is kept for the backward pass, if anything is, and the workspace.
        scratch: of one more buffer, which is not needed when the last kernel runs; where it is large enough, it lies in
            the middle one of the results, which that kernel writes.
    """

    launches: LaunchSequence
    outputs: tuple[tuple[Layout, ...], tuple[Layout, ...]]
    layouts: tuple[BufferLayout, ...]
    scratch: BufferLayout | None = None


# Passes by all that they depend on, see `find_pass`.
PASSES: Cache = Cache()


class Operator(NamedTuple):
    """A fused operator of query, key, value, more tensors that may be None and have no gradient, and options.

    Attributes:
        forward_pass: makes the forward pass from tensors, without buffers, and options.
        backward_pass: makes the backward pass from gradient, tensors without buffers, output and options.
        run_forward: output and statistics of tensors and options that no pass is known for.
        run_backward: gradients of gradient, tensors, output, statistics and options that no pass is known for.
        num_options: number of the forward pass's options that the backward pass takes.
        tiles_override: gives the tile settings that replace those of the table, or None.
        num_buffers: number of the last tensors that are buffers of an earlier pass.
    """

    forward_pass: Callable[..., Pass]
    backward_pass: Callable[..., Pass]
    run_forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    run_backward: Callable[..., tuple[torch.Tensor, ...]]
    num_options: int
    tiles_override: Callable[[], Any]
    num_buffers: int = 0

    def split(self, tensors: list[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """The tensors without buffers, and the buffers."""
        end = len(tensors) - self.num_buffers
        return tensors[:end], tensors[end:]


def pass_key(
    build: Callable[..., Pass],
    tensors: tuple[torch.Tensor | None, ...],
    tiles: Any,
    options: tuple,
    tokens_first: bool = False,
) -> tuple:
    """What a pass depends on; arguments as in `find_pass`, and `tokens_first` as in `call_key`."""
    precision = precision_of_products(tensors[0].dtype)
    return build, call_key(*tensors, tokens_first=tokens_first), options, precision, tiles


def find_pass(build: Callable[..., Pass], tensors: tuple[torch.Tensor | None, ...], tiles: Any, *options: Any) -> Pass:
    """The pass of a call, from an earlier one that is alike.

    Args:
        build: makes the pass from the tensors and options.
        tensors: arguments of the call.
        tiles: tile settings that replace those of the table, or None.
        *options: its other arguments.
    """
    key = pass_key(build, tensors, tiles, options)
    found = PASSES.get(key)
    if found is None:
        found = PASSES[key] = build(*tensors, *options)
    return found


def allocate(
    plan: Pass, like: torch.Tensor, tokens_first: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and buffers of a pass, in the dtype of `like` and where it is.

    Args:
        plan: the pass.
        like: one of its tensors.
        tokens_first: results are (B, N, H, width).
    """
    dtype, device = like.dtype, like.device
    outputs = [
        torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride in plan.outputs[tokens_first]
    ]
    return outputs, [layout.empty(device) for layout in plan.layouts]


def scratch_memory(layout: BufferLayout, result: torch.Tensor) -> torch.Tensor:
    """Memory for sums, which the last kernel does not read: that of the result that it writes, if it is enough."""
    return result if layout.nbytes <= result.nbytes else layout.empty(result.device)


def launch(
    found: Pass,
    first: tuple[torch.Tensor, ...],
    inputs: tuple[torch.Tensor | None, ...],
    last: tuple[torch.Tensor, ...] = (),
    buffers: tuple[torch.Tensor, ...] = (),
    tokens_first: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and buffers of a pass that has run.

    Args:
        found: the pass.
        first: tensors before the inputs, such as the gradient of the output.
        inputs: query, key, value, and tensors that may be None.
        last: tensors after the inputs.
        buffers: those of an earlier pass.
        tokens_first: results are (B, N, H, width).
    """
    query = inputs[0]
    results, added = allocate(found, query, tokens_first)
    buffers = memory = [*buffers, *added]
    if found.scratch is not None:
        memory = [*buffers, scratch_memory(found.scratch, results[len(results) // 2])]
    # a kernel does not read what is None
    found.launches((*first, *[query if x is None else x for x in inputs], *last, *results), memory)
    return results, buffers


class FusedFunction(torch.autograd.Function):
    """An operator without the dispatcher, which costs eager calls more than the kernels of short sequences take."""

    @staticmethod
    def forward(ctx, *arguments):
        """The output of tensors and of the `Operator`, its options, the pass if it is known, and `tokens_first`."""
        *tensors, (operator, options, found, tokens_first) = arguments
        if found is None:
            out, statistics = operator.run_forward(*tensors, *options)
        else:
            inputs, given = operator.split(tensors)
            (out,), buffers = launch(found, (), inputs, buffers=given, tokens_first=tokens_first)
            statistics = buffers[len(given)]
        ctx.save_for_backward(*tensors, out, statistics)
        ctx.call = operator, options[: operator.num_options], tokens_first
        return out

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of query, key and value, which are differentiable once."""
        # the wrapper costs time, and refuses nothing unless the gradients are recorded
        return (_differentiable_once if torch.is_grad_enabled() else FusedFunction.gradients)(ctx, gradient)

    @staticmethod
    def gradients(ctx, gradient):
        """What `backward` returns."""
        operator, options, tokens_first = ctx.call
        *tensors, out, statistics = ctx.saved_tensors
        inputs, given = operator.split(tensors)
        no_gradients = [None] * (len(tensors) - 2)
        key = pass_key(
            operator.backward_pass,
            (gradient, *inputs, out),
            operator.tiles_override(),
            options,
            tokens_first=tokens_first,
        )
        found = PASSES.get(key)
        if found is not None:
            gradients, _ = launch(found, (gradient,), inputs, (out,), (*given, statistics), tokens_first)
            return (*gradients, *no_gradients)
        if tokens_first:
            gradient, out = gradient.transpose(1, 2), out.transpose(1, 2)
            tensors[:3] = [x.transpose(1, 2) for x in tensors[:3]]
        gradients = operator.run_backward(gradient, *tensors, out, statistics, *options)
        if tokens_first:
            gradients = [x.transpose(1, 2) for x in gradients]
        return (*gradients, *no_gradients)


_differentiable_once = torch.autograd.function.once_differentiable(FusedFunction.gradients)


class Call:
    """Runs calls again that are like one that has been checked, see `calls.py`.

    Args:
        operator: the operator.
        tensors: what the kernels got of that call, without buffers.
        options: options of the forward pass.
        records: whether autograd records the call.
        earlier: arguments of `pass_key` for the pass that makes the buffers from query, key, value and None for each
            other tensor. None for an operator without buffers.
    """

    def __init__(
        self,
        operator: Operator,
        tensors: tuple[torch.Tensor | None, ...],
        options: tuple,
        records: bool,
        earlier: tuple[Callable[..., Pass], tuple[torch.Tensor | None, ...], Any, tuple] | None = None,
    ) -> None:
        self._operator, self._options, self._records = operator, options, records
        self._key = pass_key(operator.forward_pass, tensors, operator.tiles_override(), options)
        self._others = (None,) * (len(tensors) - 4)
        self._earlier = None
        if earlier is not None:
            self._earlier = pass_key(*earlier), (None,) * (len(earlier[1]) - 3)
        # a projection is rounded to it
        self._dtype = None if tensors[3] is None else tensors[3].dtype

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        first: torch.Tensor | None = None,
        tokens_first: bool = False,
    ) -> torch.Tensor | None:
        """The output; None if a pass is no longer known."""
        found = PASSES.get(self._key)
        if found is None:
            return None
        if first is not None and first.dtype is not self._dtype:
            first = first.to(self._dtype)
        tensors = query, key, value, first, *self._others
        buffers = ()
        if self._earlier is not None:
            earlier_key, others = self._earlier
            earlier = PASSES.get(earlier_key)
            if earlier is None:
                return None
            buffers = launch(earlier, (), (query, key, value, *others))[1][: self._operator.num_buffers]
        if self._records:
            return FusedFunction.apply(*tensors, *buffers, (self._operator, self._options, found, tokens_first))
        return launch(found, (), tensors, buffers=buffers, tokens_first=tokens_first)[0][0]


def by_token(batch: int, heads: int, length: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and strides of (B, H, N, width) as (B, N, H, width): a model joins the heads of a token without a copy."""
    return (batch, heads, length, width), (length * heads * width, width, heads * width, 1)


def describe_outputs(
    like: torch.Tensor, outputs: tuple[tuple[str, int, int], ...]
) -> tuple[tuple[tuple[Layout, ...], tuple[Layout, ...]], dict[str, torch.Tensor]]:
    """Sizes and strides of outputs (name, length, width), see `Pass`, and such tensors without memory.

    Args:
        like: (B, H, ..., ...), in the dtype of the outputs.
        outputs: names, lengths and widths.
    """
    layouts = tuple(by_token(*like.shape[:2], length, width) for _, length, width in outputs)
    tensors = {
        name: torch.empty_strided(*layout, dtype=like.dtype, device="meta")
        for (name, _, _), layout in zip(outputs, layouts, strict=True)
    }
    transposes = [x.transpose(1, 2) for x in tensors.values()]
    return (layouts, tuple((tuple(x.shape), x.stride()) for x in transposes)), tensors


def padded_width(width: int) -> int:
    """Sizes of a matrix product: powers of two, 16 at least."""
    return max(16, power_of_two(width))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`; Triton's own takes the host ten times as long."""
    return 1 << (number - 1).bit_length()
