"""What a plan of adaptive attention is, and the constants of the rule that makes one."""

from __future__ import annotations

from typing import NamedTuple

import torch

# How many times the clusters that still fit are taken in order. The second and third time take clusters behind one that
# was too large; further ones add almost nothing.
ROUNDS = 3
# Variances of logits below this are rounding of equal keys.
LEAST_VARIANCE = 1e-8


class AdaptivePlan(NamedTuple):
    """Clusters and supports of a call, constants for autograd.

    Attributes:
        key_assignment: cluster of each key (B, H, S) int64 in [0, M), -1 for hidden keys.
        query_assignment: cluster of each query (B, H, T) int64 in [0, Q).
        taken: boolean (B, H, Q, M), the key clusters that a query cluster weights exactly.
        num_exact: upper bound of the number of keys in the clusters that one query cluster takes.
    """

    key_assignment: torch.Tensor
    query_assignment: torch.Tensor
    taken: torch.Tensor
    num_exact: int

    def density(self) -> torch.Tensor:
        """Share (B, H) of the pairs of query and visible key that are exact because of their clusters, float32.

        The window adds to it; `exact_pairs` has both, dense.
        """
        sizes = cluster_sizes(self.key_assignment.flatten(0, 1), self.taken.shape[3])  # [G, M]
        exact = (self.taken.flatten(0, 1) * sizes.unsqueeze(1)).sum(2)  # [G, Q]
        seen = exact.gather(1, self.query_assignment.flatten(0, 1)).float().mean(1)
        return (seen / sizes.sum(1).clamp_min(1)).view(self.taken.shape[:2])


def exact_keys(density: float, num_keys: int) -> int:
    """Largest number of keys that a query cluster takes of `num_keys`."""
    return int(density * num_keys + 1e-6)


def cluster_sizes(labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Numbers of keys (G, M) int64 of clusters (G, S), -1 for none."""
    sizes = torch.zeros(labels.shape[0], num_clusters + 1, dtype=torch.int64, device=labels.device)
    return sizes.scatter_add(1, labels.where(labels >= 0, num_clusters), torch.ones_like(labels))[:, :num_clusters]
