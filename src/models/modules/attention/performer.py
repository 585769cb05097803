"""`PerformerAttention`, re-exported from `scatterbrain.attention.performer`."""

from scatterbrain.attention.performer import PerformerAttention

__all__ = ["PerformerAttention"]
