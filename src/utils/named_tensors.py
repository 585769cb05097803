"""Reproducible tensors from names: the weights of a whole network without a file that holds them.

Every tensor is a standard-normal draw whose seed is the CRC-32 of its name, so the same name gives the same numbers
on every machine. Stored reference outputs rest on them, and so do checkpoints made for trying the pipeline.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from src.models.t2t_vit import create_t2t_vit, sinusoid_table
from src.utils.checkpoint import unconvert_key


def named_tensor(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard-normal tensor, a function of its name and shape alone.

    Args:
        name: what the seed is made of.
        shape: any shape.

    Returns:
        float64 tensor of `shape`.
    """
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(np.asarray(generator.standard_normal(tuple(shape))))


def named_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Weights for a published T2T-ViT state dict, scaled so that activations stay of order one.

    Biases have deviation 0.1, weights of norms are 1 with deviation 0.1, the class token has deviation 0.5, linear
    weights (out, in) have deviation in^-0.5, feature rows 1. The position table is no draw but the sinusoid that the
    models have, rounded to float32 as published.

    Args:
        shapes: published key to shape, as `official_shapes` gives.

    Returns:
        Published key to float64 tensor, in the same order.
    """
    weights = {}
    for key, shape in shapes.items():
        if key == "pos_embed":
            weights[key] = sinusoid_table(shape[1], shape[2]).double()
            continue
        draw = named_tensor(key, shape)
        if key.endswith(".w"):  # feature rows of the performer tokens
            weights[key] = draw
        elif key == "cls_token":
            weights[key] = 0.5 * draw
        elif key.endswith("bias"):
            weights[key] = 0.1 * draw
        elif "norm" in key and key.endswith("weight"):
            weights[key] = 1 + 0.1 * draw
        else:
            weights[key] = draw / math.sqrt(shape[-1])
    return weights


def official_shapes(variant_name: str, num_classes: int = 1000, image_size: int = 224) -> dict[str, tuple[int, ...]]:
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
    model = create_t2t_vit(variant_name, image_size=image_size, num_classes=num_classes)
    return {unconvert_key(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
