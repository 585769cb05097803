"""`scatterbrain_attention`, re-exported from `scatterbrain.ops.scatterbrain`."""

from scatterbrain.ops.scatterbrain import naive_scatterbrain_attention, scatterbrain_attention

__all__ = ["naive_scatterbrain_attention", "scatterbrain_attention"]
