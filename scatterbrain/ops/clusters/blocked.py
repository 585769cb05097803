"""Landmark attention by blocks of queries, in plain PyTorch: linear in time and memory.

With landmark weights a_ib = exp(s q_i.c_b) and the sums S_b of the values of a cluster, the sum of the weighted values
of a query is

    sum over landmarks a_ib S_b  +  sum over its window (exp(s q_i.k_j) - a_ib(j)) v_j,

and the normaliser is the same with ones for the values: the features of keys are never formed. The subtraction cancels
little: s q.c_b is the mean of the logits of a cluster, so its landmark's weight for all keys of the cluster is at most
the sum of their exact weights. The sum before the subtraction exceeds the normaliser by a factor of at most about
g / (1 + ln g), where g is the spread of the logits within a cluster.

Queries are cut into blocks of C, and the keys that the windows of a block hold lie in a stretch of L >= C + W - 1 keys.
Tiles are (L, C) and (M, C), transposed, so that the landmarks of the keys of a stretch are rows. As many sequences, or
blocks of one, are computed at a time as fit the cache. Sums and exponentials are float32, or float64 for float64
inputs; maxima are constants for autograd (they cancel in the normalised result).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scatterbrain.ops.clusters.kmeans import adds_in_order, cluster_sums
from scatterbrain.ops.common.numerics import accumulation_dtype, at_most, is_exporting, no_autocast, tile_budget
from scatterbrain.ops.common.windows import window_bounds

# Exponents relative to the maximum are no less than this. What is less has no weight, and exponentials that underflow,
# of -inf among them, take up to ten times as long.
_LEAST_EXPONENT = {torch.float32: -80.0, torch.float64: -700.0}
# stands for -inf where exponents are bounded from below
_HIDDEN = -1e30
# Least normaliser, relative to the largest weight of a key or landmark. It is 1 at least, but for rounding: where that
# puts a landmark far above its keys, all of them in the window, it could be zero.
LEAST_NORMALISER = 2.0**-10


def blocked_landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    num_landmarks: int,
    window: int,
    *,
    scale: float,
    key_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (B, H, T, D) of landmark attention for given clusters, and logarithms (B, H, T) of the normaliser or None.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E), finite where it is hidden.
        value: (B, H, S, D), finite where it is hidden.
        assignment: cluster of each key (B, H, S), -1 for hidden keys.
        num_landmarks: number of clusters M.
        window: width W in keys, see `scatterbrain.ops.common.windows`; 0 for no window.
        scale: softmax scale s.
        key_mask: boolean (B, S), true for visible keys; None for all.
        dropout_p: probability of dropping a weight; that of a landmark for a query is dropped for all of its keys.
        with_lse: compute the logarithms.

    Returns:
        Output in the dtype of `query`, zero for a query that sees no key, and natural logarithms in float32, or float64
        for float64 inputs, -inf for such a query.
    """
    batch, heads, length, _ = query.shape
    # A window of twice the sequence holds every key; tiles grow with its width.
    layout = BlockLayout.of(query, at_most(window, 2 * max(length, key.shape[2])), num_landmarks)
    hidden = None
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None].expand(batch, heads, key.shape[2], 1)
    tensors = [None if x is None else x.flatten(0, 1) for x in (query, key, value, assignment, hidden)]
    if is_exporting():  # a recorded loop would fix the number of slices, and with it the batch size
        slices = [tensors]
    else:
        num_slices = -(-batch * heads // layout.groups)
        slices = zip(*([None] * num_slices if x is None else x.split(layout.groups) for x in tensors), strict=True)
    options = {"num_landmarks": num_landmarks, "scale": scale, "dropout_p": dropout_p, "with_lse": with_lse}
    with no_autocast(query):
        outputs = [_attend(layout, *each, **options) for each in slices]
    outputs, logs = zip(*outputs, strict=True)
    out = torch.cat(outputs).unflatten(0, (batch, heads))
    return out, torch.cat(logs).unflatten(0, (batch, heads)) if with_lse else None


@dataclass(frozen=True)
class BlockLayout:
    """Cut of queries and keys into blocks and stretches.

    Attributes:
        length: number of queries T.
        window: W.
        block: queries C of a block.
        stretch: keys L of a stretch, a multiple of 8; 0 without a window.
        num_blocks: blocks of a sequence.
        groups: sequences that are computed at a time.
        blocks: blocks of each of these sequences that are computed at a time.
    """

    length: int
    window: int
    block: int
    stretch: int
    num_blocks: int
    groups: int
    blocks: int

    @classmethod
    def of(cls, query: torch.Tensor, window: int, num_landmarks: int) -> BlockLayout:
        """Cut for queries (B, H, T, E)."""
        length, block, stretch = query.shape[2], 1, 0
        if window:
            # Short blocks compute few pairs outside the window; long ones make larger products and smaller gradients of
            # the stretches, which overlap. Measured for windows of 12 to 512.
            block = 16 if window <= 32 else min(128, max(32, window // 32 * 8))
            stretch = -(-(block + window - 1) // 8) * 8
        num_blocks = -(-length // block)
        blocks = max(1, tile_budget(query) // (block * (num_landmarks + stretch)))
        return cls(length, window, block, stretch, num_blocks, max(1, blocks // num_blocks), min(blocks, num_blocks))

    def query_blocks(self, query: torch.Tensor) -> torch.Tensor:
        """Blocks (g, num_blocks, C, E) of queries (g, T, E), zero beyond the last."""
        return F.pad(query, (0, 0, 0, self.num_blocks * self.block - self.length)).unflatten(1, (-1, self.block))

    def stretches(self, x: torch.Tensor, fill: float | None) -> torch.Tensor:
        """Stretches (g, num_blocks, width, L) of keys (g, S, width), a view.

        Beyond the ends the rows are `fill`, or for None the nearest row.
        """
        before = window_bounds(self.window)[0]
        length = (self.num_blocks - 1) * self.block + self.stretch
        x = x[:, : length - before]
        # concatenated, not assigned to an empty tensor: ONNX and torch.jit.trace would record the batch size
        pads = [
            row.detach().expand(-1, size, -1)
            if fill is None
            else row.new_full((1, 1, 1), fill).expand(row.shape[0], size, row.shape[2])
            for row, size in ((x[:, :1], before), (x[:, -1:], length - before - x.shape[1]))
        ]
        return torch.cat([pads[0], x, pads[1]], 1).unfold(1, self.stretch, self.block)

    def slices(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Slices (n, ...) of bounded size of blocks (g, num_blocks, ...).

        Split, not indexed: the gradient of every `x[a:b]` would be as large as `x`, quadratic in total.
        """
        return (x,) if is_exporting() else x.split(self.blocks, 1)

    def masks(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The window in the tile (L, C) of a block: 1 inside and 0 outside, and a bias of logits."""
        # position of key row l relative to query column c is l - left extent - c
        row, column = (torch.arange(size, device=like.device) for size in (self.stretch, self.block))
        distance = row[:, None] - column
        inside = (distance >= 0) & (distance < self.window)
        return inside.to(like.dtype), torch.zeros_like(inside, dtype=like.dtype).masked_fill(~inside, _HIDDEN)


def _attend(
    layout: BlockLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    hidden: torch.Tensor | None,
    *,
    num_landmarks: int,
    scale: float,
    dropout_p: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (g, T, D) and logarithms (g, T) or None of g sequences, some of whose keys are `hidden` (g, S, 1)."""
    dtype = query.dtype
    query, key, value = (x.to(accumulation_dtype(dtype)) for x in (query, key, value))
    key, centre = centred_keys(key, hidden)
    options = {"num_landmarks": num_landmarks, "scale": scale, "dropout_p": dropout_p}
    total, normaliser, maximum = landmark_sums(layout, query, key, value, assignment, hidden, **options)
    normaliser = normaliser.clamp_min(LEAST_NORMALISER)
    out = (total / normaliser).to(dtype)
    if not with_lse:
        return out, None
    log = (maximum + normaliser.log() + scale * (query @ centre.transpose(1, 2))).squeeze(-1)
    if hidden is not None:
        log = log.masked_fill(hidden.all(1), -math.inf)
    return out, log


def centred_keys(key: torch.Tensor, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (g, S, E) relative to their mean, zero where they are hidden, and the mean (g, 1, E).

    A part that all keys share changes no weight, and without it products of queries and keys round less. Nor does it
    change a gradient.

    Args:
        key: (g, S, E), zero where they are hidden.
        hidden: boolean (g, S, 1), true for hidden keys; None for none.
    """
    counts = None if hidden is None else key.shape[1] - hidden.sum(1, keepdim=True)  # (g, 1, 1)
    centre = key.detach().sum(1, keepdim=True) / (key.shape[1] if counts is None else counts.clamp_min(1))
    key = key - centre
    return key if hidden is None else key.masked_fill(hidden, 0.0), centre


def landmark_sums(
    layout: BlockLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    hidden: torch.Tensor | None,
    *,
    num_landmarks: int,
    scale: float,
    dropout_p: float,
    query_assignment: torch.Tensor | None = None,
    taken: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of weighted values (g, T, D) and of weights (g, T, 1), relative to exp of the maximum (g, T, 1).

    Args:
        layout: cut of queries and keys.
        query: (g, T, E).
        key: (g, S, E), of `centred_keys`.
        value: (g, S, D), zero where they are hidden.
        assignment: cluster of each key (g, S), -1 for hidden keys.
        hidden: boolean (g, S, 1), true for hidden keys; None for none.
        num_landmarks: number of clusters M.
        scale: softmax scale s.
        dropout_p: probability of dropping a weight; dropped weights still count in the sum of weights.
        query_assignment: cluster of each query (g, T); None where `taken` is.
        taken: boolean (g, Q, M), clusters whose keys do not count for the queries of a cluster, in the window neither;
            None for no such clusters.
    """
    num_keys = key.shape[1]
    (sums, value_sums), members = cluster_sums((key, value), assignment, num_landmarks)
    # One more cluster stands for what is no key: of no weight, except where a query sees no key. There it makes the
    # normaliser 1, and outputs and gradients zero.
    means = F.pad(sums / members.clamp_min(1.0), (0, 0, 0, 1))
    has_weight = torch.cat([members > 0, (members == 0).all(1, keepdim=True)], 1)
    bias = torch.zeros_like(means[..., :1]).masked_fill(~has_weight, _HIDDEN)
    # the numbers of members make the normaliser one more column of the products with the values
    sums = torch.cat([F.pad(value_sums, (0, 0, 0, 1)), F.pad(members, (0, 0, 0, 1), value=1.0)], -1)

    slices, masks = [layout.slices(layout.query_blocks(query))], None
    if layout.window:
        masks = layout.masks(query)
        ones = torch.ones_like(value[..., :1])
        ones = ones if hidden is None else ones.masked_fill(hidden, 0.0)
        labels = assignment.masked_fill(assignment < 0, num_landmarks).unsqueeze(-1)
        slices.append(layout.slices(layout.stretches(key, None)))
        slices.append(layout.slices(layout.stretches(torch.cat([value, ones], -1), 0.0)))
        slices.append(layout.slices(layout.stretches(labels, num_landmarks)))
        # Not needed where a window holds no hidden key, other than keys beyond the ends: such a window holds the last
        # key too, so copies of it do not change the maximum, and their values and ones are zero.
        if hidden is not None or layout.length > num_keys:
            key_bias = torch.zeros_like(ones)
            key_bias = key_bias if hidden is None else key_bias.masked_fill(hidden, _HIDDEN)
            slices.append(layout.slices(layout.stretches(key_bias, _HIDDEN)))
    counted = [None] * len(slices[0])
    if taken is not None:
        # 0 and 1 for each cluster and query, as products with a one-hot matrix of the query's cluster
        table = F.pad((~taken).to(query.dtype).transpose(1, 2), (0, 0, 0, 1), value=1.0)  # (g, M + 1, Q)
        of_blocks = layout.query_blocks(query_assignment.unsqueeze(-1))  # (g, num_blocks, C, 1)
        clusters = torch.arange(table.shape[2], device=key.device).unsqueeze(1)
        counted = [table @ (clusters == x.flatten(1).unsqueeze(1)).to(query.dtype) for x in layout.slices(of_blocks)]
    options = {"scale": scale, "dropout_p": dropout_p}
    results = [
        _attend_blocks(bias, means, sums, masks, *x, counted=of_slice, **options)
        for of_slice, *x in zip(counted, *slices, strict=True)
    ]
    total, normaliser, maximum = (
        (x[0] if len(x) == 1 else torch.cat(x, 1)).flatten(1, 2)[:, : layout.length] for x in zip(*results, strict=True)
    )
    return total, normaliser, maximum


def _attend_blocks(
    bias: torch.Tensor,
    means: torch.Tensor,
    sums: torch.Tensor,
    masks: tuple[torch.Tensor, torch.Tensor] | None,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    *,
    counted: torch.Tensor | None = None,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of weighted values (g, n, C, D) and of weights (g, n, C, 1), relative to exp of the maximum (g, n, C, 1).

    Args:
        bias: of the logits of landmarks (g, M + 1, 1).
        means: (g, M + 1, E).
        sums: sums of the values, and numbers of keys (g, M + 1, D + 1).
        masks: of `BlockLayout.masks`; None without a window.
        query: (g, n, C, E).
        key: stretches (g, n, E, L); None without a window, as the rest.
        value: stretches of values and ones (g, n, D + 1, L).
        labels: clusters of the keys (g, n, 1, L), M for what is no key.
        key_bias: of the logits of the keys (g, n, 1, L); None where the maximum needs none.
        counted: 1 for the landmarks (g, M + 1, n C) that count for a query, and 0 for those whose keys do not; None
            where all count.
        scale: softmax scale s.
        dropout_p: probability of dropping a weight.
    """
    groups, num_blocks, block, _ = query.shape
    least = _LEAST_EXPONENT[query.dtype]
    columns = query.flatten(1, 2).transpose(1, 2)  # (g, E, n C)
    weights = torch.baddbmm(bias, means, columns, alpha=scale)
    maximum = weights.detach().amax(1, keepdim=True)
    exact = landmark = None
    if key is not None:
        key, value, labels = (x.flatten(0, 1) for x in (key, value, labels))
        exact = torch.baddbmm(masks[1], key.transpose(1, 2), query.flatten(0, 1).transpose(1, 2), alpha=scale)
        if key_bias is not None:
            exact.add_(key_bias.flatten(0, 1).transpose(1, 2))
        # first over rows 8 apart: long inner dimensions make it many times faster
        largest = exact.detach().view(-1, exact.shape[1] // 8, 8 * block).amax(1).view(-1, 8, block).amax(1)
        maximum = torch.maximum(maximum, largest.view_as(maximum))
        exact = _exp(exact.sub_(maximum.view(-1, 1, block)), least)  # (g n, L, C)
        if adds_in_order(query):
            # rows of `weights` for a landmark and block
            of_block = torch.arange(groups * num_blocks, device=key.device).view(groups, num_blocks)
            of_block = of_block + of_block[:, :1] * (means.shape[1] - 1)
            landmark = (labels.squeeze(1) * num_blocks + of_block.view(-1, 1)).flatten()
        else:
            landmark = (labels.transpose(1, 2) == torch.arange(means.shape[1], device=key.device)).to(query.dtype)
    weights = _exp(weights.sub_(maximum), least)  # (g, M + 1, n C)
    if counted is not None:
        weights = weights * counted if weights.requires_grad else weights.mul_(counted)

    of_counted = None

    def sums_of(weights: torch.Tensor, exact: torch.Tensor | None) -> torch.Tensor:
        """Sums (g n, C, D + 1) of the weighted values and ones."""
        nonlocal of_counted
        total = torch.bmm(weights.transpose(1, 2), sums).view(-1, block, sums.shape[-1])
        if exact is None:
            return total
        if landmark.dim() == 1:
            replaced = weights.view(-1, block).index_select(0, landmark).view_as(exact)
        else:
            of_blocks = weights.view(groups, -1, num_blocks, block).transpose(1, 2).flatten(0, 1)
            replaced = landmark @ of_blocks
        if exact.requires_grad or dropout_p > 0:
            exact = torch.addcmul(exact, replaced, masks[0], value=-1.0)
        else:
            exact.addcmul_(replaced, masks[0], value=-1.0)
        if counted is not None:
            if of_counted is None:
                # exponents are bounded from below, so that only a landmark that does not count has the weight 0
                of_counted = replaced.detach().sign()
            exact = exact.mul_(of_counted)
        return total.baddbmm_(exact.transpose(1, 2), value.transpose(1, 2))

    total = sums_of(weights, exact)
    normaliser = total[..., -1:]
    if dropout_p > 0:  # dropped weights still count in the normaliser
        total = sums_of(*(x if x is None else F.dropout(x, dropout_p) for x in (weights, exact)))
    shape = (groups, num_blocks, block, -1)
    return total[..., :-1].view(shape), normaliser.view(shape), maximum.view(shape)


def _exp(x: torch.Tensor, least: float) -> torch.Tensor:
    """Exponentials, in place, of x or `least` if that is more."""
    # unknown to autograd: gradients of weights so small are as good as zero
    x.detach().clamp_min_(least)
    return x.exp_()
