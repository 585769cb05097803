"""Tile sizes of the kernels: one table of measured settings; `scripts/tune_attention.py` measures them again.

Tiles change a kernel's result only by the order of sums. There is no autotuning at run time: a first call compiles the
kernels, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """Tile sizes, warps, pipeline stages and registers of all kernels of one shape.

    Tiles of the gradients have fewer than 64 rows on purpose: products of 64 rows are asynchronous on a Hopper GPU, and
    Triton 3.6 overwrites a tile too early where such a product and other code read it.

    Attributes:
        sum_rows: rows of a tile in the sums over keys or queries.
        sum_programs: programs of the sums, over all sequences.
        sum_warps: their warps.
        sum_stages: their pipeline stages, at least 2.
        query_rows: queries of a tile in the forward pass.
        key_rows: keys of a tile of the window.
        query_tiles: tiles of queries of one program in the forward pass.
        query_warps: its warps.
        query_stages: its pipeline stages, at least 2.
        query_registers: registers of a thread at most; None leaves them to the compiler.
        causal_rows: queries of a tile in the forward pass with causal masking and a low-rank part.
        causal_keys: keys of a step.
        causal_warps: its warps.
        dq_rows: queries of a tile in the gradient of the queries.
        dq_keys: keys of a tile of the window.
        dq_warps: its warps.
        dq_stages: its pipeline stages, at least 2.
        dq_registers: registers of a thread at most, or None.
        dk_rows: keys of a tile in the gradient of the keys.
        dk_queries: queries of a tile of the window.
        dk_warps: its warps.
        dk_stages: its pipeline stages, at least 2.
        dk_registers: registers of a thread at most, or None.
    """

    sum_rows: int = 64
    sum_programs: int = 256
    sum_warps: int = 4
    sum_stages: int = 3
    query_rows: int = 32
    key_rows: int = 16
    query_tiles: int = 1
    query_warps: int = 1
    query_stages: int = 3
    query_registers: int | None = None
    causal_rows: int = 64
    causal_keys: int = 64
    causal_warps: int = 4
    dq_rows: int = 16
    dq_keys: int = 16
    dq_warps: int = 1
    dq_stages: int = 2
    dq_registers: int | None = 168
    dk_rows: int = 16
    dk_queries: int = 16
    dk_warps: int = 1
    dk_stages: int = 2
    dk_registers: int | None = 232


DEFAULT = Tiles()
# float32 tiles take twice the memory. One table for TF32 and for full precision, whose products use no tensor cores and
# are unrolled.
DEFAULT_FLOAT32 = Tiles(
    sum_rows=32,
    sum_stages=2,
    query_rows=16,
    query_stages=2,
    causal_rows=32,
    causal_keys=32,
    dq_registers=None,
    dk_warps=2,
    dk_registers=None,
)

# (largest N, largest W, largest MP, bytes of the dtype, major compute capability) to tiles; the first row that fits. A
# capability of None fits all.
TABLE: list[tuple[int, int, int, int, int | None, Tiles]] = [
    # short sequences: one program sums over a whole sequence, and there is nothing to combine
    (
        1024,
        16,
        16,
        2,
        None,
        replace(
            DEFAULT,
            sum_rows=128,
            sum_programs=128,
            query_rows=16,
            key_rows=32,
            query_tiles=2,
            query_stages=2,
            dk_queries=32,
            dk_stages=3,
            dk_registers=168,
        ),
    ),
    (1 << 30, 16, 16, 2, None, replace(DEFAULT, query_rows=16, dk_registers=168)),
    # three warps per sub-core of an SM in place of two
    (1 << 30, 64, 32, 2, None, replace(DEFAULT, query_registers=168)),
]

_override: Tiles | None = None


def tiles_for(
    length: int, window: int, padded_features: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tiles:
    """Tiles for a shape.

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
        # Triton's interpreter, for tests: several tiles and chunks also for small shapes
        return replace(
            DEFAULT_FLOAT32,
            sum_rows=16,
            sum_programs=6,
            query_tiles=2,
            query_rows=32,
        )
    major = torch.cuda.get_device_capability(device)[0]
    for max_length, max_window, max_features, size, capability, tiles in TABLE:
        fits = length <= max_length and window <= max_window and padded_features <= max_features and width <= 64
        if fits and size == dtype.itemsize and capability in (None, major):
            return tiles
    tiles = DEFAULT if dtype.itemsize == 2 else DEFAULT_FLOAT32
    if width > 64 or padded_features > 64:
        # more registers and shared memory for the features and values of each row
        warps = 2 if padded_features <= 128 else 4
        tiles = replace(
            tiles,
            sum_rows=32,
            sum_stages=2,
            query_rows=16,
            query_stages=2,
            query_warps=warps,
            causal_rows=32,
            causal_keys=32,
            causal_warps=8,
            dq_warps=warps,
            dq_registers=None,
            dk_warps=warps,
            dk_registers=None,
        )
    return tiles


def tiles_override() -> Tiles | None:
    """The tiles of `use_tiles`, None for those of the table."""
    return _override


@contextmanager
def use_tiles(tiles: Tiles) -> Iterator[None]:
    """Use these tiles for all shapes, for tuning and for tests."""
    global _override
    before, _override = _override, tiles
    try:
        yield
    finally:
        _override = before
