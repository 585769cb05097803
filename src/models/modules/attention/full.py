"""`FullAttention`, re-exported from `scatterbrain.attention.full`."""

from scatterbrain.attention.full import FullAttention

__all__ = ["FullAttention"]
