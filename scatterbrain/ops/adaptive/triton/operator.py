"""The attention kernels of adaptive attention as one `torch.library` operator with a backward.

Forward: landmarks and window without the key clusters that a query cluster takes, by the kernels of landmark attention;
then the keys of these clusters, merged with it. Backward: the gradients of both parts, one after the other. Nothing is
summed by atomic operations: results are the same bit by bit from run to run.
"""

from __future__ import annotations

from typing import Any

import torch

from scatterbrain.ops.adaptive.definition import exact_keys
from scatterbrain.ops.adaptive.triton.exact import (
    exact_bwd_dkdv_kernel,
    exact_bwd_dq_kernel,
    exact_fwd_kernel,
    query_tiles_kernel,
)
from scatterbrain.ops.adaptive.triton.plan import run_plan
from scatterbrain.ops.adaptive.triton.tables import tables_layout
from scatterbrain.ops.adaptive.triton.tiles import ExactTiles, tiles_for, tiles_override
from scatterbrain.ops.clusters.triton.operator import (
    LandmarkPlan,
    add_attention_kernel,
    add_cluster_kernels,
    add_gradient_kernels,
    cluster_layouts,
    gradient_layouts,
    with_vector_loads,
)
from scatterbrain.ops.common.calls import needs_dispatcher
from scatterbrain.ops.common.passes import (
    FusedFunction,
    Operator,
    Pass,
    by_token,
    describe_outputs,
    find_pass,
    launch,
    power_of_two,
)
from scatterbrain.ops.common.triton_functions import BufferLayout, LaunchSequence, device_of, row_strides


class _Call:
    """What all kernels of one call share; arguments as in `run_forward`."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_landmarks: int,
        num_query_landmarks: int,
        num_exact: int,
        window: int,
        scale: float,
        sorts_keys: bool,
    ) -> None:
        self.plan = LandmarkPlan(query, key, value, key_lengths, labels, num_landmarks, window, scale, 0)
        self.num_query_landmarks, self.num_exact = num_query_landmarks, num_exact
        plan = self.plan
        self.tiles: ExactTiles = tiles_for(
            max(plan.widths["BE"], plan.widths["BD"]), num_exact, plan.dtype, plan.device
        )
        sizes = plan.groups, plan.length, plan.num_keys, num_landmarks, num_query_landmarks, num_exact
        self.layouts = [plan.clusters(), tables_layout(*sizes, sorts_keys=sorts_keys), self.normalisers()]
        self.of_queries = {"CLUSTERS": num_query_landmarks, "BLOCK": power_of_two(num_query_landmarks)}
        self.numbers = (plan.heads, plan.length, num_exact)

    def normalisers(self) -> BufferLayout:
        """Log normalisers of the queries, for the backward pass."""
        layout = BufferLayout()
        layout.add("lse", self.plan.groups, self.plan.length)
        return layout

    def query_tiles(self, rows: int) -> int:
        """Largest number of tiles of queries of one cluster, see `cluster_tile`."""
        return self.plan.length // rows + self.num_query_landmarks


def _statistics_pass(
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor,
    num_landmarks: int,
) -> Pass:
    """Launches that find means of clusters; arguments as in `run_statistics`."""
    plan = LandmarkPlan(key, key, value, key_lengths, labels, num_landmarks, 0, 1.0, 0)
    layouts = cluster_layouts(plan)
    launches = LaunchSequence(("key", "value", "key_lengths", "given_labels"), layouts)
    add_cluster_kernels(launches, plan, key, value)
    return Pass(launches, ((), ()), layouts)


def run_statistics(
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor,
    num_landmarks: int,
) -> torch.Tensor:
    """Means and sizes of given clusters, (bytes,) uint8, see `LandmarkPlan.clusters`; arguments as in `run_forward`."""
    key, value = with_vector_loads(key), with_vector_loads(value)
    tensors = (key, value, key_lengths, labels)
    found = find_pass(_statistics_pass, tensors, tiles_override(), num_landmarks)
    with device_of(key):
        return launch(found, (), tensors)[1][0]


cluster_statistics = torch.library.custom_op("scatterbrain::cluster_statistics", run_statistics, mutates_args=())


@cluster_statistics.register_fake
def _(key, value, key_lengths, labels, num_landmarks):
    num_landmarks = int(num_landmarks)  # Dynamo passes a size that has changed since its last trace as a symbol
    plan = LandmarkPlan(key, key, value, key_lengths, labels, num_landmarks, 0, 1.0, 0)
    return key.new_empty(plan.statistics().nbytes, dtype=torch.uint8)


adaptive_plan = torch.library.custom_op("scatterbrain::adaptive_plan", run_plan, mutates_args=())


@adaptive_plan.register_fake
def _(
    query, key, value, key_lengths, query_lengths, labels,
    num_landmarks, num_query_landmarks, density, tolerance, scale, num_steps, sorts_keys,
):  # fmt: skip
    num_landmarks, num_query_landmarks, density = int(num_landmarks), int(num_query_landmarks), float(density)
    plan = LandmarkPlan(query, key, value, key_lengths, labels, num_landmarks, 0, scale, num_steps)
    sizes = plan.groups, plan.length, plan.num_keys, num_landmarks, num_query_landmarks
    tables = tables_layout(*sizes, exact_keys(density, plan.num_keys), sorts_keys)
    return tuple(query.new_empty(x.nbytes, dtype=torch.uint8) for x in (plan.statistics(), tables))


def find_statistics(*arguments: Any) -> torch.Tensor:
    """Result of `run_statistics`: by the operator for `torch.compile` and tensor subclasses, else directly."""
    return (cluster_statistics if needs_dispatcher(arguments[:4]) else run_statistics)(*arguments)


def find_plan(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of `run_plan`: by the operator for `torch.compile` and tensor subclasses, else directly."""
    return (adaptive_plan if needs_dispatcher(arguments[:6]) else run_plan)(*arguments)


def _forward_pass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_landmarks: int,
    num_query_landmarks: int,
    num_exact: int,
    window: int,
    scale: float,
) -> Pass:
    """Launches of a forward pass; arguments as in `run_forward`."""
    options = (num_landmarks, num_query_landmarks, num_exact, window, scale)
    call = _Call(query, key, value, key_lengths, labels, *options, sorts_keys=False)
    plan, tiles = call.plan, call.tiles
    outputs, tensors = describe_outputs(query, (("out", plan.length, plan.value_width),))
    names = ("query", "key", "value", "key_lengths", "given_labels", "out")
    launches = LaunchSequence(names, call.layouts)
    add_attention_kernel(launches, plan, query, key, value, tensors["out"], window, True, num_query_landmarks)
    launches.add(
        exact_fwd_kernel,
        (call.query_tiles(tiles.query_rows), plan.groups),
        (
            *("query", "key", "value", "out", "lse"),
            *("exact_keys", "exact_counts", "query_order", "query_starts"),
        ),
        (*call.numbers, *row_strides(query, key, value, tensors["out"]), plan.qk_scale),
        **plan.widths,
        **call.of_queries,
        BM=tiles.query_rows,
        BN=tiles.key_rows,
        **plan.precision,
        STAGES=tiles.query_stages,
        num_warps=tiles.query_warps,
        **plan.pdl,
    )
    return Pass(launches, outputs, (call.normalisers(),))


def run_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    statistics: torch.Tensor,
    tables: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    num_exact: int,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive attention by the kernels; arguments are checked by `scatterbrain.ops.adaptive.triton.attention`.

    Args:
        query: (B, H, T, E), E a multiple of 16, as D is.
        key: (B, H, S, E).
        value: (B, H, S, D).
        key_lengths: (B,) integers; None for all keys.
        labels: (B, H, S) int16, cluster of each key, -1 for hidden ones; None for those among the statistics.
        statistics: (bytes,) uint8, means and sizes of the clusters, see `LandmarkPlan.clusters`.
        tables: (bytes,) uint8, see `tables_layout`; for the backward pass with the order of the keys.
        num_landmarks: number of key clusters M, at most S.
        num_query_landmarks: number of query clusters Q, at most T.
        num_exact: largest number K >= 1 of keys that a query cluster takes.
        window: width W; 0 for no window.
        scale: softmax scale.

    Returns:
        Output (B, H, T, D), and log normalisers for the backward pass, (bytes,) uint8.
    """
    inputs = (*(with_vector_loads(x) for x in (query, key, value)), key_lengths, labels)
    options = (num_landmarks, num_query_landmarks, num_exact, window, scale)
    found = find_pass(_forward_pass, inputs, tiles_override(), *options)
    (out,), (_, _, normalisers) = launch(found, (), inputs, buffers=(statistics, tables))
    return out, normalisers


fused_adaptive_attention = torch.library.custom_op(
    "scatterbrain::fused_adaptive_attention", run_forward, mutates_args=()
)


@fused_adaptive_attention.register_fake
def _(query, key, value, key_lengths, labels, statistics, tables, *options):
    options = (*map(int, options[:4]), options[4])
    call = _Call(query, key, value, key_lengths, labels, *options, sorts_keys=False)
    size, stride = by_token(*query.shape[:3], value.shape[3])
    return query.new_empty_strided(size, stride), query.new_empty(call.normalisers().nbytes, dtype=torch.uint8)


def _backward_pass(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    out: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    num_exact: int,
    window: int,
    scale: float,
) -> Pass:
    """Launches of a backward pass; arguments as in `run_backward`."""
    options = (num_landmarks, num_query_landmarks, num_exact, window, scale)
    call = _Call(query, key, value, key_lengths, labels, *options, sorts_keys=True)
    plan, tiles = call.plan, call.tiles
    outputs, tensors = describe_outputs(
        query,
        (
            ("d_query", plan.length, plan.width),
            ("d_key", plan.num_keys, plan.width),
            ("d_value", plan.num_keys, plan.value_width),
        ),
    )
    workspace, scratch = gradient_layouts(plan)
    num_tiles = call.query_tiles(tiles.dk_queries)
    workspace.add("query_tiles", plan.groups, num_landmarks, num_tiles, dtype=torch.int32)
    workspace.add("query_tile_counts", plan.groups, num_landmarks, dtype=torch.int32)
    names = ("gradient", "query", "key", "value", "key_lengths", "given_labels", "out", "d_query", "d_key", "d_value")
    launches = LaunchSequence(names, (*call.layouts, workspace, scratch))
    add_gradient_kernels(launches, plan, gradient, query, key, value, out, tensors, window, num_query_landmarks)
    launches.add(
        exact_bwd_dq_kernel,
        (call.query_tiles(tiles.dq_rows), plan.groups),
        (
            *("query", "key", "value", "gradient", "d_query", "centre", "lse", "dots"),
            *("exact_keys", "exact_counts", "query_order", "query_starts"),
        ),
        (
            *(*call.numbers, *row_strides(query, key, value, gradient, tensors["d_query"])),
            *(plan.qk_scale, plan.scale),
        ),
        **plan.widths,
        **call.of_queries,
        BM=tiles.dq_rows,
        BN=tiles.dq_keys,
        **plan.precision,
        STAGES=tiles.dq_stages,
        num_warps=tiles.dq_warps,
        **plan.pdl,
    )
    launches.add(
        query_tiles_kernel,
        (num_landmarks, plan.groups),
        ("taken_words", "query_starts", "query_tiles", "query_tile_counts"),
        (num_landmarks, num_tiles),
        **call.of_queries,
        BM=tiles.dk_queries,
        num_warps=1,
        **plan.pdl,
    )
    launches.add(
        exact_bwd_dkdv_kernel,
        (plan.num_keys // tiles.dk_rows + num_landmarks, plan.groups),
        (
            *("query", "key", "value", "gradient", "d_key", "d_value", "lse", "dots"),
            *("query_order", "key_order", "key_starts", "query_tiles", "query_tile_counts"),
        ),
        (
            *(plan.heads, plan.length, plan.num_keys, num_tiles),
            *row_strides(query, key, value, gradient, tensors["d_key"], tensors["d_value"]),
            *(plan.qk_scale, plan.scale),
        ),
        **plan.widths,
        CLUSTERS=num_landmarks,
        BLOCK=power_of_two(num_landmarks),
        BM=tiles.dk_queries,
        BN=tiles.dk_rows,
        **plan.precision,
        STAGES=tiles.dk_stages,
        num_warps=tiles.dk_warps,
        **plan.pdl,
    )
    return Pass(launches, outputs, (workspace,), scratch)


def run_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    labels: torch.Tensor | None,
    statistics: torch.Tensor,
    tables: torch.Tensor,
    out: torch.Tensor,
    normalisers: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    num_exact: int,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; arguments as in `run_forward` and what it returned."""
    gradient, query, key, value = (with_vector_loads(x) for x in (gradient, query, key, value))
    inputs = (query, key, value, key_lengths, labels)
    options = (num_landmarks, num_query_landmarks, num_exact, window, scale)
    found = find_pass(_backward_pass, (gradient, *inputs, out), tiles_override(), *options)
    return tuple(launch(found, (gradient,), inputs, (out,), (statistics, tables, normalisers))[0])


fused_adaptive_attention_backward = torch.library.custom_op(
    "scatterbrain::fused_adaptive_attention_backward", run_backward, mutates_args=()
)


@fused_adaptive_attention_backward.register_fake
def _(gradient, query, key, value, *_):
    return tuple(x.new_empty_strided(*by_token(*x.shape)) for x in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log normalisers
    ctx.options = inputs[7:]


def _backward(ctx, gradient, _):
    run = torch.ops.scatterbrain.fused_adaptive_attention_backward
    return (*run(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 9)


fused_adaptive_attention.register_autograd(_backward, setup_context=_setup_context)


OPERATOR = Operator(_forward_pass, _backward_pass, run_forward, run_backward, 5, tiles_override, num_buffers=2)


def attend(*arguments: Any) -> torch.Tensor:
    """Output of `run_forward`: by the operator for `torch.compile` and tensor subclasses, else directly."""
    tensors, options = arguments[:7], arguments[7:]
    if needs_dispatcher(tensors):
        return fused_adaptive_attention(*arguments)[0]
    needs_grad = torch.is_grad_enabled() and any([x.requires_grad for x in tensors[:3]])
    with device_of(tensors[0]):
        if needs_grad:
            return FusedFunction.apply(*tensors, (OPERATOR, options, None, False))
        return run_forward(*arguments)[0]
