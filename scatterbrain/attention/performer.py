"""Performer attention: `phi(Q) (phi(K)^T V)` with M positive random features, O((T + S) M) time and memory.

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021; features as in `ops.common.features`, one for
each random projection in `projection_matrix`, or learned, see `ops.learned`.
"""

from __future__ import annotations

import torch

from scatterbrain.attention.random_features import RandomFeatureAttention, default_num_features
from scatterbrain.errors import check_whole_number
from scatterbrain.ops.performer import naive_performer_attention, performer_attention


class PerformerAttention(RandomFeatureAttention):
    """Attention with random features in place of the softmax kernel.

    Args:
        dim_heads: width E of queries and keys.
        nb_features: number of features M; None is E log E.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        seed: seed of the random projections.
        attention_dropout: probability of dropping a key's feature in training.
        backend: `naive`, `torch`, `triton` or `auto`, see the operator.
        learned_heads: number of heads H whose features are learned, as parameters in place of random projections, or
            1 to share them; None for random features. They start as random ones, see `scatterbrain.ops.learned`.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: a value out of range.
    """

    takes_attn_mask = True

    def __init__(
        self,
        dim_heads: int,
        nb_features: int | None = None,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        attention_dropout: float = 0.0,
        backend: str = "auto",
        learned_heads: int | None = None,
        **features: str | bool,
    ) -> None:
        check_whole_number("dim_heads", dim_heads, 1)
        nb_features = default_num_features(dim_heads) if nb_features is None else nb_features
        check_whole_number("nb_features", nb_features, 1)
        options = softmax_temp, causal, seed, attention_dropout, backend, learned_heads
        super().__init__(dim_heads, nb_features, False, *options, **features)

    def sizes(self) -> dict[str, int]:
        """The number of features."""
        return {"nb_features": self.num_features}

    def memory_columns(self, num_keys: int) -> float:
        """Two columns for each feature."""
        return 2 * self.num_features

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        if self.learned_features is not None:
            return self.learned_features.attend(query, key, value, **options)
        return performer_attention(query, key, value, self.projection_matrix, **options)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        if self.learned_features is not None:
            return self.learned_features.weights(query, key, value, **options)
        return naive_performer_attention(query, key, value, self.projection_matrix, **options)[1]
