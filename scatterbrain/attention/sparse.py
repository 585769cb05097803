"""Attention that is exact on a sparse support, alone or with random features outside it.

    A(i, j) = exp(s q_i.k_j)          on the support
              phi(q_i).phi(k_j)       outside it, with M random features; 0 without them
    out_i   = sum_j A(i, j) v_j / sum_j A(i, j)

Supports are those of `ops.sparse.supports`; the combination is Scatterbrain's (Chen et al., NeurIPS 2021, section 4).
Sub-classes of `SparseAttention` (masked softmax) and `SparseLowRankAttention` (Scatterbrain) differ only in their
support. Both are linear in time and memory, see `scatterbrain.ops.sparse.tiled`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from scatterbrain.attention.base import AttentionModule, refuse_causal
from scatterbrain.attention.random_features import RandomFeatureAttention, even_features
from scatterbrain.ops.common.backends import choose_backend
from scatterbrain.ops.common.dense import dense_low_rank_logits
from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.inputs import default_scale, visible_rows
from scatterbrain.ops.common.numerics import accumulation_dtype
from scatterbrain.ops.sparse.naive import naive_support_attention
from scatterbrain.ops.sparse.supports import Round, Support
from scatterbrain.ops.sparse.tiled import LogFeatures, support_attention


class SupportSource(nn.Module):
    """Base of the modules that compute the support of an attention: from a hash, a layout, a neighbourhood.

    Attributes:
        can_be_causal: whether hiding the keys j > i is defined for this support.
        takes_attn_mask: whether it does not depend on which keys are hidden.
    """

    can_be_causal = False
    takes_attn_mask = False

    def forward(self, query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None) -> Support:
        """Support of the B * H sequences of query (B, H, T, E) and key (B, H, S, E), or one that all share."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        """Sizes that the memory budget determines, by the names of their options."""
        raise NotImplementedError

    def columns(self, num_keys: int) -> float:
        """Mean number of keys that a query sees: columns of the attention matrix, of `num_keys`."""
        raise NotImplementedError

    def redraw(self, seed: int) -> None:
        """Draw what is random in the support again, in place; nothing where nothing is."""


# Supports that a module keeps: more than the lengths that a network alternates between.
MAX_CACHED_SUPPORTS = 8


class FixedSupport(SupportSource):
    """Base of the supports that depend on the lengths alone: the last ones are kept, by lengths and device."""

    takes_attn_mask = True

    def __init__(self) -> None:
        super().__init__()
        self._cache: dict[tuple[int, int, torch.device], Support] = {}

    def make(self, num_queries: int, num_keys: int) -> Support:
        """The support for these lengths, on any device."""
        raise NotImplementedError

    def forward(self, query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None) -> Support:
        """The support for the lengths of these queries and keys."""
        # constants also while a graph is recorded: torch.compile takes len(range(n)) for one, but not int(n)
        lengths = (len(range(x.shape[2])) for x in (query, key))
        return Support(tuple(Round(*tensors) for tensors in self._tensors(*lengths, query.device)))

    def _tensors(self, num_queries: int, num_keys: int, device: torch.device) -> tuple[tuple, ...]:
        """The tensors of each round, computed now also while a graph is recorded, whose constants they are."""
        cache_key = (num_queries, num_keys, device)
        support = self._cache.pop(cache_key, None)
        if support is None:
            with _disable_current_modes(), torch.device("cpu"):
                support = self.make(num_queries, num_keys).to(device)
            while len(self._cache) >= MAX_CACHED_SUPPORTS:
                # the one whose last use is longest ago: dictionaries keep the order of insertion
                del self._cache[next(iter(self._cache))]
        self._cache[cache_key] = support
        return tuple((each.query_index, each.key_index, each.mask) for each in support.rounds)

    # What torch.compiler.assume_constant_result sets; calling it would import the whole compiler with this module.
    _tensors._dynamo_marked_constant = True


class SparseAttention(AttentionModule):
    """Softmax attention over the pairs of a support.

    Args:
        source: module that computes the support.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch` or `auto`, see the operator.

    Raises:
        UserError: a value out of range; `causal` with a support that has no order.
    """

    source: SupportSource

    def __init__(
        self,
        source: SupportSource,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        refuse_causal(self, causal and not source.can_be_causal)
        self.source = source
        self.dim_heads = getattr(source, "dim_heads", None)

    @property
    def takes_attn_mask(self) -> bool:
        """Whether keys may be hidden anywhere in the sequence."""
        return self.source.takes_attn_mask

    def sizes(self) -> dict[str, int]:
        """Sizes of the support."""
        return self.source.sizes()

    def memory_columns(self, num_keys: int) -> float:
        """Mean number of keys that a query sees."""
        return self.source.columns(num_keys)

    def _log_features(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> LogFeatures | None:
        return None

    def _low_rank_logits(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor | None:
        return None

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        backend = choose_backend(options.pop("backend"))
        scale, dropout_p = default_scale(query, options.pop("scale")), options.pop("dropout_p")
        if backend == "naive":
            return self._naive(query, key, value, scale, **options)[0].to(query.dtype)
        rows = visible_rows(query, key, value, scale, **options)
        support = self.source(rows.query, rows.key, options["key_lengths"])
        options = {**options, "scale": scale, "log_features": self._log_features(rows.query, rows.key, scale)}
        return rows.mark(support_attention(*rows.tensors(), support, dropout_p=dropout_p, **options))[0]

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return self._naive(query, key, value, **options)[1]

    def _naive(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, **masks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = visible_rows(query, key, value, scale, **masks)
        query, key, value, _ = rows
        support = self.source(query, key, masks["key_lengths"]).dense(query.shape[2], key.shape[2])
        low_rank = self._low_rank_logits(query, key, scale)
        return rows.mark(*naive_support_attention(query, key, value, support, scale, low_rank, **masks))


class SparseLowRankAttention(SparseAttention, RandomFeatureAttention):
    """Scatterbrain with any sparse support: exact weights on it, random features outside it.

    Args:
        source: module that computes the support.
        dim_heads: width E of queries and keys.
        nb_features: number of features M, even: both signs of M / 2 random projections. None is E log E.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false: the low-rank sums run over all keys.
        seed: seed of the random projections and of the support.
        backend: `naive`, `torch` or `auto`, see the operator.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        source: SupportSource,
        dim_heads: int,
        nb_features: int | None = None,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        backend: str = "auto",
        **features: str | bool,
    ) -> None:
        num_projections = even_features(dim_heads, nb_features) // 2
        RandomFeatureAttention.__init__(
            self, dim_heads, num_projections, True, softmax_temp, False, seed, 0.0, backend, None, **features
        )
        refuse_causal(self, causal)
        self.source = source

    def sizes(self) -> dict[str, int]:
        """Sizes of the support, and the number of features."""
        return {**self.source.sizes(), "nb_features": self.num_features}

    def memory_columns(self, num_keys: int) -> float:
        """Mean number of keys that a query sees, and two columns for each feature."""
        return self.source.columns(num_keys) + 2 * self.num_features

    def redraw_projection(self, seed: int) -> None:
        """Draw the random projections, and what is random in the support, again, in place.

        Args:
            seed: any integer.
        """
        super().redraw_projection(seed)
        self.source.redraw(seed)

    def _log_features(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> LogFeatures:
        dtype = accumulation_dtype(query.dtype)
        projection = self.projection_matrix
        return tuple(log_softmax_features(x.to(dtype), projection, scale, cosh=True) for x in (query, key))

    def _low_rank_logits(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        return dense_low_rank_logits(query, key, self.projection_matrix, scale, cosh=True)
