"""Landmark attention: a low-rank part computed from the data, by clusters of keys and of queries. See README.md."""

from scatterbrain.ops.clusters.causal import (
    LandmarkCache,
    causal_clusters,
    causal_landmark_attention,
    naive_causal_landmark_attention,
)
from scatterbrain.ops.clusters.kmeans import assign_clusters, assign_key_clusters, assign_query_clusters
from scatterbrain.ops.clusters.landmark import landmark_attention, log_landmark_features
from scatterbrain.ops.clusters.naive import (
    naive_landmark_attention,
    naive_landmark_lse,
    naive_paired_landmark_attention,
)
from scatterbrain.ops.clusters.paired import paired_landmark_attention

__all__ = [
    "LandmarkCache",
    "assign_clusters",
    "assign_key_clusters",
    "assign_query_clusters",
    "causal_clusters",
    "causal_landmark_attention",
    "landmark_attention",
    "log_landmark_features",
    "naive_causal_landmark_attention",
    "naive_landmark_attention",
    "naive_landmark_lse",
    "naive_paired_landmark_attention",
    "paired_landmark_attention",
]
