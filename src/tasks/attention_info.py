"""The attention of a model's token stages, as results describe it."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from scatterbrain.attention import attention_memory
from src.models.modules.tokens_to_token import stage_lengths
from src.models.t2t_vit import T2TViT


def attention_name(config: DictConfig, model: T2TViT) -> str | None:
    """Name of the token stages' attention: `sblocal`, or `sblocal+local` where they differ.

    None for a variant whose token stages are part of the model.
    """
    if model.token_attentions is None:
        return None
    stages = (config.t2tattn1_cfg, config.t2tattn2_cfg)
    first, second = ("full" if stage is None else stage["name"] for stage in stages)
    return first if first == second else f"{first}+{second}"


def attention_options(model: T2TViT) -> list[dict[str, Any]] | None:
    """Options of the attention of both token stages, after budget and overrides."""
    if model.token_attentions is None:
        return None
    return [{**attention.sizes(), "scale": attention.softmax_temp} for attention in model.token_attentions]


def attention_memory_fraction(model: T2TViT) -> float | None:
    """Memory of both token stages' attention over that of full attention."""
    if model.token_attentions is None:
        return None
    lengths = stage_lengths(model.image_size)
    entries = [length**2 for length in lengths]
    fractions = [attention_memory(module, n) for module, n in zip(model.token_attentions, lengths, strict=True)]
    return sum(f * n for f, n in zip(fractions, entries, strict=True)) / sum(entries)
