"""Landmark attention, re-exported from `scatterbrain.ops.clusters`."""

from scatterbrain.ops.clusters import (
    assign_clusters,
    assign_key_clusters,
    assign_query_clusters,
    landmark_attention,
    log_landmark_features,
    naive_landmark_attention,
    naive_paired_landmark_attention,
    paired_landmark_attention,
)

__all__ = [
    "assign_clusters",
    "assign_key_clusters",
    "assign_query_clusters",
    "landmark_attention",
    "log_landmark_features",
    "naive_landmark_attention",
    "naive_paired_landmark_attention",
    "paired_landmark_attention",
]
