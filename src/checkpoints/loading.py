"""Loading a checkpoint into a model, strictly."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping

import torch
from torch import nn

from scatterbrain.errors import UserError
from src.checkpoints.architecture import (
    ARCHITECTURE_KEYS,
    POSITION_KEY,
    Architecture,
    image_size_of,
    infer_architecture,
)
from src.checkpoints.reading import PROJECTION_SUFFIX, CheckpointContents, name_some, read_checkpoint
from src.models.t2t_vit import T2T_VIT_VARIANTS, resize_position_table

logger = logging.getLogger(__name__)

HEAD_PREFIX = "head."


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, new_head: bool = False, new_head_option: str | None = None
) -> None:
    """Load the weights of a checkpoint into a model, strictly, or leave the model as it was.

    Reads every format of `read_checkpoint`. Two things may differ between file and model: the position table is
    resized (bicubic), and the model keeps its own random projections unless the file holds some of the same shape.
    Weights are cast to the dtype of the model.

    Args:
        model: a model of `create_t2t_vit`.
        path: the checkpoint; `~` is expanded.
        new_head: ignore the file's classifier, whatever its number of classes, and keep that of the model.
        new_head_option: the option that sets `new_head`, for the message about another number of classes.

    Raises:
        UserError: the file cannot be read, is not a T2T-ViT checkpoint, or does not fit the model: the message
            names what the file holds and the option that selects it.
    """
    load_contents(model, read_checkpoint(path), path, new_head=new_head, new_head_option=new_head_option)


def load_contents(
    model: nn.Module,
    contents: CheckpointContents,
    path: str | os.PathLike[str],
    *,
    new_head: bool = False,
    new_head_option: str | None = None,
    log_level: int = logging.INFO,
) -> None:
    """Like `load_checkpoint`, for a file that is already read; `path` is for messages, of which some have a level."""
    expected = model.state_dict()
    state_dict = dict(contents.state_dict)
    if new_head:
        head = [key for key in expected if key.startswith(HEAD_PREFIX)]
        contents = dataclasses.replace(contents, num_classes=expected[head[0]].shape[0])
        state_dict.update({key: expected[key] for key in head})
    _check_architecture(model, expected, contents, path, new_head_option)

    _resolve_projections(state_dict, expected, path)

    position_table = expected[POSITION_KEY]
    if state_dict[POSITION_KEY].shape[1] != position_table.shape[1]:
        logger.log(
            log_level,
            "%s: position table resized from %d to %d px.",
            path,
            contents.image_size,
            image_size_of(position_table),
        )
        state_dict[POSITION_KEY] = resize_position_table(state_dict[POSITION_KEY].float(), position_table.shape[1] - 1)

    # Compared here because load_state_dict copies what fits before it reports what does not.
    problems = []
    if missing := [key for key in expected if key not in state_dict]:
        problems.append(f"it lacks {name_some(missing)}")
    if unexpected := [key for key in state_dict if key not in expected]:
        problems.append(f"the model has no {name_some(unexpected)}")
    for key, tensor in state_dict.items():
        if key in expected and tensor.shape != expected[key].shape:
            problems.append(f"'{key}' has shape {tuple(tensor.shape)}, in the model {tuple(expected[key].shape)}")
            break
    if problems:
        raise UserError(
            f"{path} does not fit the model: {'; '.join(problems)}. Use a complete checkpoint of an unmodified "
            f"{contents.architecture}."
        )
    model.load_state_dict(state_dict, strict=True)
    logger.log(log_level, "Loaded %s from %s ('%s').", contents.architecture, path, contents.source_key)


def holds_random_features(contents: CheckpointContents, model: nn.Module) -> bool:
    """Whether a file holds random projections for every random-feature attention of a model."""
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if key.endswith(PROJECTION_SUFFIX)}
    stored = contents.state_dict
    return bool(shapes) and all(key in stored and stored[key].shape == shape for key, shape in shapes.items())


def _check_architecture(
    model: nn.Module,
    expected: Mapping[str, torch.Tensor],
    contents: CheckpointContents,
    path: str | os.PathLike[str],
    new_head_option: str | None,
) -> None:
    """Raise a UserError that names the right options if variant or number of classes of file and model differ."""
    if any(key not in expected for key in ARCHITECTURE_KEYS):
        raise UserError(
            f"{type(model).__name__} is not a T2T-ViT, so {path} cannot be loaded into it. Build the model with "
            "create_t2t_vit."
        )
    theirs, ours = contents.architecture, infer_architecture(expected)
    held, wanted, options = [], [], []
    if theirs != ours:
        held.append(str(theirs))
        wanted.append(_model_name(model, ours))
        options.append(" or ".join(f"model/t2tmodel={name}" for name in theirs.variants))
    num_classes = expected["head.weight"].shape[0]
    if contents.num_classes != num_classes:
        held.append(_count_classes(contents.num_classes))
        wanted.append(_count_classes(num_classes))
        options.append(new_head_option or f"model.num_classes={contents.num_classes}")
    if not held:
        return
    remedy = f"use {' '.join(options)}"
    if new_head_option in options:
        remedy += f" for a new classifier, or model.num_classes={contents.num_classes} to keep the file's"
    if theirs != ours and not theirs.variants:
        remedy = f"use a checkpoint of one of: {', '.join(T2T_VIT_VARIANTS)}"
    raise UserError(
        f"{path} holds {' with '.join(held)}, but the model is {' with '.join(wanted)}; {remedy}."
        if theirs != ours
        else f"{path} has {held[0]}, but the model has {wanted[0]}; {remedy}."
    )


def _count_classes(number: int) -> str:
    """`5 classes`."""
    return f"{number} class{'' if number == 1 else 'es'}"


def _model_name(model: nn.Module, architecture: Architecture) -> str:
    """Variant name of a model; its number of heads distinguishes variants of equal shapes."""
    heads = model.blocks[0].attn.num_heads
    exact = [name for name in architecture.variants if T2T_VIT_VARIANTS[name].num_heads == heads]
    return exact[0] if exact else str(architecture)


def _resolve_projections(
    state_dict: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: str | os.PathLike[str]
) -> None:
    """Keep the file's random projections where they fit the model, and the model's own elsewhere, in place."""
    for key in [key for key in state_dict if key.endswith(PROJECTION_SUFFIX)]:
        if key not in expected or expected[key].shape != state_dict[key].shape:
            logger.info("%s: '%s' does not fit the attention of the model and is ignored.", path, key)
            del state_dict[key]
    for key in expected:
        if key.endswith(PROJECTION_SUFFIX) and key not in state_dict:
            logger.debug("%s: no '%s', the model keeps its own.", path, key)
            state_dict[key] = expected[key]
