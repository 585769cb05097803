"""Adaptive attention: exact on a window and on key clusters chosen for each query cluster, landmarks elsewhere."""

from scatterbrain.ops.adaptive.attention import adaptive_attention
from scatterbrain.ops.adaptive.naive import exact_pairs, naive_adaptive_attention
from scatterbrain.ops.adaptive.plan import plan_adaptive_attention

__all__ = [
    "adaptive_attention",
    "exact_pairs",
    "naive_adaptive_attention",
    "plan_adaptive_attention",
]
