"""Local windows, defined once for all operators.

A window of width W lets query i see the keys j with `-(W // 2) <= j - i < (W + 1) // 2`: W keys, itself among
them, and for even W one more to the left than to the right.
"""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError


def window_bounds(window: int) -> tuple[int, int]:
    """Extent of a window to the left and to the right.

    Args:
        window: width W >= 0 in keys; 0 is the empty window.

    Returns:
        `(left, right)`: query i sees the keys `i - left <= j < i + right`.

    Raises:
        UserError: `window` is negative or not an integer.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise UserError(f"window={window!r} is not a number of keys; give an integer of at least 0.")
    return window // 2, (window + 1) // 2


def tiles_of_windows(window: int, rows: int, others: int) -> int:
    """Tiles of `others` keys that the windows of `rows` queries in a row touch; 0 without a window."""
    return 0 if window == 0 else -(-(rows + window - 1) // others)


def window_mask(num_queries: int, num_keys: int, window: int, device: torch.device | None = None) -> torch.Tensor:
    """Dense (T, S) boolean mask, true where key j lies in the window of query i."""
    left, right = window_bounds(window)
    offset = torch.arange(num_keys, device=device) - torch.arange(num_queries, device=device)[:, None]
    return (offset >= -left) & (offset < right)
