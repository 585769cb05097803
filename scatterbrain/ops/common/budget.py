"""From (sequence length, fraction of the attention matrix's memory) to the sizes of an attention.

The unit is one column of the attention matrix, S of which make full attention. A key that a query sees costs one
column, so a window costs its width, and clusters their size for every hash. A random feature costs two columns, one for
queries and one for keys; a landmark costs one, since a key belongs to one landmark. So at S = 3136 and a fraction of
1/32 a window may have 98 keys, or a Performer 49 features, or Scatterbrain 49 keys and 24 features, or two hashes have
clusters of 49 keys: 98 = 2 * 49 = 49 + 2 * 24 + 1.
"""

from __future__ import annotations

from scatterbrain.errors import UserError


def budget_columns(sequence_length: int, memory_fraction: float) -> float:
    """Columns of the attention matrix that may be spent.

    Args:
        sequence_length: number of keys S.
        memory_fraction: memory over that of full attention, in (0, 1].

    Raises:
        UserError: a value out of range.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length={sequence_length} has to be at least 1.")
    if not 0 < memory_fraction <= 1:
        raise UserError(f"memory_fraction={memory_fraction} has to lie in (0, 1]; the published value is 1/32.")
    return sequence_length * memory_fraction


def keys_for(columns: float) -> int:
    """Keys, or landmarks, that so many columns pay for, rounded down: at least one."""
    return max(1, int(columns))


def features_for(columns: float, multiple: int = 1) -> int:
    """Random features that so many columns pay for, rounded down to a multiple: at least one multiple."""
    return max(1, int(columns / 2) // multiple) * multiple


def block_for(columns: float, num_blocks: int, smallest: int = 16) -> int:
    """Tokens of a block, a power of two of at least `smallest`, of which `num_blocks` fit into so many columns."""
    block = smallest
    while 2 * block * num_blocks <= columns:
        block *= 2
    return block
