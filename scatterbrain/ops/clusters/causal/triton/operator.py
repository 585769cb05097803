"""The kernels of causal landmark attention as one `torch.library` operator with a backward.

Forward: landmarks of the chunks, of the levels one after another, attention by chunks of queries. Backward: gradients
of the queries, of the levels from the highest one down, of keys and values. Nothing is summed by atomic operations:
results are the same bit by bit from run to run.
"""

from __future__ import annotations

from typing import Any

import torch

from scatterbrain.ops.clusters.causal.levels import exact_chunks, node_counts
from scatterbrain.ops.clusters.causal.triton.bwd import (
    causal_bwd_dkdv_kernel,
    causal_bwd_dq_kernel,
    causal_bwd_nodes_kernel,
    causal_bwd_pieces_kernel,
)
from scatterbrain.ops.clusters.causal.triton.fwd import causal_fwd_kernel
from scatterbrain.ops.clusters.causal.triton.nodes import (
    centre_kernel,
    chunk_nodes_kernel,
    join_nodes_kernel,
    landmark_statistics_kernel,
)
from scatterbrain.ops.clusters.triton.operator import with_vector_loads
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
)
from scatterbrain.ops.common.triton_functions import (
    LOG2E,
    BufferLayout,
    LaunchSequence,
    device_of,
    pdl_options,
    precision_of_products,
    row_strides,
)

# Chunks of queries of one program in the gradient of a node; nodes that more of them see have several programs.
PIECE_CHUNKS = 16


def piece_chunks() -> int:
    """`PIECE_CHUNKS`, which passes depend on."""
    return PIECE_CHUNKS


class _Plan:
    """What all kernels of one call share: sizes, strides, constants; arguments as in `run_forward`."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None,
        num_landmarks: int,
        window: int,
        chunk: int,
        scale: float,
        width: int,
        num_steps: int = 0,
        value_weight: float = 0.0,
    ) -> None:
        self.batch, self.heads, self.length, self.width = query.shape
        self.num_keys, self.value_width = value.shape[2:]
        self.repeats = self.heads // key.shape[1]
        self.groups = self.batch * self.heads
        self.key_groups = self.batch * key.shape[1]
        self.device, self.dtype = query.device, query.dtype
        self.num_landmarks, self.chunk = num_landmarks, chunk
        self.clustering = {"STEPS": num_steps, "HAS_VALUES": value_weight > 0}
        self.num_chunks = -(-self.length // chunk)
        self.exact = exact_chunks(window, chunk)
        self.counts = node_counts(self.num_chunks, self.exact)
        # level l has (num_nodes >> l) - 1 nodes
        self.num_nodes = self.counts[0] + 1 if self.counts else 0
        self.widths = {
            "E": self.width,
            "BE": padded_width(self.width),
            "D": self.value_width,
            "BD": padded_width(self.value_width),
        }
        self.sizes = {"M": num_landmarks, "MP": max(16, num_landmarks)}
        self.key_width = {"WIDTH": width}
        self.near = {"C": chunk, "EXACT": self.exact, "REPEATS": self.repeats}
        # tiles of 64 landmarks; more than four nodes would take more index arithmetic than their products are worth
        self.far = {"M": num_landmarks, "NODES": max(1, min(4, 64 // num_landmarks)), "LEVELS": len(self.counts)}
        # of 32 for the gradients of queries, which take more registers
        self.far_of_dq = self.far | {"NODES": max(1, min(4, 32 // num_landmarks))}
        self.lengths = {"HAS_LENGTHS": key_lengths is not None}
        self.precision = {"PRECISION": precision_of_products(self.dtype)}
        self.numbers = (self.heads, self.length, self.num_keys, self.num_nodes)
        self.qk_scale, self.scale = scale * LOG2E, scale
        # tiles of wide heads and float32 need more registers
        wide = max(self.widths["BE"], self.widths["BD"], chunk) > 64 or self.dtype.itemsize > 2
        self.tiles = {"STAGES": 1 if wide else 2, "num_warps": 8 if wide else 4}
        # with fewer registers one more program fits an SM
        self.query_tiles = self.tiles if wide else {"STAGES": 1, "num_warps": 4, "maxnreg": 128}
        self.dq_tiles = self.tiles | {"STAGES": 1} | ({} if wide else {"maxnreg": 168})
        self.dkdv_tiles = self.tiles | ({"ROWS": chunk} if wide else {"ROWS": min(chunk, 32), "maxnreg": 168})
        # more landmarks need more registers, distances of values too
        few, many, has_values = num_landmarks <= 16, num_landmarks > 32, value_weight > 0
        limit = 128 if few else 168
        self.gradient_tiles = self.tiles | ({} if wide or many else {"maxnreg": limit})
        self.chunk_tiles = {"num_warps": 8 if wide or (many and has_values) else 4}
        self.chunk_tiles |= {} if wide or many else {"maxnreg": limit if has_values else 128}
        # with few landmarks one warp is enough, and it does not wait for others
        self.join_tiles = {"num_warps": 1} if few and not wide else self.chunk_tiles
        self.pdl = pdl_options(self.device)
        self.first = {"PDL": self.pdl["PDL"]}

    def first_node(self, level: int) -> int:
        """The first node of a level in the table."""
        return 2 * self.num_nodes - ((2 * self.num_nodes) >> level)

    def statistics(self) -> BufferLayout:
        """The table of landmarks, the clusters, and log normalisers of the queries."""
        rows = 2 * self.num_nodes * self.num_landmarks
        layout = BufferLayout()
        layout.add("centres", self.key_groups, self.widths["BE"])
        layout.add("deltas", self.key_groups, rows, self.width, dtype=self.dtype)
        layout.add("mean_values", self.key_groups, rows, self.value_width, dtype=self.dtype)
        layout.add("counts", self.key_groups, rows)
        layout.add("scatters", self.key_groups, rows)
        layout.add("log_counts", self.key_groups, rows)
        layout.add("spreads", self.key_groups, rows)
        layout.add("limits", self.key_groups, rows)
        layout.add("labels", self.key_groups, self.num_nodes * self.chunk, dtype=torch.int8)
        layout.add("join_labels", self.key_groups, rows, dtype=torch.int8)
        layout.add("lse", self.groups, self.length)
        return layout


SUMS = ("deltas", "mean_values", "counts", "scatters")
TABLE = ("deltas", "mean_values", "log_counts", "spreads", "limits")


def _forward_pass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    num_landmarks: int,
    window: int,
    chunk: int,
    scale: float,
    width: int,
    num_steps: int,
    value_weight: float,
    statistics: bool,
) -> Pass:
    """Launches of a forward pass; arguments as in `run_forward`."""
    plan = _Plan(query, key, value, key_lengths, num_landmarks, window, chunk, scale, width, num_steps, value_weight)
    outputs, tensors = describe_outputs(query, (("out", plan.length, plan.value_width),))
    layout = plan.statistics()
    launches = LaunchSequence(("query", "key", "value", "key_lengths", "out"), (layout,))
    if plan.counts:
        launches.add(
            centre_kernel,
            (plan.key_groups,),
            ("key", "key_lengths", "centres"),
            (plan.heads // plan.repeats, plan.num_keys, *row_strides(key)),
            E=plan.width,
            BE=plan.widths["BE"],
            C=chunk,
            num_warps=1,
            **plan.lengths,
            **plan.first,
        )
    for level, count in enumerate(plan.counts):
        options = {**plan.widths, **plan.sizes, **plan.clustering, **plan.precision}
        options |= plan.chunk_tiles if level == 0 else plan.join_tiles
        if level == 0:
            launches.add(
                chunk_nodes_kernel,
                (plan.num_nodes, plan.key_groups),
                ("key", "value", "key_lengths", "centres", *SUMS, "labels"),
                (plan.heads // plan.repeats, plan.num_keys, plan.num_nodes, value_weight, *row_strides(key, value)),
                C=chunk,
                STRETCH=chunk // num_landmarks,
                **options,
                **plan.lengths,
                **plan.pdl,
            )
        else:
            launches.add(
                join_nodes_kernel,
                (count, plan.key_groups),
                (*SUMS, "join_labels"),
                (plan.num_nodes, plan.first_node(level - 1), plan.first_node(level), 0.5**level, value_weight),
                PP=max(16, 2 * num_landmarks),
                **options,
                **plan.pdl,
            )
    if plan.counts:
        size = plan.key_groups * 2 * plan.num_nodes * num_landmarks
        launches.add(
            landmark_statistics_kernel,
            (-(-size // 1024),),
            ("counts", "scatters", "log_counts", "spreads", "limits"),
            (size,),
            BLOCK=1024,
            **plan.key_width,
            **plan.pdl,
        )
    launches.add(
        causal_fwd_kernel,
        (plan.num_chunks, plan.groups),
        ("query", "key", "value", "out", "key_lengths", "centres", *TABLE, "lse"),
        (*plan.numbers, *row_strides(query, key, value, tensors["out"]), plan.qk_scale, plan.scale),
        **plan.widths,
        **plan.near,
        **plan.far,
        **plan.lengths,
        MASKED=key_lengths is not None or plan.num_keys < plan.length,
        STATISTICS=statistics,
        **plan.precision,
        **plan.query_tiles,
        **(plan.pdl if plan.counts else plan.first),
    )
    return Pass(launches, outputs, (layout,))


def run_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    num_landmarks: int,
    window: int,
    chunk: int,
    scale: float,
    width: int,
    num_steps: int,
    value_weight: float,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal landmark attention by the kernels; `scatterbrain.ops.clusters.causal.triton.attention` checks arguments.

    Args:
        query: (B, H, T, E), E a multiple of 16, as D is.
        key: (B, Hkv, S, E), each head for H / Hkv consecutive heads of the queries.
        value: (B, Hkv, S, D).
        key_lengths: (B,) integers; None for all keys.
        num_landmarks: landmarks M of a node.
        window: width W.
        chunk: keys C of a chunk.
        scale: softmax scale.
        width: E without padding, for the spread.
        num_steps: Lloyd steps.
        value_weight: weight of the values in the clustering.
        statistics: compute log normalisers, which the backward pass needs, too.

    Returns:
        Output (B, H, T, D), and statistics (bytes,) uint8, see `_Plan.statistics`.
    """
    query, key, value = (with_vector_loads(x) for x in (query, key, value))
    inputs = (query, key, value, key_lengths)
    options = num_landmarks, window, chunk, scale, width, num_steps, value_weight, statistics
    (out,), (buffer,) = launch(find_pass(_forward_pass, inputs, piece_chunks(), *options), (), inputs)
    return out, buffer


fused_causal_landmark_attention = torch.library.custom_op(
    "scatterbrain::fused_causal_landmark_attention", run_forward, mutates_args=()
)


@fused_causal_landmark_attention.register_fake
def _(query, key, value, key_lengths, num_landmarks, window, chunk, scale, width, num_steps, value_weight, statistics):
    plan = _Plan(query, key, value, key_lengths, num_landmarks, window, chunk, scale, width)
    size, stride = by_token(*query.shape[:3], value.shape[3])
    return query.new_empty_strided(size, stride), query.new_empty(plan.statistics().nbytes, dtype=torch.uint8)


def _backward_pass(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    out: torch.Tensor,
    num_landmarks: int,
    window: int,
    chunk: int,
    scale: float,
    width: int,
) -> Pass:
    """Launches of a backward pass; arguments as in `run_backward`."""
    plan = _Plan(query, key, value, key_lengths, num_landmarks, window, chunk, scale, width)
    outputs, tensors = describe_outputs(query, (("d_query", plan.length, plan.width),))
    of_keys, others = describe_outputs(
        key, (("d_key", plan.num_keys, plan.width), ("d_value", plan.num_keys, plan.value_width))
    )
    outputs = tuple(first + second for first, second in zip(outputs, of_keys, strict=True))
    tensors |= others
    pieces = [-(-(2 << level) // PIECE_CHUNKS) for level in range(len(plan.counts))]
    rows = 2 * plan.num_nodes * num_landmarks
    workspace = BufferLayout()
    for name in ("dots", "far_lse", "norms"):
        workspace.add(name, plan.groups, plan.length)
    workspace.add("of_keys", plan.key_groups, rows, plan.width, dtype=plan.dtype)
    workspace.add("of_values", plan.key_groups, rows, plan.value_width, dtype=plan.dtype)
    workspace.add("of_scatters", plan.key_groups, rows)
    of_piece = (plan.widths["BE"] + plan.widths["BD"] + 1, plan.sizes["MP"])
    several = [count * number for count, number in zip(plan.counts, pieces, strict=True) if number > 1]
    workspace.add("pieces", plan.key_groups, max(several, default=0), *of_piece)
    names = ("gradient", "query", "key", "value", "key_lengths", "out", "d_query", "d_key", "d_value")
    launches = LaunchSequence(names, (plan.statistics(), workspace))
    launches.add(
        causal_bwd_dq_kernel,
        (plan.num_chunks, plan.groups),
        (
            *("query", "key", "value", "out", "gradient", "d_query", "key_lengths", "centres"),
            *(*TABLE, "lse", "dots", "far_lse", "norms"),
        ),
        (
            *plan.numbers,
            *row_strides(query, key, value, out, gradient, tensors["d_query"]),
            *(plan.qk_scale, plan.scale),
        ),
        **plan.widths,
        **plan.near,
        **plan.far_of_dq,
        **plan.lengths,
        **plan.precision,
        **plan.dq_tiles,
        **plan.first,
    )
    passed_on = ("of_keys", "of_values", "of_scatters")
    for level in reversed(range(len(plan.counts))):
        count, number = plan.counts[level], pieces[level]
        num_joined = 2 * plan.counts[level + 1] if level + 1 < len(plan.counts) else 0
        nodes = (plan.first_node(level), plan.first_node(level + 1), num_joined)
        launches.add(
            causal_bwd_nodes_kernel,
            (count * number, plan.key_groups),
            (
                *("query", "gradient", "deltas", "mean_values", "counts", "log_counts", "spreads", "limits"),
                *("join_labels", "far_lse", "dots", "norms", *passed_on, "pieces"),
            ),
            (
                *(plan.heads, plan.length, plan.num_nodes, plan.num_chunks, level, *nodes),
                *(*row_strides(query, gradient), plan.qk_scale, plan.scale),
            ),
            **plan.widths,
            **plan.sizes,
            **plan.key_width,
            **plan.near,
            PIECES=number,
            **plan.precision,
            **plan.gradient_tiles,
            **plan.pdl,
        )
        if number > 1:
            launches.add(
                causal_bwd_pieces_kernel,
                (count, plan.key_groups),
                ("deltas", "counts", "spreads", "join_labels", *passed_on, "pieces"),
                (plan.num_nodes, *nodes, plan.scale),
                **plan.widths,
                **plan.sizes,
                **plan.key_width,
                PIECES=number,
                num_warps=4,
                **plan.pdl,
            )
    launches.add(
        causal_bwd_dkdv_kernel,
        (-(-plan.num_keys // chunk), plan.key_groups),
        (
            *("query", "key", "value", "gradient", "d_key", "d_value", "key_lengths", "labels", "centres"),
            *("lse", "dots", *passed_on),
        ),
        (
            *plan.numbers,
            *row_strides(query, key, value, gradient, tensors["d_key"], tensors["d_value"]),
            *(plan.qk_scale, plan.scale),
        ),
        **plan.widths,
        M=num_landmarks,
        **plan.near,
        **plan.lengths,
        **plan.precision,
        **plan.dkdv_tiles,
        **plan.pdl,
    )
    return Pass(launches, outputs, (workspace,))


def run_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
    num_landmarks: int,
    window: int,
    chunk: int,
    scale: float,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; arguments as in `run_forward` and what it returned."""
    gradient, query, key, value = (with_vector_loads(x) for x in (gradient, query, key, value))
    inputs, options = (query, key, value, key_lengths), (num_landmarks, window, chunk, scale, width)
    found = find_pass(_backward_pass, (gradient, *inputs, out), piece_chunks(), *options)
    return tuple(launch(found, (gradient,), inputs, (out,), (statistics,))[0])


fused_causal_landmark_attention_backward = torch.library.custom_op(
    "scatterbrain::fused_causal_landmark_attention_backward", run_backward, mutates_args=()
)


@fused_causal_landmark_attention_backward.register_fake
def _(gradient, query, key, value, key_lengths, out, statistics, num_landmarks, window, chunk, scale, width):
    return tuple(x.new_empty_strided(*by_token(*x.shape)) for x in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, num_landmarks, window, chunk, scale, width, _, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # the statistics have none
    ctx.options = (num_landmarks, window, chunk, scale, width)


def _backward(ctx, gradient, _):
    run = torch.ops.scatterbrain.fused_causal_landmark_attention_backward
    return (*run(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 9)


fused_causal_landmark_attention.register_autograd(_backward, setup_context=_setup_context)


OPERATOR = Operator(_forward_pass, _backward_pass, run_forward, run_backward, 5, piece_chunks)


def attend(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Results of `run_forward`: by the operator for `torch.compile` and tensor subclasses, else directly.

    Statistics are None where gradients are recorded: they have none.
    """
    tensors, (*options, statistics) = arguments[:4], arguments[4:]
    needs_grad = torch.is_grad_enabled() and any([x.requires_grad for x in tensors[:3]])
    options = (*options, statistics or needs_grad)
    if needs_dispatcher(tensors):
        return fused_causal_landmark_attention(*tensors, *options)
    with device_of(tensors[0]):
        if needs_grad:
            return FusedFunction.apply(*tensors, (OPERATOR, options, None, False)), None
        return run_forward(*tensors, *options)


def clusters_of(statistics: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Clusters of the keys at each level, as `causal_clusters` gives them, from the arguments of `run_forward`."""
    plan = _Plan(*arguments)
    views = plan.statistics().views(statistics)
    position = torch.arange(plan.num_keys, device=plan.device)
    found, levels = None, []
    for level, count in enumerate(plan.counts):
        inside = position < count * (plan.chunk << level)
        if level == 0:
            index = position.clamp_max(plan.num_nodes * plan.chunk - 1)
            found = views["labels"][:, index].long()
        else:
            row = (plan.first_node(level - 1) + position // (plan.chunk << (level - 1))) * plan.num_landmarks
            index = (row + found.clamp_min(0)).clamp_max(views["join_labels"].shape[1] - 1)
            found = views["join_labels"].gather(1, index).long().masked_fill(found < 0, -1)
        found = found.masked_fill(~inside, -1)
        levels.append(found)
    shape = (len(levels), plan.batch, plan.heads // plan.repeats, plan.num_keys)
    return torch.stack(levels).view(shape) if levels else position.new_zeros(shape)


def log_normalisers(statistics: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Natural logarithms (B, H, T) of the normalisers, from the statistics of `run_forward` and its arguments."""
    plan = _Plan(*arguments)
    lse = plan.statistics().views(statistics)["lse"].view(plan.batch, plan.heads, plan.length)
    return torch.where(lse > 1e29, -torch.inf, lse / LOG2E)
