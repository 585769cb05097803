"""Launches of the kernels that plan: clusters of keys and of queries, supports, sorted orders."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from scatterbrain.ops.adaptive.definition import LEAST_VARIANCE, ROUNDS, AdaptivePlan, exact_keys
from scatterbrain.ops.adaptive.triton.starts import combine_both_kernel, start_both_kernel, sum_both_kernel
from scatterbrain.ops.adaptive.triton.supports import (
    DENSITY_BITS,
    count_kernel,
    lists_kernel,
    moments_kernel,
    support_kernel,
)
from scatterbrain.ops.adaptive.triton.tables import WORD, plan_of_tables, tables_layout
from scatterbrain.ops.clusters.steps import QUERIES_PER_CLUSTER, sample_of_variances
from scatterbrain.ops.clusters.triton import ROW_MULTIPLE, with_even_rows
from scatterbrain.ops.clusters.triton.operator import (
    MANY_CHUNKS,
    LandmarkPlan,
    add_cluster_kernels,
    cluster_layouts,
    start_programs,
    with_vector_loads,
)
from scatterbrain.ops.clusters.triton.tiles import tiles_override
from scatterbrain.ops.common.passes import Pass, find_pass, launch, padded_width, power_of_two
from scatterbrain.ops.common.triton_functions import BufferLayout, LaunchSequence, device_of, row_strides


class PlanTiles(NamedTuple):
    """Tile sizes of the kernels that plan.

    Attributes:
        sort_rows: points of a tile of the counting sort.
        prefix_tiles: tiles of the counting sort whose counts a program loads at a time.
        prefix_bins: clusters of such a program.
        assign_rows: queries of such a tile whose clusters are found at a time.
        moment_queries: query clusters of a program of the moments, at most.
        moment_landmarks: key clusters of a program of the moments.
        moment_rows: keys of a tile of the moments.
        moment_warps: warps of a program of the moments. With 8 warps and 128 keys, ptxas of CUDA 12.8 takes the address
            of an operand from an uninitialised register.
        moment_programs: half or a third of the programs of the moments, at most, over all sequences; their sums are
            added up later.
        list_places: places of a program that lists keys.
    """

    sort_rows: int = 256
    assign_rows: int = 64
    prefix_tiles: int = 64
    prefix_bins: int = 64
    moment_queries: int = 64
    moment_landmarks: int = 64
    moment_rows: int = 64
    moment_warps: int = 4
    moment_programs: int = 132
    list_places: int = 256


_FLOAT32 = PlanTiles(assign_rows=32, moment_queries=32, moment_landmarks=32, moment_rows=32, moment_warps=8)
# Triton's interpreter, for tests: several tiles also for small shapes.
_SMALL = PlanTiles(
    sort_rows=32, assign_rows=16, prefix_tiles=4, prefix_bins=16, moment_queries=16, moment_landmarks=16,
    moment_rows=16, moment_programs=4, list_places=16,
)  # fmt: skip
# Up to this many clusters, one warp chooses a support: what it sorts stays in its registers.
ONE_WARP = 256
# Initial centroids of keys and queries in one launch: rows that are loaded at a time, and largest stretch.
START_ROWS = 16
MOST_START_ROWS = 128


def _can_share(keys: LandmarkPlan, queries: LandmarkPlan) -> bool:
    """Whether the kernels of `starts.py` can find the centroids of keys and queries together."""
    one_block = not keys.has_labels and keys.blocks == 1 and queries.blocks == 1
    few_chunks = all(plan.chunks_of_steps()[1] <= MANY_CHUNKS for plan in (keys, queries))
    few_rows = max(keys.stretch, queries.stretch) <= MOST_START_ROWS
    same_tiles = ("sum_rows", "sum_warps", "sum_stages", "combine_landmarks")
    same = all(getattr(keys.tiles, name) == getattr(queries.tiles, name) for name in same_tiles)
    return one_block and few_chunks and few_rows and same


def _add_centroids(
    launches: LaunchSequence,
    keys: LandmarkPlan,
    queries: LandmarkPlan,
    key: torch.Tensor,
    query: torch.Tensor,
) -> None:
    """Launches that find the centroids of keys and queries."""
    centroids = ("centre", "landmarks", "bias")
    query_centroids = tuple("query_" + name for name in centroids)
    key_strides, query_strides = row_strides(key), row_strides(query)
    widths = {"E": keys.width, "BE": keys.widths["BE"]}

    def of_both(of_keys: dict[str, Any], of_queries: dict[str, Any]) -> dict[str, Any]:
        return of_keys | {"QUERY_" + name: option for name, option in of_queries.items()}

    # keys and queries share the registers of a program, which larger steps of one of them would take from both
    starts = [plan.start_options(START_ROWS) for plan in (keys, queries)]
    programs = max(start_programs(plan.num_landmarks, x) for plan, x in zip((keys, queries), starts, strict=True))
    launches.add(
        start_both_kernel,
        (programs, keys.groups, 2),
        ("key", "key_lengths", *centroids, "query", "query_lengths", *query_centroids),
        (
            *(keys.heads, keys.num_keys, keys.num_landmarks, *key_strides),
            *(queries.num_keys, queries.num_landmarks, *query_strides),
        ),
        **widths,
        **of_both(*starts),
        num_warps=1,
        **keys.first,
    )
    (chunk, chunks), (query_chunk, query_chunks) = (plan.chunks_of_steps() for plan in (keys, queries))
    sides = [
        {"BD": plan.widths["BD"], "MP": plan.padded, "FINAL": number == 1}
        for plan, number in ((keys, chunks), (queries, query_chunks))
    ]
    steps = [{"PARTS": plan.parts, **plan.lengths, **plan.step_options()} for plan in (keys, queries)]
    for _ in range(keys.num_steps):
        launches.add(
            sum_both_kernel,
            (max(chunks, query_chunks), keys.groups, 2),
            (
                *("key", "key_lengths", "labels", "sums", *centroids),
                *("query", "query_lengths", "query_labels", "query_sums", *query_centroids),
            ),
            (
                *(keys.heads, keys.num_keys, keys.num_landmarks, chunk, chunks, *key_strides),
                *(queries.num_keys, queries.num_landmarks, query_chunk, query_chunks, *query_strides),
            ),
            **widths,
            **of_both(sides[0] | steps[0], sides[1] | steps[1]),
            BN=keys.tiles.sum_rows,
            **keys.precision,
            STAGES=keys.tiles.sum_stages,
            num_warps=keys.tiles.sum_warps,
            **keys.pdl,
        )
        if max(chunks, query_chunks) > 1:
            block = keys.tiles.combine_landmarks
            launches.add(
                combine_both_kernel,
                (-(-max(keys.padded, queries.padded) // block), keys.groups, 2),
                ("sums", *centroids, "query_sums", *query_centroids),
                (keys.num_landmarks, chunks, queries.num_landmarks, query_chunks),
                **widths,
                **of_both(*sides),
                BLOCK=block,
                num_warps=4,
                **keys.pdl,
            )


def plan_pass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    query_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_landmarks: int,
    num_query_landmarks: int,
    density: float,
    tolerance: float | None,
    scale: float,
    num_steps: int,
    sorts_keys: bool,
) -> Pass:
    """Launches that plan; arguments as in `run_plan`."""
    keys = LandmarkPlan(query, key, value, key_lengths, labels, num_landmarks, 0, scale, num_steps)
    narrow = query[..., :1]  # queries have no mean values
    queries = LandmarkPlan(
        query, query, narrow, query_lengths, None, num_query_landmarks, 0, scale, num_steps, QUERIES_PER_CLUSTER
    )
    groups, length, num_keys = keys.groups, keys.length, keys.num_keys
    num_exact = exact_keys(density, num_keys)
    tables = tables_layout(groups, length, num_keys, num_landmarks, num_query_landmarks, num_exact, sorts_keys)

    bins = power_of_two(max(num_landmarks, num_query_landmarks, 16))
    padded = power_of_two(max(num_landmarks, WORD))  # a multiple of a word
    tiles = _SMALL if not query.is_cuda else _FLOAT32 if query.dtype == torch.float32 else PlanTiles()
    sort_tiles = -(-max(length, num_keys) // tiles.sort_rows)
    moment_queries = min(tiles.moment_queries, padded_width(num_query_landmarks))
    moment_blocks = keys.padded // tiles.moment_landmarks * -(-num_query_landmarks // moment_queries)
    rows = tiles.moment_rows
    every = sample_of_variances(num_keys, num_landmarks)
    # three programs fit an SM, two of many query clusters
    programs = tiles.moment_programs * (3 if moment_queries <= 32 else 2)
    chunk, chunks = keys.chunks(-(-num_keys // every), rows, programs, moment_blocks)

    statistics, workspace, sums = cluster_layouts(keys)
    query_statistics, query_workspace, query_sums = cluster_layouts(queries, "query_")
    for layout in (query_workspace, query_statistics):
        for name, (_, shape, dtype) in layout.parts.items():
            if name not in ("query_labels", "query_lse"):
                workspace.add(name, *shape, dtype=dtype)
    workspace.add("totals", 2, groups, bins, dtype=torch.int32)
    workspace.add("ends", groups, num_query_landmarks, padded, dtype=torch.int32)
    workspace.add("means", groups, num_query_landmarks, keys.padded)
    workspace.add("sampled", groups, chunks, keys.padded, dtype=torch.int32)
    if not sorts_keys:
        workspace.add("key_order", groups, num_keys, dtype=torch.int32)
        workspace.add("key_starts", groups, num_landmarks + 1, dtype=torch.int32)
    sums.add("query_sums", *query_sums.parts["query_sums"][1])
    # squares take the place of the sums; counts cannot, since they are written while the sums are still read
    end, sums.end = sums.end, 0
    sums.add("squares", groups, num_query_landmarks, chunks, keys.padded)
    sums.end = max(end, sums.end)
    sums.add("counts", 2, groups, sort_tiles, bins, dtype=torch.int32)

    launches = LaunchSequence(
        ("query", "key", "value", "key_lengths", "query_lengths", "given_labels"),
        (statistics, tables, workspace, sums),
    )
    can_share = _can_share(keys, queries)
    if can_share:
        _add_centroids(launches, keys, queries, key, query)
    slots, left = add_cluster_kernels(launches, keys, key, value, has_centroids=can_share, leaves_sums=True)
    if not can_share:
        add_cluster_kernels(launches, queries, query, None, "query_", ("query", "query", "query_lengths"))

    sizes = (num_keys, length, num_landmarks, num_query_landmarks)
    sort_options = {"BINS": bins, "BN": tiles.sort_rows}
    both_labels = (keys.labels, "query_labels")
    block = keys.tiles.combine_landmarks
    launches.add(
        count_kernel,
        (max(sort_tiles, keys.padded // block), groups, 3 if left else 2),
        (
            *("query", "query_landmarks", "query_bias", *both_labels, "counts", "sums"),
            *("centre", "landmarks", "bias", "mean_values", "log_counts"),
        ),
        (keys.heads, *sizes, sort_tiles, left, slots, *row_strides(query)),
        **keys.widths,
        MP=keys.padded,
        BLOCK=block,
        COMBINE=left > 0,
        QUERY_MB=queries.block,
        QUERY_MP=queries.padded,
        **sort_options,
        BM=tiles.assign_rows,
        **keys.precision,
        STAGES=queries.tiles.sum_stages,
        num_warps=queries.tiles.assign_warps,
        **keys.pdl,
    )
    prefix_bins = min(tiles.prefix_bins, bins)
    blocks = moment_blocks if num_exact > 0 else 0
    launches.add(
        moments_kernel,
        (max(chunks if blocks else 1, bins // prefix_bins), groups, blocks + 2),
        (
            *("key", "key_lengths", keys.labels, "centre", "landmarks"),
            *("query_centre", "query_landmarks", "means", "squares", "sampled", "counts", "totals"),
        ),
        (keys.heads, num_keys, num_landmarks, num_query_landmarks, chunk, chunks, sort_tiles, *row_strides(key)),
        E=keys.width,
        BE=keys.widths["BE"],
        MB=tiles.moment_landmarks,
        MP=keys.padded,
        QB=moment_queries,
        BN=rows,
        EVERY=every,
        BINS=bins,
        BB=prefix_bins,
        BT=tiles.prefix_tiles,
        BLOCKS=blocks,
        **keys.lengths,
        **keys.precision,
        STAGES=keys.tiles.sum_stages,
        num_warps=tiles.moment_warps,
        **keys.pdl,
    )
    launches.add(
        support_kernel,
        (max(num_query_landmarks, sort_tiles), groups, 3),
        (
            *("means", "squares", "sampled", "totals", "key_lengths", "ends", "taken_words", "exact_counts"),
            *(*both_labels, "counts", "key_order", "key_starts", "query_order", "query_starts"),
        ),
        (
            *(keys.heads, *sizes, sort_tiles, chunks),
            *(round(density * 2**DENSITY_BITS.value), scale, 0.0 if tolerance is None else tolerance),
        ),
        MP=keys.padded,
        MS=padded,
        **sort_options,
        WORDS=-(-num_landmarks // WORD),
        ROUNDS=ROUNDS,
        EVERY=every,
        LEAST_VARIANCE=LEAST_VARIANCE,
        HAS_TOLERANCE=tolerance is not None,
        **keys.lengths,
        num_warps=1 if padded <= ONE_WARP else 4,
        **keys.pdl,
    )
    if num_exact > 0:
        launches.add(
            lists_kernel,
            (-(-num_exact // tiles.list_places), num_query_landmarks, groups),
            ("ends", "key_order", "key_starts", "exact_keys"),
            (num_keys, num_landmarks, num_query_landmarks, num_exact),
            MS=padded,
            STEPS=padded.bit_length() - 1,
            BP=tiles.list_places,
            num_warps=4,
            **keys.pdl,
        )
    return Pass(launches, ((), ()), (statistics, tables, workspace, sums))


def run_plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    query_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_landmarks: int,
    num_query_landmarks: int,
    density: float,
    tolerance: float | None,
    scale: float,
    num_steps: int,
    sorts_keys: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics of the key clusters and tables of the plan, by the kernels and without synchronisation.

    Args:
        query: (B, H, T, E), E a multiple of 16, as D is.
        key: (B, H, S, E).
        value: (B, H, S, D).
        key_lengths: (B,) integers; None for all keys.
        query_lengths: (B,) integers; queries i >= query_lengths[b] move no centroid. None for all.
        labels: (B, H, S) int16, cluster of each key, -1 for hidden ones; None to find clusters.
        num_landmarks: number of key clusters M, at most S.
        num_query_landmarks: number of query clusters Q, at most T.
        density: largest share of the visible keys that a query cluster takes.
        tolerance: see `plan_adaptive_attention`; None for as many clusters as fit `density`.
        scale: softmax scale.
        num_steps: Lloyd steps.
        sorts_keys: whether the tables have an order of the keys.

    Returns:
        Two buffers (bytes,) uint8: statistics, see `LandmarkPlan.statistics`, and tables, see `tables_layout`.
    """
    inputs = (query, key, value, key_lengths, query_lengths, labels)
    options = (num_landmarks, num_query_landmarks, density, tolerance, scale, num_steps, sorts_keys)
    _, buffers = _run(inputs, options)
    return buffers[0], buffers[1]


def _run(
    inputs: tuple[torch.Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[tuple[BufferLayout, ...], list[torch.Tensor]]:
    """Layouts and buffers of a pass, from the tensors and the other arguments of `run_plan`."""
    inputs = (*(with_vector_loads(x) for x in inputs[:3]), *inputs[3:])
    found = find_pass(plan_pass, inputs, tiles_override(), *options)
    with device_of(inputs[0]):
        return found.layouts, launch(found, (), inputs)[1]


@torch.no_grad()
def find_plan(
    query: torch.Tensor,
    key: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    density: float,
    tolerance: float | None,
    scale: float,
    key_lengths: torch.Tensor | None,
    query_lengths: torch.Tensor | None,
    num_steps: int,
) -> AdaptivePlan:
    """The plan that `run_plan` makes of queries (B, H, T, E) and keys (B, H, S, E) of any width; arguments as there."""
    query, key = (with_even_rows(x.detach()) for x in (query, key))
    lengths = (None if x is None else x.to(query.device).contiguous() for x in (key_lengths, query_lengths))
    narrow = key[..., :ROW_MULTIPLE]  # a plan has no mean values
    options = (num_landmarks, num_query_landmarks, density, tolerance, scale, num_steps, False)
    layouts, buffers = _run((query, key, narrow, *lengths, None), options)
    statistics, tables = (layout.views(x) for layout, x in zip(layouts[:2], buffers[:2], strict=True))
    return plan_of_tables(statistics["labels"], tables, num_landmarks, query.shape[0])
