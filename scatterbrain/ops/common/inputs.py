"""Checks of the operators' arguments, and the masks that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from scatterbrain.errors import UserError, check_switch, is_number
from scatterbrain.ops.common.numerics import accumulation_dtype
from scatterbrain.ops.common.windows import window_bounds

# Under a mask, rows beyond these bounds count as not finite. Their products and sums, relative to the finite stand-in
# FLOOR for -inf, would be nan, also with a weight of zero: norm of a query or key times sqrt(s), and size of a value.
LARGEST_NORM, LARGEST_VALUE = 1e14, 1e30


def check_tensors(**tensors: torch.Tensor) -> None:
    """Check that arguments are tensors.

    Args:
        **tensors: the arguments by name.

    Raises:
        UserError: one is not.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{name} has to be a tensor, got {type(tensor).__name__}. torch.as_tensor converts arrays.")


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | Sequence[int] | None = None,
    projection: torch.Tensor | None = None,
    enable_gqa: bool = False,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Query, key, value and lengths of an operator, checked and converted.

    As `scaled_dot_product_attention` does, autocast converts queries, keys and values of different dtypes to its own.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        key_lengths: (B,) integers, a tensor or a list; None for all keys.
        projection: random projections (R, E), None for an operator without.
        enable_gqa: key and value may have fewer heads, whose number divides H. Each is repeated for H / Hkv consecutive
            heads of the queries.
        is_causal: only its type is checked.

    Returns:
        Query, key and value of one dtype, and the lengths as a tensor on their device, or None.

    Raises:
        UserError: names the argument, what it has to be and what it is.
    """
    check_tensors(query=query, key=key, value=value)
    if projection is not None:
        check_tensors(projection=projection)
    check_switch("enable_gqa", enable_gqa)
    check_switch("is_causal", is_causal)
    query, key, value = _autocast(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise UserError(
                f"{name} has to be a floating-point tensor of four dimensions (B, H, length, width), got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}."
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise UserError(
                f"{name} is {tensor.dtype} on {tensor.device} and query is {query.dtype} on {query.device}; "
                "convert them to one dtype and device."
            )
    batch, heads, num_queries, width = query.shape
    divides = 0 < key.shape[1] < heads and heads % key.shape[1] == 0
    if key.shape[0] != batch or key.shape[3] != width or not (key.shape[1] == heads or (divides and enable_gqa)):
        hint = " enable_gqa=True takes heads of key and value whose number divides H." if key.shape[1] != heads else ""
        raise UserError(
            f"key {tuple(key.shape)} has to be (B, H, S, E) with B, H, E of query {tuple(query.shape)}.{hint}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise UserError(f"value {tuple(value.shape)} has to be (B, H, S, D) with B, H, S of key {tuple(key.shape)}.")
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    # A batch may be empty. One by one: `torch.compile` of PyTorch 2.6 traces no `min` of several symbolic sizes.
    if heads < 1 or num_queries < 1 or width < 1 or key.shape[2] < 1 or value.shape[3] < 1:
        raise UserError(f"query {tuple(query.shape)}, key or value {tuple(value.shape)} is empty.")
    if key_lengths is not None and not isinstance(key_lengths, torch.Tensor):
        try:
            key_lengths = torch.as_tensor(key_lengths, device=query.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"key_lengths={key_lengths!r} has to be integers, one for each sample.") from error
        if not batch:
            key_lengths = key_lengths.long()  # an empty list has no dtype
    if key_lengths is not None and (
        key_lengths.shape != (batch,) or key_lengths.is_floating_point() or key_lengths.dtype == torch.bool
    ):
        raise UserError(
            f"key_lengths has to be integers of shape ({batch},), one for each sample, got {key_lengths.dtype} "
            f"of shape {tuple(key_lengths.shape)}."
        )
    if projection is not None and (projection.dim() != 2 or projection.shape[1] != width or not len(projection)):
        raise UserError(
            f"projection has to be (rows, {width}), one row for each random projection and the width of query, got "
            f"{tuple(projection.shape)}."
        )
    return query, key, value, None if key_lengths is None else key_lengths.to(query.device)


def check_attn_mask(attn_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """A mask of the keys as boolean (B, S) on the device of the keys, or None.

    Args:
        attn_mask: boolean (B, S) or (B, 1, 1, S), true for the keys that take part; None for all.
        query: (B, H, T, E).
        key: (B, H, S, E).

    Raises:
        UserError: another type, dtype or shape, such as an additive mask, or one that differs by query or head; two
            dimensions where B is T, which may be (B, S) or, as for `scaled_dot_product_attention`, (T, S).
    """
    if attn_mask is None:
        return None
    check_tensors(attn_mask=attn_mask)
    batch, _, num_keys, _ = key.shape
    if attn_mask.dtype != torch.bool or attn_mask.shape not in ((batch, num_keys), (batch, 1, 1, num_keys)):
        raise UserError(
            f"attn_mask has to be boolean of shape ({batch}, {num_keys}) or ({batch}, 1, 1, {num_keys}), true for the "
            f"keys that take part, got {attn_mask.dtype} of shape {tuple(attn_mask.shape)}. Convert a mask of 0 and 1 "
            "by mask.bool(), an additive one of 0 and -inf by mask == 0. is_causal hides later keys. For other biases, "
            "and masks that differ by query or head, call torch.nn.functional.scaled_dot_product_attention."
        )
    # a recorded program with a dynamic batch cannot depend on it
    if attn_mask.dim() == 2 and not torch.compiler.is_compiling() and batch == query.shape[2] > 1:
        raise UserError(
            f"attn_mask of shape {tuple(attn_mask.shape)} is ambiguous, since there are as many samples as queries: "
            "(B, S) here, (T, S) in scaled_dot_product_attention. Give padding of the keys as (B, 1, 1, S): "
            "attn_mask[:, None, None]."
        )
    return attn_mask.reshape(batch, num_keys).to(key.device)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of different dtypes in that of autocast, where it is enabled and none of them is float64."""
    device = tensors[0].device.type
    if len({x.dtype for x in tensors}) == 1 or not torch.is_autocast_enabled(device):
        return tensors
    if not all(x.is_floating_point() and x.dtype != torch.float64 for x in tensors):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def empty_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Output (0, H, T, D) of an empty batch, for autograd a function of all three."""
    return query[..., :1] * key[:, :, :1, :1] * value[:, :, :1]


def check_scale(name: str, scale: float | torch.Tensor) -> float:
    """The softmax scale as a number.

    Args:
        name: its name, for the message.
        scale: a number, or a tensor of no dimensions without gradient.

    Raises:
        UserError: it is not a positive, finite number.
    """
    number = scale
    if getattr(scale, "ndim", None) == 0:  # tensors, and scalars of numpy
        if getattr(scale, "requires_grad", False):
            raise UserError(f"{name} has no gradient. Multiply the queries by it, and pass {name}=1.0.")
        number = scale.item()
    if not is_number(number) or not 0 < number < math.inf:
        raise UserError(f"{name}={scale!r} has to be positive and finite; None is E ** -0.5.")
    return number


def default_scale(query: torch.Tensor, scale: float | torch.Tensor | None) -> float:
    """Softmax scale: `scale`, or E ** -0.5 for None."""
    return query.shape[-1] ** -0.5 if scale is None else check_scale("scale", scale)


def length_mask(key_lengths: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Boolean (B, S), true for the keys j < key_lengths[b]."""
    return torch.arange(num_keys, device=key_lengths.device) < key_lengths[:, None]


def visible_keys(
    key_lengths: torch.Tensor | None, attn_mask: torch.Tensor | None, num_keys: int
) -> torch.Tensor | None:
    """Boolean (B, S), true for the keys that neither lengths (B,) nor mask (B, S) hide; None without both."""
    if key_lengths is None:
        return attn_mask
    mask = length_mask(key_lengths, num_keys)
    return mask if attn_mask is None else mask & attn_mask


def query_lengths(query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None) -> torch.Tensor | None:
    """Lengths, or mask, of the queries of self-attention, whose padding must not influence others; else None."""
    return key_lengths if query.shape[2] == key.shape[2] else None


class VisibleRows(NamedTuple):
    """Queries, keys and values without what is hidden, see `visible_rows`.

    Attributes:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        broken: boolean (B, H, T, 1), queries that are not finite or see a key or value that is not; None without a
            mask.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    broken: torch.Tensor | None

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value; `torch.compile` of PyTorch 2.6 traces no slice of a named tuple."""
        return self.query, self.key, self.value

    def mark(self, *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Results (B, H, T, any width), nan for the broken queries."""
        if self.broken is None:
            return results
        return tuple(x.masked_fill(self.broken, math.nan) for x in results)


def visible_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    window: int | None = None,
    attn_mask: torch.Tensor | None = None,
) -> VisibleRows:
    """Queries, keys and values in which hidden rows are zero, so that they have no influence, whatever they hold.

    A weight of zero does not hide a row: 0 * nan is nan, in sums and in gradients. Keys and values that `key_lengths`
    or `attn_mask` hide become zero. So do rows that are not finite where only some queries see them: queries, and with
    `is_causal` keys and values. `VisibleRows.mark` then sets the outputs that depend on them to nan. Without a mask
    nothing changes.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        scale: softmax scale.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        window: width W of the window that all visible keys lie in; None for none.
        attn_mask: boolean (B, S), false for hidden keys.
    """
    mask = visible_keys(key_lengths, attn_mask, key.shape[2])
    if not is_causal and mask is None:
        return VisibleRows(query, key, value, None)
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    largest_norm = LARGEST_NORM / math.sqrt(scale)
    broken = ~_is_bounded(query, 2, largest_norm)
    query = query.masked_fill(broken, 0.0)
    if is_causal:
        bad = ~(_is_bounded(key, 2, largest_norm) & _is_bounded(value, math.inf, LARGEST_VALUE))
        key, value = key.masked_fill(bad, 0.0), value.masked_fill(bad, 0.0)
        # number of such keys that each query sees
        count = bad.cumsum(2)
        last = torch.arange(query.shape[2], device=key.device)
        seen = count[:, :, last.clamp_max(key.shape[2] - 1)]
        if window is not None:
            before = last - window_bounds(window)[0] - 1
            earlier = count[:, :, before.clamp(0, key.shape[2] - 1)]
            seen = seen - earlier.masked_fill((before < 0)[:, None], 0)
        broken = broken | (seen > 0)
    return VisibleRows(query, key, value, broken)


def _is_bounded(x: torch.Tensor, order: float, bound: float) -> torch.Tensor:
    """Boolean (B, H, N, 1), true for the rows of (B, H, N, E) with a norm below `bound`; false for nan."""
    dtype = accumulation_dtype(x.dtype)
    return torch.linalg.vector_norm(x.detach(), order, dim=-1, keepdim=True, dtype=dtype) < bound


def check_dropout(dropout_p: float) -> None:
    """Check that a dropout probability lies in [0, 1).

    Raises:
        UserError: it does not.
    """
    if not is_number(dropout_p) or not 0.0 <= dropout_p < 1.0:
        raise UserError(f"Attention dropout {dropout_p!r} has to lie in [0, 1).")


def check_window(window: int) -> None:
    """Check that a window holds at least one key.

    Raises:
        UserError: it does not.
    """
    window_bounds(window)
    if window < 1:
        raise UserError(f"A local window of {window} keys sees nothing; local_context has to be at least 1.")
