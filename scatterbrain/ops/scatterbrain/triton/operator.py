"""The fused kernels as one `torch.library` operator with a backward: window, random features, or both.

Forward: sums over the keys (one kernel for the chunks, one to combine them), attention by tiles of queries, and the
tiles that need pairs. Backward: sums over the queries, the gradient of the queries, the gradients of the keys. Nothing
is summed by atomic operations: results are the same bit by bit from run to run.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from scatterbrain.ops.common.triton_functions import (
    device_of,
    multiprocessors,
    overlapped,
    precision_of_products,
    row_strides,
    safe_warps,
)
from scatterbrain.ops.common.windows import window_bounds
from scatterbrain.ops.scatterbrain.triton.backward import (
    delta_kernel,
    key_gradient_kernel,
    marked_key_gradient_kernel,
    marked_query_gradient_kernel,
    query_gradient_kernel,
)
from scatterbrain.ops.scatterbrain.triton.forward import attention_kernel
from scatterbrain.ops.scatterbrain.triton.pairs import causal_kernel, marked_kernel
from scatterbrain.ops.scatterbrain.triton.sums import combine_kernel, feature_sums_kernel, running_sums_kernel
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles, tiles_for

LOG2E = math.log2(math.e)
# A query's sum over all keys may be this many times its normaliser, and its relative error that many roundings: those
# of half precision (and of tf32), or of float32. Past it, its tile is computed from pairs. On the token stages of a
# trained T2T-ViT no tile is, on normal random queries and keys of width 64 hardly any.
CANCELLATION_LIMIT = 16.0
CANCELLATION_LIMIT_FLOAT32 = 64.0
# More features than this take a running maximum in the sums: without it their weights would not fit the registers.
ONLINE_FEATURES = 128
# Columns of the sums that one program combines, and chunks that it reads side by side.
COMBINE_COLUMNS, COMBINE_CHUNKS = 4, 32
# The same for many chunks. More than so many take no more than this part of the memory of q, k, v and the output.
CHUNKS_MEMORY = 1 / 32
MANY_CHUNKS, COMBINE_COLUMNS_OF_MANY, COMBINE_MANY_CHUNKS = 64, 2, 128
# Programs of the kernels for marked tiles on a multiprocessor, for queries and for keys: as many as there is room for.
# Nearly always they find nothing to do, at once.
MARKED_PROGRAMS, MARKED_KEY_PROGRAMS = 1, 2
# Queries and keys of a step, and warps for marked tiles. Rows divide those of the marks.
MARKED_ROWS, MARKED_KEYS, MARKED_WARPS = 16, 128, 8
# The keys of a marked tile are split into so many parts at most, each with a program, and not into less than a step.
MARKED_SPLITS = 64
# Parts of all marked tiles at most, and the most memory for them, of that of q, k, v and the output.
MARKED_PARTS, MARKED_MEMORY = 512, 1 / 50
# The same where a tile of many keys does not fit.
MARKED_KEYS_WIDE = 32
# Keys of a tile of their own gradient, and warps.
MARKED_KEY_ROWS, MARKED_KEY_WARPS = 64, 4
# Tiles of a chunk at least, and rows of a chunk at most with causal masking.
MIN_CHUNK_TILES, CAUSAL_CHUNK = 2, 256


class _Plan:
    """What all kernels of one call share: sizes, strides, constants.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: rows (R, E) in the dtype of query, None without a low-rank part.
        key_lengths: (B,) integers or None.
        window: width W, 0 for none.
        scale: softmax scale.
        cosh: take each row with both signs.
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
        rows = projection.shape[0] if projection is not None else 1
        features = rows * (2 if cosh else 1)
        self.padded_features = _padded(features)
        left, right = window_bounds(window)
        self.projection = query if projection is None else projection
        self.key_lengths = query if key_lengths is None else key_lengths
        self.has_lengths = key_lengths is not None
        self.precision = precision_of_products(self.dtype)
        self.feature_precision = "tf32" if self.dtype != torch.float32 else self.precision
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
        self.window_sizes = {"LEFT": left, "RIGHT": right}
        self.sizes = {
            "E": self.width,
            "BE": _padded(self.width),
            "D": self.value_width,
            "BD": _padded(self.value_width),
            "R": rows,
            "M": features,
            "MP": self.padded_features,
        }
        self.log_m = math.log2(features)
        # how kernels follow one another: all but the first take `overlapped`
        self.overlapped = overlapped(self.device)
        self.first = {"OVERLAP": self.overlapped["OVERLAP"]}
        self.scales = (math.sqrt(scale) * LOG2E, 0.5 * scale * LOG2E, scale * LOG2E)
        # both passes walk in the same chunks, so that the backward's sums fit the forward's
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
    def marked_keys(self) -> int:
        """Keys of a step for marked tiles."""
        narrow = self.dtype.itemsize == 2 and max(self.width, self.value_width, self.padded_features) <= 64
        return MARKED_KEYS if narrow else MARKED_KEYS_WIDE

    @property
    def splits(self) -> int:
        """Parts that the keys of a marked tile are split into at most."""
        return min(MARKED_SPLITS, -(-self.num_keys // self.marked_keys))

    @property
    def num_parts(self) -> int:
        """Parts of marked tiles, of MARKED_ROWS queries each, that there is memory for: a power of two, 0 for none."""
        if not self.marks:
            return 0
        sizes = self.sizes
        part = MARKED_ROWS * max(sizes["BD"] + 2, sizes["BE"] + sizes["MP"]) * torch.float32.itemsize
        rows = self.groups * (self.length + self.num_keys) / 2
        affordable = int(rows * self._bytes_of_row() * MARKED_MEMORY) // part
        return 1 << (min(MARKED_PARTS, max(2, affordable)).bit_length() - 1)

    def arrivals(self) -> torch.Tensor:
        """Memory in which the parts of each marked tile are counted; a tile that is split has two at least."""
        return self.empty(self.num_parts // 2, dtype=torch.int32)

    def window_tiles(self, rows: int, others: int) -> int:
        """Tiles of `others` keys that the windows of `rows` queries in a row touch."""
        return 0 if self.window == 0 else -(-(rows + self.window - 1) // others)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory on the device of the call."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def no_statistics(self) -> tuple[torch.Tensor, ...]:
        """What stands for the statistics where no backward pass will want them."""
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
        chunk: int,
        chunks: int,
        marked_sequences: torch.Tensor,
        marked_list: torch.Tensor,
        arrivals: torch.Tensor,
        backward: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Averages (..., BD, MP), log weights (..., MP), averages of delta (..., MP) and norms (G, N), see the kernel.

        Over keys, or over queries. Norms are empty where no window reads them.

        Args:
            x: keys, or queries.
            y: values, or gradients of the output.
            chunk: rows of a chunk.
            chunks: number of chunks.
            marked_sequences: (1 + 2 G,), see the kernels.
            marked_list: (1 + G tiles,), see the kernels.
            arrivals: (parts / 2,), see the kernels.
            backward: for queries, `out`, `normaliser`, `delta` (written), `marked`.
        """
        tiles, features, padded = self.tiles, self.padded_features, self.sizes["BD"]
        queries = backward is not None
        final = chunks == 1 and not self.is_causal
        states = self.state_shape(chunks)
        mean = self.empty(*states, padded, features, dtype=self.dtype)
        weight = self.empty(*states, features)
        extra = self.empty(*states, features) if queries else weight
        parts = (mean, weight, extra, weight)
        if not final:
            parts = (
                self.empty(self.groups, chunks, padded, features),
                self.empty(self.groups, chunks, features),
                self.empty(self.groups, chunks, features) if queries else weight,
                self.empty(self.groups, chunks, features),
            )
        length = x.shape[2]
        norms = self.norms(length)
        out = backward["out"] if queries else y
        feature_sums_kernel[(chunks, self.groups)](
            x,
            y,
            out,
            self.projection,
            self.key_lengths,
            backward["normaliser"] if queries else weight,
            backward["delta"] if queries else weight,
            norms,
            backward["marked"] if queries else weight,
            marked_sequences,
            marked_list,
            arrivals,
            *parts,
            self.heads,
            length,
            self.num_marks,
            chunk,
            chunk // tiles.sum_rows,
            *row_strides(x, y, out),
            *self.scales[:2],
            **self.sizes,
            BN=tiles.sum_rows,
            EVEN=length % chunk == 0 and (queries or not self.has_lengths),
            HAS_LENGTHS=self.has_lengths and not queries,
            QUERIES=queries,
            NORMS=norms.numel() > 0,
            LOG_M=self.log_m,
            MARKS=self.marks,
            MARK_ROWS=tiles.query_rows,
            ARRIVALS=arrivals.numel(),
            FINAL=final,
            PRECISION=self.precision,
            STAGES=tiles.sum_stages,
            ONLINE=self.dtype == torch.float16 or features > ONLINE_FEATURES,
            num_warps=safe_warps(tiles.sum_warps, x, y, out),
            **self.first,
        )
        if final:
            return mean, weight, extra, norms
        columns, side_by_side = COMBINE_COLUMNS, COMBINE_CHUNKS
        if chunks > MANY_CHUNKS:
            columns, side_by_side = COMBINE_COLUMNS_OF_MANY, COMBINE_MANY_CHUNKS
        arguments = (*parts, mean, weight, extra, chunks)
        sizes = {"BD": padded, "DB": columns, "MP": features, "HAS_EXTRA": queries, **self.overlapped}
        grid = (padded // columns, self.groups)
        if self.is_causal:
            running_sums_kernel[grid](*arguments, **sizes, REVERSE=queries)
        else:
            combine_kernel[grid](*arguments, **sizes, CB=min(side_by_side, _power_of_two(chunks)))
        return mean, weight, extra, norms

    def norms(self, length: int) -> torch.Tensor:
        """Memory for a norm of each row, where the window of a low-rank part reads it."""
        return self.empty(*((self.groups, length) if self.low_rank and self.window > 0 else (0,)))

    @property
    def marks(self) -> bool:
        """Whether the forward pass marks tiles."""
        return self.low_rank and self.window > 0 and not self.is_causal

    @property
    def num_marks(self) -> int:
        """Tiles of queries of a sequence that can be marked."""
        return -(-self.length // self.tiles.query_rows)

    def mark_memory(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Memory for marks (G, tiles), sequences with any (1 + 2 G,), and the list of marks (1 + G tiles,)."""
        tiles = self.groups * self.num_marks
        return (
            self.empty(self.groups, self.num_marks if self.marks else 0, dtype=torch.int8),
            self.empty(1 + 2 * self.groups if self.marks else 0, dtype=torch.int32),
            self.empty(1 + tiles if self.marks else 0, dtype=torch.int32),
        )

    def common(self) -> dict[str, Any]:
        """Constants that all attention kernels take."""
        return {
            **self.sizes,
            **self.window_sizes,
            "HAS_LENGTHS": self.has_lengths,
            "IS_CAUSAL": self.is_causal,
            "PRECISION": self.precision,
        }


def _padded(width: int) -> int:
    """Sizes of a matrix product: powers of two, 16 at least."""
    return max(16, _power_of_two(width))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`; Triton's own takes the host ten times as long."""
    return 1 << (number - 1).bit_length()


def _like(x: torch.Tensor, width: int) -> torch.Tensor:
    """Memory (B, H, N, width) in which the heads of a token lie beside one another, as the model wants them."""
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
        projection: rows (R, E) in the dtype of query; None for no low-rank part.
        key_lengths: (B,) integers; None for all keys.
        window: width W; 0 for no window.
        scale: softmax scale.
        cosh: take each row with both signs.
        is_causal: hide the keys j > i.
        eps: added to the normaliser; without window only.
        statistics: keep what the backward pass needs.

    Returns:
        Output (B, H, T, D), and what the backward pass needs, empty without `statistics`: normalisers (G, T) in log2,
        marks (G, tiles), sequences with any (1 + 2 G,), their list (1 + G tiles,), sums over keys, log weights and
        the keys' norms, see `scatterbrain.ops.scatterbrain.triton.sums`.
    """
    plan = _Plan(query, key, value, projection, key_lengths, window, scale, cosh, is_causal)
    tiles, groups = plan.tiles, plan.groups
    out = _like(query, plan.value_width)
    normaliser = plan.empty(groups, plan.length) if statistics else plan.empty(0)
    marked, marked_sequences, marked_list = plan.mark_memory()  # zeroed by the sums, where they are wanted
    arrivals = plan.arrivals()
    mean, weight, norms = plan.empty(0), plan.empty(0), plan.empty(0)
    if plan.low_rank:
        mean, weight, _, norms = plan.sums(
            key, value, plan.key_chunk, plan.key_chunks, marked_sequences, marked_list, arrivals
        )
    tensors = (query, key, value, out, plan.projection, plan.key_lengths, mean, weight, norms, normaliser)
    strides = row_strides(query, key, value, out)
    tiles_in_all = -(-plan.length // tiles.query_rows)
    if not (plan.low_rank and is_causal):
        window_tiles = plan.window_tiles(tiles.query_rows, tiles.key_rows)
        attention_kernel[(-(-tiles_in_all // tiles.query_tiles), groups)](
            *tensors,
            *(marked, marked_sequences, marked_list),
            plan.heads,
            plan.length,
            plan.num_keys,
            *strides,
            *plan.scales,
            plan.log_m,
            eps,
            **plan.common(),
            BM=tiles.query_rows,
            BN=tiles.key_rows,
            WINDOW_TILES=window_tiles,
            TILES=tiles.query_tiles,
            EVEN=plan.length % (tiles.query_rows * tiles.query_tiles) == 0,
            LOW_RANK=plan.low_rank,
            STATISTICS=statistics,
            HAS_EPS=eps > 0,
            LIMIT=plan.limit,
            ONLINE=not plan.low_rank or plan.dtype == torch.float16,
            STAGES=tiles.query_stages,
            num_warps=tiles.query_warps,
            maxnreg=tiles.query_registers,
            **(plan.overlapped if plan.low_rank else plan.first),
        )
    common = {**plan.common(), "FEATURE_PRECISION": plan.feature_precision, "STATISTICS": statistics}
    del common["IS_CAUSAL"]
    if plan.low_rank and is_causal:
        causal_kernel[(-(-plan.length // tiles.causal_rows), groups)](
            *(query, key, value, out, plan.projection, plan.key_lengths, mean, weight, normaliser),
            *(plan.heads, plan.length, plan.num_keys, plan.key_chunk, plan.key_chunks),
            *strides,
            *plan.scales,
            plan.log_m,
            **common,
            BM=tiles.causal_rows,
            BN=tiles.causal_keys,
            num_warps=safe_warps(tiles.causal_warps, query, key, value),
            **plan.overlapped,
        )
    if plan.marks:
        parts = (plan.num_parts, MARKED_ROWS)
        marked_kernel[(MARKED_PROGRAMS * multiprocessors(plan.device),)](
            *(query, key, value, out, plan.projection, plan.key_lengths, normaliser),
            *(marked_list, arrivals, plan.empty(*parts, plan.sizes["BD"]), plan.empty(2, *parts)),
            *(plan.heads, plan.length, plan.num_keys, plan.num_parts),
            *strides,
            *plan.scales,
            plan.log_m,
            **common,
            BM=MARKED_ROWS,
            BN=plan.marked_keys,
            MAX_SPLITS=plan.splits,
            MARK_ROWS=tiles.query_rows,
            num_warps=MARKED_WARPS,
            **plan.overlapped,
        )
    if not statistics:
        return out, *plan.no_statistics()
    return out, normaliser, marked, marked_sequences, marked_list, mean, weight, norms


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
    marks = plan.mark_memory()
    return out, plan.empty(plan.groups, plan.length), *marks, mean, weight, plan.norms(plan.num_keys)


def run_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    out: torch.Tensor,
    normaliser: torch.Tensor,
    marked: torch.Tensor,
    marked_sequences: torch.Tensor,
    marked_list: torch.Tensor,
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
    delta = plan.empty(groups, plan.length)
    mean = weight = extra = norms = key_mean
    arrivals = plan.arrivals()
    if plan.low_rank:
        kept = {"out": out, "normaliser": normaliser, "delta": delta, "marked": marked}
        mean, weight, extra, norms = plan.sums(
            query, gradient, plan.query_chunk, plan.query_chunks, marked_sequences, marked_list, arrivals, kept
        )
    else:
        delta_kernel[(-(-plan.length // 64), groups)](
            out,
            gradient,
            delta,
            plan.heads,
            plan.length,
            *row_strides(out, gradient),
            D=plan.sizes["D"],
            BD=plan.sizes["BD"],
            BM=64,
            **plan.first,
        )
    d_query, d_key, d_value = _like(query, plan.width), _like(key, plan.width), _like(value, plan.value_width)
    common = {**plan.common(), "LOW_RANK": plan.low_rank, "FEATURE_PRECISION": plan.feature_precision}
    strides = row_strides(query, key, value, gradient)
    query_tiles = -(-plan.length // tiles.dq_rows)
    of_queries = (query, key, value, gradient, d_query, plan.projection, plan.key_lengths)
    lengths = (plan.heads, plan.length, plan.num_keys)
    numbers = (*strides, *row_strides(d_query), *plan.scales, plan.log_m, 1 / LOG2E)
    query_gradient_kernel[(query_tiles, groups)](
        *of_queries,
        *(key_mean, key_weight, key_norms, normaliser, delta),
        *lengths,
        *(plan.key_chunk, plan.key_chunks),
        *numbers,
        **common,
        BM=tiles.dq_rows,
        BN=tiles.dq_keys,
        WINDOW_TILES=plan.window_tiles(tiles.dq_rows, tiles.dq_keys),
        STAGES=tiles.dq_stages,
        num_warps=tiles.dq_warps,
        maxnreg=tiles.dq_registers,
        **plan.overlapped,
    )
    of_pairs = {name: value for name, value in common.items() if name not in ("IS_CAUSAL", "LOW_RANK")}
    if plan.marks:
        parts = (plan.num_parts, MARKED_ROWS)
        marked_query_gradient_kernel[(MARKED_PROGRAMS * multiprocessors(plan.device),)](
            *of_queries,
            *(normaliser, delta, marked_list, arrivals),
            *(plan.empty(*parts, plan.sizes["BE"]), plan.empty(*parts, plan.padded_features)),
            *lengths,
            plan.num_parts,
            *numbers,
            **of_pairs,
            BM=MARKED_ROWS,
            BN=plan.marked_keys,
            MAX_SPLITS=plan.splits,
            MARK_ROWS=tiles.query_rows,
            num_warps=MARKED_WARPS,
            **plan.overlapped,
        )
    key_tiles = -(-plan.num_keys // tiles.dk_rows)
    tensors = (query, key, value, gradient, d_key, d_value, plan.projection, plan.key_lengths)
    statistics = (normaliser, delta, marked)
    numbers = (*strides, *row_strides(d_key, d_value), *plan.scales, plan.log_m, 1 / LOG2E)
    sizes = {
        "BN": tiles.dk_rows,
        "BM": tiles.dk_queries,
        "num_warps": tiles.dk_warps,
        "maxnreg": tiles.dk_registers,
    }
    key_gradient_kernel[(key_tiles, groups)](
        *tensors,
        *(mean, weight, extra, norms),
        *statistics,
        *lengths,
        *(plan.query_chunk, plan.query_chunks),
        *numbers,
        **common,
        **sizes,
        WINDOW_TILES=plan.window_tiles(tiles.dk_rows, tiles.dk_queries),
        STAGES=tiles.dk_stages,
        MARKS=plan.marks,
        MARK_ROWS=tiles.query_rows,
        **plan.overlapped,
    )
    if plan.marks:
        marked_key_gradient_kernel[(MARKED_KEY_PROGRAMS * multiprocessors(plan.device),)](
            *tensors,
            *statistics,
            marked_sequences,
            *lengths,
            *numbers,
            **of_pairs,
            BN=MARKED_KEY_ROWS,
            BM=MARKED_ROWS,
            MARK_ROWS=tiles.query_rows,
            num_warps=safe_warps(MARKED_KEY_WARPS, query, key, value, gradient),
            **plan.overlapped,
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
    normaliser,
    marked,
    marked_sequences,
    marked_list,
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
    """The output of `run_forward`, by the shortest way there is from where it is called."""
    if torch.compiler.is_compiling() or any(
        isinstance(x, torch.Tensor) and type(x) not in (torch.Tensor, torch.nn.Parameter) for x in inputs
    ):
        return fused_attention(*inputs)[0]
    with device_of(inputs[0]):
        statistics = inputs[-1]
        return FusedAttention.apply(*inputs)[0] if statistics else run_forward(*inputs)[0]
