"""Sizes of an attention from the sequence length and a fraction of the columns of the attention matrix.

Full attention has S columns. They count what a query sees, not the memory that a kernel takes. A key that a query
sees costs one column, so a window costs its width, also where a causal mask hides a half of it, and each hash the
size of its clusters. A random feature costs two columns, one for queries and one for keys; a landmark costs one,
since a key belongs to one landmark. At S = 3136 and a fraction of 1/32 the budget is 98 columns: a window of 98 keys,
a Performer with 49 features, Scatterbrain with 49 keys and 24 features, or two hashes with clusters of 49 keys.
"""

from __future__ import annotations

import math

from scatterbrain.errors import UserError, is_number


def budget_columns(sequence_length: int, memory_fraction: float) -> float:
    """Budget in columns of the attention matrix.

    Args:
        sequence_length: number of keys S.
        memory_fraction: columns relative to full attention, in (0, 1].

    Raises:
        UserError: a value out of range.
    """
    if not is_number(sequence_length) or not 1 <= sequence_length < math.inf:
        raise UserError(f"sequence_length={sequence_length!r} has to be at least 1.")
    if not is_number(memory_fraction) or not 0 < memory_fraction <= 1:
        raise UserError(f"memory_fraction={memory_fraction} has to lie in (0, 1]; the published value is 1/32.")
    return sequence_length * memory_fraction


def keys_for(columns: float) -> int:
    """Number of keys, or landmarks, that fit the budget, at least 1."""
    return max(1, int(columns))


def features_for(columns: float, multiple: int = 1) -> int:
    """Number of random features that fit the budget, a multiple of `multiple` and at least that."""
    return max(1, int(columns / 2) // multiple) * multiple


def block_for(columns: float, num_blocks: int, smallest: int = 16) -> int:
    """Tokens of a block, the largest power of two such that `num_blocks` blocks fit the budget, at least `smallest`."""
    block = smallest
    while 2 * block * num_blocks <= columns:
        block *= 2
    return block
