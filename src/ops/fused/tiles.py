"""Tile sizes of the kernels: one table, by what was measured; `scripts/tune_attention.py` measures it again.

A kernel's result does not depend on its tiles but for the order of sums. Nothing is tried out at run time: a first
call costs the compilation of the kernels and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """Tile sizes, warps and pipeline stages of all kernels of one shape.

    Attributes:
        sum_rows: rows of a tile in the sums over keys or queries.
        sum_programs: programs that the sums are cut into, over all sequences.
        sum_warps: their warps.
        sum_stages: their pipeline stages, at least 2.
        query_rows: queries of a tile in the forward pass.
        key_rows: keys of a tile of the window.
        query_tiles: tiles of queries that one program of the forward pass goes through; None for `tiles_per_program`.
        query_warps: its warps.
        query_stages: its pipeline stages, at least 2.
        gradient_rows: queries (for the keys' gradient: keys) of a tile in the backward pass.
        gradient_keys: keys (queries) of a tile of the window.
        gradient_warps: their warps.
        gradient_stages: their pipeline stages, at least 2.
    """

    sum_rows: int = 64
    sum_programs: int = 256
    sum_warps: int = 4
    sum_stages: int = 3
    query_rows: int = 64
    key_rows: int = 64
    query_tiles: int | None = None
    query_warps: int = 4
    query_stages: int = 3
    gradient_rows: int = 128
    gradient_keys: int = 32
    gradient_warps: int = 8
    gradient_stages: int = 2


DEFAULT = Tiles()
# float32 tiles take twice the memory and, in full precision, run on the general units: smaller tiles, one at a time
DEFAULT_FLOAT32 = Tiles(
    sum_rows=32,
    sum_stages=2,
    query_rows=32,
    key_rows=32,
    query_tiles=1,
    query_stages=2,
    gradient_rows=32,
    gradient_keys=32,
    gradient_warps=4,
)

# (largest N, largest W, largest MP, bytes of the dtype, device class) to tiles; the first row that fits. The device
# class is the compute capability's major version; None fits all.
TABLE: list[tuple[int, int, int, int, int | None, Tiles]] = []

_override: Tiles | None = None


def tiles_for(
    length: int, window: int, padded_features: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tiles:
    """Tiles of a shape.

    Args:
        length: number of keys S.
        window: width W, 0 for none.
        padded_features: number of features as the kernels pad it, MP.
        width: the larger of E and D, padded.
        dtype: of the inputs.
        device: where they are.
    """
    if _override is not None:
        return _override
    if device.type != "cuda":
        # Triton's interpreter, for tests: small shapes should meet several tiles and chunks
        return replace(
            DEFAULT_FLOAT32, sum_rows=16, sum_programs=6, query_tiles=None, query_rows=32, key_rows=16, gradient_rows=16
        )
    major = torch.cuda.get_device_capability(device)[0]
    for max_length, max_window, max_features, size, device_class, tiles in TABLE:
        fits = length <= max_length and window <= max_window and padded_features <= max_features and width <= 64
        if fits and size == dtype.itemsize and device_class in (None, major):
            return tiles
    tiles = DEFAULT if dtype.itemsize == 2 else DEFAULT_FLOAT32
    if width > 64 or padded_features > 64:
        # registers: the tiles of features and of values grow with these
        small = min(32, tiles.query_rows)
        tiles = replace(
            tiles,
            sum_rows=small,
            sum_stages=2,
            query_rows=small,
            key_rows=32,
            query_tiles=1,
            query_stages=2,
            query_warps=8,
            gradient_rows=small,
            gradient_keys=32,
            gradient_warps=8,
        )
    return tiles


# Programs of the forward kernel that a multiprocessor holds: its registers are enough for two.
PROGRAMS_AT_A_TIME = 2
# What a program does before its first tile (it reads the sums and the rows), in tiles.
START = 0.7


def tiles_per_program(tiles: int, groups: int, device: torch.device) -> int:
    """Tiles that a program of the forward kernel goes through, where it is not set.

    Programs run in waves, and the last wave counts in full: the fewest steps are taken, of a few sizes that were
    measured (it puts all of them in the order of their times).

    Args:
        tiles: tiles of one sequence.
        groups: number of sequences.
        device: where they are.
    """
    if device.type != "cuda":
        return 2
    at_a_time = PROGRAMS_AT_A_TIME * torch.cuda.get_device_properties(device).multi_processor_count

    def steps(each: int) -> float:
        waves = -(-(-(-tiles // each) * groups) // at_a_time)
        return waves * (each + START)

    return min((1, 2, 4, 7), key=steps)


@contextmanager
def use_tiles(tiles: Tiles) -> Iterator[None]:
    """Use these tiles for every shape, for tuning and for tests."""
    global _override
    before, _override = _override, tiles
    try:
        yield
    finally:
        _override = before
