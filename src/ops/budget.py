"""From (sequence length, fraction of the attention matrix's memory) to window and feature numbers.

The unit is one column of the attention matrix, S of which make full attention. A window costs its width, a random
feature costs two columns (one for queries, one for keys). So at S = 3136 and a fraction of 1/32 a window may have
98 keys, or a Performer 49 features, or Scatterbrain 49 keys and 24 features: 98 = 2 * 49 = 49 + 2 * 24 + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from src.utils.errors import UserError


@dataclass(frozen=True)
class AttentionBudget:
    """What an attention may spend.

    Attributes:
        window: number of keys W of the local window, 0 for none.
        nb_features: number of random features M, 0 for none.
    """

    window: int = 0
    nb_features: int = 0

    def memory_fraction(self, sequence_length: int) -> float:
        """Memory over that of the full attention matrix."""
        return min(1.0, (self.window + 2 * self.nb_features) / sequence_length)


def attention_budget(
    sequence_length: int, memory_fraction: float, window_share: float, feature_multiple: int = 1
) -> AttentionBudget:
    """Spend a fraction of the attention matrix's memory on a window and on random features.

    Args:
        sequence_length: number of keys S.
        memory_fraction: memory over that of full attention, in (0, 1].
        window_share: part of the budget that goes to the window: 1 for local attention, 0 for Performer, 1/2 for
            Scatterbrain.
        feature_multiple: features come in multiples of this (2 for the cosh form).

    Returns:
        Window and features, rounded down, but at least one of each kind that has a share.

    Raises:
        UserError: a value out of range.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length={sequence_length} has to be at least 1.")
    if not 0 < memory_fraction <= 1:
        raise UserError(f"memory_fraction={memory_fraction} has to lie in (0, 1]; the published value is 1/32.")
    columns = sequence_length * memory_fraction
    window = features = 0
    if window_share > 0:
        window = max(1, int(columns * window_share))
    if window_share < 1:
        features = int(columns * (1 - window_share) / 2)
        features = max(1, features // feature_multiple) * feature_multiple
    return AttentionBudget(window, features)
