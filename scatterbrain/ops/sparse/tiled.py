"""Attention over a sparse support, alone or with a low-rank estimate outside it, in plain PyTorch.

    A(i, j) = exp(s q_i.k_j)          on the support (`scatterbrain.ops.sparse.supports`)
              phi(q_i).phi(k_j)       outside it, or 0 without a low-rank part

Tiles of queries and keys are gathered and multiplied; each round of the support gives, for every query, a maximum and
sums relative to it, which are merged in log space. The low-rank part is summed over all keys, and its share on the
support subtracted: support and features cost O(T L) and O((T + S) M), L the number of keys of a query.

The subtraction cancels where the estimates on the support dominate. Queries whose sum over all keys exceeds their
normaliser more than `CANCELLATION_LIMIT` times are recomputed with all their weights formed, without subtraction.
Statistics, exponentials and sums are float32, or float64 for float64 inputs; maxima are constants for autograd (they
cancel in the normalised result).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scatterbrain.errors import UserError
from scatterbrain.ops.common.inputs import visible_keys
from scatterbrain.ops.common.numerics import (
    FLOOR,
    MAXIMUM_SLACK,
    accumulation_dtype,
    gather_rows,
    is_exporting,
    no_autocast,
    split_rows,
    tile_budget,
)
from scatterbrain.ops.sparse.supports import Round, Support

# Largest amplification of rounding errors by the subtraction before a query is recomputed without it.
CANCELLATION_LIMIT = 64.0
# `torch.cond` of PyTorch 2.6 gives no gradients of tensors that one branch alone uses, or does not compile.
COND_HAS_NO_GRADIENTS = torch.__version__.startswith("2.6.")

LogFeatures = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _LowRank:
    """Low-rank part, relative to one maximum for each feature, over all keys, and one for each query.

    Attributes:
        query: (G, T, M) exp(log feature + feature's maximum - query's maximum), at most 1.
        key: (G, S, M) exp(log feature - feature's maximum), at most 1, zero for hidden keys.
        maximum: (G, T, 1) of the queries.
        sums: (G, M, D + 1) sums of key features times values and ones.
    """

    query: torch.Tensor
    key: torch.Tensor
    maximum: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, log_query: torch.Tensor, log_key: torch.Tensor, value_and_one: torch.Tensor) -> _LowRank:
        feature_maximum = log_key.detach().amax(1, keepdim=True).clamp_min(FLOOR)
        key = (log_key - feature_maximum).exp()
        log_query = log_query + feature_maximum
        maximum = log_query.detach().amax(-1, keepdim=True)
        return cls((log_query - maximum).exp(), key, maximum, key.transpose(1, 2) @ value_and_one)


def support_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    support: Support,
    *,
    scale: float,
    log_features: LogFeatures | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Output (B, H, T, D) of attention with exact weights on a support and low-rank weights outside it.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        support: exact pairs, of G = B * H sequences, or of one that all share.
        scale: softmax scale s.
        log_features: logarithms of the features of queries (B, H, T, M) and keys (B, H, S, M); None for no
            low-rank part.
        is_causal: hide the keys j > i; without a low-rank part only.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S), false for hidden keys.
        dropout_p: probability of dropping a weight; without a low-rank part only.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.

    Raises:
        UserError: causal masking or dropout together with a low-rank part.
    """
    if log_features is not None and (is_causal or dropout_p > 0):
        which = "causal masking" if is_causal else "attention dropout"
        raise UserError(
            f"A low-rank part around this sparse support has no {which}: its sums run over all keys. Use sblocal."
        )
    with no_autocast(query):
        batch, heads, length, _ = query.shape
        dtype = accumulation_dtype(query.dtype)
        q, k, v = (x.to(dtype).flatten(0, 1) for x in (query, key, value))
        mask = visible_keys(key_lengths, attn_mask, key.shape[2])
        hidden = None if mask is None else ~mask.repeat_interleave(heads, 0)
        v = torch.cat([v, v.new_ones(*v.shape[:2], 1)], -1)
        low_rank = None
        if log_features is not None:
            log_query, log_key = (x.to(dtype).flatten(0, 1) for x in log_features)
            if hidden is not None:
                log_key = log_key.masked_fill(hidden.unsqueeze(-1), -math.inf)
            low_rank = _LowRank.of(log_query, log_key, v)
        parts = [_round(q, k, v, each, scale, low_rank, is_causal, hidden, dropout_p) for each in support.rounds]
        out, cancelled = _merge(parts, low_rank)
        if low_rank is not None:
            arguments = (q, k, v, support, scale, (log_query, log_key), hidden)
            if torch.compiler.is_compiling() or q.is_meta:
                out = _recompute_in_graph(out, cancelled, *arguments)
            elif torch.jit.is_tracing():
                raise UserError(
                    "torch.jit.trace cannot record random features around a sparse support: which queries are "
                    "recomputed depends on the data. Use torch.export."
                )
            elif cancelled.any():
                out = out.masked_scatter(cancelled.unsqueeze(-1), _recompute(*arguments, cancelled))
        return out.view(batch, heads, length, -1).to(query.dtype)


@dataclass(frozen=True)
class _Part:
    """Sums of one round for each query.

    Attributes:
        maximum: (G, T, 1) largest exact logit, FLOOR where there is no key.
        exact: (G, T, D + 1) sums of exact weights, relative to it, times values and ones.
        estimate: (G, T, D + 1) the same of the estimates, relative to the low-rank maximum; None without them.
    """

    maximum: torch.Tensor
    exact: torch.Tensor
    estimate: torch.Tensor | None


def _round(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    each: Round,
    scale: float,
    low_rank: _LowRank | None,
    is_causal: bool,
    hidden: torch.Tensor | None,
    dropout_p: float,
) -> _Part:
    """Sums of one round over all sequences; query (G, T, E), key (G, S, E), value (G, S, D + 1), hidden (G, S)."""
    groups, length, _ = query.shape
    tile, columns = each.query_index.shape[-1], each.key_index.shape[-1]
    pairs = _visible_pairs(each, is_causal, hidden)
    slice_size = max(1, tile_budget(query) // (tile * columns))

    # one gather, then slices: the gradient of a gather is as large as its source
    def cut(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return split_rows(_gather(x, index), slice_size)

    tensors = [cut(query * scale, each.query_index), cut(key, each.key_index), cut(value, each.key_index)]
    if low_rank is not None:
        tensors += [cut(low_rank.query, each.query_index), cut(low_rank.key, each.key_index)]
    outputs = []
    start = 0
    for q, k, v, *features in zip(*tensors, strict=True):
        if is_exporting():
            visible = pairs.expand(groups, -1, -1, -1).flatten(0, 1)
        else:
            # tiles that all sequences share are stored once
            index = torch.arange(start, start + q.shape[0], device=pairs.device)
            visible = pairs.flatten(0, 1)[index % (pairs.shape[0] * pairs.shape[1])]
        start += q.shape[0]
        logits = torch.bmm(q, k.transpose(1, 2)).masked_fill(~visible, -math.inf)
        maximum = logits.detach().amax(-1, keepdim=True).clamp_min(FLOOR)
        weights = (logits - maximum).exp()
        exact = torch.bmm(F.dropout(weights, dropout_p), v)
        if dropout_p > 0:
            exact = torch.cat([exact[..., :-1], weights.sum(-1, keepdim=True)], -1)
        output = [maximum, exact]
        if features:
            estimate = torch.bmm(features[0], features[1].transpose(1, 2)).masked_fill(~visible, 0.0)
            output.append(torch.bmm(estimate, v))
        outputs.append(output)
    row_of_query = _row_of_query(each.query_index, length).expand(groups, -1)
    maximum, exact, *estimate = (
        torch.cat(parts).view(groups, -1, parts[0].shape[-1]) for parts in zip(*outputs, strict=True)
    )
    return _Part(
        _in_query_order(maximum, row_of_query, FLOOR),
        _in_query_order(exact, row_of_query, 0.0),
        _in_query_order(estimate[0], row_of_query, 0.0) if estimate else None,
    )


def _visible_pairs(each: Round, is_causal: bool, hidden: torch.Tensor | None) -> torch.Tensor:
    """Boolean (G or 1, n, C, L), true for the visible pairs of a round."""
    pairs = each.pairs()
    if is_causal:
        pairs = pairs & (each.key_index.unsqueeze(-2) <= each.query_index.unsqueeze(-1))
    if hidden is not None:
        index = each.key_index.expand(hidden.shape[0], -1, -1)
        of_tiles = hidden.gather(1, index.flatten(1).clamp_min(0)).view_as(index)
        pairs = pairs & ~of_tiles.unsqueeze(-2)
    return pairs


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x (G, N, width) at `index` (G or 1, n, C) as (G * n, C, width); any row where the index is -1."""
    rows = gather_rows(x, index.clamp_min(0).flatten(1).expand(x.shape[0], -1))
    return rows.view(-1, index.shape[-1], x.shape[-1])


def _row_of_query(query_index: torch.Tensor, length: int) -> torch.Tensor:
    """Row of each query in a round: (G or 1, T); one past the last row for a query in no tile."""
    flat = query_index.flatten(1)
    rows = flat.shape[1]
    row_of_query = torch.full((flat.shape[0], length + 1), rows, dtype=torch.int64, device=flat.device)
    positions = torch.arange(rows, device=flat.device).expand_as(flat)
    # positions -1 go to an extra entry after all queries
    return row_of_query.scatter(1, torch.where(flat < 0, length, flat), positions)[:, :length]


def _in_query_order(rows: torch.Tensor, row_of_query: torch.Tensor, missing: float) -> torch.Tensor:
    """Rows (G, T, width) in the order of the queries, of the rows (G, n * C, width) of a round."""
    return gather_rows(F.pad(rows, (0, 0, 0, 1), value=missing), row_of_query)


def _merge(parts: list[_Part], low_rank: _LowRank | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (G, T, D), and boolean (G, T), true for the queries whose subtraction cancels."""
    maximum = torch.stack([part.maximum for part in parts]).amax(0)
    if low_rank is not None:
        # the bound of the features includes the support, where exact weights replace the estimates
        maximum = torch.maximum(maximum, low_rank.maximum - MAXIMUM_SLACK)
    maximum = maximum.clamp_min(FLOOR)
    total = sum(part.exact * (part.maximum - maximum).exp() for part in parts)
    if low_rank is None:
        normaliser = total[..., -1:]
        cancelled = torch.zeros_like(normaliser, dtype=torch.bool)
        fully_masked = normaliser <= 0
    else:
        unit = (low_rank.maximum - maximum).exp()
        over_all = torch.bmm(low_rank.query, low_rank.sums)
        total = total + unit * (over_all - sum(part.estimate for part in parts))
        normaliser = total[..., -1:]
        fully_masked = low_rank.sums[:, None, :, -1].sum(-1, keepdim=True) <= 0
        # also true for a normaliser that came out negative or nan
        kept = unit * over_all[..., -1:] <= CANCELLATION_LIMIT * normaliser
        cancelled = ~(kept & (normaliser > 0)) & ~fully_masked
    unusable = fully_masked | cancelled
    out = total[..., :-1] / normaliser.masked_fill(unusable, 1.0)
    return out.masked_fill(unusable, 0.0), cancelled.squeeze(-1)


def _recompute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    support: Support,
    scale: float,
    log_features: LogFeatures,
    hidden: torch.Tensor | None,
    cancelled: torch.Tensor,
) -> torch.Tensor:
    """Outputs of the `cancelled` queries (G, T), all their weights formed: (cancelled, D), in the order of `cancelled`.

    Products of features are float64, each side relative to its own maximum: weights may then differ by any factor.
    """
    num_keys = key.shape[1]
    counts = cancelled.sum(1)
    groups = counts.nonzero().squeeze(1)
    counts = counts[groups]
    # the same number for each sequence: padded by rows that are not cancelled, and dropped at the end
    max_count = int(counts.max())
    rows = cancelled[groups].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :max_count]
    is_cancelled = torch.arange(max_count, device=rows.device) < counts[:, None]
    num_groups = max(1, tile_budget(query) // (max_count * num_keys))
    num_rows = max(1, tile_budget(query) // num_keys)
    outputs = [
        _dense_rows(query, key, value, support, scale, log_features, hidden, group_slice, of_groups.split(num_rows, 1))
        for group_slice, of_groups in zip(groups.split(num_groups), rows.split(num_groups), strict=True)
    ]
    return torch.cat(outputs)[is_cancelled]


def _recompute_in_graph(out: torch.Tensor, cancelled: torch.Tensor, query: torch.Tensor, *arguments) -> torch.Tensor:
    """Output (G, T, D) with the `cancelled` queries (G, T) recomputed, for a graph that is compiled or exported.

    A graph has no shapes that depend on data: where a query is cancelled, the weights of all queries are formed.
    """
    groups, length, _ = query.shape
    every = torch.arange(groups, device=query.device)
    rows = torch.arange(length, device=query.device).expand(groups, -1)

    def recompute(out: torch.Tensor) -> torch.Tensor:
        return torch.where(cancelled.unsqueeze(-1), _dense_rows(query, *arguments, every, (rows,)), out)

    # the meta device has shapes, but no condition
    if out.is_meta or (COND_HAS_NO_GRADIENTS and out.requires_grad):
        return recompute(out)
    return torch.cond(cancelled.any(), recompute, torch.clone, (out,))


def _dense_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    support: Support,
    scale: float,
    log_features: LogFeatures,
    hidden: torch.Tensor | None,
    groups: torch.Tensor,
    rows: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Outputs (g, r, D) of the sequences `groups` (g,), for the queries of each in slices `rows` of (g, r)."""
    log_query, log_key = log_features
    key_maximum = log_key[groups].detach().amax(-1, keepdim=True)
    key_factors = (log_key[groups] - key_maximum.clamp_min(FLOOR)).double().exp().transpose(1, 2)
    keys, values = key[groups].transpose(1, 2), value[groups][..., :-1]
    queries, log_queries = query[groups] * scale, log_query[groups]
    outputs = []
    for index in rows:
        features = gather_rows(log_queries, index)
        maximum = features.detach().amax(-1, keepdim=True)
        products = (features - maximum).double().exp() @ key_factors
        # the clamp keeps the gradient of a product of zero finite
        logits = products.clamp_min(torch.finfo(products.dtype).tiny).log().to(query.dtype)
        logits = logits + maximum + key_maximum.transpose(1, 2)
        exact = gather_rows(queries, index) @ keys
        logits = torch.where(_rows_of_support(support, groups, index, query.shape[1], key.shape[1]), exact, logits)
        if hidden is not None:
            logits = logits.masked_fill(hidden[groups].unsqueeze(1), -math.inf)
        outputs.append(logits.softmax(-1) @ values)
    return torch.cat(outputs, 1)


def _rows_of_support(
    support: Support, groups: torch.Tensor, rows: torch.Tensor, num_queries: int, num_keys: int
) -> torch.Tensor:
    """Boolean (g, r, S): the support's pairs of the queries `rows` (g, r) of the sequences `groups` (g,)."""
    mask = torch.zeros(*rows.shape, num_keys + 1, dtype=torch.bool, device=rows.device)
    for each in support.rounds:
        of_queries, of_keys, pairs = each.query_index, each.key_index, each.pairs()
        tiles, size = of_queries.shape[1:]
        in_queries, in_keys, in_pairs = (
            groups.clamp_max(x.shape[0] - 1).unsqueeze(1) for x in (of_queries, of_keys, pairs)
        )
        row_of_query = _row_of_query(of_queries, num_queries)[in_queries, rows]
        in_tile = row_of_query < tiles * size
        row_of_query = row_of_query.clamp_max(tiles * size - 1)
        tile, row = row_of_query // size, row_of_query % size
        seen = pairs[in_pairs, tile, row] & in_tile.unsqueeze(-1)
        # what is left out goes to a column behind all keys
        mask.scatter_(2, torch.where(seen, of_keys[in_keys, tile], num_keys), True)
    return mask[..., :num_keys]
