"""The attention of a model's token stages, as results describe it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scatterbrain.attention import attention_memory
from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.full import FullAttention
from src.models.modules.tokens_to_token import TOKEN_DIM, stage_lengths
from src.models.t2t_vit import T2TViT
from src.utils.peak_memory import peak_bytes


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
    """Columns of the attention matrix that both token stages' attention takes, over those of full attention."""
    if model.token_attentions is None:
        return None
    lengths = stage_lengths(model.image_size)
    entries = [length**2 for length in lengths]
    fractions = [attention_memory(module, n) for module, n in zip(model.token_attentions, lengths, strict=True)]
    return sum(f * n for f, n in zip(fractions, entries, strict=True)) / sum(entries)


@torch.no_grad()
def attention_cost(model: T2TViT, device: torch.device) -> dict[str, float | None]:
    """Measured cost of the token stages' attention for one image, by its names in the results.

    Args:
        model: in evaluation mode.
        device: whose memory is measured, with tensors of the model's dtype.

    Returns:
        `attention_operations`, matrix-product operations of both stages, those of clusters and hashes included, over
        those of full attention; `attention_peak_mib`, peak of the memory that a call allocates, its output included,
        in the stage where it is larger. None for a variant whose token stages are part of the model.
    """
    if model.token_attentions is None:
        return {"attention_operations": None, "attention_peak_mib": None}
    lengths, dtype = stage_lengths(model.image_size), next(model.parameters()).dtype
    stages = [
        (copy.deepcopy(attention).eval(), torch.randn(3, 1, length, 1, TOKEN_DIM))
        for attention, length in zip(model.token_attentions, lengths, strict=True)
    ]
    operations = sum(_operations(attention, tensors) for attention, tensors in stages)
    peaks = []
    for attention, tensors in stages:
        attention, tensors = attention.to(device, dtype), tensors.to(device, dtype)
        attention(*tensors)  # compiles kernels, and fills caches
        peaks.append(peak_bytes(lambda call=attention, tensors=tensors: call(*tensors), device) / 2**20)
    return {
        "attention_operations": operations / sum(_full_operations(length) for length in lengths),
        "attention_peak_mib": max(peaks),
    }


def _operations(attention: AttentionModule, tensors: torch.Tensor) -> int:
    """Multiplications and additions of the matrix products of a call, in plain PyTorch on the CPU."""
    if isinstance(attention, FullAttention):
        return _full_operations(tensors.shape[2])  # without the matrix
    # the counter knows no fused attention of the CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        attention.to("cpu", torch.float32)(*tensors)
    return counter.get_total_flops()


def _full_operations(length: int) -> int:
    return 2 * 2 * length**2 * TOKEN_DIM
