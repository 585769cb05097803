"""Attentions to compare with, not to use: floors that any approximation has to beat, and clustered attention.

Floors look at few keys, or at none, and choose them without a look at queries and keys: an output of zero, the mean of
the values, keys at equal distances, random keys. An error or an accuracy tells something only beside theirs. Clustered
attention (Vyas et al., NeurIPS 2020) clusters the queries where landmark attention clusters the keys.
"""

from __future__ import annotations

import torch

from scatterbrain.attention.base import AttentionModule, refuse_causal
from scatterbrain.errors import check_whole_number
from scatterbrain.ops.clusters import assign_query_clusters
from scatterbrain.ops.clusters.kmeans import cluster_means, valid_points
from scatterbrain.ops.common.backends import choose_backend
from scatterbrain.ops.common.inputs import query_lengths
from scatterbrain.ops.common.numerics import accumulation_dtype, at_most, gather_rows, no_autocast
from scatterbrain.ops.full import full_attention, naive_full_attention


class ZeroAttention(AttentionModule):
    """Output of zeros: what a network predicts without its attention.

    Args:
        softmax_temp: without effect.
        causal: has to be false, as in all attentions of this file.
        backend: without effect: `naive`, `torch` or `auto`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(self, softmax_temp: float | None = None, causal: bool = False, backend: str = "auto") -> None:
        super().__init__(softmax_temp, causal, 0.0, backend)
        refuse_causal(self, causal)

    def memory_columns(self, num_keys: int) -> float:
        """None."""
        return 0.0

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        choose_backend(options["backend"])
        # sums over nothing: for autograd a function of all three, and zero also where they are not finite
        of_query = query[..., :0].sum(-1, keepdim=True)
        return of_query + key[:, :, :0, :1].sum(2, keepdim=True) + value[:, :, :0].sum(2, keepdim=True)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return query.new_zeros(*query.shape[:3], key.shape[2])


class UniformAttention(ZeroAttention):
    """Mean of the values of all keys, the same for every query; arguments as in `ZeroAttention`."""

    def memory_columns(self, num_keys: int) -> float:
        """One: all rows of the attention matrix are the same."""
        return 1.0

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        zeros = super()._attend(query, key, value, **options)
        visible = valid_points(key, options["key_lengths"]).unsqueeze(-1)
        with no_autocast(value):
            total = value.to(accumulation_dtype(value.dtype)).masked_fill(~visible, 0.0).sum(2, keepdim=True)
            return zeros + (total / visible.sum(2, keepdim=True).clamp_min(1)).to(value.dtype)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        visible = valid_points(key, options["key_lengths"]).unsqueeze(1).to(query.dtype)
        return (visible / visible.sum(-1, keepdim=True).clamp_min(1)).expand(*query.shape[:3], key.shape[2])


class StridedAttention(AttentionModule):
    """Softmax attention to keys at equal distances, the same for all queries: at 1/32, to every 32nd.

    The keys are the first ones of `num_keys` stretches of the sequence; padding is not attended to.

    Args:
        num_keys: number of keys.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch` or `auto`, see `full_attention`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        num_keys: int,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        refuse_causal(self, causal)
        check_whole_number("num_keys", num_keys, 1)
        self.num_keys = num_keys

    def sizes(self) -> dict[str, int]:
        """The number of keys."""
        return {"num_keys": self.num_keys}

    def memory_columns(self, num_keys: int) -> float:
        """The keys."""
        return self.num_keys

    def _offset(self, size: torch.Tensor) -> torch.Tensor | int:
        """Position of the key within each stretch, of sizes (n,)."""
        return 0

    def _chosen(self, key: torch.Tensor, key_lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions (n,) of the keys attended to, ascending, and how many of them each sample has (B,)."""
        length = key.shape[2]
        number = at_most(self.num_keys, length)
        bounds = torch.arange(number + 1, device=key.device) * length // number
        chosen = bounds[:-1] + self._offset(bounds.diff())
        return chosen, None if key_lengths is None else (chosen < key_lengths[:, None]).sum(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        chosen, lengths = self._chosen(key, options.pop("key_lengths"))
        return full_attention(query, *(x.index_select(2, chosen) for x in (key, value)), key_lengths=lengths, **options)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        chosen, lengths = self._chosen(key, options.pop("key_lengths"))
        rows = (x.index_select(2, chosen) for x in (key, value))
        weights = naive_full_attention(query, *rows, key_lengths=lengths, **options)[1]
        return weights.new_zeros(*query.shape[:3], key.shape[2]).index_copy(3, chosen, weights)


class RandomKeysAttention(StridedAttention):
    """Softmax attention to random keys, the same for all queries: one of each of `num_keys` stretches of the sequence.

    Args:
        num_keys: number of keys.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        seed: seed of the choice.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch` or `auto`, see `full_attention`.

    Raises:
        UserError: a value out of range.
    """

    # Integers (num_keys,) below 2 ** 31, the choice for any length. The name is that of all that seeds draw:
    # evaluations replace it for each seed, and checkpoints may lack it.
    projection_matrix: torch.Tensor

    def __init__(
        self,
        num_keys: int,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(num_keys, softmax_temp, causal, attention_dropout, backend)
        self.register_buffer("projection_matrix", self._draw(seed))

    def _draw(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2**31, (self.num_keys,), generator=generator)

    @torch.no_grad()
    def redraw_projection(self, seed: int) -> None:
        """Choose the keys again.

        Args:
            seed: any integer.
        """
        self.projection_matrix.copy_(self._draw(seed))

    def _offset(self, size: torch.Tensor) -> torch.Tensor:
        return self.projection_matrix[: len(size)] % size


class QueryClusterAttention(AttentionModule):
    """Clustered attention: all queries of a cluster share the output of full attention for their mean.

    Vyas, Katharopoulos, Fleuret, "Fast Transformers with Clustered Attention", NeurIPS 2020, section 3.2. They
    cluster hashes of the queries by k-means, and this module the queries themselves. O(Q S + T Q) time for Q clusters.

    Args:
        num_query_landmarks: number of clusters Q.
        num_steps: iterations of k-means.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        attention_dropout: probability of dropping a weight of a cluster in training.
        backend: `naive`, `torch` or `auto`, see `full_attention`.

    `key_lengths` are the lengths of the queries as well, where there are as many queries as keys.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        num_query_landmarks: int,
        num_steps: int = 4,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        refuse_causal(self, causal)
        check_whole_number("num_query_landmarks", num_query_landmarks, 1)
        check_whole_number("num_steps", num_steps, 0)
        self.num_query_landmarks, self.num_steps = num_query_landmarks, num_steps

    def sizes(self) -> dict[str, int]:
        """The number of clusters."""
        return {"num_query_landmarks": self.num_query_landmarks}

    def memory_columns(self, num_keys: int) -> float:
        """A row for each cluster, which is as much as a column where there are as many queries as keys."""
        return self.num_query_landmarks

    def _clusters(
        self, query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean queries (B, H, Q, E), without padding, and the cluster (B, H, T) of each query."""
        lengths = query_lengths(query, key, key_lengths)
        labels = assign_query_clusters(query, self.num_query_landmarks, self.num_steps, lengths)
        counted = labels.masked_fill(~valid_points(query, lengths).expand(labels.shape), -1)
        with no_autocast(query):
            means = cluster_means(
                query.to(accumulation_dtype(query.dtype)), counted, at_most(self.num_query_landmarks, query.shape[2])
            )
        return means.to(query.dtype), labels

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        means, labels = self._clusters(query, key, options["key_lengths"])
        return _rows(full_attention(means, key, value, **options), labels)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        means, labels = self._clusters(query, key, options["key_lengths"])
        return _rows(naive_full_attention(means, key, value, **options)[1], labels)


def _rows(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rows (B, H, T, D) of x (B, H, Q, D) that the labels (B, H, T) choose."""
    return gather_rows(x.flatten(0, 1), labels.flatten(0, 1)).unflatten(0, labels.shape[:2])
