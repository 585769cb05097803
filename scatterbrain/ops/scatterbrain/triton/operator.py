"""The fused kernels as one `torch.library` operator with a backward: window, random features, or both.

Forward: sums over the keys (one kernel for the chunks, one to combine them), attention by tiles of queries, and the
fallback tiles. Backward: sums over the queries, gradients of the queries, gradients of the keys and values. Nothing is
summed by atomic operations: results are the same bit by bit from run to run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from scatterbrain.ops.common.triton_functions import (
    device_of,
    num_sms,
    pdl_options,
    precision_of_products,
    row_strides,
    safe_warps,
)
from scatterbrain.ops.common.windows import window_bounds
from scatterbrain.ops.scatterbrain.triton.bwd import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
    bwd_preprocess_kernel,
)
from scatterbrain.ops.scatterbrain.triton.fallback import (
    fallback_bwd_dkdv_kernel,
    fallback_bwd_dq_kernel,
    fallback_fwd_kernel,
)
from scatterbrain.ops.scatterbrain.triton.fwd import attention_fwd_kernel, causal_fwd_kernel
from scatterbrain.ops.scatterbrain.triton.sums import (
    chunk_sums_kernel,
    combine_chunks_kernel,
    cumulative_sums_kernel,
)
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles, tiles_for

LOG2E = math.log2(math.e)
# A query's sum over all keys may be this many times its normaliser, and its relative error that many roundings: those
# of half precision (and of tf32), or of float32. Past it, its tile is a fallback tile. On the token stages of a trained
# T2T-ViT there is none, on normal random queries and keys of width 64 hardly any.
CANCELLATION_LIMIT = 16.0
CANCELLATION_LIMIT_FLOAT32 = 64.0
# With more features than this, sums are relative to a running maximum: otherwise their weights exceed the registers.
ONLINE_FEATURES = 128
# Columns of the sums that one program combines, and chunks that it reads at a time.
COMBINE_COLUMNS, COMBINE_CHUNKS = 4, 32
# Part of the memory of q, k, v and the output that sums of more than MANY_CHUNKS chunks take at most.
CHUNKS_MEMORY = 1 / 32
# Columns and chunks as above where there are more chunks than MANY_CHUNKS.
MANY_CHUNKS, COMBINE_COLUMNS_OF_MANY, COMBINE_MANY_CHUNKS = 64, 2, 128
# Persistent programs per SM of the fallback kernels, for queries and for keys: as many as fit. Most exit at once.
FALLBACK_PROGRAMS, FALLBACK_DKDV_PROGRAMS = 1, 2
# Queries and keys of a step of the fallback kernels, and their warps. Queries divide those of a tile.
FALLBACK_ROWS, FALLBACK_KEYS, FALLBACK_WARPS = 16, 128, 8
# Keys of a step where a tile of many keys does not fit.
FALLBACK_KEYS_WIDE = 32
# The keys of a fallback tile are split over at most this many programs, each with one step at least.
FALLBACK_SPLITS = 64
# Partial results of all fallback tiles: the largest number, and the largest part of the memory of q, k, v and the
# output.
FALLBACK_PARTS, FALLBACK_MEMORY = 512, 1 / 50
# Keys of a tile in the fallback kernel for the gradients of the keys, and warps.
FALLBACK_DKDV_KEYS, FALLBACK_DKDV_WARPS = 64, 4
# Rows of a tile in `bwd_preprocess_kernel`.
PREPROCESS_ROWS = 64
# Tiles of a chunk at least, and rows of a chunk at most with causal masking.
MIN_CHUNK_TILES, CAUSAL_CHUNK = 2, 256


class FallbackTiles(NamedTuple):
    """Which tiles of queries are fallback tiles, as `attention_fwd_kernel` writes them; empty where there are none.

    Attributes:
        flags: (G, query tiles) int8, 1 for a fallback tile.
        sequences: (1 + 2 G,) int32, number of sequences with a fallback tile, which, and a flag of each sequence.
        tiles: (1 + G query tiles,) int32, number of fallback tiles, and which.
    """

    flags: torch.Tensor
    sequences: torch.Tensor
    tiles: torch.Tensor


class _Sums(NamedTuple):
    """Sums over keys or queries, as averages: see `sums.py`.

    Attributes:
        mean: (..., BD, MP) averages of the values, or of the gradients of the output.
        weight: (..., MP) log weights.
        delta_mean: (..., MP) averages of delta, over queries.
        norms: (G, N) of the rows; empty where no window reads them.
    """

    mean: torch.Tensor
    weight: torch.Tensor
    delta_mean: torch.Tensor
    norms: torch.Tensor


class _Plan:
    """What all kernels of one call share: sizes, strides, constants.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projection (R, E) in the dtype of query, None without a low-rank part.
        key_lengths: (B,) integers or None.
        window: width W, 0 for none.
        scale: softmax scale.
        cosh: take each row of the projection with both signs.
        is_causal: hide the keys j > i.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        projection: torch.Tensor | None,
        key_lengths: torch.Tensor | None,
        window: int,
        scale: float,
        cosh: bool,
        is_causal: bool,
    ) -> None:
        self.batch, self.heads, self.length, self.width = query.shape
        self.num_keys, self.value_width = value.shape[2:]
        self.groups = self.batch * self.heads
        self.device, self.dtype = query.device, query.dtype
        self.low_rank = projection is not None
        self.is_causal = is_causal
        self.window = window
        # whether the forward pass subtracts estimates, so that there may be fallback tiles
        self.has_fallback = self.low_rank and window > 0 and not is_causal
        rows = projection.shape[0] if projection is not None else 1
        features = rows * (2 if cosh else 1)
        self.padded_features = _padded(features)
        left, right = window_bounds(window)
        # arguments that a kernel does not read get any tensor in their place
        self.projection = query if projection is None else projection
        self.key_lengths = query if key_lengths is None else key_lengths
        self.has_lengths = key_lengths is not None
        self.precision = precision_of_products(self.dtype)
        exact = self.dtype == torch.float32 and self.precision == "ieee"
        self.limit = CANCELLATION_LIMIT_FLOAT32 if exact else CANCELLATION_LIMIT
        self.tiles: Tiles = tiles_for(
            self.num_keys,
            window,
            self.padded_features,
            max(_padded(self.width), _padded(self.value_width)),
            self.dtype,
            self.device,
        )
        # constants of all kernels with features, of all that read pairs, and of those that form logits from features
        self.sizes = {
            "E": self.width,
            "BE": _padded(self.width),
            "D": self.value_width,
            "BD": _padded(self.value_width),
            "R": rows,
            "M": features,
            "MP": self.padded_features,
            "LOG_M": math.log2(features),
        }
        self.constants = {
            **self.sizes,
            "LEFT": left,
            "RIGHT": right,
            "HAS_LENGTHS": self.has_lengths,
            "PRECISION": self.precision,
        }
        feature_precision = "tf32" if self.dtype != torch.float32 else self.precision
        self.pair_constants = {**self.constants, "FEATURE_PRECISION": feature_precision}
        # qk_scale, feature_scale and norm_scale of the kernels
        self.scales = (scale * LOG2E, math.sqrt(scale) * LOG2E, 0.5 * scale * LOG2E)
        self.lengths = (self.heads, self.length, self.num_keys)
        # launch options of the first kernel of a pass, and of those after it
        self.pdl = pdl_options(self.device)
        self.first = {"PDL": self.pdl["PDL"]}
        # both passes use the same chunks, so that the backward's sums fit the forward's
        self.key_chunk, self.key_chunks = self._chunks(self.num_keys)
        self.query_chunk, self.query_chunks = self._chunks(self.length)

    def _chunks(self, length: int) -> tuple[int, int]:
        """Rows of a chunk, a multiple of the tile, and number of chunks."""
        rows = self.tiles.sum_rows
        tiles = -(-length // rows)
        wanted = max(1, self.tiles.sum_programs // self.groups)
        chunk_bytes = self.sizes["BD"] * self.padded_features * torch.float32.itemsize
        affordable = length * self._bytes_of_row() * CHUNKS_MEMORY / chunk_bytes
        wanted = min(wanted, max(MANY_CHUNKS, int(affordable)))
        if self.is_causal:
            # pairs are taken within a chunk: longer chunks mean more of them
            wanted = max(wanted, -(-length // CAUSAL_CHUNK))
        per_chunk = min(tiles, max(MIN_CHUNK_TILES, -(-tiles // wanted)))
        return per_chunk * rows, -(-tiles // per_chunk)

    def _bytes_of_row(self) -> int:
        """Memory of a token in q, k, v and the output."""
        return 2 * (self.width + self.value_width) * self.dtype.itemsize

    @property
    def query_tiles(self) -> int:
        """Tiles of queries of a sequence in the forward pass."""
        return -(-self.length // self.tiles.query_rows)

    @property
    def fallback_keys(self) -> int:
        """Keys of a step of the fallback kernels."""
        narrow = self.dtype.itemsize == 2 and max(self.width, self.value_width, self.padded_features) <= 64
        return FALLBACK_KEYS if narrow else FALLBACK_KEYS_WIDE

    @property
    def num_parts(self) -> int:
        """Partial results of FALLBACK_ROWS queries that there is memory for: a power of two, 0 without fallback."""
        if not self.has_fallback:
            return 0
        sizes = self.sizes
        part = FALLBACK_ROWS * max(sizes["BD"] + 2, sizes["BE"] + sizes["MP"]) * torch.float32.itemsize
        rows = self.groups * (self.length + self.num_keys) / 2
        affordable = int(rows * self._bytes_of_row() * FALLBACK_MEMORY) // part
        return 1 << (min(FALLBACK_PARTS, max(2, affordable)).bit_length() - 1)

    def fallback_options(self) -> dict[str, Any]:
        """Constants and launch options of the fallback kernels for queries."""
        return {
            **self.pair_constants,
            "BM": FALLBACK_ROWS,
            "BN": self.fallback_keys,
            "MAX_SPLITS": min(FALLBACK_SPLITS, -(-self.num_keys // self.fallback_keys)),
            "TILE_ROWS": self.tiles.query_rows,
            "num_warps": FALLBACK_WARPS,
            **self.pdl,
        }

    def fallback_parts(self, *widths: int) -> list[torch.Tensor]:
        """Memory (parts, FALLBACK_ROWS, width) for partial results of fallback tiles."""
        return [self.empty(self.num_parts, FALLBACK_ROWS, width) for width in widths]

    def counters(self) -> torch.Tensor:
        """Memory for a counter of each fallback tile that is split; such a tile has two parts at least."""
        return self.empty(self.num_parts // 2, dtype=torch.int32)

    def window_tiles(self, rows: int, others: int) -> int:
        """Tiles of `others` keys that the windows of `rows` queries in a row touch."""
        return 0 if self.window == 0 else -(-(rows + self.window - 1) // others)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory on the device of the call."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def no_statistics(self) -> tuple[torch.Tensor, ...]:
        """Empty tensors in place of the statistics, for a call without a backward pass."""
        integers = (torch.int8, torch.int32, torch.int32)
        dtypes = (torch.float32, *integers, self.dtype, torch.float32, torch.float32)
        return tuple(self.empty(0, dtype=dtype) for dtype in dtypes)

    def state_shape(self, chunks: int) -> tuple[int, ...]:
        """Leading sizes of the sums that the attention reads."""
        return (self.groups, chunks + 1) if self.is_causal else (self.groups,)

    def sums(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        fallback: FallbackTiles,
        counters: torch.Tensor,
        backward: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> _Sums:
        """Sums over keys, or with `backward` over queries.

        Args:
            x: keys, or queries.
            y: values, or gradients of the output.
            fallback: fallback tiles; over keys the list is cleared, over queries such tiles are left out.
            counters: (parts / 2,), cleared.
            backward: for queries, the output, log normalisers (G, T) and delta (G, T), which is written.
        """
        tiles, features, padded = self.tiles, self.padded_features, self.sizes["BD"]
        queries = backward is not None
        chunk, chunks = (self.query_chunk, self.query_chunks) if queries else (self.key_chunk, self.key_chunks)
        final = chunks == 1 and not self.is_causal
        states = self.state_shape(chunks)
        mean = self.empty(*states, padded, features, dtype=self.dtype)
        weight = self.empty(*states, features)
        delta_mean = self.empty(*states, features) if queries else weight
        parts = (mean, weight, delta_mean, weight)
        if not final:
            parts = (
                self.empty(self.groups, chunks, padded, features),
                self.empty(self.groups, chunks, features),
                self.empty(self.groups, chunks, features) if queries else weight,
                self.empty(self.groups, chunks, features),
            )
        length = x.shape[2]
        norms = self.norms(length)
        out, lse, delta = backward or (y, weight, weight)
        chunk_sums_kernel[(chunks, self.groups)](
            *(x, y, out, self.projection, self.key_lengths, lse, delta, norms),
            *(fallback.flags if queries else weight, fallback.sequences, fallback.tiles, counters),
            *parts,
            *(self.heads, length, self.query_tiles, chunk, chunk // tiles.sum_rows),
            *row_strides(x, y, out),
            *self.scales[1:],
            **self.sizes,
            BN=tiles.sum_rows,
            EVEN=length % chunk == 0 and (queries or not self.has_lengths),
            HAS_LENGTHS=self.has_lengths and not queries,
            QUERIES=queries,
            NORMS=norms.numel() > 0,
            HAS_FALLBACK=self.has_fallback,
            TILE_ROWS=tiles.query_rows,
            COUNTERS=counters.numel(),
            FINAL=final,
            PRECISION=self.precision,
            STAGES=tiles.sum_stages,
            ONLINE=self.dtype == torch.float16 or features > ONLINE_FEATURES,
            num_warps=safe_warps(tiles.sum_warps, x, y, out),
            **self.first,
        )
        sums = _Sums(mean, weight, delta_mean, norms)
        if final:
            return sums
        columns, chunks_at_a_time = COMBINE_COLUMNS, COMBINE_CHUNKS
        if chunks > MANY_CHUNKS:
            columns, chunks_at_a_time = COMBINE_COLUMNS_OF_MANY, COMBINE_MANY_CHUNKS
        arguments = (*parts, mean, weight, delta_mean, chunks)
        constants = {"BD": padded, "BLOCK": columns, "MP": features, "QUERIES": queries, **self.pdl}
        grid = (padded // columns, self.groups)
        if self.is_causal:
            cumulative_sums_kernel[grid](*arguments, **constants)
        else:
            combine_chunks_kernel[grid](*arguments, **constants, CHUNKS=min(chunks_at_a_time, _power_of_two(chunks)))
        return sums

    def norms(self, length: int) -> torch.Tensor:
        """Memory for a norm of each row, where the window of a low-rank part reads it."""
        return self.empty(*((self.groups, length) if self.low_rank and self.window > 0 else (0,)))

    def fallback_tiles(self) -> FallbackTiles:
        """Memory for the fallback tiles; `chunk_sums_kernel` clears numbers and flags."""
        tiles = self.query_tiles if self.has_fallback else 0
        return FallbackTiles(
            self.empty(self.groups, tiles, dtype=torch.int8),
            self.empty(1 + 2 * self.groups if self.has_fallback else 0, dtype=torch.int32),
            self.empty(1 + self.groups * tiles if self.has_fallback else 0, dtype=torch.int32),
        )


def _padded(width: int) -> int:
    """Sizes of a matrix product: powers of two, 16 at least."""
    return max(16, _power_of_two(width))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`; Triton's own takes the host ten times as long."""
    return 1 << (number - 1).bit_length()


def _like(x: torch.Tensor, width: int) -> torch.Tensor:
    """Memory (B, H, N, width), contiguous as (B, N, H, width): the model joins the heads of a token without a copy."""
    batch, heads, length, _ = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def run_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    window: int,
    scale: float,
    cosh: bool,
    is_causal: bool,
    eps: float,
    statistics: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Attention by the fused kernels; arguments are checked by `scatterbrain.ops.scatterbrain.triton.attention`.

    Args:
        query: (B, H, T, E), last dimension contiguous, as in key and value.
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projection (R, E) in the dtype of query; None for no low-rank part.
        key_lengths: (B,) integers; None for all keys.
        window: width W; 0 for no window.
        scale: softmax scale.
        cosh: take each row of the projection with both signs.
        is_causal: hide the keys j > i.
        eps: added to the normaliser; without window only.
        statistics: keep what the backward pass needs.

    Returns:
        Output (B, H, T, D), and what the backward pass needs, empty without `statistics`: log2 of the normalisers
        (G, T), `FallbackTiles`, and averages, log weights and norms of the keys, see `_Sums`.
    """
    plan = _Plan(query, key, value, projection, key_lengths, window, scale, cosh, is_causal)
    tiles, groups = plan.tiles, plan.groups
    out = _like(query, plan.value_width)
    lse = plan.empty(groups, plan.length) if statistics else plan.empty(0)
    fallback, counters = plan.fallback_tiles(), plan.counters()
    sums = _Sums(*(plan.empty(0) for _ in range(4)))  # results of an operator may not be one tensor
    if plan.low_rank:
        sums = plan.sums(key, value, fallback, counters)
    tensors = (query, key, value, out, plan.projection, plan.key_lengths)
    strides = row_strides(query, key, value, out)
    if not (plan.low_rank and is_causal):
        attention_fwd_kernel[(-(-plan.query_tiles // tiles.query_tiles), groups)](
            *tensors,
            *(sums.mean, sums.weight, sums.norms, lse),
            *fallback,
            *plan.lengths,
            *strides,
            *plan.scales,
            eps,
            **plan.constants,
            BM=tiles.query_rows,
            BN=tiles.key_rows,
            WINDOW_TILES=plan.window_tiles(tiles.query_rows, tiles.key_rows),
            QUERY_TILES=tiles.query_tiles,
            EVEN=plan.length % (tiles.query_rows * tiles.query_tiles) == 0,
            IS_CAUSAL=is_causal,
            LOW_RANK=plan.low_rank,
            STATISTICS=statistics,
            HAS_EPS=eps > 0,
            LIMIT=plan.limit,
            ONLINE=not plan.low_rank or plan.dtype == torch.float16,
            STAGES=tiles.query_stages,
            num_warps=tiles.query_warps,
            maxnreg=tiles.query_registers,
            **(plan.pdl if plan.low_rank else plan.first),
        )
    if plan.low_rank and is_causal:
        causal_fwd_kernel[(-(-plan.length // tiles.causal_rows), groups)](
            *tensors,
            *(sums.mean, sums.weight, lse),
            *(*plan.lengths, plan.key_chunk, plan.key_chunks),
            *strides,
            *plan.scales,
            **plan.pair_constants,
            STATISTICS=statistics,
            BM=tiles.causal_rows,
            BN=tiles.causal_keys,
            num_warps=safe_warps(tiles.causal_warps, query, key, value, has_while_loop=True),
            **plan.pdl,
        )
    if plan.has_fallback:
        fallback_fwd_kernel[(FALLBACK_PROGRAMS * num_sms(plan.device),)](
            *tensors,
            *(lse, fallback.tiles, counters, *plan.fallback_parts(plan.sizes["BD"], 2)),
            *(*plan.lengths, plan.num_parts),
            *strides,
            *plan.scales,
            **plan.fallback_options(),
            STATISTICS=statistics,
        )
    if not statistics:
        return out, *plan.no_statistics()
    return out, lse, *fallback, sums.mean, sums.weight, sums.norms


fused_attention = torch.library.custom_op("scatterbrain::fused_attention", run_forward, mutates_args=())


@fused_attention.register_fake
def _(query, key, value, projection, key_lengths, window, scale, cosh, is_causal, eps, statistics):
    plan = _Plan(query, key, value, projection, key_lengths, window, scale, cosh, is_causal)
    out = _like(query, value.shape[3])
    if not statistics:
        return out, *plan.no_statistics()
    mean, weight = plan.empty(0), plan.empty(0)
    if plan.low_rank:
        states = plan.state_shape(plan.key_chunks)
        mean = plan.empty(*states, plan.sizes["BD"], plan.padded_features, dtype=plan.dtype)
        weight = plan.empty(*states, plan.padded_features)
    lse = plan.empty(plan.groups, plan.length)
    return out, lse, *plan.fallback_tiles(), mean, weight, plan.norms(plan.num_keys)


def run_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    fallback_flags: torch.Tensor,
    fallback_sequences: torch.Tensor,
    fallback_tiles: torch.Tensor,
    key_mean: torch.Tensor,
    key_weight: torch.Tensor,
    key_norms: torch.Tensor,
    window: int,
    scale: float,
    cosh: bool,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; arguments as in `run_forward` and what it returned."""
    plan = _Plan(query, key, value, projection, key_lengths, window, scale, cosh, is_causal)
    tiles, groups = plan.tiles, plan.groups
    fallback, counters = FallbackTiles(fallback_flags, fallback_sequences, fallback_tiles), plan.counters()
    delta = plan.empty(groups, plan.length)
    sums = _Sums(*[key_mean] * 4)
    if plan.low_rank:
        sums = plan.sums(query, gradient, fallback, counters, (out, lse, delta))
    else:
        bwd_preprocess_kernel[(-(-plan.length // PREPROCESS_ROWS), groups)](
            *(out, gradient, delta, plan.heads, plan.length),
            *row_strides(out, gradient),
            D=plan.sizes["D"],
            BD=plan.sizes["BD"],
            BM=PREPROCESS_ROWS,
            **plan.first,
        )
    d_query, d_key, d_value = _like(query, plan.width), _like(key, plan.width), _like(value, plan.value_width)
    inputs = (query, key, value, gradient)
    strides = row_strides(*inputs)
    attention_bwd_dq_kernel[(-(-plan.length // tiles.dq_rows), groups)](
        *(*inputs, d_query, plan.projection, plan.key_lengths),
        *(key_mean, key_weight, key_norms, lse, delta),
        *(*plan.lengths, plan.key_chunk, plan.key_chunks),
        *(*strides, *row_strides(d_query), *plan.scales),
        **plan.pair_constants,
        BM=tiles.dq_rows,
        BN=tiles.dq_keys,
        WINDOW_TILES=plan.window_tiles(tiles.dq_rows, tiles.dq_keys),
        STAGES=tiles.dq_stages,
        IS_CAUSAL=is_causal,
        LOW_RANK=plan.low_rank,
        num_warps=tiles.dq_warps,
        maxnreg=tiles.dq_registers,
        **plan.pdl,
    )
    if plan.has_fallback:
        fallback_bwd_dq_kernel[(FALLBACK_PROGRAMS * num_sms(plan.device),)](
            *(*inputs, d_query, plan.projection, plan.key_lengths),
            *(lse, delta, fallback.tiles, counters),
            *plan.fallback_parts(plan.sizes["BE"], plan.padded_features),
            *(*plan.lengths, plan.num_parts),
            *(*strides, *row_strides(d_query), *plan.scales),
            **plan.fallback_options(),
        )
    attention_bwd_dkdv_kernel[(-(-plan.num_keys // tiles.dk_rows), groups)](
        *(*inputs, d_key, d_value, plan.projection, plan.key_lengths),
        *(*sums, lse, delta, fallback.flags),
        *(*plan.lengths, plan.query_chunk, plan.query_chunks),
        *(*strides, *row_strides(d_key, d_value), *plan.scales),
        **plan.pair_constants,
        BM=tiles.dk_queries,
        BN=tiles.dk_rows,
        WINDOW_TILES=plan.window_tiles(tiles.dk_rows, tiles.dk_queries),
        STAGES=tiles.dk_stages,
        IS_CAUSAL=is_causal,
        LOW_RANK=plan.low_rank,
        HAS_FALLBACK=plan.has_fallback,
        TILE_ROWS=tiles.query_rows,
        num_warps=tiles.dk_warps,
        maxnreg=tiles.dk_registers,
        **plan.pdl,
    )
    if plan.has_fallback:
        fallback_bwd_dkdv_kernel[(FALLBACK_DKDV_PROGRAMS * num_sms(plan.device),)](
            *(*inputs, d_key, d_value, plan.projection, plan.key_lengths),
            *(lse, delta, fallback.flags, fallback.sequences),
            *plan.lengths,
            *(*strides, *row_strides(d_key, d_value), *plan.scales),
            **plan.pair_constants,
            BM=FALLBACK_ROWS,
            BN=FALLBACK_DKDV_KEYS,
            TILE_ROWS=tiles.query_rows,
            num_warps=safe_warps(FALLBACK_DKDV_WARPS, *inputs, has_while_loop=True),
            **plan.pdl,
        )
    return d_query, d_key, d_value


fused_attention_backward = torch.library.custom_op(
    "scatterbrain::fused_attention_backward", run_backward, mutates_args=()
)


@fused_attention_backward.register_fake
def _(
    gradient,
    query,
    key,
    value,
    projection,
    key_lengths,
    out,
    lse,
    fallback_flags,
    fallback_sequences,
    fallback_tiles,
    key_mean,
    key_weight,
    key_norms,
    window,
    scale,
    cosh,
    is_causal,
):
    return _like(query, query.shape[3]), _like(key, key.shape[3]), _like(value, value.shape[3])


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, projection, key_lengths, window, scale, cosh, is_causal, _, _ = inputs
    ctx.save_for_backward(query, key, value, projection, key_lengths, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = (window, scale, cosh, is_causal)


def _gradients(ctx, gradient: torch.Tensor, run) -> tuple[torch.Tensor | None, ...]:
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    return (*run(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 8)


def _backward(ctx, gradient, *_):
    return _gradients(ctx, gradient, torch.ops.scatterbrain.fused_attention_backward)


fused_attention.register_autograd(_backward, setup_context=_setup_context)


class FusedAttention(torch.autograd.Function):
    """The operator without the dispatcher, which costs eager calls more than the kernels of short sequences take."""

    @staticmethod
    def forward(ctx, *inputs):
        """Arguments and results as in `run_forward`."""
        output = run_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        """Gradients of query, key and value."""
        return _gradients(ctx, gradient, run_backward)


def attend(*inputs) -> torch.Tensor:
    """The output of `run_forward`: by the operator for `torch.compile` and tensor subclasses, else directly."""
    if torch.compiler.is_compiling() or any(
        isinstance(x, torch.Tensor) and type(x) not in (torch.Tensor, torch.nn.Parameter) for x in inputs
    ):
        return fused_attention(*inputs)[0]
    with device_of(inputs[0]):
        statistics = inputs[-1]
        return FusedAttention.apply(*inputs)[0] if statistics else run_forward(*inputs)[0]
