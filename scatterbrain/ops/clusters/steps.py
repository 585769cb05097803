"""What the implementations of k-means share."""

from __future__ import annotations

from scatterbrain.ops.common.numerics import is_exporting

# Lloyd's steps use the first of so many points: centroids are means of many, and half of them give as good ones.
STEP_EVERY = 2
# Centroids are found from the first of so many points where a cluster has enough of them on average: of a sequence
# without its padding, so that padding has no influence.
SAMPLE_EVERY = 4
KEYS_PER_CLUSTER, QUERIES_PER_CLUSTER = 16, 64
# Adaptive attention finds variances of logits from the first of each two keys of a long sequence, of each four or eight
# where so many of a cluster are left on average.
LONG_SEQUENCE, KEYS_PER_VARIANCE = 2048, 12


def sample_of(length: int, num_clusters: int, per_cluster: int | None) -> int:
    """1, or s where centroids are found from the first of each s points.

    Args:
        length: number of points.
        num_clusters: number of clusters M.
        per_cluster: points per cluster from which on centroids are found from a sample; None for never.
    """
    # an exported graph serves other lengths
    is_sampled = per_cluster is not None and not is_exporting() and length >= per_cluster * num_clusters
    return SAMPLE_EVERY if is_sampled else 1


def sample_of_variances(num_keys: int, num_clusters: int) -> int:
    """1, or s where a plan finds variances of logits from the first of each s keys."""
    if is_exporting() or num_keys < LONG_SEQUENCE:
        return 1
    left = num_keys // num_clusters // KEYS_PER_VARIANCE
    return 8 if left >= 8 else 4 if left >= 4 else 2


def step_sample(sample: int) -> int:
    """How many points Lloyd's steps take the first of, with centroids from the first of `sample`."""
    return max(sample, STEP_EVERY)
