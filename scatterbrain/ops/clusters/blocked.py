"""Landmark attention by blocks of queries, in plain PyTorch: linear in time and memory.

With landmark weights a_ib = exp(s q_i.c_b) and the sums S_b of the values of a cluster, the sum of the weighted values
of a query is

    sum over landmarks a_ib S_b  +  sum over its window (exp(s q_i.k_j) - a_ib(j)) v_j,

and the normaliser is the same with ones for the values: the features of keys are never formed. The subtraction cancels
little: s q.c_b is the mean of the logits of a cluster, so its landmark's weight for all keys of the cluster is at most
the sum of their exact weights. The sum before the subtraction exceeds the normaliser by a factor of at most about
g / (1 + ln g), where g is the spread of the logits within a cluster.

Queries are cut into blocks of C, and the keys that the windows of a block hold lie in a stretch of L = C + W - 1 keys,
rounded up to whole blocks. Tiles are (L, C) and (M, C), transposed, so that the landmarks of the keys of a stretch are
rows. Sums and exponentials are float32, or float64 for float64 inputs; maxima are constants for autograd (they cancel
in the normalised result).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scatterbrain.ops.clusters.kmeans import cluster_sums
from scatterbrain.ops.common.numerics import FLOOR, accumulation_dtype, at_most, no_autocast, split_rows, tile_budget
from scatterbrain.ops.common.windows import window_bounds


@dataclass(frozen=True)
class _Layout:
    """Cut of the queries and keys of G = B * H sequences into blocks.

    The sequences are concatenated as rows, `num_blocks` blocks of `block` rows each. Keys are shifted back by the left
    extent of the window against the queries, so the stretch of block b is the key blocks b to b + side, and the
    stretches of all blocks are one strided view, without copies. Every sequence ends in `side` blocks without queries,
    so that no stretch that is used reaches into the next sequence.

    Attributes:
        length: number of queries T.
        num_keys: S.
        window: W.
        block: C.
        side: blocks of a stretch beside the first.
        num_blocks: blocks of a sequence.
        groups_at_once: sequences whose blocks one slice may hold.
        slice_size: blocks of a slice; a slice holds blocks of one sequence, or whole sequences.
    """

    length: int
    num_keys: int
    window: int
    block: int
    side: int
    num_blocks: int
    groups_at_once: int
    slice_size: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, window: int, num_landmarks: int) -> _Layout:
        length, num_keys = query.shape[2], key.shape[2]
        span = max(window - 1, 0)
        # Blocks as long as the window's span compute the fewest unused pairs: the stretch is twice the block. Above 64
        # the tiles exceed the cache, below 16 the products are too small. Without a window any number of queries will
        # do.
        side = -(-span // 64)
        block = 1 if not window else 64 if side == 0 else max(16, -(-span // (side * 8)) * 8)
        num_blocks = -(-length // block) + side
        columns = num_landmarks + (block * (1 + side) if window else 0)
        slice_size = max(1, tile_budget(query) // (block * columns))
        groups_at_once = max(1, slice_size // num_blocks)
        if slice_size >= num_blocks:
            slice_size = groups_at_once * num_blocks
        return cls(length, num_keys, window, block, side, num_blocks, groups_at_once, slice_size)

    @property
    def stretch(self) -> int:
        return self.block * (1 + self.side)

    def slices(self, blocks: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Slices of bounded size of the blocks (G * num_blocks, ...), those of `groups_at_once` sequences together.

        Split, not indexed: the gradient of every `x[a:b]` would be as large as `x`, quadratic in total.
        """
        size = self.groups_at_once * self.num_blocks
        return [split_rows(x, self.slice_size) for x in split_rows(blocks, size)]

    def query_blocks(self, query: torch.Tensor) -> torch.Tensor:
        """Blocks (G * num_blocks, C, E) of queries (G, T, E), zero beyond the last."""
        query = F.pad(query, (0, 0, 0, self.num_blocks * self.block - self.length))
        return query.reshape(-1, self.block, query.shape[-1])

    def stretches(self, x: torch.Tensor, fill: float | None) -> torch.Tensor:
        """Stretches (G * num_blocks, width, L) of keys (G, S, width), a view.

        Between sequences the rows are `fill`, or for None the nearest row of the sequence.
        """
        before = window_bounds(self.window)[0]
        x = x[:, : self.num_blocks * self.block - before]
        behind = self.num_blocks * self.block - before - x.shape[1]
        # concatenated, not assigned to an empty tensor: ONNX and torch.jit.trace would record the batch size
        pads = (
            row.detach().expand(-1, size, -1) if fill is None else x.new_full((x.shape[0], size, x.shape[2]), fill)
            for row, size in ((x[:, :1], before), (x[:, -1:], behind))
        )
        rows = torch.cat([next(pads), x, next(pads)], 1).flatten(0, 1)
        # the last blocks hold no query
        rows = torch.cat([rows, rows.new_zeros(self.side * self.block, rows.shape[1])])
        return rows.unfold(0, self.stretch, self.block)

    def restore(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Rows (G, T, D) of slices of blocks (slice, C, D)."""
        rows = torch.cat(outputs)
        return rows.view(-1, self.num_blocks * self.block, rows.shape[-1])[:, : self.length]


def blocked_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    num_landmarks: int,
    window: int,
    *,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) of landmark attention for given clusters, and logarithm (B, H, T) of the normaliser.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E), finite where it is hidden.
        value: (B, H, S, D), finite where it is hidden.
        assignment: cluster of each key (B, H, S), -1 for hidden keys.
        num_landmarks: number of clusters M.
        window: width W in keys, see `scatterbrain.ops.common.windows`; 0 for no window.
        scale: softmax scale s.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        dropout_p: probability of dropping a weight; that of a landmark for a query is dropped for all of its keys.

    Returns:
        Output in the dtype of `query`, zero for a query that sees no key, and natural logarithms in float32, or float64
        for float64 inputs, -inf for such a query.
    """
    # A window of twice the sequence holds every key; tiles grow with its width.
    window = at_most(window, 2 * max(query.shape[2], key.shape[2]))
    with no_autocast(query):
        return _blocked(query, key, value, assignment, num_landmarks, window, scale, key_lengths, dropout_p)


def _blocked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    num_landmarks: int,
    window: int,
    scale: float,
    key_lengths: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = _Layout.of(query, key, window, num_landmarks)
    dtype, shape = query.dtype, query.shape[:3]
    query, key, value = (x.to(accumulation_dtype(dtype)).flatten(0, 1) for x in (query, key, value))
    assignment = assignment.flatten(0, 1)
    counts = None
    if key_lengths is not None:
        counts = key_lengths.clamp(0, layout.num_keys).view(-1, 1).expand(shape[:2]).reshape(-1, 1, 1)
    # A part that all keys share changes no weight, and without it products of queries and keys round less. Nor does it
    # change a gradient.
    centre = key.detach().sum(1, keepdim=True) / (layout.num_keys if counts is None else counts.clamp_min(1))
    key = key - centre
    if counts is not None:
        hidden = torch.arange(layout.num_keys, device=key.device)[:, None] >= counts  # (G, S, 1)
        key = key.masked_fill(hidden, 0.0)

    sums, members = cluster_sums(key, assignment, num_landmarks)
    # One more cluster stands for what is no key: of weight zero, except where a query sees no key. There it makes
    # the normaliser 1, and outputs and gradients zero.
    means = F.pad(sums / members.clamp_min(1.0), (0, 0, 0, 1))
    has_weight = torch.cat([members > 0, (members == 0).all(1, keepdim=True)], 1)
    bias = torch.zeros_like(means[..., :1]).masked_fill(~has_weight, -math.inf)
    # the numbers of members make the normaliser one more column of the products with the values
    sums, _ = cluster_sums(value, assignment, num_landmarks)
    sums = torch.cat([F.pad(sums, (0, 0, 0, 1)), F.pad(members, (0, 0, 0, 1), value=1.0)], -1)
    landmarks = zip(*(split_rows(x, layout.groups_at_once) for x in (bias, means, sums)), strict=True)

    slices = [layout.slices(layout.query_blocks(query))]
    if window:
        ones = (assignment >= 0).to(value.dtype).unsqueeze(-1)
        tiles = [layout.stretches(key, None), layout.stretches(torch.cat([value, ones], -1), 0.0)]
        labels = assignment.where(assignment >= 0, num_landmarks).unsqueeze(-1)
        tiles.append(layout.stretches(labels, num_landmarks).squeeze(1))
        # Not needed where a window holds no hidden key, other than keys beyond the ends: such a window holds the last
        # key too, so copies of it do not change the maximum, and their values and ones are zero.
        if counts is not None or layout.length > layout.num_keys:
            visible = torch.zeros_like(key[..., :1])
            visible = visible if counts is None else visible.masked_fill(hidden, -math.inf)
            tiles.append(layout.stretches(visible, -math.inf).transpose(1, 2))
        slices += [layout.slices(x) for x in tiles]
    masks = _window_masks(layout, query) if window else None

    outputs, logs = [], []
    for of_landmarks, *of_group in zip(landmarks, *slices, strict=True):
        for each in zip(*of_group, strict=True):
            out, log = _attend(layout, *of_landmarks, *each, masks=masks, scale=scale, dropout_p=dropout_p)
            outputs.append(out)
            logs.append(log)
    out, log = (layout.restore(x) for x in (outputs, logs))
    log = log + scale * (query @ centre.transpose(1, 2))
    if counts is not None:
        log = log.masked_fill(counts == 0, -math.inf)
    return out.to(dtype).unflatten(0, shape[:2]), log.view(shape)


def _window_masks(layout: _Layout, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (L, C) of the window in the tile of a block: 1 inside and 0 outside, and 0 inside and -inf outside."""
    # position of key row l relative to query column c is l - left extent - c
    distance = torch.arange(layout.stretch, device=like.device)[:, None] - torch.arange(
        layout.block, device=like.device
    )
    inside = (distance >= 0) & (distance < layout.window)
    return inside.to(like.dtype), torch.zeros_like(inside, dtype=like.dtype).masked_fill(~inside, -math.inf)


def _attend(
    layout: _Layout,
    bias: torch.Tensor,
    means: torch.Tensor,
    sums: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    *,
    masks: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (n, C, D) of a slice of n blocks of g sequences, and logarithms (n, C, 1) of the normaliser.

    Args:
        layout: the cut into blocks.
        bias: (g, M + 1, 1), 0 for landmarks with keys, -inf for others.
        means: (g, M + 1, E).
        sums: sums of the values, and numbers of keys (g, M + 1, D + 1).
        query: (n, C, E).
        key: stretches (n, E, L); None without a window.
        value: stretches of values and ones (n, D + 1, L).
        labels: clusters of the keys (n, L), M for what is no key.
        key_bias: 0 or -inf for what is no key (n, L, 1); None where the maximum needs none.
        masks: of `_window_masks`.
        scale: softmax scale s.
        dropout_p: probability of dropping a weight.
    """
    groups, num_weights, _ = means.shape
    columns = query.reshape(groups, -1, query.shape[-1]).transpose(1, 2)  # (g, E, n C / g)
    weights = torch.baddbmm(bias, means, columns, alpha=scale)
    maximum = weights.detach().amax(1, keepdim=True)
    exact = None
    if key is not None:
        exact = torch.baddbmm(masks[1], key.transpose(1, 2), query.transpose(1, 2), alpha=scale)  # (n, L, C)
        if key_bias is not None:
            exact.add_(key_bias)
        maximum = torch.maximum(maximum, exact.detach().amax(1).view_as(maximum))
    maximum = maximum.clamp_min_(FLOOR)
    weights = weights.sub_(maximum).exp_()  # (g, M + 1, n C / g)
    maximum = maximum.view(-1, layout.block)
    if exact is not None:
        exact = exact.sub_(maximum.unsqueeze(1)).exp_()
        num_blocks = query.shape[0] // groups
        block = torch.arange(query.shape[0], device=query.device)
        first = block // num_blocks * (num_weights * num_blocks) + block % num_blocks
        index = (labels * num_blocks + first.unsqueeze(1)).flatten()

    def sums_of(weights: torch.Tensor, exact: torch.Tensor | None) -> torch.Tensor:
        """Sums (n, C, D + 1) over the weighted values and ones."""
        total = torch.bmm(weights.transpose(1, 2), sums).view(-1, layout.block, sums.shape[-1])
        if exact is None:
            return total
        replaced = weights.view(-1, layout.block).index_select(0, index).view_as(exact)
        exact = exact - replaced * masks[0]
        return total.baddbmm_(exact.transpose(1, 2), value.transpose(1, 2))

    total = sums_of(weights, exact)
    normaliser = total[..., -1:]
    if dropout_p > 0:  # dropped weights still count in the normaliser
        total = sums_of(*(x if x is None else F.dropout(x, dropout_p) for x in (weights, exact)))
    return total[..., :-1] / normaliser, maximum.unsqueeze(-1) + normaliser.log()
