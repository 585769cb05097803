"""Block-sparse supports: a layout is a boolean matrix of which blocks of queries see which blocks of keys.

A block is `block` consecutive tokens; the last one may be shorter. A pair of tokens is in the support where the pair of
their blocks is in the layout. Block 0 of queries and keys is the same, also where T and S differ. No layout is causal
by itself: the operator masks hidden keys.

The layouts are those of:

- `longformer`: Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 3.1, over blocks;
- `bigbird`: Zaheer et al., "Big Bird: Transformers for Longer Sequences", NeurIPS 2020, section 2, over blocks;
- `openai`: Child et al., "Generating Long Sequences with Sparse Transformers", 2019, section 4.3, the fixed pattern,
  with groups that see each other in both directions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from scatterbrain.errors import UserError, check_whole_number, did_you_mean
from scatterbrain.ops.sparse.supports import Round, Support

# A round is split into two where that saves at least this fraction of the computed pairs.
MIN_SAVING = 0.1


def block_layout(name: str, num_blocks_query: int, num_blocks_key: int, seed: int = 0, **options: int) -> torch.Tensor:
    """Layout, boolean (blocks of queries, blocks of keys), by name.

    Args:
        name: one of `LAYOUTS`.
        num_blocks_query: number of blocks of queries, at least 1.
        num_blocks_key: number of blocks of keys, at least 1.
        seed: seed of BigBird's random blocks; the other layouts ignore it.
        **options: options of the layout, integers; blocks beyond the last one are ignored.

            `longformer`: `num_sliding_blocks` (3, odd): each block sees itself and (number - 1) / 2 blocks on either
            side. Block 0 is global: every block sees it, and it sees every block.

            `bigbird`: `num_sliding_blocks` (3, odd) as above; the first `num_global_blocks` (1) are global;
            `num_random_blocks` (1): number of distinct random blocks for each block of queries, drawn from all blocks,
            including those of the window.

            `openai`: `num_local_blocks` (3): blocks within a group of this many consecutive blocks see each other. The
            last block of each group, also of a shorter last one, is seen by every block.

    Returns:
        Boolean (num_blocks_query, num_blocks_key), on the CPU.

    Raises:
        UserError: unknown name or option (near names are suggested), or a value out of range.
    """
    if name not in LAYOUTS:
        raise UserError(f"Unknown layout '{name}'. {did_you_mean(name, LAYOUTS)}")
    known = inspect.signature(LAYOUTS[name]).parameters.values()
    known = [parameter.name for parameter in known if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise UserError(f"Layout '{name}' has no option '{option}'. {did_you_mean(option, known)}")
    check_whole_number("num_blocks_query", num_blocks_query, 1)
    check_whole_number("num_blocks_key", num_blocks_key, 1)
    for option, value in options.items():
        check_whole_number(option, value, 0 if option in ("num_global_blocks", "num_random_blocks") else 1)
    return LAYOUTS[name](num_blocks_query, num_blocks_key, seed, **options)


def _longformer(rows: int, columns: int, seed: int, *, num_sliding_blocks: int = 3) -> torch.Tensor:
    return _sliding(rows, columns, num_sliding_blocks) | _global(rows, columns, 1)


def _bigbird(
    rows: int,
    columns: int,
    seed: int,
    *,
    num_sliding_blocks: int = 3,
    num_global_blocks: int = 1,
    num_random_blocks: int = 1,
) -> torch.Tensor:
    layout = _sliding(rows, columns, num_sliding_blocks) | _global(rows, columns, num_global_blocks)
    order = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).argsort(dim=1, stable=True)
    # a tensor of true: torch.jit.trace has no scatter_ of a boolean
    return layout.scatter_(1, order[:, :num_random_blocks], torch.ones_like(layout))


def _openai(rows: int, columns: int, seed: int, *, num_local_blocks: int = 3) -> torch.Tensor:
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    last = (column % num_local_blocks == num_local_blocks - 1) | (column == columns - 1)
    return (row // num_local_blocks == column // num_local_blocks) | last


def _sliding(rows: int, columns: int, number: int) -> torch.Tensor:
    """Layout of the blocks at a distance of at most (number - 1) / 2."""
    if number % 2 == 0:
        raise UserError(
            f"num_sliding_blocks={number} has to be odd: the block itself, and as many on either side. "
            f"Try {number - 1} or {number + 1}."
        )
    return (torch.arange(rows)[:, None] - torch.arange(columns)).abs() <= number // 2


def _global(rows: int, columns: int, number: int) -> torch.Tensor:
    """Layout in which the first blocks see every block and are seen by every block."""
    return (torch.arange(rows)[:, None] < number) | (torch.arange(columns) < number)


LAYOUTS: dict[str, Callable[..., torch.Tensor]] = {
    "longformer": _longformer,
    "bigbird": _bigbird,
    "openai": _openai,
}


def layout_support(layout: torch.Tensor, block: int, num_queries: int, num_keys: int) -> Support:
    """Support of a layout: a tile for each block of queries that sees any block.

    The tiles of a round are padded to the same number of keys, and a global block sees many more keys than others. So
    blocks that see similar numbers of keys share a round, see `_split`: Longformer has one round for the global block
    and one for the rest.

    Args:
        layout: boolean, one row for each block of queries and one column for each block of keys.
        block: tokens of a block.
        num_queries: T.
        num_keys: S.

    Returns:
        Support, on the device of the layout.

    Raises:
        UserError: the layout does not fit the lengths, or a number below 1.
    """
    for option, value in (("block", block), ("num_queries", num_queries), ("num_keys", num_keys)):
        check_whole_number(option, value, 1)
    expected = tuple(-(-length // block) for length in (num_queries, num_keys))
    if layout.shape != expected or layout.dtype != torch.bool:
        raise UserError(
            f"A layout for {num_queries} queries and {num_keys} keys in blocks of {block} has to be boolean {expected},"
            f" got {layout.dtype} {tuple(layout.shape)}."
        )
    counts, rows = layout.sum(1).sort(descending=True, stable=True)
    rows = rows[counts > 0]
    rounds = []
    for chosen in rows.split(_split(counts[counts > 0].tolist())):
        seen = layout[chosen]
        # visible blocks first, both kinds in ascending order
        columns = (~seen).byte().argsort(dim=1, stable=True)[:, : int(seen.sum(1).max())]
        columns = columns.masked_fill(~seen.gather(1, columns), -1)
        rounds.append(Round(_tokens(chosen[:, None], block, num_queries), _tokens(columns, block, num_keys)))
    return Support(tuple(rounds))


def _split(counts: list[int]) -> list[int]:
    """Sizes of the rounds, given the number of visible blocks of each row in descending order.

    A round of n rows computes n times its largest number. It is cut where that saves most, if the saving is at least
    the fraction `MIN_SAVING`: less is not worth another round.
    """
    if not counts:
        return []
    computed = [cut * counts[0] + (len(counts) - cut) * count for cut, count in enumerate(counts)]
    cut = min(range(len(counts)), key=computed.__getitem__)
    if computed[cut] > (1 - MIN_SAVING) * computed[0]:
        return [len(counts)]
    return _split(counts[:cut]) + _split(counts[cut:])


def _tokens(blocks: torch.Tensor, block: int, length: int) -> torch.Tensor:
    """Positions (1, n, number * block) of the tokens of blocks (n, number); -1 for none."""
    tokens = blocks.unsqueeze(-1) * block + torch.arange(block, device=blocks.device)
    return tokens.masked_fill((tokens < 0) | (tokens >= length), -1).flatten(1).unsqueeze(0)


def keys_per_query(layout: torch.Tensor, block: int, num_keys: int) -> float:
    """Mean number of keys that a query sees, with the same weight for each row of the layout.

    Args:
        layout: boolean (blocks of queries, blocks of keys).
        block: tokens of a block.
        num_keys: S; the last block may be partial.
    """
    sizes = (num_keys - torch.arange(layout.shape[1], device=layout.device) * block).clamp_max(block)
    return (layout * sizes).sum().item() / layout.shape[0]
