"""Two-dimensional windows: tokens are an image in raster order, and a query sees a rectangle of it.

The query in row y and column x sees the keys in row y + dy and column x + dx with `-(h // 2) <= dy < (h + 1) // 2`
and the same for columns: the interval of `ops.common.windows` along both axes. The border of the image cuts the
rectangle off.
"""

from __future__ import annotations

import itertools
import math

import torch

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.windows import window_bounds
from scatterbrain.ops.sparse.supports import Round, Support

# Cost of gathering a key for a tile, in pairs of the tile. It gives patches near the fastest on a CPU: squares of 4 to
# 8 tokens for 7 x 7 keys, of 2 to 5 tokens for 3 x 4 keys.
GATHER_COST = 32
# Longest side of a patch of queries.
MAX_PATCH = 32


def neighbourhood_shape(num_keys: int) -> tuple[int, int]:
    """Height and width of the rectangle of at most `num_keys` keys that is nearest to a square.

    The one of the largest area with h <= w <= h + 2: 49 gives 7 x 7, 12 gives 3 x 4, 24 gives 4 x 6, 98 gives 9 x 10.

    Args:
        num_keys: at least 1.

    Returns:
        Height h and width w, h <= w <= h + 2.

    Raises:
        UserError: not a whole number of at least 1.
    """
    check_whole_number("num_keys", num_keys, 1)
    # with h * h <= num_keys < (h + 1) * (h + 1), no lower rectangle is larger than h x h
    height = math.isqrt(num_keys)
    return height, num_keys // height


def neighbourhood_mask(
    height: int, width: int, shape: tuple[int, int], device: torch.device | None = None
) -> torch.Tensor:
    """Dense (N, N) boolean mask of the windows of an image of N = height * width tokens: the definition.

    Args:
        height: rows of the image.
        width: tokens of a row.
        shape: height and width of the rectangle.
        device: device of the mask.

    Raises:
        UserError: a size that is not a whole number of at least 1.
    """
    _check_sizes(height, width, shape)
    token = torch.arange(height * width, device=device)
    mask = torch.ones(len(token), len(token), dtype=torch.bool, device=device)
    for position, size in ((token // width, shape[0]), (token % width, shape[1])):
        offset = position - position[:, None]
        mask &= (offset >= -(size // 2)) & (offset < (size + 1) // 2)
    return mask


def neighbourhood_support(height: int, width: int, shape: tuple[int, int]) -> Support:
    """Support of `neighbourhood_mask` in one round: patches of queries, each with the keys around it.

    Neighbouring queries share most of their keys. The keys of a patch are the patch, extended by the rectangle; one
    mask for all patches excludes those too far from a query.

    Args:
        height: rows of the image.
        width: tokens of a row.
        shape: height and width of the rectangle.

    Returns:
        Support of N = height * width queries and keys, on the CPU.

    Raises:
        UserError: a size that is not a whole number of at least 1.
    """
    _check_sizes(height, width, shape)
    patch = _choose_patch(height, width, shape)
    lines, key_lines, near_lines = _cut(height, shape[0], patch[0])
    columns, key_columns, near_columns = _cut(width, shape[1], patch[1])
    mask = near_lines[:, None, :, None] & near_columns[None, :, None, :]
    return Support(
        (
            Round(
                _raster(lines, columns, width),
                _raster(key_lines, key_columns, width),
                mask.flatten(2, 3).flatten(0, 1)[None, None],
            ),
        )
    )


def _check_sizes(height: int, width: int, shape: tuple[int, int]) -> None:
    check_whole_number("height", height, 1)
    check_whole_number("width", width, 1)
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise UserError(f"shape={shape!r} is not valid. Give height and width of the rectangle, such as (7, 7).")
    for size in shape:
        check_whole_number("shape", size, 1)


def _choose_patch(height: int, width: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the patches of queries with the lowest cost.

    Small patches gather a key many times, large ones compute many excluded pairs. The cost of n patches is that of
    their C * L pairs and L gathered keys, padding included.
    """

    def cost(patch: tuple[int, int]) -> int:
        axes = zip((height, width), shape, patch, strict=True)
        (tiles, keys), (other_tiles, other_keys) = (_count(*axis) for axis in axes)
        return tiles * other_tiles * keys * other_keys * (patch[0] * patch[1] + GATHER_COST)

    return min(itertools.product(*(range(1, min(side, MAX_PATCH) + 1) for side in (height, width))), key=cost)


def _key_offsets(length: int, window: int, patch: int) -> range:
    """Offsets of a patch's keys from its first query along one axis, less those outside the image for all patches."""
    left, right = window_bounds(window)
    last_start = (length - 1) // patch * patch
    return range(-min(left, last_start), min(patch + right - 1, length))


def _count(length: int, window: int, patch: int) -> tuple[int, int]:
    """Number of patches, and of keys of each, along one axis."""
    return -(-length // patch), len(_key_offsets(length, window, patch))


def _cut(length: int, window: int, patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches along one axis of the image.

    Returns:
        Positions of queries (n, patch) and of keys (n, k), negative for none, and boolean (patch, k), true for the
        pairs of a patch in the window, the same for all patches.
    """
    left, right = window_bounds(window)
    starts = torch.arange(0, length, patch)[:, None]
    query_offset, key_offset = torch.arange(patch), torch.tensor(_key_offsets(length, window, patch))
    positions = (starts + query_offset, starts + key_offset)
    query, key = (x.masked_fill(x >= length, -1) for x in positions)
    offset = key_offset - query_offset[:, None]
    return query, key, (offset >= -left) & (offset < right)


def _raster(lines: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """Tokens (1, n * m, p * q) in rows (n, p) and columns (m, q); -1 where either is negative."""
    lines, columns = lines[:, None, :, None], columns[None, :, None, :]
    tokens = (lines * width + columns).masked_fill((lines < 0) | (columns < 0), -1)
    return tokens.flatten(2, 3).flatten(0, 1)[None]
