"""Causal landmark attention by chunks, in plain PyTorch: exact keys and levels of landmarks in one softmax.

A level's node is seen by the queries of successive chunks, so that all products are those of blocks, without a gather.
Of a query's chunk c only u = c - w + 1 matters: its nodes of level l follow from u >> l. The chunks of a slice have the
same u >> s: all of them see the same nodes of the levels from s on, which are one product, and those of the levels
below are products of 2^(l + 1) chunks with the landmarks of two nodes, of which the first 2^l chunks see one. The first
chunks, whose low levels have fewer nodes, are one slice by themselves.

T (W + C + 2 M log(T / C)) weights are kept for the backward pass. Sums and exponentials are float32, or float64 for
float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scatterbrain.ops.clusters.causal.levels import Level, chunks_of, exact_chunks, find_levels, node_counts
from scatterbrain.ops.common.numerics import (
    FLOOR,
    accumulation_dtype,
    is_exporting,
    no_autocast,
    split_rows,
    tile_budget,
)


def blocked_causal_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    chunk: int,
    *,
    scale: float,
    num_steps: int,
    value_weight: float = 0.0,
    key_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (B, H, T, D) in the dtype of `query`, and natural logarithms (B, H, T) of the normaliser or None.

    Args:
        query: (B, H, T, E).
        key: (B, Hkv, S, E), zero where it is hidden; each head for H / Hkv consecutive heads of the queries.
        value: (B, Hkv, S, D), likewise.
        num_landmarks: landmarks M of a node.
        window: width W of the window.
        chunk: keys C of a chunk.
        scale: softmax scale s.
        num_steps: iterations of Lloyd's algorithm.
        value_weight: weight of the values in the clustering.
        key_mask: boolean (B, S), true for visible keys; None for all.
        dropout_p: probability of dropping a weight; that of a landmark for a query is dropped for all of its keys.
        with_lse: compute the logarithms.

    Returns:
        Output, zero for a query that sees no key, and logarithms in float32, or float64 for float64 inputs, -inf for
        such a query.
    """
    batch, heads, length, _ = query.shape
    repeats, dtype = heads // key.shape[1], accumulation_dtype(query.dtype)
    num_chunks, num_exact = -(-length // chunk), exact_chunks(window, chunk)
    columns = (num_exact + 1) * chunk + 2 * num_landmarks * len(node_counts(num_chunks, num_exact))
    # chunks of a slice, and sequences of keys that are computed at a time
    size = num_chunks + 1
    if not (torch.compiler.is_compiling() or is_exporting()):
        size = _power_of_two(max(4, tile_budget(query) // (chunk * columns * repeats)))
    groups = max(1, tile_budget(query) // (chunk * columns * repeats * min(size, num_chunks)))
    query_dtype = query.dtype
    with no_autocast(query):
        key, value, visible = chunks_of(key.to(dtype), value.to(dtype), key_mask, chunk, length)
        query = F.pad(query.to(dtype).flatten(0, 1), (0, 0, 0, num_chunks * chunk - length))
        # a group of sequences of keys has `repeats` times as many of queries
        slices = zip(
            *(split_rows(x, groups) for x in (key, value, visible)), split_rows(query, groups * repeats), strict=True
        )
        options = {"scale": scale, "num_steps": num_steps, "value_weight": value_weight}
        options |= {"dropout_p": dropout_p, "with_lse": with_lse}
        results = [_attend(*each, num_landmarks, window, size, **options) for each in slices]
    out, *lse = (torch.cat(x)[:, :length].unflatten(0, (batch, heads)) for x in zip(*results, strict=True))
    return out.to(query_dtype), lse[0] if with_lse else None


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`."""
    return 1 << (number.bit_length() - 1)


def _attend(
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    query: torch.Tensor,
    num_landmarks: int,
    window: int,
    size: int,
    *,
    scale: float,
    num_steps: int,
    value_weight: float,
    dropout_p: float,
    with_lse: bool,
) -> tuple[torch.Tensor, ...]:
    """Output (G, n C, D), and with `with_lse` logarithms (G, n C), of some sequences.

    Args:
        key: (g, n, C, E).
        value: (g, n, C, D).
        visible: boolean (g, n, C, 1).
        query: (G, n C, E), G a multiple of g.
        num_landmarks: landmarks M of a node.
        window: width W of the window.
        size: chunks of a slice, a power of two where they are not more than all.
        scale: softmax scale s.
        num_steps: iterations of Lloyd's algorithm.
        value_weight: weight of the values in the clustering.
        dropout_p: probability of dropping a weight.
        with_lse: compute the logarithms.
    """
    num_chunks, chunk, width = key.shape[1:]
    repeats = query.shape[0] // key.shape[0]
    num_exact = exact_chunks(window, chunk)
    levels, _ = find_levels(key, value, visible, num_landmarks, window, num_steps, value_weight)

    def of_queries(x: torch.Tensor) -> torch.Tensor:
        """For every sequence of queries."""
        return x if repeats == 1 else x.repeat_interleave(repeats, 0)

    def stretches(x: torch.Tensor) -> torch.Tensor:
        """Rows (G, n, width, R) of each chunk and the exact chunks before it, a view."""
        x = F.pad(x.flatten(1, 2), (0, 0, num_exact * chunk, 0))
        return of_queries(x).unfold(1, (num_exact + 1) * chunk, chunk)

    levels = [Landmarks.of(Level(*(of_queries(x) for x in level)), width) for level in levels]
    query = scale * query
    norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
    hidden = torch.arange((num_exact + 1) * chunk, device=query.device)
    hidden = hidden > torch.arange(chunk, device=query.device)[:, None] + num_exact * chunk
    # split, not indexed: the gradient of every `x[a:b]` would be as large as `x`
    first = min(num_chunks, num_exact - 1 + size)
    sizes = [first, *[size] * ((num_chunks - first) // size)]
    sizes += [num_chunks - sum(sizes)] if sum(sizes) < num_chunks else []
    parts = (x.split(sizes, 1) for x in (query.unflatten(1, (-1, chunk)), norm.unflatten(1, (-1, chunk))))
    parts = (*parts, *(stretches(x).split(sizes, 1) for x in (key, value, visible)))
    nodes = [level.unbind() for level in levels] if len(sizes) > 1 else []
    results = []
    for number, (queries, norms, keys, values, shown) in enumerate(zip(*parts, strict=True)):
        near = (queries @ keys).masked_fill(hidden | ~shown, FLOOR).flatten(1, 2)
        if number == 0:
            far = _first_landmarks(levels, queries.flatten(1, 2), norms.flatten(1, 2), num_exact, chunk)
        else:
            far = _landmarks_of_slice(nodes, queries, norms, number, size)
        logits = torch.cat([near, *(x for x, _ in far)], -1)
        lse = (logits.logsumexp(-1),) if with_lse else ()
        weights = logits.softmax(-1)
        if dropout_p > 0:
            weights = F.dropout(weights, dropout_p)
        exact, *of_levels = weights.split([near.shape[-1], *(x.shape[-1] for x, _ in far)], -1)
        out = (exact.unflatten(1, queries.shape[1:3]) @ values.transpose(2, 3)).flatten(1, 2)
        for part, (_, product) in zip(of_levels, far, strict=True):
            out = out + product(part)
        results.append((out, *lse))
    out, *lse = (torch.cat(x, 1) for x in zip(*results, strict=True))
    blind = of_queries(visible.flatten(1, 2).squeeze(-1).cumsum(1) == 0)
    return out.masked_fill(blind.unsqueeze(-1), 0.0), *(x.masked_fill(blind, -torch.inf) for x in lse)


class Landmarks(NamedTuple):
    """What products with landmarks take; n nodes.

    Attributes:
        key: mean keys, (G, n, E, M).
        value: mean values, (G, n, M, D).
        bias: logarithms of the numbers of keys (G, n, 1, M), FLOOR for none.
        spread: root mean square distances of the keys from their mean, over sqrt(E), (G, n, 1, M).
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, level: Level, width: int) -> Landmarks:
        """Landmarks of a level of keys of width E."""
        count = level.count.transpose(2, 3)
        bias = count.clamp_min(1.0).log().masked_fill(count == 0, FLOOR)
        return cls(level.key.transpose(2, 3), level.value, bias, spread_of(level, width).transpose(2, 3))

    def unbind(self) -> list[Landmarks]:
        """Those of each node."""
        return [Landmarks(*x) for x in zip(*(x.unbind(1) for x in self), strict=True)]

    def logits(self, query: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Logits (..., T, M) of queries (..., T, E) times the softmax scale, with norms (..., T, 1)."""
        return query @ self.key + (self.bias + spread_correction(norm, self.spread, self.bias))


def spread_of(level: Level, width: int) -> torch.Tensor:
    """Root mean square distances (..., M, 1) of the keys of landmarks from their mean, over sqrt(E)."""
    # no gradient of the square root at zero
    tiny = torch.finfo(level.scatter.dtype).tiny
    return (level.scatter / (level.count.clamp_min(1.0) * width)).clamp_min(tiny).sqrt()


# Logits (G, T, number) of landmarks, and the product of weights of this shape with their values (G, T, D).
Product = tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]


def _landmarks_of_slice(
    nodes: list[list[Landmarks]], query: torch.Tensor, norm: torch.Tensor, number: int, size: int
) -> list[Product]:
    """Logits and products of the landmarks that the chunks of a slice see.

    Args:
        nodes: landmarks of each node of each level, (G, E, M) and so on.
        query: (G, n, C, E), n at most `size`, fewer in the last slice.
        norm: (G, n, C, 1).
        number: of the slice; its first chunk has u = number * size.
        size: chunks of a slice.
    """
    num_chunks, chunk = query.shape[1:3]
    found: list[Product] = []
    depth = size.bit_length() - 1  # s
    common = []
    for level in range(depth, len(nodes)):
        left = ((number * size) >> level) - 1
        if left >= 1:
            common += nodes[level][left - 2 + left % 2 : left]
    if common:
        joined = Landmarks(*(torch.cat(x, 1 if i == 1 else 2) for i, x in enumerate(zip(*common, strict=True))))
        logits = joined.logits(query.flatten(1, 2), norm.flatten(1, 2))
        found.append((logits, lambda weights: weights @ joined.value))
    for level in range(min(depth, len(nodes))):
        # a block of 2^(level + 1) chunks, from u = 2^(level + 1) a on, sees node 2 a - 2, its second half 2 a - 1 too
        block = 2 << level
        num_blocks = -(-num_chunks // block)
        first = (number * size >> level) - 2
        seen = nodes[level][first : first + 2 * num_blocks]
        if len(seen) % 2:
            seen.append(seen[-1])  # the last block has no second half
        both = Landmarks(*(torch.stack(x, 1) for x in zip(*seen, strict=True)))
        both = Landmarks(
            *(torch.cat(x.unflatten(1, (num_blocks, 2)).unbind(2), 2 if i == 1 else 3) for i, x in enumerate(both))
        )
        pad = (0, 0, 0, 0, 0, num_blocks * block - num_chunks)
        queries, norms = (F.pad(x, pad).unflatten(1, (num_blocks, block)).flatten(2, 3) for x in (query, norm))
        logits = both.logits(queries, norms)
        half = logits.shape[-1] // 2
        mask = torch.zeros(block * chunk, 2 * half, dtype=torch.bool, device=query.device)
        mask[: block * chunk // 2, half:] = True
        logits = logits.masked_fill(mask, FLOOR).flatten(1, 2)[:, : num_chunks * chunk]
        found.append((logits, partial(_block_product, both.value, block * chunk)))
    return found


def _first_landmarks(
    levels: list[Landmarks], query: torch.Tensor, norm: torch.Tensor, num_exact: int, chunk: int
) -> list[Product]:
    """The same for the first chunks of a sequence, queries (G, T, E) and norms (G, T, 1)."""
    found: list[Product] = []
    for number, level in enumerate(levels):
        start, block = (num_exact + (2 << number) - 1) * chunk, chunk << number
        if start >= query.shape[1]:
            break
        num_blocks = -(-(query.shape[1] - start) // block)
        landmarks = _last_two(Landmarks(*(x[:, :num_blocks] for x in level)))
        queries, norms = (_blocks(x[:, start:], block, num_blocks) for x in (query, norm))
        logits = landmarks.logits(queries, norms).flatten(1, 2)[:, : query.shape[1] - start]
        found.append(
            (
                F.pad(logits, (0, 0, start, 0), value=FLOOR),
                partial(_block_product, landmarks.value, block, start=start),
            )
        )
    return found


def _block_product(values: torch.Tensor, block: int, weights: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Products (G, T, D) of weights (G, T, number), of which each block of rows from `start` on has its own values."""
    length = weights.shape[1] - start
    out = (_blocks(weights[:, start:], block, values.shape[1]) @ values).flatten(1, 2)[:, :length]
    return F.pad(out, (0, 0, start, 0))


def _last_two(level: Landmarks) -> Landmarks:
    """For each number of nodes 1 to n, the last node and, where the number is even, the one before it: 2 M landmarks.

    Where the number is odd, the second one has no keys.
    """
    tensors = []
    for name, x in zip(Landmarks._fields, level, strict=True):
        before = torch.cat([x[:, :1], x[:, :-1]], 1)
        if name == "bias":
            odd = torch.arange(x.shape[1], device=x.device) % 2 == 0
            before = before.masked_fill(odd.view(-1, 1, 1), FLOOR)
        tensors.append(torch.cat([x, before], 2 if name == "value" else 3))
    return Landmarks(*tensors)


def spread_correction(norm: torch.Tensor, spread: torch.Tensor, log_count: torch.Tensor) -> torch.Tensor:
    """What the spread of the keys of a landmark adds to the logarithm of their mean weight, see README.md.

    Args:
        norm: norms of the queries times the softmax scale, (..., T, 1).
        spread: of `spread_of`, (..., 1, M).
        log_count: logarithms of the numbers of keys (..., 1, M), at most 0 for none.
    """
    sigma = norm * spread
    limited = torch.minimum(sigma, (2.0 * log_count.clamp_min(0.0)).sqrt())
    return limited * torch.sub(sigma, limited, alpha=0.5)


def _blocks(x: torch.Tensor, block: int, num_blocks: int) -> torch.Tensor:
    """Blocks (G, n, block, width) of rows (G, T, width), zero beyond the last."""
    return F.pad(x, (0, 0, 0, num_blocks * block - x.shape[1])).unflatten(1, (num_blocks, block))
