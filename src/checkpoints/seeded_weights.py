"""Reproducible random weights: each tensor is standard normal, seeded by the CRC-32 of its name.

The same name gives the same numbers on every machine, so a whole network needs no file of weights. The stored outputs
in `tests/golden` and the checkpoints of `scripts/make_random_checkpoint.py` use them.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from src.checkpoints import save_checkpoint, unconvert_key
from src.models.t2t_vit import create_t2t_vit, sinusoid_table


def seeded_tensor(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard-normal tensor that depends only on its name and shape.

    Args:
        name: its CRC-32 is the seed.
        shape: any shape.

    Returns:
        float64 tensor of `shape`.
    """
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(np.asarray(generator.standard_normal(tuple(shape))))


def seeded_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Weights for a published T2T-ViT state dict, scaled so that activations stay of order one.

    Standard deviations: 0.1 for biases and for norm weights (mean 1), 0.5 for the class token, in^-0.5 for linear
    weights (out, in), 1 for random projections. The position table is not random but the models' sinusoid, rounded to
    float32 as published.

    Args:
        shapes: published key to shape, see `published_shapes`.

    Returns:
        Published key to float64 tensor, in the same order.
    """
    weights = {}
    for key, shape in shapes.items():
        if key == "pos_embed":
            weights[key] = sinusoid_table(shape[1], shape[2]).double()
            continue
        tensor = seeded_tensor(key, shape)
        if key.endswith(".w"):  # random projections of the Performer token stages
            weights[key] = tensor
        elif key == "cls_token":
            weights[key] = 0.5 * tensor
        elif key.endswith("bias"):
            weights[key] = 0.1 * tensor
        elif "norm" in key and key.endswith("weight"):
            weights[key] = 1 + 0.1 * tensor
        else:
            weights[key] = tensor / math.sqrt(shape[-1])
    return weights


def published_shapes(variant_name: str, num_classes: int = 1000, image_size: int = 224) -> dict[str, tuple[int, ...]]:
    """Shapes of the published state dict of a variant.

    Args:
        variant_name: one of `T2T_VIT_VARIANTS`.
        num_classes: number of classes.
        image_size: height and width of the images in pixels; a multiple of 16.

    Returns:
        Published key (`tokens_to_token.project.weight`, `pos_embed`, ...) to shape.

    Raises:
        UserError: unknown variant, or sizes that `create_t2t_vit` refuses.
    """
    with torch.device("meta"):  # only the shapes are needed
        model = create_t2t_vit(variant_name, image_size=image_size, num_classes=num_classes)
    return {unconvert_key(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def save_seeded_checkpoint(variant: str, num_classes: int, image_size: int, path: str | os.PathLike[str]) -> None:
    """Write a published checkpoint of seeded weights, see `published_shapes` and `save_checkpoint` for the errors."""
    weights = seeded_weights(published_shapes(variant, num_classes, image_size))
    save_checkpoint({"state_dict_ema": {key: tensor.float() for key, tensor in weights.items()}}, path)
