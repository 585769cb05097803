"""Tile sizes of the landmark kernels, as in `scatterbrain.ops.scatterbrain.triton.tiles`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class LandmarkTiles:
    """Tile sizes, warps and pipeline stages of the landmark kernels.

    Attributes:
        start_rows: keys of a step where initial centroids are chosen.
        start_pair_rows: a program there has two landmarks where the step of each has no more keys.
        start_warps: warps there.
        block: landmarks of a block, at most; where there are no more, clusters are found and summed in one kernel.
        min_block: landmarks of a block, at least.
        sum_rows: keys of a tile in the sums, a multiple of 16.
        sum_programs: programs of the sums, over all sequences.
        sum_warps: their warps.
        sum_stages: their pipeline stages, at least 2.
        assign_rows: keys of a program that finds clusters over several blocks.
        assign_warps: its warps.
        combine_landmarks: landmarks of a program that combines the chunks.
        query_rows: queries of a tile in the forward pass.
        key_rows: keys of a tile of the window.
        band: keys that 16 queries see, at most, for each 16 to have their own tile of keys; 0 for never.
        query_block: landmarks of a block in the attention and in the gradient of the queries.
        query_tiles: tiles of queries of one program.
        query_warps: its warps.
        query_stages: its pipeline stages.
        query_registers: registers of a thread at most; None leaves them to the compiler.
        dq_rows: queries of a tile in the gradient of the queries.
        dq_keys: keys of a tile of the window.
        dq_warps: its warps.
        dq_registers: registers of a thread at most; None leaves them to the compiler.
        landmark_rows: queries of a tile in the gradient of the landmarks.
        landmark_block: landmarks of a block there.
        landmark_programs: programs of that gradient, over all sequences.
        landmark_warps: its warps.
        landmark_stages: its pipeline stages.
        window_keys: keys of a tile in the window's part of that gradient.
        window_queries: queries of a tile of the window.
        window_warps: its warps.
        dk_rows: keys of a tile in the gradient of the keys.
        dk_queries: queries of a tile of the window.
        dk_warps: its warps.
        dk_registers: registers of a thread at most; None leaves them to the compiler.
    """

    start_rows: int = 32
    start_pair_rows: int = 16
    start_warps: int = 1
    block: int = 128
    min_block: int = 64
    sum_rows: int = 64
    sum_programs: int = 264
    sum_warps: int = 4
    sum_stages: int = 3
    assign_rows: int = 64
    assign_warps: int = 4
    combine_landmarks: int = 16
    query_rows: int = 64
    key_rows: int = 32
    band: int = 32
    query_block: int = 64
    query_tiles: int = 1
    query_warps: int = 4
    query_stages: int = 1
    query_registers: int | None = 128
    dq_rows: int = 64
    dq_keys: int = 32
    dq_warps: int = 4
    dq_registers: int | None = 168
    landmark_rows: int = 64
    landmark_block: int = 64
    landmark_programs: int = 264
    landmark_warps: int = 4
    landmark_stages: int = 3
    window_keys: int = 64
    window_queries: int = 32
    window_warps: int = 4
    dk_rows: int = 64
    dk_queries: int = 32
    dk_warps: int = 4
    dk_registers: int | None = 168


DEFAULT = LandmarkTiles()
# float32 tiles take twice the memory. One row for TF32 and for full precision, whose products use no tensor cores.
DEFAULT_FLOAT32 = replace(
    DEFAULT,
    block=64,
    sum_rows=32,
    sum_warps=8,
    sum_stages=2,
    assign_rows=32,
    assign_warps=8,
    query_rows=32,
    band=0,
    query_registers=None,
    dq_rows=32,
    dq_registers=None,
    landmark_rows=32,
    landmark_stages=1,
    landmark_warps=8,
    window_keys=32,
    dk_rows=32,
    dk_registers=None,
)
# heads wider than 64
WIDE = {
    "block": 64,
    "sum_warps": 8,
    "sum_stages": 2,
    "band": 0,
    "query_registers": None,
    "dq_registers": None,
    "landmark_stages": 2,
    "landmark_warps": 8,
    "dk_registers": None,
}
# without a window, up to 128 landmarks: the tables stay in shared memory over several tiles of queries
NO_WINDOW = {"query_block": 128, "query_tiles": 4, "query_stages": 2, "query_registers": 168}

# windows whose band 16 queries see at once
NARROW = {"query_registers": 168}
# up to so many keys one program adds up a sequence, and no kernel has to combine chunks
SHORT_SEQUENCE = 1024
SHORT = {"sum_rows": 128, "sum_programs": 128}

_override: LandmarkTiles | None = None


def tiles_for(
    width: int,
    num_landmarks: int,
    num_keys: int,
    sample: int,
    window: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LandmarkTiles:
    """Tiles for a shape.

    Args:
        width: the larger of E and D, padded to a power of two.
        num_landmarks: number of clusters M.
        num_keys: keys of a sequence.
        sample: centroids are found from the first of each so many.
        window: width W of the window, 0 for none.
        dtype: of the inputs.
        device: where they are.
    """
    if _override is not None:
        return _override
    if device.type != "cuda":
        # Triton's interpreter, for tests: several tiles, chunks and blocks also for small shapes
        small = {"block": 16, "min_block": 16, "sum_rows": 16, "sum_programs": 6, "query_rows": 16, "query_tiles": 2}
        return replace(DEFAULT_FLOAT32, **small, band=32)
    tiles = DEFAULT if dtype.itemsize == 2 else DEFAULT_FLOAT32
    if width > 64:
        tiles = replace(tiles, **WIDE)
    elif dtype.itemsize == 2 and window == 0 and num_landmarks <= tiles.block:
        tiles = replace(tiles, **NO_WINDOW)
    if dtype.itemsize == 2 and width <= 64 and num_keys <= SHORT_SEQUENCE:
        tiles = replace(tiles, **SHORT)
    elif dtype.itemsize == 2 and width <= 64 and num_landmarks <= 64:
        tiles = replace(tiles, sum_programs=396)  # three programs fit an SM
    if 0 < window_band(window) <= tiles.band:
        tiles = replace(tiles, **NARROW)
    stretch = -(-num_keys // (sample * num_landmarks))
    if stretch > 32:
        tiles = replace(tiles, start_rows=64) if stretch <= 64 else replace(tiles, start_rows=128, start_warps=4)
    if num_landmarks > tiles.block:
        # sums alone need fewer registers, so that more programs fit an SM
        tiles = replace(tiles, sum_programs=4 * tiles.sum_programs)
    return tiles


def window_band(window: int) -> int:
    """Keys that 16 queries see in a window of width W, a power of two; 0 without a window."""
    return 1 << (window + 14).bit_length() if window > 0 else 0


@contextmanager
def use_tiles(tiles: LandmarkTiles) -> Iterator[None]:
    """Use these tiles for all shapes, for tuning and for tests."""
    global _override
    before, _override = _override, tiles
    try:
        yield
    finally:
        _override = before


def tiles_override() -> LandmarkTiles | None:
    """The tiles of `use_tiles`; None outside it."""
    return _override
