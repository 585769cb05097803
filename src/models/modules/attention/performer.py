"""`PerformerAttention` at its first address; it lives in `scatterbrain.attention.performer`."""

from scatterbrain.attention.performer import PerformerAttention

__all__ = ["PerformerAttention"]
