"""Causal landmark attention: exact near, landmarks of earlier chunks in levels far away. See README.md."""

from scatterbrain.ops.clusters.causal.attention import causal_landmark_attention
from scatterbrain.ops.clusters.causal.cache import LandmarkCache
from scatterbrain.ops.clusters.causal.levels import causal_clusters
from scatterbrain.ops.clusters.causal.naive import naive_causal_landmark_attention

__all__ = ["LandmarkCache", "causal_clusters", "causal_landmark_attention", "naive_causal_landmark_attention"]
