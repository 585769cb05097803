"""Approximate attention for pre-trained transformers: Scatterbrain and its family, drop-in and without training.

>>> import torch, scatterbrain
>>> query = key = value = torch.randn(1, 8, 3136, 64)               # (B, H, T, E)
>>> projection = scatterbrain.draw_projection(12, 64, seed=0)       # 12 random projections, 24 features
>>> scatterbrain.scatterbrain_attention(query, key, value, projection, window=49).shape
torch.Size([1, 8, 3136, 64])

Functions take (B, H, length, width) as `torch.nn.functional.scaled_dot_product_attention` does; modules, which
`create_attention` sizes to a memory budget, take (B, length, H, width). Needs torch alone.
"""

from scatterbrain.attention import ATTENTIONS, attention_memory, create_attention
from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.block_sparse import BlockSparseAttention, SBBlockSparseAttention
from scatterbrain.attention.cluster import ClusterAttention, PairedClusterAttention, SBClusterAttention
from scatterbrain.attention.combination import (
    CombinationLocalPerformerAttention,
    CombinationSmyrfPerformerAttention,
)
from scatterbrain.attention.full import FullAttention
from scatterbrain.attention.local import LocalAttention
from scatterbrain.attention.local2d import Local2dAttention, SBLocal2dAttention
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.random_features import RandomFeatureOptions
from scatterbrain.attention.reformer import ReformerAttention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.attention.smyrf import SBSmyrfAttention, SmyrfAttention
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
    "BlockSparseAttention",
    "ClusterAttention",
    "CombinationLocalPerformerAttention",
    "CombinationSmyrfPerformerAttention",
    "FullAttention",
    "Local2dAttention",
    "LocalAttention",
    "PairedClusterAttention",
    "PerformerAttention",
    "RandomFeatureOptions",
    "ReformerAttention",
    "SBBlockSparseAttention",
    "SBClusterAttention",
    "SBLocal2dAttention",
    "SBLocalAttention",
    "SBSmyrfAttention",
    "SmyrfAttention",
    "UserError",
    "__version__",
    "attention_memory",
    "create_attention",
    "draw_projection",
    "full_attention",
    "landmark_attention",
    "local_attention",
    "paired_landmark_attention",
    "performer_attention",
    "scatterbrain_attention",
]
