"""Causal landmark attention by chunks, in plain PyTorch: exact keys and levels of landmarks in one softmax.

A level's node is seen by the queries of the same 2^l or 2^(l + 1) successive chunks, so that all products are those of
blocks, without a gather: of C queries with the keys of their own and the exact chunks, and of 2^l C queries with 2 M
landmarks of a level. T (W + C + 2 M log(T / C)) weights are kept for the backward pass. Sums and exponentials are
float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scatterbrain.ops.clusters.causal.levels import Level, chunks_of, exact_chunks, find_levels
from scatterbrain.ops.common.numerics import FLOOR, accumulation_dtype, no_autocast, split_rows, tile_budget


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
    key_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) in the dtype of `query`, and natural logarithms (B, H, T) of the normaliser.

    Args:
        query: (B, H, T, E).
        key: (B, Hkv, S, E), zero where it is hidden; each head for H / Hkv consecutive heads of the queries.
        value: (B, Hkv, S, D), likewise.
        num_landmarks: landmarks M of a node.
        window: width W of the window.
        chunk: keys C of a chunk.
        scale: softmax scale s.
        num_steps: iterations of Lloyd's algorithm.
        key_mask: boolean (B, S), true for visible keys; None for all.
        dropout_p: probability of dropping a weight; that of a landmark for a query is dropped for all of its keys.

    Returns:
        Output, zero for a query that sees no key, and logarithms in float32, or float64 for float64 inputs, -inf for
        such a query.
    """
    batch, heads, length, _ = query.shape
    repeats = heads // key.shape[1]
    dtype = accumulation_dtype(query.dtype)
    with no_autocast(query):
        key, value, visible = chunks_of(key.to(dtype), value.to(dtype), key_mask, chunk, length)
        columns = key.shape[1] * chunk + length  # about: of the keys and landmarks of all levels
        size = max(1, tile_budget(query) // (columns * (window // 2 + chunk + 2 * num_landmarks)) // repeats)
        # a group of sequences of keys has `repeats` times as many of queries
        slices = zip(
            *(split_rows(x, size) for x in (key, value, visible)),
            split_rows(query.to(dtype).flatten(0, 1), size * repeats),
            strict=True,
        )
        results = [
            _attend(*each, num_landmarks, window, scale=scale, num_steps=num_steps, dropout_p=dropout_p)
            for each in slices
        ]
    out, lse = (torch.cat(x).unflatten(0, (batch, heads)) for x in zip(*results, strict=True))
    return out.to(query.dtype), lse


def _attend(
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    query: torch.Tensor,
    num_landmarks: int,
    window: int,
    *,
    scale: float,
    num_steps: int,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (G, T, D) and logarithms (G, T) for chunks of keys (G, n, C, E), values, and which are visible."""
    num_chunks, chunk, width = key.shape[1:]
    length, repeats = query.shape[1], query.shape[0] // key.shape[0]
    num_exact = exact_chunks(window, chunk)
    levels, _ = find_levels(key, value, visible, num_landmarks, window, num_steps)
    query = F.pad(query, (0, 0, 0, num_chunks * chunk - length))

    def of_queries(x: torch.Tensor) -> torch.Tensor:
        """For every sequence of queries."""
        return x if repeats == 1 else x.repeat_interleave(repeats, 0)

    def stretches(x: torch.Tensor) -> torch.Tensor:
        """Rows (G, n, R, width) of each chunk and the exact chunks before it."""
        x = F.pad(x.flatten(1, 2), (0, 0, num_exact * chunk, 0))
        return of_queries(x.unfold(1, (num_exact + 1) * chunk, chunk).transpose(2, 3))

    blocks = query.unflatten(1, (num_chunks, chunk))
    i = torch.arange(chunk, device=query.device)[:, None] + num_exact * chunk
    hidden = ~stretches(visible).transpose(2, 3) | (torch.arange((num_exact + 1) * chunk, device=query.device) > i)
    logits = [(scale * blocks @ stretches(key).transpose(2, 3)).masked_fill(hidden, FLOOR).flatten(1, 2)]
    values, starts = [stretches(value)], []
    norm = scale * torch.linalg.vector_norm(query, dim=-1, keepdim=True)
    for number, level in enumerate(levels):
        start = (num_exact + (2 << number) - 1) * chunk
        landmarks = Level(*(of_queries(x) for x in _last_two(level)))
        of_level = _level_logits(query[:, start:], norm[:, start:], landmarks, chunk << number, scale, width)
        logits.append(F.pad(of_level, (0, 0, start, 0), value=FLOOR))
        values.append(landmarks.value)
        starts.append(start)
    sizes = [x.shape[-1] for x in logits]
    logits = torch.cat(logits, -1)
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    exact, *of_levels = weights.split(sizes, -1)
    out = (exact.unflatten(1, (num_chunks, chunk)) @ values[0]).flatten(1, 2)
    for number, (weights, mean_values, start) in enumerate(zip(of_levels, values[1:], starts, strict=True)):
        blocks = _blocks(weights[:, start:], chunk << number, mean_values.shape[1])
        part = (blocks @ mean_values).flatten(1, 2)[:, : query.shape[1] - start]
        out = out + F.pad(part, (0, 0, start, 0))
    blind = of_queries(visible.flatten(1, 2).squeeze(-1).cumsum(1) == 0)[:, :length]
    return out[:, :length].masked_fill(blind.unsqueeze(-1), 0.0), lse[:, :length].masked_fill(blind, -torch.inf)


def _last_two(level: Level) -> Level:
    """For each number of nodes 1 to n, the last node and, where the number is even, the one before it: (G, n, 2 M, .).

    Where the number is odd, the second one has no keys.
    """
    tensors = []
    for x in level:
        before = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]
        if x is level.count:
            before = before.clone()
            before[:, ::2] = 0.0
        tensors.append(torch.cat([x, before], 2))
    return Level(*tensors)


def _level_logits(
    query: torch.Tensor, norm: torch.Tensor, landmarks: Level, block: int, scale: float, width: int
) -> torch.Tensor:
    """Logits (G, T, 2 M) of the landmarks (G, n, 2 M, .), of which each block of queries (G, T, E) sees one n.

    Args:
        query: (G, T, E).
        norm: norms of the queries times the scale (G, T, 1).
        landmarks: of `_last_two`.
        block: queries of a block.
        scale: softmax scale s.
        width: E.
    """
    length, num_blocks = query.shape[1], landmarks.key.shape[1]
    query, norm = (_blocks(x, block, num_blocks) for x in (query, norm))
    count = landmarks.count.transpose(2, 3)
    log_count = count.clamp_min(1.0).log()
    logits = scale * query @ landmarks.key.transpose(2, 3) + log_count
    logits = logits + spread_correction(norm, landmarks.scatter.transpose(2, 3), count, log_count, width)
    return logits.masked_fill(count == 0, FLOOR).flatten(1, 2)[:, :length]


def spread_correction(
    norm: torch.Tensor, scatter: torch.Tensor, count: torch.Tensor, log_count: torch.Tensor, width: int
) -> torch.Tensor:
    """What the spread of the keys of a landmark adds to the logarithm of their mean weight, see README.md.

    Args:
        norm: norms of the queries times the softmax scale, (..., T, 1).
        scatter: sums of squared distances from the mean (..., 1, M).
        count: numbers of keys (..., 1, M).
        log_count: logarithms of the numbers of keys, 0 for none.
        width: E.
    """
    # no gradient of the square root at zero
    spread = (scatter / (count.clamp_min(1.0) * width)).clamp_min(torch.finfo(scatter.dtype).tiny).sqrt()
    sigma = norm * spread
    limited = torch.minimum(sigma, (2.0 * log_count).sqrt())
    return limited * (sigma - 0.5 * limited)


def _blocks(x: torch.Tensor, block: int, num_blocks: int) -> torch.Tensor:
    """Blocks (G, n, block, width) of rows (G, T, width), zero beyond the last."""
    return F.pad(x, (0, 0, 0, num_blocks * block - x.shape[1])).unflatten(1, (num_blocks, block))
