"""Window and low-rank attention by blocks of queries, in plain PyTorch: linear in time and memory.

Queries are cut into blocks of C. For each block the keys have three parts (W = window, `left` = W // 2):

    keys    ...........|<------------- span, L keys -------------->|..........
            prefix     start of the block - left                              suffix

- for the *span*, C + W - 1 keys rounded up to whole blocks, the weights of all pairs (i, j) are computed: exp(s q.k)
  inside the window, phi(q).phi(k) outside it;
- *prefix* and *suffix* enter only through their sums of phi(k) and phi(k) v^T, one (M, D) matrix for each block.

Nothing is subtracted: subtracting the window's features from a sum over all keys (as the published implementation
does) cancels catastrophically where few keys dominate. The (C, L) tiles are computed in slices of bounded size, so
neither a T x S matrix nor a T x W x E gather exists. Statistics, exponentials and sums are float32, or float64 for
float64 inputs; maxima are constants for autograd (they cancel in the normalised result).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.inputs import visible_keys
from scatterbrain.ops.common.numerics import (
    FLOOR,
    MAXIMUM_SLACK,
    accumulation_dtype,
    at_most,
    no_autocast,
    split_rows,
    tile_budget,
)
from scatterbrain.ops.common.windows import window_bounds


@dataclass(frozen=True)
class _Layout:
    """Cut of (B, H, N, width) tensors into blocks.

    The G = B * H sequences are concatenated as rows, `num_blocks` blocks of `block` rows each. Keys are shifted back by
    `left` rows against the queries, so the span of block b is the key blocks b to b + num_extra, and the spans of all
    blocks are one strided view, without copies. Every sequence ends in `num_extra` blocks without queries, so that no
    span that is used reaches into the next sequence.
    """

    groups: int
    length: int
    num_keys: int
    window: int
    block: int
    num_extra: int
    num_blocks: int
    slice_size: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, window: int) -> _Layout:
        num_others = max(window - 1, 0)
        # Blocks as long as the window compute the fewest unused pairs: the span is twice the block. Above 64
        # the tiles exceed the cache, below 16 the products are too small.
        num_extra = -(-num_others // 64)
        block = 64 if num_extra == 0 else max(16, -(-num_others // (num_extra * 8)) * 8)
        batch, heads, length, _ = query.shape
        num_keys = key.shape[2]
        query_blocks, key_blocks = -(-length // block), -(-(num_keys + window_bounds(window)[0]) // block)
        slice_size = max(1, tile_budget(query) // (block * block * (1 + num_extra)))
        num_blocks = max(query_blocks + num_extra, key_blocks)
        return cls(batch * heads, length, num_keys, window, block, num_extra, num_blocks, slice_size)

    @property
    def span(self) -> int:
        return self.block * (1 + self.num_extra)

    @property
    def left(self) -> int:
        return window_bounds(self.window)[0]

    def rows(self, x: torch.Tensor, offset: int, fill: float | None = 0.0, with_ones: bool = False) -> torch.Tensor:
        """Rows (G * num_blocks * C, width) of a tensor (B, H, N, width).

        Between sequences the rows are `fill`, or for None the nearest row of the sequence. `with_ones` appends a column
        of ones to the sequences.
        """
        if with_ones:
            x = F.pad(x, (0, 1), value=1.0)
        behind = self.num_blocks * self.block - offset - x.shape[2]
        # concatenated, not assigned to an empty tensor: ONNX and torch.jit.trace would record the batch size
        before, after = (
            nearest.detach().expand(-1, -1, size, -1)
            if fill is None
            else x.new_full((*x.shape[:2], size, x.shape[3]), fill)
            for nearest, size in ((x[:, :, :1], offset), (x[:, :, -1:], behind))
        )
        rows = torch.cat([before, x, after], 2)
        return rows.reshape(-1, rows.shape[-1])

    def blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as blocks (G * num_blocks, C, width), a view."""
        return rows.view(-1, self.block, rows.shape[-1])

    def by_group(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as (G, num_blocks * C, width), a view."""
        return rows.view(self.groups, -1, rows.shape[-1])

    def slices_of_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Slices of bounded size of the blocks, without the last `num_extra` blocks, whose span would be incomplete.

        One split: the gradient of every `x[a:b]` would be as large as `x`, quadratic in total.
        """
        return split_rows(blocks[: blocks.shape[0] - self.num_extra], self.slice_size)

    def slices_of_spans(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Spans of the same slices, transposed: views (slice, width, L)."""
        return split_rows(rows.unfold(0, self.span, self.block), self.slice_size)

    def restore(self, outputs: list[torch.Tensor], batch: int) -> torch.Tensor:
        """Output (B, H, T, D) of slices of blocks (slice, C, D)."""
        left_out = outputs[0].new_zeros(self.num_extra, *outputs[0].shape[1:])
        x = torch.cat([*outputs, left_out])
        return x.view(batch, -1, self.num_blocks * self.block, x.shape[-1])[:, :, : self.length]


@dataclass(frozen=True)
class _TileMasks:
    """Masks of the C x L tile of a block, the same for all blocks.

    Attributes:
        in_window: boolean (C, L).
        outside_window: its complement, 0 or 1 in the dtype of the weights.
        hidden: boolean (C, L), the keys that causality hides; None without it.
    """

    in_window: torch.Tensor
    outside_window: torch.Tensor
    hidden: torch.Tensor | None

    @classmethod
    def of(cls, layout: _Layout, like: torch.Tensor, is_causal: bool) -> _TileMasks:
        # position of key column l relative to query row c is l - left - c
        row = torch.arange(layout.block, device=like.device)[:, None]
        distance = torch.arange(layout.span, device=like.device) - row
        in_window = (distance >= 0) & (distance < layout.window)
        return cls(in_window, (~in_window).to(like.dtype), distance > layout.left if is_causal else None)

    def window_bias(self) -> torch.Tensor:
        """0 for the visible keys of the window, -inf elsewhere: (C, L)."""
        visible = self.in_window if self.hidden is None else self.in_window & ~self.hidden
        return torch.zeros_like(self.outside_window).masked_fill(~visible, -math.inf)


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *,
    scale: float,
    projection: torch.Tensor | None = None,
    cosh: bool = False,
    log_features: tuple[torch.Tensor, torch.Tensor] | None = None,
    bounded: bool = True,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Output (B, H, T, D) of attention with exact weights in a window and weights phi(q).phi(k) outside it.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        window: width W in keys, see `scatterbrain.ops.common.windows`; 0 for no window.
        scale: softmax scale s.
        projection: random projections (R, E); without it and `log_features` there is no low-rank part.
        cosh: take each random projection with both signs.
        log_features: in place of `projection`, logarithms of any positive features of queries (B, H, T, M), finite, and
            of keys (B, H, S, M), -inf for zero. Without causality, the largest product of a query's feature and the
            maximum of that feature over all keys may exceed the query's largest weight by at most exp(`MAXIMUM_SLACK`).
        bounded: whether `log_features` keep that bound; without it they may have any size, and it takes longer.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        attn_mask: boolean (B, S), false for hidden keys.
        dropout_p: probability of dropping a weight. In prefix and suffix, whose weights are never formed, pairs of key
            and feature are dropped, the same for all queries of a head.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.
    """
    # A window of twice the sequence holds every key; tiles grow with its width.
    window = at_most(window, 2 * max(query.shape[2], key.shape[2]))
    key_mask = visible_keys(key_lengths, attn_mask, key.shape[2])
    with no_autocast(query):
        return _blocked(
            query, key, value, window, scale, projection, cosh, log_features, bounded, is_causal, key_mask, dropout_p
        )


def _blocked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scale: float,
    projection: torch.Tensor | None,
    cosh: bool,
    log_features: tuple[torch.Tensor, torch.Tensor] | None,
    bounded: bool,
    is_causal: bool,
    key_mask: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    layout = _Layout.of(query, key, window)
    dtype, batch = query.dtype, query.shape[0]
    query, key, value = (x.to(accumulation_dtype(dtype)) for x in (query, key, value))
    masks = _TileMasks.of(layout, query, is_causal)

    # 0 for visible keys, -inf for padding
    key_bias = key.new_zeros(batch, query.shape[1], layout.num_keys, 1)
    if key_mask is not None:
        key_bias = key_bias.masked_fill(~key_mask[:, None, :, None], -math.inf)
    query_rows = layout.rows(query, 0)
    # Beyond either end the nearest key is repeated, see `needs_bias`.
    key_rows = layout.rows(key, layout.left, fill=None)
    bias_rows = layout.rows(key_bias, layout.left, fill=-math.inf)
    # The column of ones makes the normaliser one more column of each product with the values. It is zero where there is
    # no key.
    value_rows = layout.rows(value, layout.left, with_ones=True)

    low_rank = None
    if projection is not None:
        low_rank_class = (
            _PerKeyMaximum if is_causal or query.shape[-1] > _MAX_WIDTH_OF_SHARED_MAXIMUM else _SharedMaximum
        )
        log_query = log_softmax_features(query_rows, projection, scale, cosh)
        log_key = log_softmax_features(key_rows, projection, scale, cosh).add_(bias_rows)
        low_rank = low_rank_class(layout, masks, log_query, log_key, layout.blocks(value_rows), dropout_p)
    elif log_features is not None:
        # of any width: the caller says whether there is a bound to how much features may exceed a weight
        low_rank_class = _PerKeyMaximum if is_causal or not bounded else _SharedMaximum
        log_query, log_key = (x.to(query.dtype) for x in log_features)
        log_query = layout.rows(log_query, 0)
        log_key = layout.rows(log_key, layout.left).add_(bias_rows)
        low_rank = low_rank_class(layout, masks, log_query, log_key, layout.blocks(value_rows), dropout_p)

    query_slices = layout.slices_of_blocks(layout.blocks(query_rows))
    key_slices = layout.slices_of_spans(key_rows)
    bias_slices = layout.slices_of_spans(bias_rows)
    value_slices = layout.slices_of_spans(value_rows)
    masked = _fully_masked_queries(layout, query, key_mask, is_causal, low_rank is not None)
    fully_masked = layout.slices_of_blocks(masked)
    window_bias = masks.window_bias()
    # Not needed where a window holds no padding, other than keys beyond the ends: such a window holds the last key too,
    # so copies of it do not change the maximum, and their values and ones are zero.
    needs_bias = key_mask is not None or layout.length > layout.num_keys

    outputs = []
    for index, query_slice in enumerate(query_slices):
        logits = None
        if window:
            logits = torch.baddbmm(window_bias, query_slice, key_slices[index], alpha=scale)
            if needs_bias:
                logits.add_(bias_slices[index])
        if low_rank is None:
            maximum = logits.detach().amax(-1, keepdim=True).clamp_min_(FLOOR)
            weights = logits.sub_(maximum).exp_()
            outside = None
        else:
            weights, outside = low_rank(index, logits)
        values = value_slices[index].transpose(1, 2)
        if dropout_p > 0:
            # dropped weights still count in the normaliser
            kept = torch.bmm(F.dropout(weights, dropout_p), values)
            kept = kept if outside is None else kept + outside
        sums = torch.bmm(weights, values) if outside is None else outside.baddbmm_(weights, values)
        # 0 / 1 in place of 0 / 0 for queries that see no key: the output is zero, and so are the gradients
        normaliser = sums[..., -1:].masked_fill(fully_masked[index], 1.0)
        outputs.append((kept if dropout_p > 0 else sums)[..., :-1] / normaliser)
    return layout.restore(outputs, batch).to(dtype)


def _fully_masked_queries(
    layout: _Layout, query: torch.Tensor, key_mask: torch.Tensor | None, is_causal: bool, has_low_rank: bool
) -> torch.Tensor:
    """Boolean (G * num_blocks, C, 1), true for queries that see no key and for rows between sequences.

    Computed from the masks, not from a zero normaliser: a normaliser that is zero for any other reason should give nan,
    not a result.
    """
    position = torch.arange(layout.num_blocks * layout.block, device=query.device)
    # a query looks at the keys first <= j < end
    first, end = position - layout.left, position - layout.left + layout.window
    if has_low_rank:
        first, end = torch.zeros_like(first), torch.full_like(end, layout.num_keys)
    if is_causal:
        end = end.minimum(position + 1)
    if key_mask is None:
        key_mask = torch.ones(1, layout.num_keys, dtype=torch.bool, device=query.device)
    # number of visible keys before each position
    before = F.pad(key_mask.long().cumsum(1), (1, 0))
    first, end = (x.clamp(0, layout.num_keys) for x in (first, end))
    masked = (before[:, end] <= before[:, first]) | (position >= layout.length)
    return masked[:, None].expand(*query.shape[:2], -1).reshape(-1, layout.block, 1)


# Random projections w ~ N(0, I_E) have |w|^2 ~ E +- sqrt(2 E): up to this width below the 294 of MAXIMUM_SLACK.
_MAX_WIDTH_OF_SHARED_MAXIMUM = 128


class _SharedMaximum:
    """Low-rank part with one maximum for each feature, that over all keys of the sequence.

    One product then gives the low-rank weights of a tile, without a logarithm. Not with causal masking: relative to a
    hidden key with a far larger feature, all visible keys would underflow.

    Args:
        layout: the cut into blocks.
        masks: masks of a tile.
        log_query: rows of log features (rows, M).
        log_key: the same of the keys, -inf where there is no key.
        value_blocks: values and ones (G * num_blocks, C, D + 1).
        dropout_p: probability of dropping a key's feature from the sums of the values.
    """

    def __init__(
        self,
        layout: _Layout,
        masks: _TileMasks,
        log_query: torch.Tensor,
        log_key: torch.Tensor,
        value_blocks: torch.Tensor,
        dropout_p: float,
    ) -> None:
        self.masks = masks
        num_features = log_key.shape[-1]
        # first over rows num_blocks apart, then over what remains: long inner dimensions make it ten times faster
        maximum = log_key.detach().view(layout.groups, layout.block, -1, num_features).amax(1)
        maximum = maximum.amax(1, keepdim=True).clamp_min_(FLOOR)  # (G, 1, M)
        # in place where autograd allows it: allocation costs more than the arithmetic
        key_rows = layout.by_group(log_key).sub_(maximum).exp_().view(-1, num_features)
        query_rows = layout.by_group(log_query).add_(maximum).view(-1, num_features)
        self.keys = layout.slices_of_spans(key_rows)
        self.log_queries = layout.slices_of_blocks(layout.blocks(query_rows))
        sums = _block_sums(layout, layout.blocks(key_rows), value_blocks, dropout_p)
        self.sums = layout.slices_of_blocks(_outside(layout, sums).flatten(0, 1))

    def __call__(self, index: int, logits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of a slice of tiles, and the sums over everything outside them."""
        log_query = self.log_queries[index]
        maximum = log_query.detach().amax(-1, keepdim=True)
        if logits is not None:
            maximum = torch.maximum(logits.detach().amax(-1, keepdim=True), maximum - MAXIMUM_SLACK)
        query = (log_query - maximum).exp()
        weights = torch.bmm(query, self.keys[index])
        if logits is not None:
            # exact weights are zero outside the window: a product and a sum select, 8 times faster than torch.where
            weights.mul_(self.masks.outside_window).add_(logits.sub_(maximum).exp_())
        return weights, torch.bmm(query, self.sums[index])


class _PerKeyMaximum:
    """Low-rank part with a maximum for each key, each query, and each feature of a prefix.

    The weights of a tile are computed as logarithms, so that no key, visible or hidden, makes another underflow. The
    products of features are float64, whose range down to e^-708 covers queries and keys with different large features.
    Costs a logarithm for each pair; used where `_SharedMaximum` is not safe, with the same arguments.
    """

    def __init__(
        self,
        layout: _Layout,
        masks: _TileMasks,
        log_query: torch.Tensor,
        log_key: torch.Tensor,
        value_blocks: torch.Tensor,
        dropout_p: float,
    ) -> None:
        self.masks = masks
        key_blocks = layout.blocks(log_key)
        block_max = key_blocks.detach().amax(1).clamp_min_(FLOOR)  # (G * num_blocks, M)
        state = _block_sums(layout, (key_blocks - block_max.unsqueeze(1)).exp(), value_blocks, dropout_p)
        maximum, state = _log_space_outside(layout, layout.by_group(block_max), state, masks.hidden is not None)
        self.sums = layout.slices_of_blocks(state.flatten(0, 1))
        log_query_blocks = layout.blocks(log_query)
        self.log_queries_outside = layout.slices_of_blocks(log_query_blocks + maximum.flatten(0, 1).unsqueeze(1))

        query_max = log_query_blocks.detach().amax(-1, keepdim=True)
        self.query_max = layout.slices_of_blocks(query_max)
        self.queries = layout.slices_of_blocks((log_query_blocks - query_max).double().exp())
        key_max = log_key.detach().amax(-1, keepdim=True)
        self.key_max = layout.slices_of_spans(key_max)
        self.keys = layout.slices_of_spans((log_key - key_max.clamp_min(FLOOR)).double().exp())

    def __call__(self, index: int, logits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of a slice of tiles, and the sums over everything outside them."""
        products = torch.bmm(self.queries[index], self.keys[index])
        # the clamp keeps the gradient of hidden keys' logarithms finite; their weight is exp(-inf) all the same
        log_products = products.clamp_min(torch.finfo(products.dtype).tiny).log()
        log_weights = log_products.to(self.query_max[index].dtype) + (self.query_max[index] + self.key_max[index])
        if self.masks.hidden is not None:
            log_weights = log_weights.masked_fill(self.masks.hidden, -math.inf)
        if logits is not None:
            log_weights = torch.where(self.masks.in_window, logits, log_weights)
        log_query = self.log_queries_outside[index]
        maximum = torch.maximum(
            log_weights.detach().amax(-1, keepdim=True), log_query.detach().amax(-1, keepdim=True)
        ).clamp_min_(FLOOR)
        query = (log_query - maximum).exp()
        weights = (log_weights - maximum).exp()
        return weights, torch.bmm(query, self.sums[index])


def _block_sums(
    layout: _Layout, key_features: torch.Tensor, value_blocks: torch.Tensor, dropout_p: float
) -> torch.Tensor:
    """Sums of phi(k) (v, 1)^T over each block of keys, (G, num_blocks, M, D + 1)."""
    sums = torch.bmm(key_features.transpose(1, 2), value_blocks)
    if dropout_p > 0:
        dropped = torch.bmm(F.dropout(key_features, dropout_p).transpose(1, 2), value_blocks[..., :-1])
        sums = torch.cat([dropped, sums[..., -1:]], dim=-1)
    return sums.view(layout.groups, layout.num_blocks, *sums.shape[1:])


# Up to this number of blocks, the sums over all others are one product; above it, running sums in groups.
_MAX_BLOCKS_OF_ONE_PRODUCT = 128
_RUNNING_SUM_GROUP = 16


def _outside(layout: _Layout, sums: torch.Tensor) -> torch.Tensor:
    """Sums (G, num_blocks, M, D) over prefix and suffix of each block: all key blocks but b to b + num_extra."""
    flat, num_extra = sums.flatten(2), layout.num_extra
    if layout.num_blocks <= _MAX_BLOCKS_OF_ONE_PRODUCT:
        ones = sums.new_ones(layout.num_blocks, layout.num_blocks)
        return ((ones.tril(-1) + ones.triu(1 + num_extra)) @ flat).view_as(sums)
    # the suffix of block b is what comes after block b + num_extra
    suffix = _running_sum(flat, after=True)[:, num_extra:]
    return (_running_sum(flat) + F.pad(suffix, (0, 0, 0, num_extra))).view_as(sums)


def _running_sum(x: torch.Tensor, after: bool = False) -> torch.Tensor:
    """Sums (G, n, width) over the entries of dimension 1 before, or `after`, each entry.

    By products with triangular matrices of ones, in groups: PyTorch's cumsum is fast along the last dimension only.
    """
    groups, length, width = x.shape
    size = min(length, _RUNNING_SUM_GROUP)
    ones = x.new_ones(size, size)
    triangle = ones.triu(1) if after else ones.tril(-1)
    if length == size:
        return triangle @ x
    count = -(-length // size)
    x = F.pad(x, (0, 0, 0, count * size - length)).view(groups, count, size, width)
    carry = _running_sum(x.sum(2), after)
    return torch.baddbmm(
        carry.reshape(-1, 1, width), triangle.expand(groups * count, size, size), x.view(-1, size, width)
    ).view(groups, -1, width)[:, :length]


def _log_space_outside(
    layout: _Layout, log_max: torch.Tensor, state: torch.Tensor, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums as in `_outside`, for block sums relative to maxima of their own.

    Args:
        layout: the cut into blocks.
        log_max: (G, num_blocks, M), logarithm of the maximum that the sums of block b are relative to.
        state: (G, num_blocks, M, D), the sums.
        is_causal: prefix only.

    Returns:
        Logarithms of the maxima (G, num_blocks, M) and sums relative to them (G, num_blocks, M, D).
    """
    maximum, prefix = _exclusive_running_sum(log_max, state)
    beyond = 1 + layout.num_extra
    if is_causal or layout.num_blocks <= beyond:
        return maximum, prefix
    # the suffix of block b is the exclusive running sum, from the back, at block b + num_extra
    suffix_max, suffix = (x.flip(1) for x in _exclusive_running_sum(log_max.flip(1), state.flip(1)))
    shift = layout.num_extra
    suffix_max = F.pad(suffix_max[:, shift:], (0, 0, 0, shift), value=FLOOR)
    suffix = F.pad(suffix[:, shift:], (0, 0, 0, 0, 0, shift))
    joint = torch.maximum(maximum, suffix_max)
    both = prefix * (maximum - joint).exp().unsqueeze(-1) + suffix * (suffix_max - joint).exp().unsqueeze(-1)
    return joint, both


def _exclusive_running_sum(log_max: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Running maxima and running sums, relative to them, over the blocks before each block."""
    running_max = torch.cummax(log_max, dim=1).values
    # unbound at once: the gradient of `scaled[:, block]` would be as large as `scaled` for every block
    scaled = (state * (log_max - running_max).exp().unsqueeze(-1)).unbind(1)
    decay = (running_max[:, :-1] - running_max[:, 1:]).exp().unsqueeze(-1).unbind(1)
    sums = [torch.zeros_like(scaled[0]), scaled[0]]
    for block in range(1, len(scaled) - 1):
        sums.append(torch.addcmul(scaled[block], sums[-1], decay[block - 1]))
    floor = torch.full_like(log_max[:, :1], FLOOR)
    return torch.cat([floor, running_max[:, :-1]], dim=1), torch.stack(sums[: len(scaled)], dim=1)
