"""Adaptive attention: the operator, and its implementation by tiles in plain PyTorch.

Landmarks and the window are computed in the original order of the queries, by `scatterbrain.ops.clusters.blocked`,
without the clusters that a query takes. The keys of these are gathered once for all queries of a cluster, or, where
sizes must not depend on the data (GPUs, export, compilation), once for each tile of queries of a cluster. Both are sums
relative to a maximum of their own, and are merged relative to the larger one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.adaptive import triton as fused
from scatterbrain.ops.adaptive.naive import naive_adaptive_attention
from scatterbrain.ops.adaptive.plan import (
    AdaptivePlan,
    check_density,
    check_plan,
    check_query_lengths,
    plan_adaptive_attention,
)
from scatterbrain.ops.adaptive.triton.tiles import tiles_override
from scatterbrain.ops.clusters.blocked import LEAST_NORMALISER, BlockLayout, centred_keys, landmark_sums
from scatterbrain.ops.clusters.kmeans import assign_key_clusters, check_steps
from scatterbrain.ops.clusters.tiles import ClusterTiles
from scatterbrain.ops.clusters.triton import is_fast
from scatterbrain.ops.common.backends import PYTORCH_AND_TRITON, choose_backend
from scatterbrain.ops.common.calls import run_again
from scatterbrain.ops.common.inputs import (
    VisibleRows,
    check_dropout,
    check_inputs,
    default_scale,
    empty_output,
    length_mask,
    visible_rows,
)
from scatterbrain.ops.common.numerics import (
    FLOOR,
    accumulation_dtype,
    at_most,
    gather_rows,
    is_exporting,
    no_autocast,
    split_rows,
    stable_argsort,
    tile_budget,
)
from scatterbrain.ops.common.windows import window_bounds


def adaptive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    density: float,
    window: int = 0,
    *,
    tolerance: float | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
    num_steps: int = 1,
    value_weight: float = 0.0,
    plan: AdaptivePlan | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Output (B, H, T, D) of attention that is exact on a window and on key clusters chosen for each query cluster.

    All other keys have the weight exp(s q.c_b) of the mean of their cluster; README.md in this folder states the maths.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        num_landmarks: number of key clusters M.
        num_query_landmarks: number of query clusters Q.
        density: largest share in [0, 1] of the visible keys that a query cluster weights exactly; 0 is
            `landmark_attention`, 1 full attention.
        window: width W of the window `-(W // 2) <= j - i < (W + 1) // 2`; 0 for none.
        tolerance: estimated share of a query cluster's weight that landmarks may misplace; a query cluster takes no
            more clusters once it is reached. None takes as many as fit `density`.
        scale: softmax scale s; None is E ** -0.5.
        is_causal: has to be false.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        query_lengths: (B,) integers; queries i >= query_lengths[b] move no centroid, so that padding does not influence
            other queries. None for all.
        num_steps: iterations of Lloyd's algorithm, see `assign_clusters`.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`.
        plan: a result of `plan_adaptive_attention`, to reuse clusters and supports over layers, steps of a sampler or
            heads. Its numbers of clusters and keys replace the options from `num_landmarks` to `density`, `tolerance`,
            `num_steps` and `value_weight`. Ranges are checked on the CPU only: the check would synchronise a GPU.
        dropout_p: probability of dropping a weight (ignored by `naive`); that of a landmark for a query is dropped for
            all of its keys.
        enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them. A plan has
            clusters for all H heads.
        backend: `naive` (dense, float64), `torch` (by tiles), `triton` (fused CUDA kernels, see
            `scatterbrain.ops.adaptive.triton`), or `auto`: `triton` where it runs and is fast, else `torch`.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: causal, or shapes, dtypes or options that do not fit.
    """
    known_as = None
    given = query, key, value
    if key_lengths is None and query_lengths is None and plan is None:
        sizes = num_landmarks, num_query_landmarks, density, window
        options = tolerance, scale, is_causal, num_steps, value_weight, dropout_p, enable_gqa, backend
        out, known_as = run_adaptive_again(*given, *sizes, *options)
        if out is not None:
            return out
    query, key, value, key_lengths = check_inputs(query, key, value, key_lengths, None, enable_gqa, is_causal)
    query_lengths = check_query_lengths(query_lengths, query)
    check_dropout(dropout_p)
    check_density(density, tolerance)
    window_bounds(window)
    if plan is None:
        check_whole_number("num_landmarks", num_landmarks, 1)
        check_whole_number("num_query_landmarks", num_query_landmarks, 1)
    if is_causal:
        raise UserError(
            "Adaptive attention cannot be causal: its landmarks are means over all keys, so later keys would influence "
            "earlier queries. Choose sbcluster, sblocal, local or performer."
        )
    given_scale, scale = scale, default_scale(query, scale)
    if plan is not None and query.shape[0] > 0:
        plan = check_plan(plan, query, key, key_lengths)
        num_query_landmarks, num_landmarks = plan.taken.shape[2:]
    reason = fused.unsupported(query, value, num_landmarks, num_query_landmarks, window, dropout_p)
    backend = choose_backend(backend, PYTORCH_AND_TRITON, unsupported=reason, prefer_kernels=is_fast(query))
    if query.shape[0] == 0:
        return empty_output(query, key, value)
    if backend == "triton":
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if needs_grad and key_lengths is not None:
            rows = visible_rows(query, key, value, scale, key_lengths=key_lengths)
        else:
            rows = VisibleRows(query, key, value, None)  # the kernels skip hidden keys themselves
        assignment = None
        if plan is None and value_weight != 0:  # the kernels find clusters of keys alone themselves
            assignment = assign_key_clusters(key, value, num_landmarks, num_steps, key_lengths, value_weight)
        check_steps(num_landmarks, num_steps)
        sizes = at_most(num_landmarks, key.shape[2]), at_most(num_query_landmarks, query.shape[2]), density, window
        out = fused.attention(
            *rows.tensors(),
            *sizes,
            tolerance=tolerance,
            scale=scale,
            num_steps=num_steps,
            key_lengths=key_lengths,
            query_lengths=query_lengths,
            assignment=assignment,
            plan=plan,
        )
        is_given = all(x is y for x, y in zip(given, (query, key, value), strict=True))
        if known_as is not None and assignment is None and is_given:
            fused.remember(known_as, *given, *sizes, tolerance, scale, num_steps)
        return rows.mark(out)[0]
    if plan is None:
        plan = plan_adaptive_attention(
            *(query, key, value, num_landmarks, num_query_landmarks, density),
            tolerance=tolerance,
            scale=given_scale,  # the default is a symbol for Dynamo where the width is one: it cannot be checked
            key_lengths=key_lengths,
            query_lengths=query_lengths,
            num_steps=num_steps,
            value_weight=value_weight,
        )
    if backend == "naive":
        return naive_adaptive_attention(query, key, value, *plan[:3], window, scale, key_lengths)[0].to(query.dtype)
    rows = visible_rows(query, key, value, scale, key_lengths=key_lengths)
    return rows.mark(_tiled(*rows.tensors(), plan, window, scale, key_lengths, dropout_p))[0]


def run_adaptive_again(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    density: float,
    window: int,
    tolerance: float | None,
    scale: float | None,
    is_causal: bool,
    num_steps: int,
    value_weight: float,
    dropout_p: float,
    enable_gqa: bool,
    backend: str,
    tokens_first: bool = False,
) -> tuple[torch.Tensor | None, tuple | None]:
    """Output of a call of `adaptive_attention` like one that has been checked, and its key; each may be None.

    Arguments as there; with `tokens_first` query, key, value and output are (B, N, H, width).
    """
    sizes = num_landmarks, num_query_landmarks, density, window
    options = tolerance, scale, is_causal, num_steps, value_weight, dropout_p, enable_gqa, backend
    return run_again(adaptive_attention, (query, key, value), (*sizes, *options), tiles_override(), tokens_first)


def _tiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AdaptivePlan,
    window: int,
    scale: float,
    key_lengths: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """Output (B, H, T, D) over (B, H, N, width) tensors that are finite where they are hidden."""
    batch, heads = query.shape[:2]
    num_landmarks = plan.taken.shape[3]
    # A window of twice the sequence holds every key; tiles grow with its width.
    layout = BlockLayout.of(query, at_most(window, 2 * max(query.shape[2], key.shape[2])), num_landmarks)
    hidden = None
    if key_lengths is not None:
        hidden = ~length_mask(key_lengths, key.shape[2])[:, None, :, None].expand(batch, heads, key.shape[2], 1)
    tensors = [x.flatten(0, 1) for x in (query, key, value, plan.key_assignment, plan.query_assignment, plan.taken)]
    slices = [split_rows(x, layout.groups) for x in tensors]
    slices.append([None] * len(slices[0]) if hidden is None else split_rows(hidden.flatten(0, 1), layout.groups))
    options = {"scale": scale, "dropout_p": dropout_p}
    outputs = []
    with no_autocast(query):
        for *each, key_labels, query_labels, taken, of_slice in zip(*slices, strict=True):
            q, k, v = (x.to(accumulation_dtype(query.dtype)) for x in each)
            k, _ = centred_keys(k, of_slice)
            lists = {"query_assignment": query_labels, "taken": taken} if plan.num_exact else {}
            sums = landmark_sums(layout, q, k, v, key_labels, of_slice, num_landmarks=num_landmarks, **options, **lists)
            if plan.num_exact:
                exact = exact_sums(q, k, v, key_labels, **lists, num_exact=plan.num_exact, **options)
                sums = merge_sums(sums, exact)
            outputs.append((sums[0] / sums[1].clamp_min(LEAST_NORMALISER)).to(query.dtype))
        return torch.cat(outputs).unflatten(0, (batch, heads))


Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def merge_sums(first: Sums, second: Sums) -> Sums:
    """Sums of weighted values (g, T, D) and of weights (g, T, 1), relative to exp of the maximum (g, T, 1), of both.

    A part without weights has the sums 0 and any maximum that is finite.
    """
    maximum = torch.maximum(first[2], second[2])
    factors = [(part[2] - maximum).exp() for part in (first, second)]
    total, normaliser = (
        sum(part[i] * factor for part, factor in zip((first, second), factors, strict=True)) for i in (0, 1)
    )
    return total, normaliser, maximum


def exact_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_assignment: torch.Tensor,
    query_assignment: torch.Tensor,
    taken: torch.Tensor,
    num_exact: int,
    scale: float,
    dropout_p: float,
) -> Sums:
    """Sums over the keys that each query cluster takes, see `merge_sums`.

    Args:
        query: (g, T, E).
        key: (g, S, E).
        value: (g, S, D).
        key_assignment: cluster of each key (g, S), -1 for none.
        query_assignment: cluster of each query (g, T).
        taken: boolean (g, Q, M).
        num_exact: upper bound of the number of keys that a query cluster takes.
        scale: softmax scale s.
        dropout_p: probability of dropping a weight; dropped weights still count in the sum of weights.
    """
    rows = torch.cat([key, value, torch.ones_like(value[..., :1])], -1)
    keys, is_key = exact_lists(key_assignment, taken, num_exact)
    if not _may_synchronise(query):
        return _static_sums(query, rows, query_assignment, keys, is_key, scale, dropout_p)
    order, parts = _cluster_parts(query_assignment, keys, is_key, rows.shape[1], tile_budget(query))
    flat = query.flatten(0, 1), rows.flatten(0, 1)
    if torch.is_grad_enabled() and dropout_p == 0 and any(x.requires_grad for x in flat):
        sums, maximum = _ExactSums.apply(flat[0][order], flat[1], parts, scale)
    else:
        sums, maximum = _forward(flat[0][order], flat[1], parts, scale, dropout_p)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    sums, maximum = (x.index_select(0, place).unflatten(0, query.shape[:2]) for x in (sums, maximum))
    return sums[..., :-1], sums[..., -1:], maximum


def _may_synchronise(x: torch.Tensor) -> bool:
    """Whether sizes may depend on the data: they would synchronise a GPU, and cannot be recorded."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or is_exporting())


# Numbers of consecutive queries, and positions of the keys that they see.
Parts = list[tuple[int, torch.Tensor]]


def _cluster_parts(
    query_assignment: torch.Tensor, keys: torch.Tensor, is_key: torch.Tensor, num_keys: int, budget: int
) -> tuple[torch.Tensor, Parts]:
    """Positions (g T) of the queries in the order of their clusters, and stretches of this order with their keys.

    Positions are those in flat tensors (g T, E) and (g S, E).
    """
    groups, length = query_assignment.shape
    first = torch.arange(groups).unsqueeze(1)
    order = (stable_argsort(query_assignment) + first * length).flatten()
    keys = keys + (first * num_keys).unsqueeze(2)
    sizes = torch.zeros(is_key.shape[:2], dtype=torch.int64)
    sizes = sizes.scatter_add(1, query_assignment, torch.ones_like(query_assignment))
    clusters = zip(sizes.flatten().tolist(), keys.flatten(0, 1), is_key.sum(2).flatten().tolist(), strict=True)
    parts = []
    for size, of_cluster, number in clusters:
        most = max(1, budget // max(1, number))
        parts += [(min(most, size - start), of_cluster[:number]) for start in range(0, size, most)]
    return order, parts


def _forward(
    query: torch.Tensor, rows: torch.Tensor, parts: Parts, scale: float, dropout_p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of weighted values and of weights (N, D + 1) of queries (N, E), relative to exp of the maximum (N, 1).

    Args:
        query: (N, E), in the order of the parts.
        rows: keys, values and ones (n, E + D + 1).
        parts: numbers of consecutive queries, and positions of the keys that they see.
        scale: softmax scale s.
        dropout_p: probability of dropping a weight.
    """
    width = query.shape[1]
    results = []
    for q, (_, keys) in zip((query * scale).split([size for size, _ in parts]), parts, strict=True):
        if not len(keys):
            results.append((q.new_zeros(len(q), rows.shape[1] - width), q.new_full((len(q), 1), FLOOR)))
            continue
        kv = rows.index_select(0, keys)
        logits = q @ kv[:, :width].T
        maximum = logits.detach().amax(1, keepdim=True)
        weights = logits.sub_(maximum).exp_()
        total = weights @ kv[:, width:]
        if dropout_p > 0:
            dropped = F.dropout(weights, dropout_p) @ kv[:, width:]
            total = torch.cat([dropped[:, :-1], total[:, -1:]], 1)
        results.append((total, maximum))
    sums, maxima = (torch.cat(x) for x in zip(*results, strict=True))
    return sums, maxima


class _ExactSums(torch.autograd.Function):
    """`_forward` with gradients by parts: autograd's of gathered rows would be as large as all rows for each part."""

    @staticmethod
    def forward(ctx, query, rows, parts, scale):
        sums, maxima = _forward(query, rows, parts, scale)
        ctx.save_for_backward(query, rows, maxima)
        ctx.mark_non_differentiable(maxima)
        ctx.parts, ctx.scale = parts, scale
        return sums, maxima

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        query, rows, maxima = ctx.saved_tensors
        width, sizes = query.shape[1], [size for size, _ in ctx.parts]
        query_grads, rows_grad = [], torch.zeros_like(rows)
        stretches = zip(*(x.split(sizes) for x in (query, maxima, grad)), ctx.parts, strict=True)
        for q, maximum, of_sums, (_, keys) in stretches:
            kv, q = rows.index_select(0, keys), q * ctx.scale
            weights = (q @ kv[:, :width].T).sub_(maximum).exp_()
            of_logits = (of_sums @ kv[:, width:].T).mul_(weights)
            query_grads.append(of_logits @ kv[:, :width] * ctx.scale)
            rows_grad.index_add_(0, keys, torch.cat([of_logits.T @ q, weights.T @ of_sums], 1))
        return torch.cat(query_grads), rows_grad, None, None


def _static_sums(
    query: torch.Tensor,
    rows: torch.Tensor,
    query_assignment: torch.Tensor,
    keys: torch.Tensor,
    is_key: torch.Tensor,
    scale: float,
    dropout_p: float,
) -> Sums:
    """The sums of `exact_sums` by tiles of queries of one cluster, whose sizes do not depend on the data.

    Args:
        query: (g, T, E).
        rows: keys, values and ones (g, S, E + D + 1).
        query_assignment: cluster of each query (g, T).
        keys: positions of the keys of each query cluster (g, Q, K).
        is_key: boolean (g, Q, K), false for a place without a key.
        scale: softmax scale s.
        dropout_p: probability of dropping a weight.
    """
    tiles = ClusterTiles.of(query_assignment, keys.shape[1])
    bias = torch.zeros_like(is_key, dtype=query.dtype).masked_fill(~is_key, -math.inf)
    groups, _, size = tiles.index.shape
    width = query.shape[2]
    length = max(1, tile_budget(query) // (groups * keys.shape[2] * (size + rows.shape[2])))
    pairs = ((tiles.index, tiles.owner),)
    if not is_exporting():
        pairs = zip(*(x.split(length, 1) for x in (tiles.index, tiles.owner)), strict=True)
    results = []
    for places, owner in pairs:
        q = gather_rows(query, places.flatten(1).clamp_min(0)).view(-1, size, width)
        kv = gather_rows(rows, gather_rows(keys, owner).flatten(1)).view(q.shape[0], -1, rows.shape[2])
        tile_bias = gather_rows(bias, owner).flatten(0, 1).unsqueeze(1)
        logits = torch.baddbmm(tile_bias, q, kv[..., :width].transpose(1, 2), alpha=scale)
        maximum = logits.detach().amax(-1, keepdim=True).clamp_min(FLOOR)
        weights = (logits - maximum).exp()
        total = torch.bmm(weights, kv[..., width:])
        if dropout_p > 0:
            dropped = torch.bmm(F.dropout(weights, dropout_p), kv[..., width:])
            total = torch.cat([dropped[..., :-1], total[..., -1:]], -1)
        results.append([x.view(groups, -1, *x.shape[1:]) for x in (total, maximum)])
    sums, maximum = (tiles.put(torch.cat(parts, 1)) for parts in zip(*results, strict=True))
    return sums[..., :-1], sums[..., -1:], maximum.detach()


def exact_lists(key_assignment: torch.Tensor, taken: torch.Tensor, num_exact: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (g, Q, K) of the keys that each query cluster takes, and whether each is one of them.

    Args:
        key_assignment: cluster of each key (g, S), -1 for none.
        taken: boolean (g, Q, M).
        num_exact: upper bound K of their number.
    """
    groups, _, num_clusters = taken.shape
    labels = key_assignment.where(key_assignment >= 0, num_clusters)
    order = stable_argsort(labels)
    sizes = torch.zeros(groups, num_clusters + 1, dtype=torch.int64, device=labels.device)
    sizes = sizes.scatter_add(1, labels, torch.ones_like(labels))[:, :num_clusters].unsqueeze(1)
    starts = sizes.cumsum(2) - sizes  # (g, 1, M)
    sizes = sizes * taken
    ends = sizes.cumsum(2)  # (g, Q, M)
    if _may_synchronise(key_assignment):
        num_exact = max(1, int(ends[..., -1].max()))
    place = torch.arange(num_exact, device=labels.device).expand(*taken.shape[:2], -1).contiguous()
    if torch.onnx.is_in_onnx_export():  # which has no searchsorted
        cluster = (ends.unsqueeze(2) <= place.unsqueeze(3)).sum(3)
    else:
        cluster = torch.searchsorted(ends, place, right=True)
    is_key = cluster < num_clusters
    cluster = cluster.clamp_max(num_clusters - 1)
    # a place in the order of clusters: the start of its cluster, and as far behind it as in the list
    shift = starts - (ends - sizes)
    place = (place + shift.gather(2, cluster)).clamp(0, labels.shape[1] - 1)
    return order.gather(1, place.flatten(1)).view_as(place), is_key
