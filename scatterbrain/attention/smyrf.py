"""SMYRF attention, alone and with random features: exact between queries and keys of one hash cluster.

Daras et al., "SMYRF: Efficient Attention using Asymmetric Clustering", NeurIPS 2020; its combination with random
features is the paper's Scatterbrain with a data-dependent support. O(T C n) time for n hashes and clusters of C keys,
and a sort for each hash. Clusters are of equal size; there are as many clusters of queries as of keys.
"""

from __future__ import annotations

import torch

from scatterbrain.attention.sparse import SparseAttention, SparseLowRankAttention, SupportSource
from scatterbrain.errors import check_whole_number
from scatterbrain.ops.common.inputs import query_lengths
from scatterbrain.ops.sparse.lsh import draw_smyrf_projection, smyrf_support
from scatterbrain.ops.sparse.supports import Support

# One seed draws both hashes and features; the offset makes them independent.
HASH_SEED_OFFSET = 1_000_003


class SmyrfClusters(SupportSource):
    """Support of the pairs of a query and a key that share a cluster in at least one hash.

    Args:
        cluster_size: number of keys C of a cluster.
        dim_heads: width E of queries and keys.
        num_hashes: number of hashes n.
        seed: seed of the hashes, whose random projections are the buffer `projection_matrix` (n, E + 2).
    """

    projection_matrix: torch.Tensor

    def __init__(self, cluster_size: int, dim_heads: int, num_hashes: int = 2, seed: int = 0) -> None:
        super().__init__()
        check_whole_number("cluster_size", cluster_size, 1)
        self.cluster_size, self.num_hashes, self.dim_heads = cluster_size, num_hashes, dim_heads
        projection = draw_smyrf_projection(num_hashes, dim_heads, seed + HASH_SEED_OFFSET)
        self.register_buffer("projection_matrix", projection)

    def forward(self, query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None) -> Support:
        """The clusters of these queries and keys."""
        lengths = key_lengths, query_lengths(query, key, key_lengths)
        return smyrf_support(query, key, self.projection_matrix, self.cluster_size, *lengths)

    def sizes(self) -> dict[str, int]:
        """Cluster size and number of hashes."""
        return {"cluster_size": self.cluster_size, "num_hashes": self.num_hashes}

    def columns(self, num_keys: int) -> float:
        """One cluster for each hash."""
        return self.cluster_size * self.num_hashes

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Draw the hashes again, in place.

        Args:
            seed: any integer.
        """
        self.projection_matrix.copy_(draw_smyrf_projection(self.num_hashes, self.dim_heads, seed + HASH_SEED_OFFSET))


class SmyrfAttention(SparseAttention):
    """Softmax attention within the clusters of asymmetric hashes.

    Args:
        cluster_size: number of keys of a cluster.
        dim_heads: width E of queries and keys.
        num_hashes: number of hashes; a pair that shares a cluster in several counts once.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        seed: seed of the hashes.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch` or `auto`, see the operator.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        cluster_size: int,
        dim_heads: int,
        num_hashes: int = 2,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        source = SmyrfClusters(cluster_size, dim_heads, num_hashes, seed)
        super().__init__(source, softmax_temp, causal, attention_dropout, backend)

    def redraw_projection(self, seed: int) -> None:
        """Draw the hashes again, in place.

        Args:
            seed: any integer.
        """
        self.source.redraw(seed)


class SBSmyrfAttention(SparseLowRankAttention):
    """Scatterbrain with the clusters of asymmetric hashes as its sparse support.

    Args:
        cluster_size: number of keys of a cluster.
        dim_heads: width E of queries and keys.
        nb_features: number of features M, even; None is E log E.
        num_hashes: number of hashes.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        seed: seed of the random projections and of the hashes.
        backend: `naive`, `torch` or `auto`, see the operator.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        cluster_size: int,
        dim_heads: int,
        nb_features: int | None = None,
        num_hashes: int = 2,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        backend: str = "auto",
        **features: str | bool,
    ) -> None:
        source = SmyrfClusters(cluster_size, dim_heads, num_hashes, seed)
        super().__init__(source, dim_heads, nb_features, softmax_temp, causal, seed, backend, **features)
