"""Window and low-rank attention by blocks of queries, in plain PyTorch: linear in time and memory.

Queries are cut into blocks of C. A block meets the keys in three parts (W = window, `reach` = W // 2):

    keys    ...........|<------------ stretch, L keys ------------>|..........
            prefix     start of the block - reach                             suffix

- in the *stretch*, C + W - 1 keys rounded up to whole blocks, every pair (i, j) is formed: exp(s q.k) inside the
  window, phi(q).phi(k) outside it;
- *prefix* and *suffix* enter only through their sums of phi(k) and phi(k) v^T, one (M, D) matrix for each block.

Nothing is subtracted: taking the window's features off a sum over all keys (as the published implementation does)
cancels catastrophically where few keys dominate. The (C, L) tiles live in slices of bounded size, so neither an
N x N matrix nor an N x W x E gather ever exists. Statistics, exponentials and sums are float32, or float64 for
float64 inputs; maxima are constants for autograd (they cancel in the normalised result).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from src.ops.features import log_softmax_features
from src.ops.inputs import accumulation_dtype, length_mask
from src.ops.windows import window_bounds

# Stand-in for the maximum over no key: finite, so that (-inf) - FLOOR is -inf and not nan.
FLOOR = -1e30

# The reference that a query's exponentials are taken from may lie this far below the largest bound of its features.
# Why it is needed: the bound of the low-rank part also covers keys inside the window, where exp(s q.k) replaces
# phi(q).phi(k). A feature exceeds the exact weight by at most exp(|w|^2 / 2), w its row: exp(32) is typical at
# E = 64. With 60 of slack to the reference and 87 down to float32's smallest number, the weights of a window survive
# |w|^2 up to 294.
REFERENCE_SLACK = 60.0


@dataclass(frozen=True)
class _Layout:
    """How (B, H, N, width) tensors are cut into blocks.

    All G = B * H sequences lie behind one another in `num_blocks` blocks of `block` rows each, with `side` more
    blocks at the very end, so that the stretches of all blocks are one strided view and no copies. Keys lie `reach`
    rows further back than queries: the stretch of block b then is the key blocks b to b + side.
    """

    groups: int
    length: int
    num_keys: int
    window: int
    block: int
    side: int
    num_blocks: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, window: int) -> _Layout:
        span = max(window - 1, 0)
        # Blocks as long as the window's span waste the least: the stretch is twice as long as the block. Past 64 the
        # tiles leave the cache, under 16 the products are too small.
        side = -(-span // 64)
        block = 64 if side == 0 else max(16, -(-span // (side * 8)) * 8)
        batch, heads, length, _ = query.shape
        num_keys = key.shape[2]
        query_blocks, key_blocks = -(-length // block), -(-(num_keys + window_bounds(window)[0]) // block)
        return cls(batch * heads, length, num_keys, window, block, side, max(query_blocks + side, key_blocks))

    @property
    def stretch(self) -> int:
        return self.block * (1 + self.side)

    @property
    def reach(self) -> int:
        return window_bounds(self.window)[0]

    def rows(self, x: torch.Tensor, offset: int, fill: float = 0.0) -> torch.Tensor:
        """Lay (B, H, N, width) out as rows ((G * num_blocks + side) * block, width), `fill` between sequences."""
        width, size = x.shape[-1], self.num_blocks * self.block
        x = x.reshape(self.groups, x.shape[2], width)
        x = F.pad(x, (0, 0, offset, size - offset - x.shape[1]), value=fill).view(-1, width)
        return F.pad(x, (0, 0, 0, self.side * self.block), value=fill)

    def blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as blocks (G * num_blocks, C, width)."""
        rows = rows[: self.groups * self.num_blocks * self.block]
        return rows.view(-1, self.block, rows.shape[-1])

    def stretches(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as transposed stretches (G * num_blocks, width, L), a view."""
        return rows.unfold(0, self.stretch, self.block)

    def by_group(self, blocks: torch.Tensor) -> torch.Tensor:
        """(G * num_blocks, ...) as (G, num_blocks, ...)."""
        return blocks.view(self.groups, self.num_blocks, *blocks.shape[1:])

    def restore(self, blocks: torch.Tensor, batch: int) -> torch.Tensor:
        """Blocks (G * num_blocks, C, D) as (B, H, T, D)."""
        x = blocks.view(batch, -1, self.num_blocks * self.block, blocks.shape[-1])
        return x[:, :, : self.length]


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *,
    scale: float,
    projection: torch.Tensor | None = None,
    cosh: bool = False,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Exact weights inside a window, random-feature weights outside it.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        window: width W in keys, see `src.ops.windows`; 0 for no window.
        scale: softmax scale s.
        projection: rows (R, E) of the random features; None leaves out the low-rank part.
        cosh: take each row with both signs.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        dropout_p: probability of dropping a weight. The weights of prefix and suffix are dropped by key and
            feature, the same for all queries of a head: they never exist one by one.

    Returns:
        (B, H, T, D) in the dtype of `query`; zero for a query that sees no key.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _blocked(query, key, value, window, scale, projection, cosh, is_causal, key_lengths, dropout_p)


def _blocked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scale: float,
    projection: torch.Tensor | None,
    cosh: bool,
    is_causal: bool,
    key_lengths: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    layout = _Layout.of(query, key, window)
    dtype, batch = query.dtype, query.shape[0]
    query, key, value = (x.to(accumulation_dtype(dtype)) for x in (query, key, value))

    # 0 for a key that exists, -inf for padding, as rows of width 1 so that it is cut like the keys
    key_bias = key.new_zeros(batch, query.shape[1], layout.num_keys, 1)
    if key_lengths is not None:
        hidden = ~length_mask(key_lengths, layout.num_keys)[:, None, :, None]
        key_bias = key_bias.masked_fill(hidden, -math.inf)

    low_rank = None
    if projection is not None:
        log_query = log_softmax_features(query, projection, scale, cosh)
        log_key = log_softmax_features(key, projection, scale, cosh) + key_bias
        form = _PerKeyReference if is_causal or query.shape[-1] > _MAX_WIDTH_OF_SHARED_REFERENCE else _SharedReference
        low_rank = form(layout, log_query, log_key, value, is_causal, dropout_p)

    offset = layout.reach
    query_blocks = layout.blocks(layout.rows(query, 0))
    value_stretches = layout.stretches(layout.rows(value, offset)).transpose(1, 2)
    bias_stretches = layout.stretches(layout.rows(key_bias, offset, fill=-math.inf))
    key_stretches = layout.stretches(layout.rows(key, offset)) if window else None

    # Position of key column l relative to query row c is l - reach - c.
    distance = (
        torch.arange(layout.stretch, device=query.device) - torch.arange(layout.block, device=query.device)[:, None]
    )
    in_window = (distance >= 0) & (distance < window)
    hidden = distance > offset if is_causal else None
    window_bias = torch.zeros(in_window.shape, dtype=query.dtype, device=query.device)
    window_bias = window_bias.masked_fill(~(in_window if hidden is None else in_window & ~hidden), -math.inf)

    # 0 / 1 in place of 0 / 0 for queries that see no key: the output is zero, and so are the gradients
    blind = _blind_queries(layout, query.device, key_lengths, low_rank is not None)

    # A slice's tiles should stay in the cache of a CPU; a GPU wants few launches.
    tile_budget = 1 << 18 if query.device.type == "cpu" else 1 << 26
    step = max(1, tile_budget // window_bias.numel())
    outputs = []
    for start in range(0, len(query_blocks), step):
        part = slice(start, start + step)
        logits = None
        if window:
            logits = torch.baddbmm(window_bias, query_blocks[part], key_stretches[part], alpha=scale)
            logits.add_(bias_stretches[part])
        if low_rank is None:
            reference = logits.detach().amax(-1, keepdim=True).clamp_min_(FLOOR)
            weights = logits.sub_(reference).exp_()
            numerator, normaliser = 0.0, 0.0
        else:
            weights, numerator, normaliser = low_rank(part, logits, in_window, hidden)
        normaliser = (weights.sum(-1, keepdim=True) + normaliser).masked_fill(blind[part], 1.0)
        if dropout_p > 0:
            weights = F.dropout(weights, dropout_p)
        numerator = torch.bmm(weights, value_stretches[part]) + numerator
        outputs.append(numerator / normaliser)
    return layout.restore(torch.cat(outputs), batch).to(dtype)


def _blind_queries(
    layout: _Layout, device: torch.device, key_lengths: torch.Tensor | None, has_low_rank: bool
) -> torch.Tensor:
    """Queries that see no key, and rows of padding: boolean (G * num_blocks, C, 1).

    They are told from the masks, not from a zero normaliser: a normaliser that vanishes for any other reason should
    show as nan, not pass as a result.
    """
    position = torch.arange(layout.num_blocks * layout.block, device=device)
    first = torch.zeros_like(position) if has_low_rank else (position - layout.reach).clamp_min_(0)
    if key_lengths is None:
        lengths = torch.full((layout.groups, 1), layout.num_keys, device=device)
    else:
        lengths = key_lengths.repeat_interleave(layout.groups // len(key_lengths))[:, None]
    blind = (first >= lengths) | (position >= layout.length)
    return blind.view(-1, layout.block, 1)


# Rows w ~ N(0, I_E) have |w|^2 ~ E +- sqrt(2 E): up to this width |w|^2 stays under the 294 of REFERENCE_SLACK.
_MAX_WIDTH_OF_SHARED_REFERENCE = 128


class _SharedReference:
    """Low-rank part with one reference for each feature: the maximum over all keys of the sequence.

    One product then gives the low-rank weights of a tile, without a logarithm. Safe without causal masking only: a
    hidden key with a far larger feature would push everything visible below the smallest float.
    """

    def __init__(
        self,
        layout: _Layout,
        log_query: torch.Tensor,
        log_key: torch.Tensor,
        value: torch.Tensor,
        is_causal: bool,
        dropout_p: float,
    ) -> None:
        del is_causal
        reference = log_key.detach().amax(2, keepdim=True).clamp_min_(FLOOR)  # (B, H, 1, M)
        key_rows = layout.rows((log_key - reference).exp(), layout.reach)
        self.key_stretches = layout.stretches(key_rows)
        self.log_query = layout.blocks(layout.rows(log_query + reference, 0))
        sums, norms = _block_sums(layout, layout.blocks(key_rows), value, dropout_p)
        self.sums, self.norms = (_outside(layout, x).flatten(0, 1) for x in (sums, norms))

    def __call__(
        self, part: slice, logits: torch.Tensor | None, in_window: torch.Tensor, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights of a slice of tiles, numerator and normaliser of everything outside them."""
        log_query = self.log_query[part]
        reference = log_query.detach().amax(-1, keepdim=True)
        if logits is not None:
            reference = torch.maximum(logits.detach().amax(-1, keepdim=True), reference - REFERENCE_SLACK)
        query = (log_query - reference).exp()
        weights = torch.bmm(query, self.key_stretches[part])
        if logits is not None:
            weights = torch.where(in_window, logits.sub_(reference).exp_(), weights)
        return weights, torch.bmm(query, self.sums[part]), torch.bmm(query, self.norms[part])


class _PerKeyReference:
    """Low-rank part with a reference for each key, each query, and each feature of a prefix.

    The weights of a tile are formed as logarithms, so that no key, visible or hidden, can push another below the
    smallest float. Costs a logarithm for each pair; used where `_SharedReference` is not safe.
    """

    def __init__(
        self,
        layout: _Layout,
        log_query: torch.Tensor,
        log_key: torch.Tensor,
        value: torch.Tensor,
        is_causal: bool,
        dropout_p: float,
    ) -> None:
        key_blocks = layout.blocks(layout.rows(log_key, layout.reach, fill=-math.inf))
        block_max = key_blocks.detach().amax(1, keepdim=True).clamp_min_(FLOOR)  # (G * num_blocks, 1, M)
        sums, norms = _block_sums(layout, (key_blocks - block_max).exp(), value, dropout_p)
        state = torch.cat([sums, norms], dim=-1)
        reference, state = _log_space_outside(layout, layout.by_group(block_max.squeeze(1)), state, is_causal)
        state = state.flatten(0, 1)
        self.sums, self.norms = state[..., :-1], state[..., -1:]
        self.log_query = layout.blocks(layout.rows(log_query, 0))
        self.log_query_outside = self.log_query + reference.flatten(0, 1).unsqueeze(1)

        self.query_max = self.log_query.detach().amax(-1, keepdim=True)
        key_max = log_key.detach().amax(-1, keepdim=True).clamp_min(FLOOR)
        self.query = (self.log_query - self.query_max).exp()
        self.key_stretches = layout.stretches(layout.rows((log_key - key_max).exp(), layout.reach))
        key_max = key_max.masked_fill(log_key.detach().amax(-1, keepdim=True) == -math.inf, -math.inf)
        self.key_max = layout.stretches(layout.rows(key_max, layout.reach, fill=-math.inf))

    def __call__(
        self, part: slice, logits: torch.Tensor | None, in_window: torch.Tensor, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights of a slice of tiles, numerator and normaliser of everything outside them."""
        products = torch.bmm(self.query[part], self.key_stretches[part])
        # the clamp keeps the gradient of hidden keys' logarithms finite; their weight is exp(-inf) all the same
        log_weights = products.clamp_min(torch.finfo(products.dtype).tiny).log()
        log_weights = log_weights + (self.query_max[part] + self.key_max[part])
        if hidden is not None:
            log_weights = log_weights.masked_fill(hidden, -math.inf)
        if logits is not None:
            log_weights = torch.where(in_window, logits, log_weights)
        log_query = self.log_query_outside[part]
        reference = torch.maximum(
            log_weights.detach().amax(-1, keepdim=True), log_query.detach().amax(-1, keepdim=True)
        ).clamp_min_(FLOOR)
        query = (log_query - reference).exp()
        weights = (log_weights - reference).exp()
        return weights, torch.bmm(query, self.sums[part]), torch.bmm(query, self.norms[part])


def _block_sums(
    layout: _Layout, key_features: torch.Tensor, value: torch.Tensor, dropout_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of phi(k) v^T (G, num_blocks, M, D) and of phi(k) (G, num_blocks, M, 1) over each block of keys."""
    value_blocks = layout.blocks(layout.rows(value, layout.reach))
    norms = key_features.sum(1).unsqueeze(-1)
    if dropout_p > 0:
        key_features = F.dropout(key_features, dropout_p)
    sums = torch.bmm(key_features.transpose(1, 2), value_blocks)
    return layout.by_group(sums), layout.by_group(norms)


def _outside(layout: _Layout, sums: torch.Tensor) -> torch.Tensor:
    """Sum over prefix and suffix of each block: all key blocks but b to b + side. (G, num_blocks, M, D) to the same."""
    pad = (0, 0, 0, 0)
    prefix = F.pad(sums[:, :-1].cumsum(1), (*pad, 1, 0))
    beyond = 1 + layout.side
    if layout.num_blocks <= beyond:
        return prefix
    suffix = sums[:, beyond:].flip(1).cumsum(1).flip(1)
    return prefix + F.pad(suffix, (*pad, 0, beyond))


def _log_space_outside(
    layout: _Layout, log_max: torch.Tensor, state: torch.Tensor, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_outside` for sums that are relative to a maximum of their own.

    Args:
        layout: the cut into blocks.
        log_max: (G, num_blocks, M), the logarithm that block b's sums are relative to.
        state: (G, num_blocks, M, D), the sums.
        is_causal: prefix only.

    Returns:
        Reference (G, num_blocks, M) and sums relative to it (G, num_blocks, M, D).
    """
    reference, prefix = _exclusive_running_sum(log_max, state)
    beyond = 1 + layout.side
    if is_causal or layout.num_blocks <= beyond:
        return reference, prefix
    # the suffix of block b is the exclusive running sum, from the back, at block b + side
    suffix_max, suffix = (x.flip(1) for x in _exclusive_running_sum(log_max.flip(1), state.flip(1)))
    shift = layout.side
    suffix_max = F.pad(suffix_max[:, shift:], (0, 0, 0, shift), value=FLOOR)
    suffix = F.pad(suffix[:, shift:], (0, 0, 0, 0, 0, shift))
    joint = torch.maximum(reference, suffix_max)
    both = prefix * (reference - joint).exp().unsqueeze(-1) + suffix * (suffix_max - joint).exp().unsqueeze(-1)
    return joint, both


def _exclusive_running_sum(log_max: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Running sum over the blocks before each block, relative to the running maximum."""
    running_max = torch.cummax(log_max, dim=1).values
    scaled = state * (log_max - running_max).exp().unsqueeze(-1)
    decay = (running_max[:, :-1] - running_max[:, 1:]).exp().unsqueeze(-1)
    sums = [torch.zeros_like(state[:, 0]), scaled[:, 0]]
    for block in range(1, state.shape[1] - 1):
        sums.append(torch.addcmul(scaled[:, block], sums[-1], decay[:, block - 1]))
    floor = torch.full_like(log_max[:, :1], FLOOR)
    return torch.cat([floor, running_max[:, :-1]], dim=1), torch.stack(sums[: state.shape[1]], dim=1)
