"""`draw_projection` at its first address; it lives in `scatterbrain.ops.common.projection`."""

from scatterbrain.ops.common.projection import draw_projection

__all__ = ["draw_projection"]
