"""`draw_projection`, re-exported from `scatterbrain.ops.common.projection`."""

from scatterbrain.ops.common.projection import draw_projection

__all__ = ["draw_projection"]
