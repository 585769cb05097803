"""Errors of the attentions against full attention, on the queries, keys and values of a trained T2T-ViT.

They are those of the network with full attention, in both token stages and in the blocks of the backbone, so that the
error of each layer stands alone: stage 2 does not suffer from an approximation in stage 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.ops.common.dense import dense_logits
from scatterbrain.ops.common.numerics import accumulation_dtype
from scatterbrain.ops.full import full_attention
from src.analysis.tools import split_folder
from src.checkpoints import load_checkpoint, read_checkpoint
from src.datamodules import photographs
from src.datamodules.dataset import ImageDataset, ImageFolderDataset
from src.datamodules.image_folder import ImageFolderDataModule
from src.models.attention_inputs import ONE_HOT, StageInputs
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViT, create_t2t_vit
from src.utils.files import sha256_of_file


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


def model_entries(name: str, path: str | os.PathLike[str]) -> dict[str, str]:
    """Name of a model and SHA-256 of its checkpoint, which results are stored with."""
    return {"model": name, "checkpoint_sha256": sha256_of_file(Path(path).expanduser())}


def open_split(data_dir: str | os.PathLike[str], split: str, model: T2TViT) -> ImageFolderDataset:
    """The photographs of a split, as the model's evaluation sees them.

    Raises:
        UserError: there is no such folder, or see `ImageFolderDataset`.
    """
    transform = ImageFolderDataModule(image_size=model.image_size).test_transform
    return ImageFolderDataset(split_folder(data_dir, split), transform, model.num_classes)


def open_photographs(arguments: argparse.Namespace, model: T2TViT) -> ImageDataset:
    """The photographs of `--data-dir` and `--images`, as the model's evaluation sees them; they need no labels.

    Raises:
        UserError: they are not there, or see `photographs.open_photographs`.
    """
    root = None if arguments.data_dir is None else split_folder(arguments.data_dir, arguments.split)
    transform = ImageFolderDataModule(image_size=model.image_size).test_transform
    return photographs.open_photographs(root, arguments.images or (), transform, model.num_classes)


def pixels_of(image: torch.Tensor) -> np.ndarray:
    """A normalised image (3, height, width) as pixels (height, width, 3) in [0, 1]."""
    return (image.permute(1, 2, 0).numpy() * IMAGENET_DEFAULT_STD + IMAGENET_DEFAULT_MEAN).clip(0, 1)


@torch.no_grad()
def attention_weights(inputs: StageInputs, attention: nn.Module) -> torch.Tensor:
    """The matrix of weights (B, H, T, S) of an attention; its rows sum to 1."""
    inputs = inputs.with_identity_values()
    out = attention(inputs.query, inputs.key, inputs.value)[0]
    return out[..., -inputs.key.shape[1] :].transpose(1, 2) / ONE_HOT


@torch.no_grad()
def relative_errors(inputs: StageInputs, attentions: Sequence[nn.Module], *, of_weights: bool = False) -> torch.Tensor:
    """Relative Frobenius errors (attentions, B) float64 against full attention, over T, H and D.

    The attentions have the softmax scale of the layer. `of_weights` compares the matrices of weights (T, S) in place of
    the outputs, and takes O(T S) memory.
    """
    full, tensors = _full_attention(inputs, of_weights)
    columns = full.shape[-1]
    return torch.stack([relative_error(attention(*tensors)[0][..., -columns:], full) for attention in attentions])


@torch.no_grad()
def bias_and_spread(
    inputs: StageInputs, samples: Sequence[nn.Module]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors of one attention over seeds, split into bias and spread; their squares add up to the expected square.

    Of at least two modules that differ in their seed: relative errors (samples, B) as in `relative_errors`; bias (B,),
    the relative norm of the expected output less full attention, estimated without the part that a mean of so many
    samples still has from their spread (0 where that is larger); spread (B,), root of the expected squared norm about
    the expected output, relative as well.
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


@torch.no_grad()
def query_dependence(inputs: StageInputs) -> torch.Tensor:
    """Norm of full attention's output less its mean over the queries, over that of the output, (B,) float64."""
    full, _ = _full_attention(inputs, of_weights=False)
    return relative_error(full.mean(1, keepdim=True), full)


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
