"""Attention over a sparse support, alone or with a low-rank estimate outside it. See README.md."""

from scatterbrain.ops.sparse.naive import naive_support_attention
from scatterbrain.ops.sparse.supports import Round, Support
from scatterbrain.ops.sparse.tiled import support_attention

__all__ = ["Round", "Support", "naive_support_attention", "support_attention"]
