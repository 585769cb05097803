"""Tile sizes of the kernels for exact key clusters, as in `scatterbrain.ops.clusters.triton.tiles`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from scatterbrain.ops.clusters.triton.tiles import LandmarkTiles
from scatterbrain.ops.clusters.triton.tiles import tiles_override as landmark_tiles_override


@dataclass(frozen=True)
class ExactTiles:
    """Tile sizes, warps and pipeline stages of the kernels for exact key clusters.

    Attributes:
        query_rows: queries of a tile in the forward pass.
        key_rows: keys of a step there.
        query_warps: warps there.
        query_stages: pipeline stages there.
        dq_rows: queries of a tile in the gradient of the queries.
        dq_keys: keys of a step there.
        dq_warps: warps there.
        dq_stages: pipeline stages there.
        dk_rows: keys of a tile in the gradient of the keys.
        dk_queries: queries of a step there.
        dk_warps: warps there.
        dk_stages: pipeline stages there.
    """

    query_rows: int = 64
    key_rows: int = 64
    query_warps: int = 4
    query_stages: int = 2
    dq_rows: int = 64
    dq_keys: int = 64
    dq_warps: int = 4
    dq_stages: int = 3
    dk_rows: int = 64
    dk_queries: int = 64
    dk_warps: int = 4
    dk_stages: int = 2


DEFAULT = ExactTiles()
# lists of up to so many keys leave much of larger steps empty
SHORT_LIST = 128
# float32 tiles take twice the memory
DEFAULT_FLOAT32 = ExactTiles(32, 32, 4, 2, 32, 32, 4, 1, 32, 32, 4, 1)

_override: ExactTiles | None = None


def tiles_for(width: int, num_exact: int, dtype: torch.dtype, device: torch.device) -> ExactTiles:
    """Tiles for a shape.

    Args:
        width: the larger of E and D, padded to a power of two.
        num_exact: upper bound of the keys that a query cluster takes.
        dtype: of the inputs.
        device: where they are.
    """
    if _override is not None:
        return _override
    if device.type != "cuda":
        # Triton's interpreter, for tests: several tiles and steps also for small shapes
        return ExactTiles(16, 16, 4, 2, 16, 16, 4, 2, 16, 16, 4, 2)
    if dtype.itemsize != 2:
        return DEFAULT_FLOAT32
    tiles = replace(DEFAULT, dq_keys=32, dk_queries=32) if width > 64 else DEFAULT
    return replace(tiles, key_rows=32) if num_exact <= SHORT_LIST else tiles


@contextmanager
def use_tiles(tiles: ExactTiles) -> Iterator[None]:
    """Use these tiles for all shapes, for tuning and for tests."""
    global _override
    before, _override = _override, tiles
    try:
        yield
    finally:
        _override = before


def tiles_override() -> tuple[LandmarkTiles | None, ExactTiles | None]:
    """The tiles of `use_tiles` of the landmark kernels, and those of `use_tiles` here; None outside them."""
    return landmark_tiles_override(), _override
