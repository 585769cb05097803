"""Clusters of keys and of queries, and the key clusters that each query cluster weights exactly."""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError, check_whole_number, is_number
from scatterbrain.ops.adaptive.definition import LEAST_VARIANCE, ROUNDS, AdaptivePlan, cluster_sizes, exact_keys
from scatterbrain.ops.clusters import triton as fused
from scatterbrain.ops.clusters.kmeans import (
    assign_key_clusters,
    check_steps,
    cluster_sums,
    find_centroids,
    valid_points,
)
from scatterbrain.ops.clusters.steps import QUERIES_PER_CLUSTER, sample_of_variances
from scatterbrain.ops.common.inputs import check_inputs, check_tensors, default_scale, visible_rows
from scatterbrain.ops.common.numerics import (
    at_most,
    gather_rows,
    is_exporting,
    no_autocast,
    split_rows,
    stable_argsort,
    tile_budget,
)


def plan_adaptive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    num_query_landmarks: int,
    density: float,
    *,
    tolerance: float | None = None,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
    num_steps: int = 1,
    value_weight: float = 0.0,
) -> AdaptivePlan:
    """Clusters, and the key clusters that each query cluster takes, of which README.md in this folder has the rule.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D), for the clustering of the keys alone.
        num_landmarks: number of key clusters M.
        num_query_landmarks: number of query clusters Q.
        density: largest share in [0, 1] of the visible keys that a query cluster takes.
        tolerance: estimated share of a query cluster's weight that landmarks may misplace; a query cluster takes no
            more clusters once it is reached. None takes as many as fit `density`.
        scale: softmax scale s; None is E ** -0.5.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        query_lengths: (B,) integers; queries i >= query_lengths[b] move no centroid. None for all.
        num_steps: iterations of Lloyd's algorithm, see `assign_clusters`.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`.

    Returns:
        The plan, without gradient.

    Raises:
        UserError: shapes, dtypes or options that do not fit.
    """
    query, key, value, key_lengths = check_inputs(query, key, value, key_lengths)
    query_lengths = check_query_lengths(query_lengths, query)
    check_density(density, tolerance)
    check_whole_number("num_landmarks", num_landmarks, 1)
    check_whole_number("num_query_landmarks", num_query_landmarks, 1)
    scale = default_scale(query, scale)
    if value_weight == 0 and _has_fast_kernels(query, key, num_landmarks, num_query_landmarks, num_steps):
        from scatterbrain.ops.adaptive.triton.plan import find_plan

        sizes = at_most(num_landmarks, key.shape[2]), at_most(num_query_landmarks, query.shape[2])
        return find_plan(query, key, *sizes, density, tolerance, scale, key_lengths, query_lengths, num_steps)
    with torch.no_grad(), no_autocast(query):
        num_exact = exact_keys(density, key.shape[2])
        key_labels = assign_key_clusters(key, value, num_landmarks, num_steps, key_lengths, value_weight)
        num_landmarks = at_most(num_landmarks, key.shape[2])
        num_query_landmarks = at_most(num_query_landmarks, query.shape[2])
        query_labels, centroids = find_centroids(
            query, num_query_landmarks, num_steps, query_lengths, QUERIES_PER_CLUSTER
        )
        shape = (*query.shape[:2], num_query_landmarks, num_landmarks)
        if num_exact == 0:
            taken = torch.zeros(shape, dtype=torch.bool, device=query.device)
            return AdaptivePlan(key_labels, query_labels, taken, 0)
        rows = visible_rows(query, key, value, scale, key_lengths=key_lengths)
        tensors = (centroids, rows.key, key_labels)
        # as many sequences at a time as the budget of tiles allows
        columns = num_query_landmarks + key.shape[3] + num_landmarks
        size = max(1, tile_budget(query) // (key.shape[2] * columns))
        slices = zip(*(split_rows(x.flatten(0, 1), size) for x in tensors), strict=True)
        taken = [_take(*each, num_landmarks, density, tolerance, scale) for each in slices]
        return AdaptivePlan(key_labels, query_labels, torch.cat(taken).view(shape), num_exact)


def _has_fast_kernels(
    query: torch.Tensor, key: torch.Tensor, num_landmarks: int, num_query_landmarks: int, num_steps: int
) -> bool:
    """Whether the kernels of `triton/plan.py` can make the plan of a call that is not recorded, and are fast."""
    if not fused.is_fast(query) or torch.compiler.is_compiling() or is_exporting():
        return False
    for number, points in ((num_landmarks, key), (num_query_landmarks, query)):
        check_steps(number, num_steps)
        if fused.unsupported(query, key, at_most(number, points.shape[2]), 0) is not None:
            return False
    return True


def check_density(density: float, tolerance: float | None) -> None:
    """Check the options of the support.

    Raises:
        UserError: one is out of range.
    """
    if not is_number(density) or not 0 <= density <= 1:
        raise UserError(f"density={density!r} has to lie in [0, 1]: the largest share of the keys with exact weights.")
    if tolerance is not None and (not is_number(tolerance) or not 0 <= tolerance < 1):
        raise UserError(f"tolerance={tolerance!r} has to lie in [0, 1), or be None for as many keys as fit density.")


def check_query_lengths(query_lengths: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """Lengths (B,) of the queries (B, H, T, E) on their device, or None.

    Raises:
        UserError: they are no tensor of integers, one for each sample.
    """
    if query_lengths is None:
        return None
    check_tensors(query_lengths=query_lengths)
    is_integer = not (query_lengths.is_floating_point() or query_lengths.dtype == torch.bool)
    if query_lengths.shape != query.shape[:1] or not is_integer:
        raise UserError(
            f"query_lengths has to be integers of shape ({query.shape[0]},), one for each sample, got "
            f"{query_lengths.dtype} of shape {tuple(query_lengths.shape)}."
        )
    return query_lengths.to(query.device)


def check_plan(
    plan: AdaptivePlan, query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None
) -> AdaptivePlan:
    """A given plan, with -1 for the clusters of hidden keys.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, or on the CPU clusters or numbers out of range.
    """
    if not isinstance(plan, AdaptivePlan):
        raise UserError(f"plan has to be a result of plan_adaptive_attention, got {type(plan).__name__}.")
    key_labels, query_labels, taken, num_exact = plan
    check_tensors(key_assignment=key_labels, query_assignment=query_labels, taken=taken)
    num_clusters = taken.shape[-2:] if taken.dim() == 4 else ("Q", "M")
    for name, tensor, shape, dtype in (
        ("key_assignment", key_labels, key.shape[:3], torch.int64),
        ("query_assignment", query_labels, query.shape[:3], torch.int64),
        ("taken", taken, (*query.shape[:2], *num_clusters), torch.bool),
    ):
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != query.device:
            raise UserError(
                f"{name} of the plan has to be {dtype} of shape {tuple(shape)} on {query.device}, got {tensor.dtype} "
                f"of shape {tuple(tensor.shape)} on {tensor.device}. Make the plan from tensors of these shapes."
            )
    if isinstance(num_exact, bool) or not isinstance(num_exact, int) or num_exact < 0:
        raise UserError(
            f"num_exact={num_exact!r} of the plan has to be a whole number of at least 0, an upper bound of the "
            "keys that a query cluster takes."
        )
    visible = valid_points(key, key_lengths)
    key_labels = key_labels if key_lengths is None else key_labels.masked_fill(~visible, -1)
    if query.device.type == "cpu" and not (torch.compiler.is_compiling() or is_exporting()):
        for name, labels, size, used in (
            ("key_assignment", key_labels, taken.shape[3], visible),
            ("query_assignment", query_labels, taken.shape[2], True),
        ):
            bad = ((labels < 0) | (labels >= size)) & used
            if bad.any():
                raise UserError(
                    f"{name} of the plan has the cluster {labels[bad][0].item()}, and clusters have to lie in "
                    f"[0, {size}). Make the plan with the same key_lengths."
                )
        largest = (
            (taken.flatten(0, 1) * cluster_sizes(key_labels.flatten(0, 1), taken.shape[3]).unsqueeze(1)).sum(2).max()
        )
        if num_exact < largest:
            raise UserError(
                f"num_exact={num_exact} of the plan is below the {largest.item()} keys that a query cluster takes."
            )
    return AdaptivePlan(key_labels, query_labels, taken, num_exact)


def _take(
    centroids: torch.Tensor,
    key: torch.Tensor,
    key_labels: torch.Tensor,
    num_landmarks: int,
    density: float,
    tolerance: float | None,
    scale: float,
) -> torch.Tensor:
    """Boolean (G, Q, M), the clusters that each query cluster takes; arguments as in `log_losses`."""
    log_weight, log_loss, members = log_losses(centroids, key, key_labels, num_landmarks, scale)
    order = stable_argsort(-log_loss)
    sizes = members.unsqueeze(1).expand_as(order).gather(2, order)
    room = (density * members.sum(1).double() + 1e-6).long().view(-1, 1, 1)
    wanted = sizes > 0
    if tolerance is not None:
        total = log_weight.logsumexp(-1, keepdim=True)
        shares = (log_loss - total).masked_fill(log_weight == -torch.inf, -torch.inf).exp().gather(2, order)
        # what landmarks would misplace without this cluster and those after it
        wanted = wanted & (shares.flip(-1).cumsum(-1).flip(-1) > tolerance)
    taken = torch.zeros_like(wanted)
    for _ in range(ROUNDS):
        left = room - (sizes * taken).sum(-1, keepdim=True)
        fits = wanted & ~taken & (sizes <= left)
        taken = taken | (fits & ((sizes * fits).cumsum(-1) <= left))
    return torch.zeros_like(taken).scatter(2, order, taken)


def log_losses(
    centroids: torch.Tensor, key: torch.Tensor, key_labels: torch.Tensor, num_landmarks: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logarithms of the weights of clusters whose logits are normal, and of what their landmarks may misplace of them.

    Args:
        centroids: of the query clusters (G, Q, E).
        key: (G, S, E).
        key_labels: cluster of each key (G, S), -1 for none.
        num_landmarks: number of key clusters M.
        scale: softmax scale s.

    Returns:
        Both (G, Q, M), -inf for clusters without keys, and sizes of the clusters (G, M) int64.
    """
    means = scale * centroids  # s p_a
    key = key.to(means.dtype)
    hidden = (key_labels < 0).unsqueeze(-1)
    centre = key.sum(1, keepdim=True) / (~hidden).sum(1, keepdim=True).clamp_min(1)
    # relative to a common centre, sums lose no digits where all keys share a large component
    key = (key - centre).masked_fill(hidden, 0.0)
    (sums,), members = cluster_sums((key,), key_labels, num_landmarks)
    sizes = members.clamp_min(1.0)
    landmarks = sums / sizes
    mean = landmarks @ means.transpose(1, 2)  # [G, M, Q]
    # variances over a sample of the keys
    some = slice(None, None, sample_of_variances(key.shape[1], num_landmarks))
    offsets = key[:, some] - gather_rows(landmarks, key_labels[:, some].clamp_min(0))
    squares = (offsets @ means.transpose(1, 2)).square_()
    (squares,), sampled = cluster_sums((squares,), key_labels[:, some], num_landmarks)
    variance = (squares / sampled.clamp_min(1.0)).clamp_min(LEAST_VARIANCE)
    log_weight = (mean + variance / 2 + sizes.log()).masked_fill(members == 0, -torch.inf).transpose(1, 2)
    log_loss = log_weight + (-torch.expm1(-variance)).log().transpose(1, 2) / 2  # [G, Q, M]
    return log_weight, log_loss, members.squeeze(-1).long()
