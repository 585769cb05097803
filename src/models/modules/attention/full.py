"""`FullAttention` at its first address; it lives in `scatterbrain.attention.full`."""

from scatterbrain.attention.full import FullAttention

__all__ = ["FullAttention"]
