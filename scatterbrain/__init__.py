"""Approximate attention for pre-trained transformers: Scatterbrain and its family, drop-in and without training."""

from scatterbrain.attention import ATTENTIONS, create_attention
from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import landmark_attention, paired_landmark_attention
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.full import full_attention
from scatterbrain.ops.local import local_attention
from scatterbrain.ops.performer import performer_attention
from scatterbrain.ops.scatterbrain import scatterbrain_attention

__version__ = "0.2.0"

__all__ = [
    "ATTENTIONS",
    "AttentionModule",
    "UserError",
    "__version__",
    "create_attention",
    "draw_projection",
    "full_attention",
    "landmark_attention",
    "local_attention",
    "paired_landmark_attention",
    "performer_attention",
    "scatterbrain_attention",
]
