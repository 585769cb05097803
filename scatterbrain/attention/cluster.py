"""Landmark attention, alone and with exact weights: keys are represented by the means of their clusters.

    A(i, j) = exp(s q_i.k_j)                          for W exact keys
              exp(s q_i.c_b)                          for the others, c_b the mean of cluster b = b(j) of key j
              exp(s p_a.k_j) exp(s (q_i - p_a).c_ab)  or this, where queries are clustered too: p_a is the mean of
                                                      cluster a = a(i) of query i, and c_ab the mean of the keys of
                                                      cluster b weighted by exp(s p_a.k)

The exact keys are a window, the heaviest of each query cluster, or a window and the clusters in which a landmark loses
most for the query cluster (`SBAdaptiveAttention`).

Scatterbrain's combination (Chen et al., NeurIPS 2021, algorithm 1) with a low-rank part computed from the data in
place of a random one; see `scatterbrain.ops.clusters`. Linear in time and memory, and deterministic.
"""

from __future__ import annotations

import torch

from scatterbrain.attention.base import AttentionModule, refuse_causal
from scatterbrain.errors import check_value_weight, check_whole_number
from scatterbrain.ops.adaptive import adaptive_attention, naive_adaptive_attention, plan_adaptive_attention
from scatterbrain.ops.adaptive.attention import run_adaptive_again
from scatterbrain.ops.adaptive.plan import check_density, exact_keys
from scatterbrain.ops.clusters import (
    assign_key_clusters,
    assign_query_clusters,
    causal_clusters,
    landmark_attention,
    naive_causal_landmark_attention,
    naive_landmark_attention,
    naive_paired_landmark_attention,
    paired_landmark_attention,
)
from scatterbrain.ops.clusters.causal.attention import CHUNK, check_causal_sizes
from scatterbrain.ops.clusters.causal.levels import visible_columns
from scatterbrain.ops.clusters.landmark import run_landmarks_again
from scatterbrain.ops.common.inputs import check_window, query_lengths


class ClusterAttention(AttentionModule):
    """Attention in which every key is replaced by the mean of its cluster.

    Args:
        num_landmarks: number of clusters M.
        num_steps: iterations of k-means.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        attention_dropout: probability of dropping a cluster's weight in training.
        backend: `naive`, `torch` or `auto`, see the operator.

    Raises:
        UserError: a value out of range.
    """

    takes_attn_mask = True
    local_context = 0
    can_be_causal = False

    def __init__(
        self,
        num_landmarks: int,
        num_steps: int = 1,
        value_weight: float = 0.0,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        refuse_causal(self, causal and not self.can_be_causal)
        _check_sizes(value_weight, num_landmarks=num_landmarks, num_steps=num_steps)
        self.num_landmarks, self.num_steps, self.value_weight = num_landmarks, num_steps, value_weight

    def sizes(self) -> dict[str, int]:
        """The number of clusters."""
        return {"num_landmarks": self.num_landmarks}

    def memory_columns(self, num_keys: int) -> float:
        """The window's keys, and a column for each landmark."""
        return self.local_context + self.num_landmarks

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return landmark_attention(
            *(query, key, value, self.num_landmarks, self.local_context),
            num_steps=self.num_steps,
            value_weight=self.value_weight,
            **options,
        )

    def _attend_again(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float
    ) -> torch.Tensor | None:
        sizes = self.num_landmarks, self.local_context
        options = self.softmax_temp, self.causal, self.num_steps, self.value_weight, dropout_p, False, self.backend
        return run_landmarks_again(query, key, value, *sizes, *options, tokens_first=True)[0]

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        scale, key_lengths, attn_mask = options["scale"], options["key_lengths"], options.get("attn_mask")
        assignment = assign_key_clusters(
            key, value, self.num_landmarks, self.num_steps, key_lengths, self.value_weight, attn_mask
        )
        masks = key_lengths, attn_mask
        return naive_landmark_attention(query, key, value, assignment, self.local_context, scale, *masks)[1]


class SBClusterAttention(ClusterAttention):
    """Attention that is exact in a local window and takes cluster means outside it.

    Args:
        local_context: width W >= 1 of the window in keys.
        num_landmarks: number of clusters M; if causal, of each node, see `scatterbrain.ops.clusters.causal`.
        num_steps: iterations of k-means.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`; if causal, see
            `causal_landmark_attention`.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i. A query then sees its own chunk and those that the window reaches exactly, and the
            landmarks of earlier chunks alone.
        attention_dropout: probability of dropping a weight in training, see `scatterbrain.ops.scatterbrain.blocked`.
        backend: `naive`, `torch` or `auto`, see the operator.

    Raises:
        UserError: a value out of range.
    """

    can_be_causal = True

    def __init__(
        self,
        local_context: int,
        num_landmarks: int,
        num_steps: int = 1,
        value_weight: float = 0.0,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        check_window(local_context)
        super().__init__(num_landmarks, num_steps, value_weight, softmax_temp, causal, attention_dropout, backend)
        self.local_context = local_context
        if causal:
            check_causal_sizes(num_landmarks, local_context, CHUNK, num_steps)

    def sizes(self) -> dict[str, int]:
        """The window and the number of clusters."""
        return {"local_context": self.local_context, "num_landmarks": self.num_landmarks}

    def memory_columns(self, num_keys: int) -> float:
        """The window's keys, and a column for each landmark; if causal, the mean of those that the queries see."""
        if self.causal:
            return visible_columns(num_keys, self.num_landmarks, self.local_context, CHUNK)
        return super().memory_columns(num_keys)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        if not self.causal:
            return super()._weights(query, key, value, **options)
        sizes = (self.local_context, CHUNK)
        masks = {name: options.get(name) for name in ("key_lengths", "attn_mask")}
        steps = {"num_steps": self.num_steps, "value": value, "value_weight": self.value_weight}
        found = causal_clusters(key, self.num_landmarks, *sizes, num_queries=query.shape[2], **steps, **masks)
        return naive_causal_landmark_attention(query, key, value, found, *sizes, options["scale"], **masks)[1]


class PairedClusterAttention(AttentionModule):
    """Attention of clustered queries and keys: each query cluster has its own summary of every key cluster.

    Args:
        num_landmarks: number of key clusters M.
        num_query_landmarks: number of query clusters Q.
        num_exact: number of keys W that a query cluster weights exactly, those of the largest weight for its mean.
        num_steps: iterations of k-means.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        attention_dropout: probability of dropping the weight of a summary or of an exact key in training.
        backend: `naive`, `torch` or `auto`, see the operator.

    `key_lengths` and `attn_mask` hold for the queries as well, where there are as many queries as keys.

    Raises:
        UserError: a value out of range.
    """

    takes_attn_mask = True

    def __init__(
        self,
        num_landmarks: int,
        num_query_landmarks: int,
        num_exact: int = 0,
        num_steps: int = 2,
        value_weight: float = 1.0,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        refuse_causal(self, causal)
        sizes = {"num_landmarks": num_landmarks, "num_query_landmarks": num_query_landmarks}
        _check_sizes(value_weight, **sizes, num_exact=num_exact, num_steps=num_steps)
        self.num_landmarks, self.num_query_landmarks, self.num_exact = num_landmarks, num_query_landmarks, num_exact
        self.num_steps, self.value_weight = num_steps, value_weight

    def sizes(self) -> dict[str, int]:
        """Numbers of clusters, and of exact keys where there are any."""
        sizes = {"num_landmarks": self.num_landmarks, "num_query_landmarks": self.num_query_landmarks}
        return sizes | ({"num_exact": self.num_exact} if self.num_exact else {})

    def memory_columns(self, num_keys: int) -> float:
        """A column for each key cluster, query cluster and exact key, and the summaries, for heads of width 64."""
        summaries = self.num_query_landmarks * (self.num_landmarks + self.num_exact) * SUMMARY_SIZE / num_keys
        return self.num_landmarks + self.num_query_landmarks + self.num_exact + summaries

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return paired_landmark_attention(
            *(query, key, value, self.num_landmarks, self.num_query_landmarks, self.num_exact),
            query_lengths=query_lengths(query, key, options["key_lengths"]),
            query_mask=query_lengths(query, key, options.get("attn_mask")),
            num_steps=self.num_steps,
            value_weight=self.value_weight,
            **options,
        )

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        key_lengths, attn_mask = options["key_lengths"], options.get("attn_mask")
        of_queries = [query_lengths(query, key, mask) for mask in (key_lengths, attn_mask)]
        keys = assign_key_clusters(
            key, value, self.num_landmarks, self.num_steps, key_lengths, self.value_weight, attn_mask
        )
        queries = assign_query_clusters(query, self.num_query_landmarks, self.num_steps, *of_queries)
        masks = key_lengths, of_queries[0], attn_mask, of_queries[1]
        return naive_paired_landmark_attention(
            query, key, value, keys, queries, self.num_exact, options["scale"], *masks
        )[1]


class SBAdaptiveAttention(AttentionModule):
    """Attention that is exact in a local window and on key clusters chosen for each query cluster.

    All other keys have the weights of the means of their clusters.

    Args:
        local_context: width W >= 1 of the window in keys.
        num_landmarks: number of key clusters M.
        num_query_landmarks: number of query clusters Q.
        density: largest share in [0, 1] of the keys that a query cluster weights exactly, besides the window.
        tolerance: estimated share of a query cluster's weight that landmarks may misplace: a query cluster weights no
            more clusters exactly once it is reached. None takes as many as fit `density`.
        num_steps: iterations of k-means.
        value_weight: weight of the values in the clustering of keys, see `assign_key_clusters`.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        attention_dropout: probability of dropping a weight in training, see `adaptive_attention`.
        backend: `naive`, `torch`, `triton` or `auto`, see the operator.

    `key_lengths` are the lengths of the queries as well, where there are as many queries as keys.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        local_context: int,
        num_landmarks: int,
        num_query_landmarks: int,
        density: float,
        tolerance: float | None = None,
        num_steps: int = 1,
        value_weight: float = 0.0,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        refuse_causal(self, causal)
        check_window(local_context)
        sizes = {"num_landmarks": num_landmarks, "num_query_landmarks": num_query_landmarks}
        _check_sizes(value_weight, **sizes, num_steps=num_steps)
        check_density(density, tolerance)
        self.local_context, self.density, self.tolerance = local_context, density, tolerance
        self.num_landmarks, self.num_query_landmarks = num_landmarks, num_query_landmarks
        self.num_steps, self.value_weight = num_steps, value_weight

    def sizes(self) -> dict[str, int | float]:
        """The window, the numbers of clusters and the density."""
        names = ("local_context", "num_landmarks", "num_query_landmarks", "density")
        return {name: getattr(self, name) for name in names}

    def memory_columns(self, num_keys: int) -> float:
        """A column for each key that a query sees exactly and for each cluster, and the lists of the query clusters."""
        clusters = self.num_landmarks + self.num_query_landmarks
        num_exact = exact_keys(self.density, num_keys)
        return self.local_context + clusters + num_exact + self.num_query_landmarks * num_exact / num_keys

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return adaptive_attention(
            *(query, key, value, self.num_landmarks, self.num_query_landmarks, self.density, self.local_context),
            **self._plan_options(query, key, options["key_lengths"]),
            **options,
        )

    def _attend_again(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float
    ) -> torch.Tensor | None:
        sizes = self.num_landmarks, self.num_query_landmarks, self.density, self.local_context
        options = self.tolerance, self.softmax_temp, self.causal, self.num_steps, self.value_weight
        options = *options, dropout_p, False, self.backend
        return run_adaptive_again(query, key, value, *sizes, *options, tokens_first=True)[0]

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        scale, key_lengths = options["scale"], options["key_lengths"]
        plan = plan_adaptive_attention(
            *(query, key, value, self.num_landmarks, self.num_query_landmarks, self.density),
            **self._plan_options(query, key, key_lengths),
            scale=scale,
            key_lengths=key_lengths,
        )
        return naive_adaptive_attention(query, key, value, *plan[:3], self.local_context, scale, key_lengths)[1]

    def _plan_options(self, query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None) -> dict:
        return {
            "tolerance": self.tolerance,
            "query_lengths": query_lengths(query, key, key_lengths),
            "num_steps": self.num_steps,
            "value_weight": self.value_weight,
        }


def _check_sizes(value_weight: float, **sizes: int) -> None:
    """Check sizes of at least 1, or 0 for `num_exact` and `num_steps`, and the weight of the values.

    Raises:
        UserError: a value out of range.
    """
    for name, size in sizes.items():
        check_whole_number(name, size, 0 if name in ("num_exact", "num_steps") else 1)
    check_value_weight(value_weight)


# Elements of a summary: a mean key, a mean value and a mass, for heads of width 64.
SUMMARY_SIZE = 2 * 64 + 1
