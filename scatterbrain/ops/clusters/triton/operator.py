"""The landmark kernels as one `torch.library` operator with a backward.

Forward: initial centroids, Lloyd steps, sums over clusters, attention by tiles of queries. Backward: gradients of the
queries, of the landmarks, of the keys and values. Nothing is summed by atomic operations: results are the same bit by
bit from run to run.
"""

from __future__ import annotations

from typing import Any

import torch

from scatterbrain.ops.clusters.steps import KEYS_PER_CLUSTER, STEP_EVERY, sample_of, step_sample
from scatterbrain.ops.clusters.triton.bwd import (
    landmark_bwd_combine_kernel,
    landmark_bwd_dkdv_kernel,
    landmark_bwd_dq_kernel,
    landmark_bwd_sums_kernel,
    landmark_bwd_window_kernel,
)
from scatterbrain.ops.clusters.triton.fwd import landmark_fwd_kernel
from scatterbrain.ops.clusters.triton.kmeans import (
    assign_kernel,
    cluster_sums_kernel,
    combine_kernel,
    start_kernel,
    sum_chunks_kernel,
)
from scatterbrain.ops.clusters.triton.tiles import tiles_for, tiles_override, window_band
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
    has_vector_loads,
    pdl_options,
    precision_of_products,
    row_strides,
)
from scatterbrain.ops.common.windows import tiles_of_windows, window_bounds

# More chunks than MANY_CHUNKS are added up by two kernels, for enough programs: the first leaves FEW_CHUNKS sums, and a
# program of it has SUM_BLOCK elements.
MANY_CHUNKS, FEW_CHUNKS, SUM_BLOCK = 32, 8, 1024
# Up to this many tiles of a window are unrolled.
MAX_UNROLLED = 3


class LandmarkPlan:
    """What all kernels of one call share: sizes, strides, constants; arguments as in `run_forward`.

    Args:
        per_cluster: visible keys per cluster from which on centroids are found from one key of `sample`, see
            `sample_of`.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_landmarks: int,
        window: int,
        scale: float,
        num_steps: int,
        per_cluster: int = KEYS_PER_CLUSTER,
    ) -> None:
        self.batch, self.heads, self.length, self.width = query.shape
        self.num_keys, self.value_width = value.shape[2:]
        self.groups = self.batch * self.heads
        self.device, self.dtype = query.device, query.dtype
        self.num_landmarks, self.num_steps, self.per_cluster = num_landmarks, num_steps, per_cluster
        self.sample = sample_of(self.num_keys, num_landmarks, per_cluster)
        self.has_labels = labels is not None
        # name of the clusters' tensor
        self.labels = "given_labels" if self.has_labels else "labels"
        widths = padded_width(self.width), padded_width(self.value_width)
        self.tiles = tiles_for(max(widths), num_landmarks, self.num_keys, self.sample, window, self.dtype, self.device)
        self.block = min(self.tiles.block, max(self.tiles.min_block, padded_width(num_landmarks)))
        self.blocks = -(-num_landmarks // self.block)
        self.padded = self.blocks * self.block
        left, right = window_bounds(window)
        self.widths = {"E": self.width, "BE": widths[0], "D": self.value_width, "BD": widths[1]}
        self.lengths = {"HAS_LENGTHS": key_lengths is not None}
        self.precision = {"PRECISION": precision_of_products(self.dtype)}
        self.blocked = {"MB": self.block, "MP": self.padded}
        self.query_blocked = {"MB": min(self.tiles.query_block, self.block), "MP": self.padded}
        self.in_window = {"LEFT": left, "RIGHT": right, **self.lengths, **self.precision}
        self.numbers = (self.heads, self.length, self.num_keys, num_landmarks)
        self.qk_scale, self.scale = scale * LOG2E, scale
        self.pdl = pdl_options(self.device)
        self.first = {"PDL": self.pdl["PDL"]}

    def chunks(self, length: int, rows: int, programs: int, blocks: int | None = None) -> tuple[int, int]:
        """Rows of a chunk, a multiple of the tile, and number of chunks, with a program for each of so many blocks."""
        tiles = -(-length // rows)
        wanted = max(1, programs // (self.groups * (blocks or self.blocks)))
        per_chunk = -(-tiles // min(wanted, tiles))
        return per_chunk * rows, -(-tiles // per_chunk)

    @property
    def stretch(self) -> int:
        """Largest number of keys of which one is chosen as an initial centroid."""
        stretch = -(-self.num_keys // (self.sample * self.num_landmarks))
        return max(stretch, self.per_cluster) if self.has_short_sequences else stretch

    def start_options(self, most_rows: int = 128) -> dict[str, Any]:
        """Options of `start_kernel`, with steps of at most so many keys."""
        rows = min(most_rows, self.tiles.start_rows, max(16, power_of_two(self.stretch)))
        one_tile = self.stretch <= rows
        pair = one_tile and rows <= self.tiles.start_pair_rows
        options = {"MP": self.padded, "BN": rows, "ONE_TILE": one_tile, "PAIR": pair, **self.lengths}
        return {**options, "EVERY": self.sample, "PER_CLUSTER": self.per_cluster}

    @property
    def has_short_sequences(self) -> bool:
        """Whether centroids may be found from all keys of some sequences, and from a sample of others."""
        return self.sample > 1 and self.lengths["HAS_LENGTHS"]

    def step_options(self) -> dict[str, Any]:
        """Options of the sums of a Lloyd step."""
        return {"EVERY": step_sample(self.sample), "LEAST": STEP_EVERY, "PER_CLUSTER": self.per_cluster}

    @property
    def keys_of_steps(self) -> int:
        """Largest number of keys of a sequence that a Lloyd step takes."""
        most = -(-self.num_keys // step_sample(self.sample))
        return max(most, -(-self.per_cluster * self.num_landmarks // STEP_EVERY)) if self.has_short_sequences else most

    def chunks_of_steps(self) -> tuple[int, int]:
        """Rows of a chunk of a Lloyd step, and number of chunks: as many as for all keys, which are more."""
        rows = self.tiles.sum_rows
        _, chunks = self.chunks(self.num_keys, rows, self.tiles.sum_programs)
        return -(-self.keys_of_steps // (chunks * rows)) * rows, chunks

    @property
    def parts(self) -> int:
        """Parts in which the scores of a block are computed, see `cluster_sums_kernel`."""
        return 2 if self.block >= 64 else 1

    @property
    def rows_of_sums(self) -> int:
        """Rows of the sums of a chunk: keys, values, numbers of members."""
        return self.widths["BE"] + self.widths["BD"] + 1

    def add_sum_of_chunks(self, launches: LaunchSequence, chunks: int, sums: str = "sums") -> int:
        """Number of sums that are left after a kernel that adds up more than `MANY_CHUNKS` to `FEW_CHUNKS`."""
        if chunks <= MANY_CHUNKS:
            return chunks
        size = self.rows_of_sums * self.padded
        launches.add(
            sum_chunks_kernel,
            (-(-size // SUM_BLOCK), FEW_CHUNKS, self.groups),
            (sums,),
            (chunks,),
            SIZE=size,
            BLOCK=SUM_BLOCK,
            CHUNKS=FEW_CHUNKS,
            num_warps=4,
            **self.pdl,
        )
        return FEW_CHUNKS

    def clusters(self, prefix: str = "") -> BufferLayout:
        """What the attention and the backward pass read of the clusters: the first parts of `statistics`."""
        layout = BufferLayout()
        layout.add(prefix + "centre", self.groups, self.widths["BE"])
        layout.add(prefix + "landmarks", self.groups, self.num_landmarks, self.width, dtype=self.dtype)
        layout.add(prefix + "mean_values", self.groups, self.num_landmarks, self.value_width, dtype=self.dtype)
        layout.add(prefix + "log_counts", self.groups, self.padded)
        labels = (0,) if self.has_labels else (self.groups, self.num_keys)
        layout.add(prefix + "labels", *labels, dtype=torch.int16)
        return layout

    def statistics(self, prefix: str = "") -> BufferLayout:
        """What the attention and the backward pass read of the clusters, and log normalisers of the queries."""
        layout = self.clusters(prefix)
        layout.add(prefix + "lse", self.groups, self.length)
        return layout

    def sums(self, chunks: int, prefix: str = "") -> BufferLayout:
        """Memory for the sums of each chunk."""
        layout = BufferLayout()
        layout.add(prefix + "sums", self.groups, chunks, self.rows_of_sums, self.padded)
        return layout


def start_programs(num_landmarks: int, options: dict[str, Any]) -> int:
    """Programs of `start_kernel` for a sequence, by its options."""
    return -(-num_landmarks // 2) if options["PAIR"] else num_landmarks


def cluster_layouts(plan: LandmarkPlan, prefix: str = "") -> tuple[BufferLayout, BufferLayout, BufferLayout]:
    """Layouts of the statistics, of the workspace and of the sums of `add_cluster_kernels`.

    Args:
        plan: of the call.
        prefix: of the names of their parts.
    """
    _, chunks = plan.chunks(plan.num_keys, plan.tiles.sum_rows, plan.tiles.sum_programs)
    workspace = BufferLayout()
    workspace.add(prefix + "bias", plan.groups, plan.padded)
    return plan.statistics(prefix), workspace, plan.sums(chunks, prefix)


def add_cluster_kernels(
    launches: LaunchSequence,
    plan: LandmarkPlan,
    key: torch.Tensor,
    value: torch.Tensor | None,
    prefix: str = "",
    names: tuple[str, str, str] = ("key", "value", "key_lengths"),
    has_centroids: bool = False,
    leaves_sums: bool = False,
) -> tuple[int, int]:
    """Number of chunks of the sums, and of those still to add up, of kernels that find clusters or take given ones.

    Args:
        launches: to which they are appended, with the layouts of `cluster_layouts`.
        plan: of the call.
        key: (B, H, S, E).
        value: (B, H, S, D); None where centroids are all that is wanted. Then other kernels come first.
        prefix: of the names of the parts of the layouts.
        names: of keys, values and lengths.
        has_centroids: kernels before have found the centroids; only the clusters and their means are missing.
        leaves_sums: what the last `combine_kernel` does is left to a kernel that comes next; 0 chunks are left where
            there is nothing to do.
    """
    tiles = plan.tiles
    chunk, chunks = plan.chunks(plan.num_keys, tiles.sum_rows, tiles.sum_programs)
    step_chunk, _ = plan.chunks_of_steps()
    has_values = value is not None
    key_strides, value_strides = row_strides(key), row_strides(value if has_values else key)
    key_numbers = (plan.heads, plan.num_keys, plan.num_landmarks)
    key_widths = {"E": plan.width, "BE": plan.widths["BE"]}
    labels = plan.labels if plan.has_labels else prefix + plan.labels
    centre, landmarks, bias, *means = (
        prefix + name for name in ("centre", "landmarks", "bias", "mean_values", "log_counts")
    )
    sums = prefix + "sums"
    results = (centre, landmarks, bias, *means)
    key_name, value_name, lengths = names
    if not has_centroids:
        start = plan.start_options()
        launches.add(
            start_kernel,
            (start_programs(plan.num_landmarks, start), plan.groups),
            (key_name, lengths, centre, landmarks, bias),
            (*key_numbers, *key_strides),
            **key_widths,
            **start,
            FIRST=has_values,
            num_warps=tiles.start_warps,
            **(plan.first if has_values else plan.pdl),
        )

    assign = not plan.has_labels and plan.blocks == 1
    steps = range(1 if plan.has_labels else plan.num_steps + has_values)
    # where a program has a whole sequence, the last launch makes all steps
    fused = plan.num_steps if assign and has_values and chunks == 1 and not has_centroids else 0
    of_steps = plan.step_options()
    for step in steps[-1:] if has_centroids or fused else steps:
        last = plan.has_labels or step == plan.num_steps
        num_keys = plan.num_keys if last else plan.keys_of_steps
        every = {**of_steps, "EVERY": 1, "LEAST": 1} if last else of_steps
        if not plan.has_labels and not assign:
            launches.add(
                assign_kernel,
                (-(-num_keys // tiles.assign_rows), plan.groups),
                (key_name, lengths, landmarks, bias, labels),
                (*key_numbers, *key_strides),
                **key_widths,
                **plan.blocked,
                BN=tiles.assign_rows,
                **every,
                **plan.lengths,
                **plan.precision,
                num_warps=tiles.assign_warps,
                **plan.pdl,
            )
        launches.add(
            cluster_sums_kernel,
            (chunks, plan.groups, plan.blocks),
            (key_name, value_name, lengths, labels, sums, *results),
            (*key_numbers, chunk if last else step_chunk, step_chunk, *key_strides, *value_strides),
            **plan.widths,
            **plan.blocked,
            BN=tiles.sum_rows,
            ASSIGN=assign,
            LAST=last,
            FINAL=chunks == 1,
            **every,
            STEPS=fused,
            STEP_EVERY=of_steps["EVERY"],
            STEP_LEAST=of_steps["LEAST"],
            PARTS=plan.parts,
            **plan.lengths,
            **plan.precision,
            STAGES=tiles.sum_stages,
            num_warps=tiles.sum_warps,
            **plan.pdl,
        )
        if chunks > 1:
            left = plan.add_sum_of_chunks(launches, chunks, sums)
            if last and leaves_sums:
                return chunks, left
            launches.add(
                combine_kernel,
                (-(-plan.padded // tiles.combine_landmarks), plan.groups),
                (sums, *results),
                (plan.num_landmarks, left, chunks),
                **plan.widths,
                MP=plan.padded,
                BLOCK=tiles.combine_landmarks,
                LAST=last,
                num_warps=4,
                **plan.pdl,
            )
    return chunks, 0


def _of_queries(plan: LandmarkPlan, clusters: int) -> tuple[str, str]:
    """Names of the query clusters and of the key clusters that they take; without `clusters`, of an unread tensor."""
    return ("query_labels", "taken_words") if clusters else (plan.labels, plan.labels)


def add_attention_kernel(
    launches: LaunchSequence,
    plan: LandmarkPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    window: int,
    statistics: bool,
    clusters: int = 0,
) -> None:
    """Kernel that computes the output from the statistics.

    Args:
        launches: to which it is appended.
        plan: of the call.
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        out: (B, H, T, D).
        window: width W.
        statistics: compute log normalisers.
        clusters: number of query clusters; what they take of the key clusters is left out. 0 for none.
    """
    tiles = plan.tiles
    window_tiles = tiles_of_windows(window, tiles.query_rows, tiles.key_rows)
    band = window_band(window)
    launches.add(
        landmark_fwd_kernel,
        (-(-plan.length // (tiles.query_rows * tiles.query_tiles)), plan.groups),
        (
            *("query", "key", "value", "out", "key_lengths"),
            *("centre", "landmarks", "mean_values", "log_counts", plan.labels, "lse", *_of_queries(plan, clusters)),
        ),
        (*plan.numbers, *row_strides(query, key, value, out), plan.qk_scale),
        **plan.widths,
        **plan.query_blocked,
        BM=tiles.query_rows,
        BN=tiles.key_rows,
        **plan.in_window,
        WINDOW_TILES=window_tiles,
        BAND=band if band <= tiles.band else 0,
        UNROLLED=window_tiles if window_tiles <= MAX_UNROLLED else 0,
        QUERY_TILES=tiles.query_tiles,
        STAGES=tiles.query_stages,
        STATISTICS=statistics,
        CLUSTERS=clusters,
        num_warps=tiles.query_warps,
        maxnreg=tiles.query_registers,
        **plan.pdl,
    )


def _forward_pass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_landmarks: int,
    window: int,
    scale: float,
    num_steps: int,
    statistics: bool,
) -> Pass:
    """Launches of a forward pass; arguments as in `run_forward`."""
    plan = LandmarkPlan(query, key, value, key_lengths, labels, num_landmarks, window, scale, num_steps)
    outputs, tensors = describe_outputs(query, (("out", plan.length, plan.value_width),))
    names = ("query", "key", "value", "key_lengths", "given_labels", "out")
    *layouts, scratch = cluster_layouts(plan)
    launches = LaunchSequence(names, (*layouts, scratch))
    add_cluster_kernels(launches, plan, key, value)
    add_attention_kernel(launches, plan, query, key, value, tensors["out"], window, statistics)
    return Pass(launches, outputs, tuple(layouts), scratch)


def _cluster_pass(key: torch.Tensor, key_lengths: torch.Tensor | None, num_landmarks: int, num_steps: int) -> Pass:
    """Launches that find the clusters of keys; arguments as in `run_clusters`."""
    plan = LandmarkPlan(key, key, key, key_lengths, None, num_landmarks, 0, 1.0, num_steps)
    layouts = cluster_layouts(plan)
    launches = LaunchSequence(("key", "value", "key_lengths"), layouts)
    add_cluster_kernels(launches, plan, key, key)
    return Pass(launches, ((), ()), layouts)


def run_clusters(
    key: torch.Tensor, key_lengths: torch.Tensor | None, num_landmarks: int, num_steps: int
) -> torch.Tensor:
    """Clusters (B, H, S) int16 of the keys, -1 for hidden ones; arguments as in `run_forward`."""
    key = with_vector_loads(key)
    found = find_pass(_cluster_pass, (key, key_lengths), tiles_override(), num_landmarks, num_steps)
    with device_of(key):
        _, buffers = launch(found, (), (key, key, key_lengths))
    return found.layouts[0].views(buffers[0])["labels"].view(key.shape[:3]).clone()


def with_vector_loads(x: torch.Tensor) -> torch.Tensor:
    """The rows of (B, H, N, E), copied where Triton could not tell that they can be read 16 bytes at a time."""
    x = with_near_rows(x)
    return x if has_vector_loads(x) else x.clone(memory_format=torch.contiguous_format)


def run_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_landmarks: int,
    window: int,
    scale: float,
    num_steps: int,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmark attention by the kernels; arguments are checked by `scatterbrain.ops.clusters.triton.attention`.

    Args:
        query: (B, H, T, E), E a multiple of 16, as D is.
        key: (B, H, S, E).
        value: (B, H, S, D).
        key_lengths: (B,) integers; None for all keys.
        labels: (B, H, S) int16, cluster of each key, -1 for hidden ones; None to find clusters.
        num_landmarks: number of clusters M, at most S.
        window: width W; 0 for no window.
        scale: softmax scale.
        num_steps: Lloyd steps.
        statistics: compute log normalisers, which the backward pass needs, too.

    Returns:
        Output (B, H, T, D), and statistics (bytes,) uint8, see `LandmarkPlan.statistics`.
    """
    query, key, value = (with_vector_loads(x) for x in (query, key, value))
    inputs = (query, key, value, key_lengths, labels)
    found = find_pass(_forward_pass, inputs, tiles_override(), num_landmarks, window, scale, num_steps, statistics)
    (out,), buffers = launch(found, (), inputs)
    return out, buffers[0]


fused_landmark_attention = torch.library.custom_op(
    "scatterbrain::fused_landmark_attention", run_forward, mutates_args=()
)


@fused_landmark_attention.register_fake
def _(query, key, value, key_lengths, labels, num_landmarks, window, scale, num_steps, statistics):
    # int: Dynamo passes a size that has changed since its last trace as a symbol
    num_landmarks, window = int(num_landmarks), int(window)
    plan = LandmarkPlan(query, key, value, key_lengths, labels, num_landmarks, window, scale, num_steps)
    size, stride = by_token(*query.shape[:3], value.shape[3])
    return query.new_empty_strided(size, stride), query.new_empty(plan.statistics().nbytes, dtype=torch.uint8)


def gradient_layouts(plan: LandmarkPlan) -> tuple[BufferLayout, BufferLayout]:
    """Layouts of the workspace and of the sums of `add_gradient_kernels`."""
    _, chunks = plan.chunks(plan.length, plan.tiles.landmark_rows, plan.tiles.landmark_programs)
    workspace = BufferLayout()
    workspace.add("dots", plan.groups, plan.length)
    workspace.add("offsets", plan.groups, plan.length)
    workspace.add("d_landmarks", plan.groups, plan.num_landmarks, plan.width, dtype=plan.dtype)
    workspace.add("d_mean_values", plan.groups, plan.num_landmarks, plan.value_width, dtype=plan.dtype)
    return workspace, plan.sums(chunks)


def add_gradient_kernels(
    launches: LaunchSequence,
    plan: LandmarkPlan,
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    outputs: dict[str, torch.Tensor],
    window: int,
    clusters: int = 0,
) -> None:
    """Kernels that compute the gradients from the statistics.

    Args:
        launches: to which they are appended, with the layouts of `gradient_layouts`.
        plan: of the call.
        gradient: of the output, (B, H, T, D).
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        out: (B, H, T, D).
        outputs: the gradients, by name.
        window: width W.
        clusters: number of query clusters; what they take of the key clusters is left out. 0 for none.
    """
    tiles, groups = plan.tiles, plan.groups
    chunk, chunks = plan.chunks(plan.length, tiles.landmark_rows, tiles.landmark_programs)
    of_queries = _of_queries(plan, clusters)
    launches.add(
        landmark_bwd_dq_kernel,
        (-(-plan.length // tiles.dq_rows), groups),
        (
            *("query", "key", "value", "out", "gradient", "d_query", "key_lengths"),
            *("centre", "landmarks", "mean_values", "log_counts", plan.labels, "lse", "dots", "offsets", *of_queries),
        ),
        (
            *plan.numbers,
            *row_strides(query, key, value, out, gradient, outputs["d_query"]),
            *(plan.qk_scale, plan.scale),
        ),
        **plan.widths,
        **plan.query_blocked,
        BM=tiles.dq_rows,
        BN=tiles.dq_keys,
        **plan.in_window,
        WINDOW_TILES=tiles_of_windows(window, tiles.dq_rows, tiles.dq_keys),
        CLUSTERS=clusters,
        num_warps=tiles.dq_warps,
        maxnreg=tiles.dq_registers,
        **plan.first,
    )
    if window > 0:
        key_tiles = -(-plan.num_keys // tiles.window_keys)
        launches.add(
            landmark_bwd_window_kernel,
            (chunks, groups, plan.blocks),
            (
                *("query", "value", "gradient", "key_lengths", "landmarks", plan.labels, "dots", "offsets", "sums"),
                *of_queries,
            ),
            (
                *(*plan.numbers, -(-key_tiles // chunks) * tiles.window_keys),
                *(*row_strides(query, value, gradient), plan.qk_scale),
            ),
            **plan.widths,
            **plan.blocked,
            BM=tiles.window_queries,
            BN=tiles.window_keys,
            **plan.in_window,
            WINDOW_TILES=tiles_of_windows(window, tiles.window_keys, tiles.window_queries),
            CLUSTERS=clusters,
            num_warps=tiles.window_warps,
            **plan.pdl,
        )
    block = min(tiles.landmark_block, plan.block)
    launches.add(
        landmark_bwd_sums_kernel,
        (chunks, groups, plan.padded // block),
        ("query", "gradient", "landmarks", "mean_values", "log_counts", "dots", "offsets", "sums", *of_queries),
        (plan.heads, plan.length, plan.num_landmarks, chunk, *row_strides(query, gradient), plan.qk_scale),
        **plan.widths,
        MB=block,
        MP=plan.padded,
        BM=tiles.landmark_rows,
        HAS_WINDOW=window > 0,
        CLUSTERS=clusters,
        **plan.precision,
        STAGES=tiles.landmark_stages,
        num_warps=tiles.landmark_warps,
        **plan.pdl,
    )
    left = plan.add_sum_of_chunks(launches, chunks)
    launches.add(
        landmark_bwd_combine_kernel,
        (-(-plan.padded // tiles.combine_landmarks), groups),
        ("sums", "log_counts", "d_landmarks", "d_mean_values"),
        (plan.num_landmarks, left, chunks, plan.scale),
        **plan.widths,
        MP=plan.padded,
        BLOCK=tiles.combine_landmarks,
        num_warps=4,
        **plan.pdl,
    )
    launches.add(
        landmark_bwd_dkdv_kernel,
        (-(-plan.num_keys // tiles.dk_rows), groups),
        (
            *("query", "key", "value", "gradient", "d_key", "d_value", "key_lengths", "landmarks", plan.labels),
            *("lse", "dots", "offsets", "d_landmarks", "d_mean_values", *of_queries),
        ),
        (
            *plan.numbers,
            *row_strides(query, key, value, gradient, outputs["d_key"], outputs["d_value"]),
            *(plan.qk_scale, plan.scale),
        ),
        **plan.widths,
        MP=plan.padded,
        BM=tiles.dk_queries,
        BN=tiles.dk_rows,
        **plan.in_window,
        WINDOW_TILES=tiles_of_windows(window, tiles.dk_rows, tiles.dk_queries),
        CLUSTERS=clusters,
        num_warps=tiles.dk_warps,
        maxnreg=tiles.dk_registers,
        **plan.pdl,
    )


def _backward_pass(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    out: torch.Tensor,
    num_landmarks: int,
    window: int,
    scale: float,
) -> Pass:
    """Launches of a backward pass; arguments as in `run_backward`."""
    plan = LandmarkPlan(query, key, value, key_lengths, labels, num_landmarks, window, scale, 0)
    outputs, tensors = describe_outputs(
        query,
        (
            ("d_query", plan.length, plan.width),
            ("d_key", plan.num_keys, plan.width),
            ("d_value", plan.num_keys, plan.value_width),
        ),
    )
    workspace, scratch = gradient_layouts(plan)
    names = ("gradient", "query", "key", "value", "key_lengths", "given_labels", "out", "d_query", "d_key", "d_value")
    launches = LaunchSequence(names, (plan.statistics(), workspace, scratch))
    add_gradient_kernels(launches, plan, gradient, query, key, value, out, tensors, window)
    return Pass(launches, outputs, (workspace,), scratch)


def run_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
    num_landmarks: int,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; arguments as in `run_forward` and what it returned."""
    gradient, query, key, value = (with_vector_loads(x) for x in (gradient, query, key, value))
    inputs = (query, key, value, key_lengths, labels)
    found = find_pass(_backward_pass, (gradient, *inputs, out), tiles_override(), num_landmarks, window, scale)
    return tuple(launch(found, (gradient,), inputs, (out,), (statistics,))[0])


fused_landmark_attention_backward = torch.library.custom_op(
    "scatterbrain::fused_landmark_attention_backward", run_backward, mutates_args=()
)


@fused_landmark_attention_backward.register_fake
def _(gradient, query, key, value, key_lengths, labels, out, statistics, num_landmarks, window, scale):
    return tuple(x.new_empty_strided(*by_token(*x.shape)) for x in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, num_landmarks, window, scale, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # the statistics have none
    ctx.options = (num_landmarks, window, scale)


def _backward(ctx, gradient, _):
    gradients = torch.ops.scatterbrain.fused_landmark_attention_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return (*gradients, *[None] * 7)


fused_landmark_attention.register_autograd(_backward, setup_context=_setup_context)


OPERATOR = Operator(_forward_pass, _backward_pass, run_forward, run_backward, 3, tiles_override)


def attend(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Results of `run_forward`: by the operator for `torch.compile` and tensor subclasses, else directly.

    Statistics are None where gradients are recorded and they were not requested.
    """
    tensors, (*options, statistics) = arguments[:5], arguments[5:]
    needs_grad = torch.is_grad_enabled() and any([x.requires_grad for x in tensors[:3]])
    options = (*options, statistics or needs_grad)
    if needs_dispatcher(tensors) or (needs_grad and statistics):
        return fused_landmark_attention(*tensors, *options)
    with device_of(tensors[0]):
        if needs_grad:
            return FusedFunction.apply(*tensors, (OPERATOR, options, None, False)), None
        return run_forward(*tensors, *options)


def log_normalisers(statistics: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Natural logarithms (B, H, T) of the normalisers, from the statistics of `run_forward` and its arguments."""
    plan = LandmarkPlan(*arguments)
    lse = plan.statistics().views(statistics)["lse"].view(plan.batch, plan.heads, plan.length)
    return torch.where(lse < 1e29, lse / LOG2E, -torch.inf)
