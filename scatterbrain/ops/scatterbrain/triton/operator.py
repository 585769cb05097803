"""The fused kernels as one `torch.library` operator with a backward: window, random features, or both.

Forward: sums over the keys (one kernel for the chunks, one to combine them), attention by tiles of queries, and the
fallback tiles. Backward: sums over the queries, gradients of the queries, gradients of the keys and values. Nothing is
summed by atomic operations: results are the same bit by bit from run to run.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from scatterbrain.ops.common.backends import with_near_rows
from scatterbrain.ops.common.calls import needs_dispatcher
from scatterbrain.ops.common.passes import (
    FusedFunction,
    Operator,
    Pass,
    by_token,
    describe_outputs,
    find_pass,
    launch,
    padded_width,
    power_of_two,
)
from scatterbrain.ops.common.triton_functions import (
    LOG2E,
    BufferLayout,
    LaunchSequence,
    device_of,
    num_sms,
    pdl_options,
    precision_of_products,
    row_strides,
    safe_warps,
)
from scatterbrain.ops.common.windows import tiles_of_windows, window_bounds
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
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles, tiles_for, tiles_override

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


class _Plan:
    """What all kernels of one call share: sizes, strides, constants.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projection (R, E), None without a low-rank part.
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
        self.padded_features = padded_width(features)
        left, right = window_bounds(window)
        self.has_lengths = key_lengths is not None
        self.precision = precision_of_products(self.dtype)
        exact = self.dtype == torch.float32 and self.precision == "ieee"
        self.limit = CANCELLATION_LIMIT_FLOAT32 if exact else CANCELLATION_LIMIT
        self.tiles: Tiles = tiles_for(
            self.num_keys,
            window,
            self.padded_features,
            max(padded_width(self.width), padded_width(self.value_width)),
            self.dtype,
            self.device,
        )
        # constants of all kernels with features, of all that read pairs, and of those that form logits from features
        self.sizes = {
            "E": self.width,
            "BE": padded_width(self.width),
            "D": self.value_width,
            "BD": padded_width(self.value_width),
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

    def add_fallback_parts(self, layout: BufferLayout, *widths: int) -> tuple[str, ...]:
        """Memory (parts, FALLBACK_ROWS, width) for partial results of fallback tiles, and its names."""
        names = tuple(f"fallback_part_{width}" for width in range(len(widths)))
        for name, width in zip(names, widths, strict=True):
            layout.add(name, self.num_parts, FALLBACK_ROWS, width)
        return names

    def statistics(self, lse: bool = True) -> BufferLayout:
        """What the forward pass leaves to the backward pass: log normalisers, fallback tiles, and sums over keys.

        Which tiles of queries are fallback tiles, as `attention_fwd_kernel` writes it, is empty where there are none:
        `fallback_flags`, (G, query tiles) int8, 1 for a fallback tile; `fallback_sequences`, (1 + 2 G,) int32, number
        of sequences with a fallback tile, which, and a flag of each sequence; `fallback_tiles`, (1 + G query tiles,)
        int32, number of fallback tiles, and which. `chunk_sums_kernel` clears numbers and flags.

        Args:
            lse: with `lse`, (G, T) log2 of the normalisers.
        """
        layout = BufferLayout()
        layout.add("lse", *((self.groups, self.length) if lse else (0,)))
        tiles = self.query_tiles if self.has_fallback else 0
        layout.add("fallback_flags", self.groups, tiles, dtype=torch.int8)
        layout.add("fallback_sequences", 1 + 2 * self.groups if self.has_fallback else 0, dtype=torch.int32)
        layout.add("fallback_tiles", 1 + self.groups * tiles if self.has_fallback else 0, dtype=torch.int32)
        self.add_sums(layout, "key", self.num_keys, self.key_chunks)
        return layout

    def add_sums(self, layout: BufferLayout, rows: str, length: int, chunks: int) -> None:
        """Memory for sums over keys or queries, as averages, see `sums.py`; empty without a low-rank part.

        Averages of the values, or of the gradients of the output, (..., BD, MP); log weights (..., MP); and norms of
        the rows (G, length), where the window reads them.
        """
        states = ((self.groups, chunks + 1) if self.is_causal else (self.groups,)) if self.low_rank else (0,)
        layout.add(f"{rows}_mean", *states, self.sizes["BD"], self.padded_features, dtype=self.dtype)
        layout.add(f"{rows}_weight", *states, self.padded_features)
        if rows == "query":
            layout.add("delta_mean", *states, self.padded_features)
        layout.add(f"{rows}_norms", *((self.groups, length) if self.low_rank and self.window > 0 else (0,)))

    def add_kernels_of_sums(
        self, launches: LaunchSequence, workspace: BufferLayout, tensors: dict[str, torch.Tensor], queries: bool
    ) -> None:
        """Kernels that sum over the keys, or over the queries and compute `delta`.

        Over keys the fallback tiles and counters are cleared; over queries such tiles are left out, and counters are
        cleared.

        Args:
            launches: gets the kernels.
            workspace: gets memory for sums of each chunk, which later parts take the place of.
            tensors: arguments by name.
            queries: over queries.
        """
        tiles, features, padded = self.tiles, self.padded_features, self.sizes["BD"]
        names = ("query", "gradient", "out") if queries else ("key", "value", "value")
        x, y, out = (tensors[name] for name in names)
        rows, length = names[0], x.shape[2]
        chunk, chunks = (self.query_chunk, self.query_chunks) if queries else (self.key_chunk, self.key_chunks)
        final = chunks == 1 and not self.is_causal
        # arguments that a kernel does not read get any tensor in their place
        results = (f"{rows}_mean", f"{rows}_weight", "delta_mean" if queries else f"{rows}_weight")
        parts = (*results, f"{rows}_weight")
        begin = workspace.end
        if not final:
            parts = ("mean_parts", "weight_parts", "delta_parts" if queries else "weight_parts", "max_parts")
            workspace.add("mean_parts", self.groups, chunks, padded, features)
            for name in dict.fromkeys(parts[1:]):
                workspace.add(name, self.groups, chunks, features)
        workspace.end = begin
        launches.add(
            chunk_sums_kernel,
            (chunks, self.groups),
            (
                *(*names, "projection", "key_lengths", "lse", "delta" if queries else "lse", f"{rows}_norms"),
                *("fallback_flags", "fallback_sequences", "fallback_tiles", "counters"),
                *parts,
            ),
            (
                *(self.heads, length, self.query_tiles, chunk, chunk // tiles.sum_rows),
                *row_strides(x, y, out),
                *self.scales[1:],
            ),
            **self.sizes,
            BN=tiles.sum_rows,
            EVEN=length % chunk == 0 and (queries or not self.has_lengths),
            HAS_LENGTHS=self.has_lengths and not queries,
            QUERIES=queries,
            NORMS=self.window > 0,
            HAS_FALLBACK=self.has_fallback,
            TILE_ROWS=tiles.query_rows,
            COUNTERS=self.num_parts // 2,
            FINAL=final,
            PRECISION=self.precision,
            STAGES=tiles.sum_stages,
            ONLINE=self.dtype == torch.float16 or features > ONLINE_FEATURES,
            num_warps=safe_warps(tiles.sum_warps, x, y, out),
            **self.first,
        )
        if final:
            return
        constants = {"MP": features, "QUERIES": queries, "BD": padded, **self.pdl}
        columns, chunks_at_a_time = COMBINE_COLUMNS, COMBINE_CHUNKS
        if chunks > MANY_CHUNKS:
            columns, chunks_at_a_time = COMBINE_COLUMNS_OF_MANY, COMBINE_MANY_CHUNKS
        kernel = cumulative_sums_kernel if self.is_causal else combine_chunks_kernel
        if not self.is_causal:
            constants["CHUNKS"] = min(chunks_at_a_time, power_of_two(chunks))
        grid = (padded // columns, self.groups)
        launches.add(kernel, grid, (*parts, *results), (chunks,), BLOCK=columns, **constants)


def _forward_pass(
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
) -> Pass:
    """Launches of a forward pass; arguments as in `run_forward`."""
    plan = _Plan(query, key, value, projection, key_lengths, window, scale, cosh, is_causal)
    tiles, groups = plan.tiles, plan.groups
    outputs, tensors = describe_outputs(query, (("out", plan.length, plan.value_width),))
    tensors |= {"query": query, "key": key, "value": value}
    kept = plan.statistics(lse=statistics)
    workspace = BufferLayout() if statistics else kept
    layouts = (kept, workspace) if statistics else (workspace,)
    launches = LaunchSequence(("query", "key", "value", "projection", "key_lengths", "out"), layouts)
    workspace.add("counters", plan.num_parts // 2, dtype=torch.int32)
    if plan.low_rank:
        plan.add_kernels_of_sums(launches, workspace, tensors, queries=False)
    names = ("query", "key", "value", "out", "projection", "key_lengths")
    strides = row_strides(query, key, value, tensors["out"])
    if plan.low_rank and is_causal:
        launches.add(
            causal_fwd_kernel,
            (-(-plan.length // tiles.causal_rows), groups),
            (*names, "key_mean", "key_weight", "lse"),
            (*plan.lengths, plan.key_chunk, plan.key_chunks, *strides, *plan.scales),
            **plan.pair_constants,
            STATISTICS=statistics,
            BM=tiles.causal_rows,
            BN=tiles.causal_keys,
            num_warps=safe_warps(tiles.causal_warps, query, key, value, has_while_loop=True),
            **plan.pdl,
        )
    else:
        launches.add(
            attention_fwd_kernel,
            (-(-plan.query_tiles // tiles.query_tiles), groups),
            (
                *(*names, "key_mean", "key_weight", "key_norms", "lse"),
                *("fallback_flags", "fallback_sequences", "fallback_tiles"),
            ),
            (*plan.lengths, *strides, *plan.scales, eps),
            **plan.constants,
            BM=tiles.query_rows,
            BN=tiles.key_rows,
            WINDOW_TILES=tiles_of_windows(window, tiles.query_rows, tiles.key_rows),
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
    if plan.has_fallback:
        parts = plan.add_fallback_parts(workspace, plan.sizes["BD"], 2)
        launches.add(
            fallback_fwd_kernel,
            (FALLBACK_PROGRAMS * num_sms(plan.device),),
            (*names, "lse", "fallback_tiles", "counters", *parts),
            (*plan.lengths, plan.num_parts, *strides, *plan.scales),
            **plan.fallback_options(),
            STATISTICS=statistics,
        )
    return Pass(launches, outputs, layouts)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by the fused kernels; arguments are checked by `scatterbrain.ops.scatterbrain.triton.attention`.

    Args:
        query: (B, H, T, E), last dimension contiguous, as in key and value.
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projection (R, E), float32 or in the dtype of query; None for no low-rank part.
        key_lengths: (B,) integers; None for all keys.
        window: width W; 0 for no window.
        scale: softmax scale.
        cosh: take each row of the projection with both signs.
        is_causal: hide the keys j > i.
        eps: added to the normaliser; without window only.
        statistics: keep what the backward pass needs.

    Returns:
        Output (B, H, T, D), and what the backward pass needs, (bytes,) uint8, see `read_statistics`; empty without
        `statistics`.
    """
    tensors, options = (query, key, value, projection, key_lengths), (window, scale, cosh, is_causal, eps, statistics)
    (out,), buffers = launch(find_pass(_forward_pass, tensors, tiles_override(), *options), (), tensors)
    return out, buffers[0] if statistics else query.new_empty(0, dtype=torch.uint8)


fused_attention = torch.library.custom_op("scatterbrain::fused_attention", run_forward, mutates_args=())


@fused_attention.register_fake
def _(query, key, value, projection, key_lengths, window, scale, cosh, is_causal, eps, statistics):
    window = int(window)  # Dynamo passes a size that has changed since its last trace as a symbol
    plan = _Plan(query, key, value, projection, key_lengths, window, scale, cosh, is_causal)
    size, stride = by_token(*query.shape[:3], value.shape[3])
    nbytes = plan.statistics().nbytes if statistics else 0
    return query.new_empty_strided(size, stride), query.new_empty(nbytes, dtype=torch.uint8)


def read_statistics(statistics: torch.Tensor, *arguments: Any) -> dict[str, torch.Tensor]:
    """The tensors in the statistics of a forward pass by name, see `_Plan.statistics`, for inspection.

    Args:
        statistics: second result of `run_forward`.
        *arguments: what it got, from `query` to `is_causal`.
    """
    return _Plan(*arguments).statistics().views(statistics)


def _backward_pass(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    out: torch.Tensor,
    window: int,
    scale: float,
    cosh: bool,
    is_causal: bool,
) -> Pass:
    """Launches of a backward pass; arguments as in `run_backward`."""
    plan = _Plan(query, key, value, projection, key_lengths, window, scale, cosh, is_causal)
    tiles, groups = plan.tiles, plan.groups
    outputs, tensors = describe_outputs(
        query,
        (
            ("d_query", plan.length, plan.width),
            ("d_key", plan.num_keys, plan.width),
            ("d_value", plan.num_keys, plan.value_width),
        ),
    )
    tensors |= {"query": query, "key": key, "value": value, "gradient": gradient, "out": out}
    workspace = BufferLayout()
    layouts = (plan.statistics(), workspace)
    names = ("gradient", "query", "key", "value", "projection", "key_lengths", "out", "d_query", "d_key", "d_value")
    launches = LaunchSequence(names, layouts)
    workspace.add("delta", groups, plan.length)
    workspace.add("counters", plan.num_parts // 2, dtype=torch.int32)
    plan.add_sums(workspace, "query", plan.length, plan.query_chunks)
    if plan.low_rank:
        plan.add_kernels_of_sums(launches, workspace, tensors, queries=True)
    else:
        launches.add(
            bwd_preprocess_kernel,
            (-(-plan.length // PREPROCESS_ROWS), groups),
            ("out", "gradient", "delta"),
            (plan.heads, plan.length, *row_strides(out, gradient)),
            D=plan.sizes["D"],
            BD=plan.sizes["BD"],
            BM=PREPROCESS_ROWS,
            **plan.first,
        )
    inputs = ("query", "key", "value", "gradient")
    strides = row_strides(query, key, value, gradient)
    dq_tensors = (*inputs, "d_query", "projection", "key_lengths")
    dq_numbers = (*strides, *row_strides(tensors["d_query"]), *plan.scales)
    launches.add(
        attention_bwd_dq_kernel,
        (-(-plan.length // tiles.dq_rows), groups),
        (*dq_tensors, "key_mean", "key_weight", "key_norms", "lse", "delta"),
        (*plan.lengths, plan.key_chunk, plan.key_chunks, *dq_numbers),
        **plan.pair_constants,
        BM=tiles.dq_rows,
        BN=tiles.dq_keys,
        WINDOW_TILES=tiles_of_windows(window, tiles.dq_rows, tiles.dq_keys),
        STAGES=tiles.dq_stages,
        IS_CAUSAL=is_causal,
        LOW_RANK=plan.low_rank,
        num_warps=tiles.dq_warps,
        maxnreg=tiles.dq_registers,
        **plan.pdl,
    )
    if plan.has_fallback:
        parts = plan.add_fallback_parts(workspace, plan.sizes["BE"], plan.padded_features)
        launches.add(
            fallback_bwd_dq_kernel,
            (FALLBACK_PROGRAMS * num_sms(plan.device),),
            (*dq_tensors, "lse", "delta", "fallback_tiles", "counters", *parts),
            (*plan.lengths, plan.num_parts, *dq_numbers),
            **plan.fallback_options(),
        )
    dkdv_tensors = (*inputs, "d_key", "d_value", "projection", "key_lengths")
    dkdv_numbers = (*strides, *row_strides(tensors["d_key"], tensors["d_value"]), *plan.scales)
    launches.add(
        attention_bwd_dkdv_kernel,
        (-(-plan.num_keys // tiles.dk_rows), groups),
        (
            *(*dkdv_tensors, "query_mean", "query_weight", "delta_mean", "query_norms"),
            *("lse", "delta", "fallback_flags"),
        ),
        (*plan.lengths, plan.query_chunk, plan.query_chunks, *dkdv_numbers),
        **plan.pair_constants,
        BM=tiles.dk_queries,
        BN=tiles.dk_rows,
        WINDOW_TILES=tiles_of_windows(window, tiles.dk_rows, tiles.dk_queries),
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
        launches.add(
            fallback_bwd_dkdv_kernel,
            (FALLBACK_DKDV_PROGRAMS * num_sms(plan.device),),
            (*dkdv_tensors, "lse", "delta", "fallback_flags", "fallback_sequences"),
            (*plan.lengths, *dkdv_numbers),
            **plan.pair_constants,
            BM=FALLBACK_ROWS,
            BN=FALLBACK_DKDV_KEYS,
            TILE_ROWS=tiles.query_rows,
            num_warps=safe_warps(FALLBACK_DKDV_WARPS, query, key, value, gradient, has_while_loop=True),
            **plan.pdl,
        )
    return Pass(launches, outputs, (workspace,))


def run_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
    window: int,
    scale: float,
    cosh: bool,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; arguments as in `run_forward` and what it returned."""
    gradient = with_near_rows(gradient)
    inputs, options = (query, key, value, projection, key_lengths), (window, scale, cosh, is_causal)
    found = find_pass(_backward_pass, (gradient, *inputs, out), tiles_override(), *options)
    return tuple(launch(found, (gradient,), inputs, (out,), (statistics,))[0])


fused_attention_backward = torch.library.custom_op(
    "scatterbrain::fused_attention_backward", run_backward, mutates_args=()
)


@fused_attention_backward.register_fake
def _(gradient, query, key, value, projection, key_lengths, out, statistics, window, scale, cosh, is_causal):
    return tuple(x.new_empty_strided(*by_token(*x.shape)) for x in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, window, scale, cosh, is_causal, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # the statistics have none
    ctx.options = (window, scale, cosh, is_causal)


def _backward(ctx, gradient, _):
    gradients = torch.ops.scatterbrain.fused_attention_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return (*gradients, *[None] * 8)


fused_attention.register_autograd(_backward, setup_context=_setup_context)


OPERATOR = Operator(_forward_pass, _backward_pass, run_forward, run_backward, 4, tiles_override)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    *options: Any,
) -> torch.Tensor:
    """The output of `run_forward`: by the operator for `torch.compile` and tensor subclasses, else directly."""
    tensors = (query, key, value, projection, key_lengths)
    if needs_dispatcher(tensors):
        return fused_attention(*tensors, *options)[0]
    with device_of(query):
        if options[-1]:
            return FusedFunction.apply(*tensors, (OPERATOR, options, None, False))
        return run_forward(*tensors, *options)[0]
