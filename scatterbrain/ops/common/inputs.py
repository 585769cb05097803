"""Checks of the operators' arguments, and the masks that they share."""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.windows import window_bounds


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
) -> None:
    """Check shapes and dtypes of an operator's arguments.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        key_lengths: (B,) integers, None for all keys.
        projection: random projections (R, E), None for an operator without.

    Raises:
        UserError: names the argument, what it has to be and what it is.
    """
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
    batch, heads, _, width = query.shape
    if key.shape[:2] != (batch, heads) or key.shape[3] != width:
        raise UserError(f"key {tuple(key.shape)} has to be (B, H, S, E) with B, H, E of query {tuple(query.shape)}.")
    if value.shape[:3] != key.shape[:3]:
        raise UserError(f"value {tuple(value.shape)} has to be (B, H, S, D) with B, H, S of key {tuple(key.shape)}.")
    if min(query.shape) < 1 or min(key.shape) < 1 or value.shape[3] < 1:
        raise UserError(f"query {tuple(query.shape)}, key or value {tuple(value.shape)} is empty.")
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


def default_scale(query: torch.Tensor, scale: float | None) -> float:
    """Softmax scale: `scale`, or E ** -0.5 for None."""
    if scale is None:
        return query.shape[-1] ** -0.5
    if not scale > 0:
        raise UserError(f"scale={scale} has to be positive; None is E ** -0.5.")
    return scale


def length_mask(key_lengths: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Boolean (B, S), true for the keys j < key_lengths[b]."""
    return torch.arange(num_keys, device=key_lengths.device) < key_lengths[:, None]


def check_dropout(dropout_p: float) -> None:
    """Check that a dropout probability lies in [0, 1).

    Raises:
        UserError: it does not.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise UserError(f"Attention dropout {dropout_p} has to lie in [0, 1).")


def check_window(window: int) -> None:
    """Check that a window holds at least one key.

    Raises:
        UserError: it does not.
    """
    window_bounds(window)
    if window < 1:
        raise UserError(f"A local window of {window} keys sees nothing; local_context has to be at least 1.")
