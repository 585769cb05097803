"""How close an attention comes to full attention on what a trained T2T-ViT really asks of it.

Queries, keys and values of both token stages, and of the blocks of the backbone, are taken from the network as it runs
with full attention, so that the error of each layer stands alone: stage 2 is not judged on what an approximation in
stage 1 has left of the image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import nn

from scatterbrain.attention import create_attention
from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.full import FullAttention
from scatterbrain.errors import UserError, did_you_mean
from scatterbrain.ops.common.dense import dense_logits
from scatterbrain.ops.common.inputs import accumulation_dtype, default_scale
from scatterbrain.ops.full import full_attention
from src.models.modules.tokens_to_token import TOKEN_DIM, stage_lengths
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViT, create_t2t_vit, stage_seed
from src.utils.checkpoint import load_checkpoint, read_checkpoint

LAYERS = ("stages", "backbone", "all")
# One of the one-hot values, see `StageInputs.with_identity_values`: a power of two, and nothing beside the values.
ONE_HOT = 2.0**-40


@dataclass(frozen=True)
class StageInputs:
    """What the attention of one layer works on: a token stage (one head) or a block of the backbone (several).

    Attributes:
        query: (B, T, H, E).
        key: (B, S, H, E).
        value: (B, S, H, D).
        scale: softmax scale of the layer.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float

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


def load_model(path: str | os.PathLike[str]) -> tuple[str, T2TViT]:
    """Build the T2T-ViT that a checkpoint is of, with full attention, and load the checkpoint.

    Args:
        path: any checkpoint that `read_checkpoint` reads.

    Returns:
        Name of the variant, and the model in evaluation mode.

    Raises:
        UserError: see `read_checkpoint`; no variant with swappable attention has the sizes of the checkpoint.
    """
    contents = read_checkpoint(path)
    names = [name for name in contents.variants if T2T_VIT_VARIANTS[name].tokens == "transformer"]
    if not names:
        raise UserError(
            f"{path} holds {contents.architecture}: no attention of its token stages can be swapped. Use a checkpoint "
            "of one of the t2t_vit_t_* variants."
        )
    model = create_t2t_vit(names[0], "full", image_size=contents.image_size, num_classes=contents.num_classes)
    load_checkpoint(model, path)
    return names[0], model.eval()


def capture_stage_inputs(model: T2TViT, images: torch.Tensor) -> tuple[StageInputs, StageInputs]:
    """Query, key and value of both token stages, as their attention modules receive them.

    Args:
        model: full attention in both token stages. Its hooks are as before when this returns or raises.
        images: (B, 3, image_size, image_size), normalised.

    Returns:
        Inputs of stage 1 and of stage 2, (B, N, 1, E) each.

    Raises:
        UserError: the token stages have another attention.
    """
    return capture_inputs(model, images, "stages")


@torch.no_grad()
def capture_inputs(model: T2TViT, images: torch.Tensor, layers: str = "all") -> tuple[StageInputs, ...]:
    """Query, key and value of the layers, in one run with full attention.

    Args:
        model: full attention in both token stages. Its hooks are as before when this returns or raises.
        images: (B, 3, image_size, image_size), normalised.
        layers: `stages`, `backbone` or `all`.

    Returns:
        Inputs in the order of the layers: of stages 1 and 2, (B, N, 1, E) each, and of every block of the backbone,
        (B, N / 16 + 1, H, E) each with the class token first.

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


def create_stage_attentions(
    name: str, model: T2TViT, memory_fraction: float = 1 / 32, seed: int = 0
) -> tuple[AttentionModule, AttentionModule]:
    """The attention modules that an evaluation of `model` with this attention and seed has in its token stages.

    Args:
        name: one of `ATTENTIONS`.
        model: with a swappable attention, which tells the sequence lengths, the softmax scales and the device.
        memory_fraction: see `create_attention`.
        seed: seed of the random features; each stage derives its own.

    Returns:
        Modules of stage 1 and of stage 2, in evaluation mode.

    Raises:
        UserError: unknown name or a fraction out of range.
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
        )
        .to(device)
        .eval()
        for stage, (own, length) in enumerate(zip(model.token_attentions, stage_lengths(model.image_size), strict=True))
    )


def create_block_attentions(
    name: str, model: T2TViT, memory_fraction: float = 1 / 32, seed: int = 0
) -> tuple[AttentionModule, ...]:
    """Attention modules for the blocks of the backbone, each for all of its heads.

    Args:
        name: one of `ATTENTIONS`.
        model: which tells the sequence length, class token included, the width of a head, and the device.
        memory_fraction: see `create_attention`.
        seed: seed of the random features; each block derives its own.

    Returns:
        One module for each block, in evaluation mode.

    Raises:
        UserError: unknown name, a fraction out of range, or an attention that cannot be had at this length.
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


@torch.no_grad()
def attention_weights(inputs: StageInputs, attention: nn.Module) -> torch.Tensor:
    """The matrix of weights (B, H, T, S) of an attention; its rows sum to 1."""
    inputs = inputs.with_identity_values()
    out = attention(inputs.query, inputs.key, inputs.value)[0]
    return out[..., -inputs.key.shape[1] :].transpose(1, 2) / ONE_HOT


@torch.no_grad()
def relative_errors(inputs: StageInputs, attentions: Sequence[nn.Module], *, of_weights: bool = False) -> torch.Tensor:
    """Relative Frobenius errors against full attention, `|| out - full ||_F / || full ||_F` over T, H and D.

    Args:
        inputs: of one layer.
        attentions: modules with the softmax scale of the layer.
        of_weights: compare the matrices of weights (T, S) in place of the outputs. Takes O(T S) memory.

    Returns:
        (attentions, B) float64, one for each attention and image.
    """
    full, tensors = _full_attention(inputs, of_weights)
    columns = full.shape[-1]
    return torch.stack([relative_error(attention(*tensors)[0][..., -columns:], full) for attention in attentions])


@torch.no_grad()
def bias_and_spread(inputs: StageInputs, draws: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors of the draws of one attention, and what of them is common to all draws and what is not.

    Args:
        inputs: of one layer.
        draws: at least two modules that differ in their seed.

    Returns:
        Relative errors (draws, B) as in `relative_errors`; bias (B,), the relative norm of the expected output less
        full attention, estimated without the part that a mean of so many draws still has from their spread (0 where
        that is larger); spread (B,), root of the expected squared norm about the expected output, relative as well.
        The expected squared error is the sum of their squares.
    """
    full, tensors = _full_attention(inputs, of_weights=False)
    errors, total, squares = [], 0.0, 0.0
    for attention in draws:
        out = attention(*tensors)[0]
        errors.append(relative_error(out, full))
        # about full attention, which is close: sums of squares of small numbers lose little
        difference = (out - full).double().flatten(1)
        total = total + difference
        squares = squares + difference.square().sum(1)
    mean = (total / len(draws)).square().sum(1)
    variance = (squares - len(draws) * mean) / (len(draws) - 1)
    norm = full.double().flatten(1).square().sum(1)
    bias = (mean - variance / len(draws)).clamp_min(0)
    return torch.stack(errors), (bias / norm).sqrt(), (variance / norm).sqrt()


def _full_attention(
    inputs: StageInputs, of_weights: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Output of full attention, or its weights times `ONE_HOT`, and the query, key and value that it is of."""
    if of_weights:
        inputs = inputs.with_identity_values()
    tensors = (inputs.query, inputs.key, inputs.value)
    dtype = accumulation_dtype(inputs.query.dtype)
    full = full_attention(*(x.to(dtype).transpose(1, 2) for x in tensors), scale=inputs.scale).transpose(1, 2)
    return full[..., -inputs.key.shape[1] :] if of_weights else full, tensors


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`|| result - reference || / || reference ||` of each entry of the first dimension, (B,) float64."""
    difference, reference = (result - reference).double().flatten(1), reference.double().flatten(1)
    return difference.norm(dim=1) / reference.norm(dim=1)


def effective_keys(weights: torch.Tensor) -> torch.Tensor:
    """Number of keys over which a query spreads its weight: exp(H), H the entropy of its weights in nats.

    Args:
        weights: (..., S), not negative, sums 1.

    Returns:
        (...) in [1, S]: 1 for a single key, S for equal weights.
    """
    return torch.special.entr(weights).sum(-1).exp()


@torch.no_grad()
def largest_logit(inputs: StageInputs) -> torch.Tensor:
    """Largest |s q.k| of each image, (B,) float64."""
    logits = dense_logits(inputs.query.transpose(1, 2), inputs.key.transpose(1, 2), inputs.scale)
    return logits.abs().amax((1, 2, 3))
