"""Errors of the attentions against full attention, on the queries, keys and values of a trained T2T-ViT.

They are those of the network with full attention, in both token stages and in the blocks of the backbone, so that the
error of each layer stands alone: stage 2 does not suffer from an approximation in stage 1.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from scatterbrain.attention import create_attention
from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.full import FullAttention
from scatterbrain.errors import UserError, did_you_mean
from scatterbrain.ops.common.dense import dense_logits
from scatterbrain.ops.common.inputs import default_scale
from scatterbrain.ops.common.numerics import accumulation_dtype
from scatterbrain.ops.full import full_attention
from src.checkpoints import load_checkpoint, read_checkpoint
from src.datamodules.dataset import ImageFolderDataset
from src.datamodules.image_folder import ImageFolderDataModule
from src.models.modules.tokens_to_token import TOKEN_DIM, stage_lengths
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViT, create_t2t_vit, stage_seed

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


def load_model(path: str | os.PathLike[str]) -> tuple[str, T2TViT]:
    """Name of the T2T-ViT variant of a checkpoint, and the model with full attention in evaluation mode.

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


def open_split(data_dir: str | os.PathLike[str], split: str, model: T2TViT) -> ImageFolderDataset:
    """The photographs of a split, as the model's evaluation sees them.

    Raises:
        UserError: there is no such folder, or see `ImageFolderDataset`.
    """
    root = Path(data_dir).expanduser() / split
    if not root.is_dir():
        raise UserError(f"{root} is not a folder. Give --data-dir the folder that holds '{split}', or another --split.")
    transform = ImageFolderDataModule(image_size=model.image_size).test_transform
    return ImageFolderDataset(root, transform, model.num_classes)


def spread(size: int, number: int) -> list[int]:
    """Positions of `number` items, all of them where they are fewer, spread evenly over `size`."""
    number = min(size, number)
    return [(2 * i + 1) * size // (2 * number) for i in range(number)]


def pixels_of(image: torch.Tensor) -> np.ndarray:
    """A normalised image (3, height, width) as pixels (height, width, 3) in [0, 1]."""
    return (image.permute(1, 2, 0).numpy() * IMAGENET_DEFAULT_STD + IMAGENET_DEFAULT_MEAN).clip(0, 1)


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


def create_stage_attentions(
    name: str, model: T2TViT, memory_fraction: float = 1 / 32, seed: int = 0
) -> tuple[AttentionModule, AttentionModule]:
    """Modules of stage 1 and 2, in evaluation mode, as an evaluation of `model` with this attention and seed has them.

    Args:
        name: one of `ATTENTIONS`.
        model: with a swappable attention; sequence lengths, softmax scales and device are its own.
        memory_fraction: see `create_attention`.
        seed: of what is random; each stage derives its own.

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


@torch.no_grad()
def attention_weights(inputs: StageInputs, attention: nn.Module) -> torch.Tensor:
    """The matrix of weights (B, H, T, S) of an attention; its rows sum to 1."""
    inputs = inputs.with_identity_values()
    out = attention(inputs.query, inputs.key, inputs.value)[0]
    return out[..., -inputs.key.shape[1] :].transpose(1, 2) / ONE_HOT


@torch.no_grad()
def relative_errors(inputs: StageInputs, attentions: Sequence[nn.Module], *, of_weights: bool = False) -> torch.Tensor:
    """Relative Frobenius errors (attentions, B) float64 against full attention, over T, H and D.

    Args:
        inputs: of one layer.
        attentions: modules with the softmax scale of the layer.
        of_weights: compare the matrices of weights (T, S) in place of the outputs. Takes O(T S) memory.
    """
    full, tensors = _full_attention(inputs, of_weights)
    columns = full.shape[-1]
    return torch.stack([relative_error(attention(*tensors)[0][..., -columns:], full) for attention in attentions])


@torch.no_grad()
def bias_and_spread(
    inputs: StageInputs, samples: Sequence[nn.Module]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors of one attention over seeds, split into bias and spread; their squares add up to the expected square.

    Args:
        inputs: of one layer.
        samples: at least two modules that differ in their seed.

    Returns:
        Relative errors (samples, B) as in `relative_errors`; bias (B,), the relative norm of the expected output less
        full attention, estimated without the part that a mean of so many samples still has from their spread (0 where
        that is larger); spread (B,), root of the expected squared norm about the expected output, relative as well.
    """
    full, tensors = _full_attention(inputs, of_weights=False)
    errors, total, squares = [], 0.0, 0.0
    for attention in samples:
        out = attention(*tensors)[0]
        errors.append(relative_error(out, full))
        # about full attention, which is close: sums of squares of small numbers lose little
        difference = (out - full).double().flatten(1)
        total = total + difference
        squares = squares + difference.square().sum(1)
    mean = (total / len(samples)).square().sum(1)
    variance = (squares - len(samples) * mean) / (len(samples) - 1)
    norm = full.double().flatten(1).square().sum(1)
    bias = (mean - variance / len(samples)).clamp_min(0)
    return torch.stack(errors), (bias / norm).sqrt(), (variance / norm).sqrt()


def _full_attention(
    inputs: StageInputs, of_weights: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Output of full attention, or its weights times `ONE_HOT`, and its query, key and value."""
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
    """Number of keys over which a query spreads its weights (..., S): exp of their entropy in nats, in [1, S]."""
    return torch.special.entr(weights).sum(-1).exp()


@torch.no_grad()
def largest_logit(inputs: StageInputs) -> torch.Tensor:
    """Largest |s q.k| of each image, (B,) float64."""
    logits = dense_logits(inputs.query.transpose(1, 2), inputs.key.transpose(1, 2), inputs.scale)
    return logits.abs().amax((1, 2, 3))


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """`mean` and sample standard deviation `std` (None of one value)."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """`mean` and `std` of the values of all seeds, and these as `per_seed`."""
    return {**mean_and_std(values), "per_seed": list(values)}


def plus_minus(value: Mapping[str, Any], digits: int = 3) -> str:
    """A mean, and its standard deviation where there is one, as text."""
    mean = f"{value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"
