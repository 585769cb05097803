"""`LocalAttention` at its first address; it lives in `scatterbrain.attention.local`."""

from scatterbrain.attention.local import LocalAttention

__all__ = ["LocalAttention"]
