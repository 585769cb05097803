"""`LocalAttention`, re-exported from `scatterbrain.attention.local`."""

from scatterbrain.attention.local import LocalAttention

__all__ = ["LocalAttention"]
