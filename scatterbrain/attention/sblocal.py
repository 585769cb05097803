"""Scatterbrain attention: exact in a local window, a low-rank estimate outside it.

    A(i, j) = exp(s q_i.k_j)          inside the window of W keys
              phi(q_i).phi(k_j)       outside it, with M random features
    out_i   = sum_j A(i, j) v_j / sum_j A(i, j)

Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention", NeurIPS 2021, algorithm 1; the low-rank part is
Performer's (ICLR 2021) with both signs of each random projection in `projection_matrix`. O(T (W + M)) time; the
estimate of A stays unbiased, and its largest entries, near the diagonal, are exact. The features may also be
learned, see `ops.learned`.
"""

from __future__ import annotations

import torch

from scatterbrain.attention.random_features import RandomFeatureAttention, even_features
from scatterbrain.ops.common.inputs import check_window
from scatterbrain.ops.scatterbrain import (
    naive_scatterbrain_attention,
    run_scatterbrain_again,
    scatterbrain_attention,
)


class SBLocalAttention(RandomFeatureAttention):
    """Scatterbrain with a local window: softmax weights inside it, random features outside it.

    Args:
        local_context: width W >= 1 of the window in keys.
        dim_heads: width E of queries and keys.
        nb_features: number of features M, even: both signs of M / 2 random projections. None is E log E.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        seed: seed of the random projections.
        attention_dropout: probability of dropping an attention weight in training, see `ops.scatterbrain.blocked`.
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
        local_context: int,
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
        check_window(local_context)
        num_projections = even_features(dim_heads, nb_features) // 2
        options = softmax_temp, causal, seed, attention_dropout, backend, learned_heads
        super().__init__(dim_heads, num_projections, True, *options, **features)
        self.local_context = local_context

    def sizes(self) -> dict[str, int]:
        """The window and the number of features."""
        return {"local_context": self.local_context, "nb_features": self.num_features}

    def memory_columns(self, num_keys: int) -> float:
        """The window's keys, and two columns for each feature."""
        return self.local_context + 2 * self.num_features

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        if self.learned_features is not None:
            return self.learned_features.attend(query, key, value, window=self.local_context, **options)
        return scatterbrain_attention(query, key, value, self.projection_matrix, self.local_context, **options)

    def _attend_again(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float
    ) -> torch.Tensor | None:
        if self.features.use_statistics or self.learned_features is not None:
            return None
        options = self.local_context, self.softmax_temp, self.causal, dropout_p, False, self.backend
        return run_scatterbrain_again(query, key, value, self.projection_matrix, *options, tokens_first=True)[0]

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        if self.learned_features is not None:
            return self.learned_features.weights(query, key, value, window=self.local_context, **options)
        naive = naive_scatterbrain_attention
        return naive(query, key, value, self.projection_matrix, self.local_context, **options)[1]
