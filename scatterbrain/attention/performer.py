"""Performer attention: `phi(Q) (phi(K)^T V)` with M positive random features, O((T + S) M) time and memory.

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021; features as in `ops.common.features`, one for
each random projection in `projection_matrix`.
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
        **features: str | bool,
    ) -> None:
        check_whole_number("dim_heads", dim_heads, 1)
        nb_features = default_num_features(dim_heads) if nb_features is None else nb_features
        check_whole_number("nb_features", nb_features, 1)
        super().__init__(dim_heads, nb_features, softmax_temp, causal, seed, attention_dropout, backend, **features)

    def sizes(self) -> dict[str, int]:
        """The number of features."""
        return {"nb_features": self.projection_matrix.shape[0]}

    def memory_columns(self, num_keys: int) -> float:
        """Two columns for each feature."""
        return 2 * self.projection_matrix.shape[0]

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return performer_attention(query, key, value, self.projection_matrix, **options)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return naive_performer_attention(query, key, value, self.projection_matrix, **options)[1]
