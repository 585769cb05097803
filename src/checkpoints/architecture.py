"""Sizes of a T2T-ViT from the shapes of its state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from src.models.modules.tokens_to_token import TOTAL_STRIDE
from src.models.t2t_vit import T2T_VIT_VARIANTS

# The tensors whose shapes determine the variant.
ARCHITECTURE_KEYS = (
    "cls_token",
    "pos_embed.pe",
    "patch_embed.project.weight",
    "blocks.0.mlp.fc1.weight",
    "head.weight",
)
POSITION_KEY = "pos_embed.pe"
TOKEN_STAGE_PREFIX = "patch_embed.attention1."


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network, inferred from its state dict; no shape depends on the number of heads.

    Attributes:
        tokens: kind of the token stages, `transformer` or `performer`.
        embed_dim: width of the backbone.
        depth: number of backbone blocks.
        mlp_dim: hidden width of the backbone's MLPs.
    """

    tokens: str
    embed_dim: int
    depth: int
    mlp_dim: int

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants of these sizes: none, one, or several that differ only in the number of heads."""
        return tuple(
            name
            for name, variant in T2T_VIT_VARIANTS.items()
            if self
            == Architecture(
                variant.tokens, variant.embed_dim, variant.depth, int(variant.embed_dim * variant.mlp_ratio)
            )
        )

    def __str__(self) -> str:
        return " or ".join(self.variants) or (
            f"a T2T-ViT with {self.tokens} tokens, embed_dim {self.embed_dim}, depth {self.depth} and MLP width "
            f"{self.mlp_dim} (none of the known variants)"
        )


def infer_architecture(state_dict: Mapping[str, torch.Tensor]) -> Architecture:
    """Sizes of the network that a state dict belongs to; it must hold `ARCHITECTURE_KEYS`."""
    # The highest index, not the number of blocks: a file without block 3 is incomplete, not shallower.
    blocks = (re.match(r"blocks\.(\d+)\.", key) for key in state_dict)
    return Architecture(
        tokens="performer" if TOKEN_STAGE_PREFIX + "w" in state_dict else "transformer",
        embed_dim=state_dict["cls_token"].shape[-1],
        depth=1 + max(int(match[1]) for match in blocks if match),
        mlp_dim=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
    )


def image_size_of(position_table: torch.Tensor) -> int:
    """Height and width in pixels of the images that a position table (1, 1 + N, dim) belongs to."""
    return TOTAL_STRIDE * math.isqrt(max(position_table.shape[1] - 1, 0))
