"""Queries, keys and values of the attentions of a T2T-ViT, and attentions that fit in their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import nn

from scatterbrain.attention import create_attention
from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.full import FullAttention
from scatterbrain.errors import UserError, did_you_mean
from scatterbrain.ops.common.inputs import default_scale
from src.models.modules.tokens_to_token import TOKEN_DIM, stage_lengths
from src.models.t2t_vit import T2TViT, stage_seed

LAYERS = ("stages", "backbone", "all")
# One of the one-hot values, see `StageInputs.with_identity_values`: a power of two, and nothing beside the values.
ONE_HOT = 2.0**-40


@dataclass(frozen=True)
class StageInputs:
    """Inputs of the attention of one layer: a token stage (one head) or a block of the backbone (several)."""

    query: torch.Tensor  # (B, T, H, E)
    key: torch.Tensor  # (B, S, H, E)
    value: torch.Tensor  # (B, S, H, D)
    scale: float  # softmax scale of the layer

    def image(self, index: int) -> StageInputs:
        """Those of one image, as a batch of one."""
        tensors = {name: getattr(self, name)[index : index + 1] for name in ("query", "key", "value")}
        return replace(self, **tensors)

    def with_identity_values(self) -> StageInputs:
        """The same with one-hot values behind the values (D + S), whose averages are the matrix of weights.

        So the weights are those of the fast operator, which has them in a small part of the time that the dense
        specification (`need_weights=True`) takes. The values stay, and the one-hot ones are `ONE_HOT` in place of 1:
        an attention that clusters by values makes the clusters that it makes without them. Float32 or float64.
        """
        batch, num_keys, heads, _ = self.value.shape
        identity = torch.eye(num_keys, dtype=self.value.dtype, device=self.value.device)
        identity = ONE_HOT * identity[None, :, None].expand(batch, -1, heads, -1)
        return replace(self, value=torch.cat([self.value, identity], dim=-1))


def capture_stage_inputs(model: T2TViT, images: torch.Tensor) -> tuple[StageInputs, StageInputs]:
    """Inputs of stage 1 and of stage 2, (B, N, 1, E) each, see `capture_inputs`."""
    return capture_inputs(model, images, "stages")


@torch.no_grad()
def capture_inputs(model: T2TViT, images: torch.Tensor, layers: str = "all") -> tuple[StageInputs, ...]:
    """Query, key and value of the layers, from one run with full attention.

    Args:
        model: full attention in both token stages. Its hooks are as before when this returns or raises.
        images: (B, 3, image_size, image_size), normalised.
        layers: `stages`: 1 and 2, (B, N, 1, E) each; `backbone`: every block, (B, N / 16 + 1, H, E) each with the class
            token first; or `all` of them, in this order.

    Raises:
        UserError: the token stages have another attention, or `layers` is unknown.
    """
    if layers not in LAYERS:
        raise UserError(f"layers={layers!r} is unknown. {did_you_mean(layers, LAYERS)}")
    attentions = model.token_attentions
    if attentions is None or not all(isinstance(attention, FullAttention) for attention in attentions):
        raise UserError("Inputs are captured with full attention in both token stages. Build such a model.")
    captured: list[StageInputs] = []

    def capture(attention: AttentionModule, tensors: tuple[torch.Tensor, ...]) -> None:
        captured.append(StageInputs(*tensors, scale=attention.softmax_temp))

    with ExitStack() as hooks:
        if layers != "backbone":
            for attention in attentions:
                hooks.enter_context(attention.register_forward_pre_hook(capture))
        if layers == "stages":
            model.patch_embed(images)  # the backbone comes behind both stages and is not needed
            return tuple(captured)
        for block in model.blocks:
            num_heads = block.attn.num_heads

            def split(_: nn.Module, __: object, out: torch.Tensor, num_heads: int = num_heads) -> None:
                tensors = rearrange(out, "b n (three h e) -> three b n h e", three=3, h=num_heads)
                captured.append(StageInputs(*tensors, scale=default_scale(tensors[0], None)))

            # its attention is a function, which has no hook; what it works on is this map's output
            hooks.enter_context(block.attn.qkv.register_forward_hook(split))
        model.forward_features(images)
    return tuple(captured)


@torch.no_grad()
def capture_calls(attentions: Sequence[AttentionModule], run: Callable[[], Any]) -> tuple[StageInputs, ...]:
    """Inputs of attention modules (B, N, H, E), one for each, of their last call while a network runs.

    Args:
        attentions: modules of any network, such as those of the blocks of `Network`.
        run: calls the network on a batch.
    """
    captured: dict[AttentionModule, StageInputs] = {}

    def capture(attention: AttentionModule, tensors: tuple[torch.Tensor, ...]) -> None:
        # a part of a fused qkv would hold the memory of all of it
        inputs = (x.contiguous() for x in tensors[:3])
        captured[attention] = StageInputs(*inputs, scale=default_scale(tensors[0], attention.softmax_temp))

    with ExitStack() as hooks:
        for attention in attentions:
            hooks.enter_context(attention.register_forward_pre_hook(capture))
        run()
    return tuple(captured[attention] for attention in attentions)


def create_stage_attentions(
    name: str, model: T2TViT, memory_fraction: float = 1 / 32, seed: int = 0, **options: Any
) -> tuple[AttentionModule, AttentionModule]:
    """Modules of stage 1 and 2, in evaluation mode, as an evaluation of `model` with this attention and seed has them.

    Args:
        name: one of `ATTENTIONS`.
        model: with a swappable attention; sequence lengths, softmax scales and device are its own.
        memory_fraction: see `create_attention`.
        seed: of what is random; each stage derives its own.
        **options: of both modules.

    Raises:
        UserError: unknown name or option, or a fraction out of range.
    """
    device = model.cls_token.device
    return tuple(
        create_attention(
            name,
            length,
            TOKEN_DIM,
            softmax_temp=own.softmax_temp,
            memory_fraction=memory_fraction,
            seed=stage_seed(seed, stage),
            **options,
        )
        .to(device)
        .eval()
        for stage, (own, length) in enumerate(zip(model.token_attentions, stage_lengths(model.image_size), strict=True))
    )


def create_block_attentions(
    name: str, model: T2TViT, memory_fraction: float = 1 / 32, seed: int = 0
) -> tuple[AttentionModule, ...]:
    """One module for each block of the backbone and all of its heads, in evaluation mode; each derives its own seed.

    Raises:
        UserError: unknown name, a fraction out of range, or an attention that is not defined at this length.
    """
    device, length = model.cls_token.device, model.patch_embed.num_patches + 1
    modules = []
    for number, block in enumerate(model.blocks):
        dim_heads = block.attn.qkv.in_features // block.attn.num_heads
        module = create_attention(
            name,
            length,
            dim_heads,
            softmax_temp=dim_heads**-0.5,
            memory_fraction=memory_fraction,
            seed=len(model.blocks) * seed + number,  # no two pairs (seed, block) share one
        )
        modules.append(module.to(device).eval())
    # some attentions refuse a length on their first call only; all blocks are alike
    query, key, value = torch.zeros(3, 1, length, 1, dim_heads, dtype=model.cls_token.dtype, device=device)
    with torch.no_grad():
        modules[0](query, key, value)
    return tuple(modules)
