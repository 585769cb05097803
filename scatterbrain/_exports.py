"""The public names of `scatterbrain`, which `__init__.py` re-exports; importing them imports torch."""

from scatterbrain.attention import ATTENTIONS, attention_memory, create_attention
from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.baselines import (
    QueryClusterAttention,
    RandomKeysAttention,
    StridedAttention,
    UniformAttention,
    ZeroAttention,
)
from scatterbrain.attention.block_sparse import BlockSparseAttention, SBBlockSparseAttention
from scatterbrain.attention.cluster import (
    ClusterAttention,
    PairedClusterAttention,
    SBAdaptiveAttention,
    SBClusterAttention,
)
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
from scatterbrain.integrations.sdpa import replace_sdpa
from scatterbrain.ops.adaptive import adaptive_attention, plan_adaptive_attention
from scatterbrain.ops.clusters import LandmarkCache, landmark_attention, paired_landmark_attention
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.full import full_attention
from scatterbrain.ops.local import local_attention
from scatterbrain.ops.packed import packed_attention
from scatterbrain.ops.performer import performer_attention
from scatterbrain.ops.scatterbrain import scatterbrain_attention
from scatterbrain.tuning.choosing import tune
from scatterbrain.tuning.forwards import restore
from scatterbrain.tuning.plan import Plan, apply
from scatterbrain.tuning.profiling import profile
from scatterbrain.tuning.report import ProfileReport

__all__ = [
    "ATTENTIONS",
    "AttentionModule",
    "BlockSparseAttention",
    "ClusterAttention",
    "CombinationLocalPerformerAttention",
    "CombinationSmyrfPerformerAttention",
    "FullAttention",
    "LandmarkCache",
    "Local2dAttention",
    "LocalAttention",
    "PairedClusterAttention",
    "PerformerAttention",
    "Plan",
    "ProfileReport",
    "QueryClusterAttention",
    "RandomFeatureOptions",
    "RandomKeysAttention",
    "ReformerAttention",
    "SBAdaptiveAttention",
    "SBBlockSparseAttention",
    "SBClusterAttention",
    "SBLocal2dAttention",
    "SBLocalAttention",
    "SBSmyrfAttention",
    "SmyrfAttention",
    "StridedAttention",
    "UniformAttention",
    "UserError",
    "ZeroAttention",
    "adaptive_attention",
    "apply",
    "attention_memory",
    "create_attention",
    "draw_projection",
    "full_attention",
    "landmark_attention",
    "local_attention",
    "packed_attention",
    "paired_landmark_attention",
    "performer_attention",
    "plan_adaptive_attention",
    "profile",
    "replace_sdpa",
    "restore",
    "scatterbrain_attention",
    "tune",
]
