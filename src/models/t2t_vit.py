"""T2T-ViT (Yuan et al., "Tokens-to-Token ViT", ICCV 2021): one table of variants, one factory.

State dict keys are the published ones with two prefixes renamed, as in the Scatterbrain release:
`tokens_to_token.` is `patch_embed.` and `pos_embed` is `pos_embed.pe`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import nn

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError, did_you_mean
from src.models.modules.token_stage import TokenPerformer, TokenTransformer
from src.models.modules.tokens_to_token import (
    STAGE_DIMS,
    TOKEN_DIM,
    TOTAL_STRIDE,
    TokensToToken,
    stage_lengths,
)
from src.models.modules.transformer_block import Block


@dataclass(frozen=True)
class T2TViTVariant:
    """Sizes of one variant.

    Attributes:
        tokens: kind of the token stages, `transformer` (attention swappable) or `performer` (part of the model).
        embed_dim: width of the backbone.
        depth: number of backbone blocks.
        num_heads: number of heads of the backbone.
        mlp_ratio: hidden width of the backbone's MLPs over `embed_dim`.
    """

    tokens: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 3.0


T2T_VIT_VARIANTS: dict[str, T2TViTVariant] = {
    "t2t_vit_7": T2TViTVariant("performer", 256, 7, 4, mlp_ratio=2.0),
    "t2t_vit_10": T2TViTVariant("performer", 256, 10, 4, mlp_ratio=2.0),
    "t2t_vit_12": T2TViTVariant("performer", 256, 12, 4, mlp_ratio=2.0),
    "t2t_vit_14": T2TViTVariant("performer", 384, 14, 6),
    "t2t_vit_19": T2TViTVariant("performer", 448, 19, 7),
    "t2t_vit_24": T2TViTVariant("performer", 512, 24, 8),
    "t2t_vit_t_14": T2TViTVariant("transformer", 384, 14, 6),
    "t2t_vit_t_19": T2TViTVariant("transformer", 448, 19, 7),
    "t2t_vit_t_24": T2TViTVariant("transformer", 512, 24, 8),
    "t2t_vit_14_resnext": T2TViTVariant("performer", 384, 14, 32),
    "t2t_vit_14_wide": T2TViTVariant("performer", 768, 4, 12),
    # our own, not published: small enough to train in minutes and to include in the repository
    "t2t_vit_t_7": T2TViTVariant("transformer", 256, 7, 4, mlp_ratio=2.0),
}


def sinusoid_table(num_positions: int, dim: int) -> torch.Tensor:
    """Fixed position embedding of Vaswani et al. (2017), section 3.5.

    Returns:
        (1, num_positions, dim) float32, computed in float64 and rounded once, as published.
    """
    positions = np.arange(num_positions)[:, None]
    angles = positions / np.power(10000, 2 * (np.arange(dim) // 2) / dim)
    angles[:, 0::2] = np.sin(angles[:, 0::2])
    angles[:, 1::2] = np.cos(angles[:, 1::2])
    return torch.from_numpy(angles).float().unsqueeze(0)


def resize_position_table(table: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Resize a position table to another number of patches, bicubic on the grid, as in the published code.

    Args:
        table: (1, 1 + old patches, dim), the class token first.
        num_patches: new number of patches, a square.

    Returns:
        (1, 1 + num_patches, dim); the class token's row is kept.

    Raises:
        UserError: the table does not hold one row for the class token and a square grid.
    """
    old_side, new_side = math.isqrt(max(table.shape[1] - 1, 0)), math.isqrt(num_patches)
    if table.dim() != 3 or old_side < 1 or old_side**2 + 1 != table.shape[1]:
        raise UserError(
            f"A position table of shape {tuple(table.shape)} is not one class token and a square grid; "
            "the checkpoint is not a T2T-ViT checkpoint."
        )
    if old_side == new_side:
        return table
    grid = rearrange(table[:, 1:], "1 (h w) c -> 1 c h w", h=old_side)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic")
    return torch.cat([table[:, :1], rearrange(grid, "1 c h w -> 1 (h w) c")], dim=1)


class PositionEmbedding(nn.Module):
    """Adds a fixed sinusoidal embedding to the tokens; `pe` is stored in checkpoints but not trained.

    Args:
        num_positions: number of tokens, class token included.
        dim: width of the tokens.
    """

    def __init__(self, num_positions: int, dim: int) -> None:
        super().__init__()
        self.pe = nn.Parameter(sinusoid_table(num_positions, dim), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, num_positions, dim) to tokens of the same shape."""
        return x + self.pe


class T2TViT(nn.Module):
    """Tokens-to-token module, class token, transformer backbone, linear classifier.

    Args:
        variant: sizes.
        token_stages: the two token stages, (B, N, 147 | 576) -> (B, N, 64).
        image_size: height and width of the images in pixels; a multiple of 16.
        num_classes: number of classes.
        drop_rate: dropout of embeddings, projections and MLPs of the backbone.
        attention_drop_rate: dropout of the backbone's attention weights.
        drop_path_rate: stochastic depth rate of the last block, increasing linearly from 0 over the depth.
    """

    def __init__(
        self,
        variant: T2TViTVariant,
        token_stages: tuple[nn.Module, nn.Module],
        image_size: int = 224,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        attention_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.num_classes = num_classes
        dim = variant.embed_dim
        self.patch_embed = TokensToToken(*token_stages, embed_dim=dim, image_size=image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = PositionEmbedding(self.patch_embed.num_patches + 1, dim)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(dim, variant.num_heads, variant.mlp_ratio, drop_rate, attention_drop_rate, drop_path)
            for drop_path in torch.linspace(0, drop_path_rate, variant.depth, device="cpu").tolist()
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

        trunc_normal_(self.cls_token, std=0.02)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """Truncated normal of standard deviation 0.02 for linear layers, as published."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beside biases and norms; called by timm's optimizers."""
        return {"cls_token"}

    @property
    def token_attentions(self) -> tuple[nn.Module, nn.Module] | None:
        """The attention modules of the two token stages; None if they cannot be swapped."""
        stages = (self.patch_embed.attention1, self.patch_embed.attention2)
        if not all(isinstance(stage, TokenTransformer) for stage in stages):
            return None
        return tuple(stage.attn.attention for stage in stages)

    @property
    def has_random_features(self) -> bool:
        """Whether the token attentions hold random projections, which `redraw_projections` replaces."""
        names = (name for module in self.token_attentions or () for name, _ in module.named_buffers())
        return any(name.endswith("projection_matrix") for name in names)

    def redraw_projections(self, seed: int) -> None:
        """Redraw the random projections of both token stages in place, from `seed`."""
        for stage, attention in enumerate(self.token_attentions or ()):
            if hasattr(attention, "redraw_projection"):
                attention.redraw_projection(stage_seed(seed, stage))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, image_size, image_size) to the class token's features (B, embed_dim)."""
        expected = (3, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise UserError(
                f"The model takes images of shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}. "
                "Build it with image_size=... for another size."
            )
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(self.pos_embed(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, image_size, image_size) to logits (B, num_classes)."""
        return self.head(self.forward_features(x))


def stage_seed(seed: int, stage: int) -> int:
    """Seed of the random features of a token stage, unique for each pair (seed, stage)."""
    return 2 * seed + stage


def get_variant(name: str) -> T2TViTVariant:
    """Sizes of the variant `name`.

    Raises:
        UserError: unknown name; similar names are suggested.
    """
    if name not in T2T_VIT_VARIANTS:
        raise UserError(f"Unknown T2T-ViT variant '{name}'. {did_you_mean(name, T2T_VIT_VARIANTS)}")
    return T2T_VIT_VARIANTS[name]


def create_t2t_vit(
    name: str,
    attention: str | Sequence[Mapping[str, Any] | str] | None = None,
    image_size: int = 224,
    num_classes: int = 1000,
    *,
    drop_rate: float = 0.0,
    attention_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    seed: int = 0,
) -> T2TViT:
    """Build a T2T-ViT with random weights; nothing is read or downloaded.

    Args:
        name: one of `T2T_VIT_VARIANTS`.
        attention: attention of the two token stages (transformer-token variants only): the name of an attention,
            or a pair, one for each stage, of names or of mappings `{"name": ..., option: value, ...}` with the
            options of `create_attention`. None is full attention.
        image_size: height and width of the images in pixels; a multiple of 16.
        num_classes: number of classes.
        drop_rate: dropout of embeddings, projections and MLPs of the backbone.
        attention_drop_rate: dropout of the backbone's attention weights.
        drop_path_rate: stochastic depth rate of the last block.
        seed: seed of the random features, from which each stage derives its own.

    Returns:
        Module (B, 3, image_size, image_size) -> (B, num_classes).

    Raises:
        UserError: unknown variant or attention, an attention for a `performer` variant, or sizes out of range.
    """
    variant = get_variant(name)
    if not isinstance(image_size, int) or image_size < TOTAL_STRIDE or image_size % TOTAL_STRIDE:
        raise UserError(f"image_size={image_size} is not a positive multiple of {TOTAL_STRIDE}; 224 is usual.")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes={num_classes} is not a positive number of classes.")

    stages: tuple[nn.Module, nn.Module]
    if variant.tokens == "performer":
        if attention is not None:
            raise UserError(
                f"{name} takes no attention: the Performer in its token stages is part of the trained model. Choose "
                "one of the t2t_vit_t_* variants (model/t2tmodel=t2t_vit_t_14), or leave the attention out."
            )
        stages = tuple(TokenPerformer(dim, TOKEN_DIM) for dim in STAGE_DIMS)
    else:
        stages = tuple(
            TokenTransformer(
                dim,
                TOKEN_DIM,
                create_attention(
                    sequence_length=length,
                    dim_heads=TOKEN_DIM,
                    softmax_temp=dim**-0.5,
                    **{"seed": stage_seed(seed, stage), **config},
                ),
            )
            for stage, (dim, length, config) in enumerate(
                zip(STAGE_DIMS, stage_lengths(image_size), _stage_configs(attention), strict=True)
            )
        )
    return T2TViT(
        variant,
        stages,
        image_size=image_size,
        num_classes=num_classes,
        drop_rate=drop_rate,
        attention_drop_rate=attention_drop_rate,
        drop_path_rate=drop_path_rate,
    )


def _stage_configs(attention: str | Sequence[Mapping[str, Any] | str] | None) -> list[dict[str, Any]]:
    """Arguments of `create_attention` for both stages, from the argument `attention` of `create_t2t_vit`."""
    if attention is None:
        attention = "full"
    pair = [attention, attention] if isinstance(attention, str) else list(attention)
    if isinstance(attention, Mapping) or len(pair) != 2:
        raise UserError(
            f"attention={attention!r} is neither a name nor a pair of stage configs; give both stages, such as "
            '[{"name": "sblocal"}, {"name": "local"}].'
        )
    configs = []
    for stage, config in enumerate(pair, start=1):
        config = {"name": config} if isinstance(config, str) else dict(config)
        if "name" not in config:
            raise UserError(f"The attention config of stage {stage} has no name: {config}. Add name=... to it.")
        for fixed in ("sequence_length", "dim_heads", "softmax_temp"):
            if fixed in config:
                raise UserError(f"{fixed} of a token stage follows from the model; take it out of the stage's config.")
        configs.append({"config_name": config.pop("name"), **config})
    return configs
