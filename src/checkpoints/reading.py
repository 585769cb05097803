"""Reading and checking a checkpoint: one state dict in our keys, whatever the file wraps it in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scatterbrain.errors import UserError
from src.checkpoints.architecture import (
    ARCHITECTURE_KEYS,
    POSITION_KEY,
    TOKEN_STAGE_PREFIX,
    Architecture,
    image_size_of,
    infer_architecture,
)
from src.checkpoints.conversion import convert_t2t_vit_state_dict
from src.checkpoints.files import load_file
from src.models.modules.tokens_to_token import TOTAL_STRIDE

logger = logging.getLogger(__name__)

# Where files keep their state dict, by priority: published accuracies are those of the averaged weights.
STATE_DICT_KEYS = ("state_dict_ema", "state_dict", "net")
# Prefixes that wrappers (DataParallel, torch.compile) add to every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
LIGHTNING_PREFIX = "model."
# Random projections belong to the attention that a model is built with, not to the trained weights.
PROJECTION_SUFFIX = ".projection_matrix"


@dataclass(frozen=True)
class CheckpointContents:
    """The weights in a checkpoint file, and what they are.

    Attributes:
        state_dict: tensors on the CPU, in the keys of `create_t2t_vit`'s models and the precision of the file.
        architecture: sizes of the network.
        num_classes: number of classes.
        image_size: height and width in pixels of the images that the position table belongs to.
        source_key: where the file keeps the weights: `"state_dict_ema"`, `"state_dict"`, `"net"`, or `"bare"`.
        converted: whether the file already is what `convert_checkpoint_file` would write.
        file_format: `"torch"` or `"safetensors"`.
    """

    state_dict: dict[str, torch.Tensor]
    architecture: Architecture
    num_classes: int
    image_size: int
    source_key: str
    converted: bool
    file_format: str

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that the weights fit; empty if no known variant has these sizes."""
        return self.architecture.variants

    @property
    def num_parameters(self) -> int:
        """Number of parameters, position table included, random projections excluded."""
        return sum(tensor.numel() for key, tensor in self.state_dict.items() if not key.endswith(PROJECTION_SUFFIX))

    def summary(self, **more: object) -> str:
        """Aligned lines `name  value`; `more` is appended, underscores shown as spaces."""
        facts = {
            "variant": self.architecture,
            "weights from": self.source_key,
            "parameters": f"{self.num_parameters:,}",
            "image size": self.image_size,
            "classes": self.num_classes,
            **{name.replace("_", " "): value for name, value in more.items()},
        }
        width = max(map(len, facts)) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in facts.items())


def read_checkpoint(path: str | os.PathLike[str]) -> CheckpointContents:
    """Read a T2T-ViT checkpoint of any supported format, and check it.

    Formats: files of `torch.save` (with `state_dict_ema`, `state_dict` or `net`, in this order, or bare; Lightning
    checkpoints, whose model is stored under `model.`) and safetensors files; published or converted keys; with or
    without the prefix of a parallel or compiled wrapper. The format is detected from the content, not from the name.
    No code in a file is run.

    Args:
        path: the file; `~` is expanded.

    Returns:
        The weights in the keys of `create_t2t_vit`'s models, and what they are.

    Raises:
        UserError: the file is missing, empty, truncated, a web page, a Git LFS pointer, an archive, or contains code;
            it holds no T2T-ViT; or its weights are damaged (NaN, infinite), quantised or sparse.
    """
    path = Path(path).expanduser()
    checkpoint, file_format = load_file(path)
    stored, source_key = _find_state_dict(checkpoint, path)
    bare = _strip_wrappers(stored, is_lightning="pytorch-lightning_version" in checkpoint)
    try:
        state_dict = convert_t2t_vit_state_dict(bare)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _check_is_t2t_vit(state_dict, path, found=list(bare))
    _check_tensors(state_dict, path)
    table = state_dict[POSITION_KEY]
    if table.dim() != 3 or (image_size_of(table) // TOTAL_STRIDE) ** 2 + 1 != table.shape[1]:
        raise UserError(
            f"{path}: the position table has shape {tuple(table.shape)}, which is not one class token and a square "
            "grid. The file is not a checkpoint of an unmodified T2T-ViT; use another one."
        )
    return CheckpointContents(
        state_dict=state_dict,
        architecture=infer_architecture(state_dict),
        num_classes=state_dict["head.weight"].shape[0],
        image_size=image_size_of(table),
        source_key=source_key,
        converted=source_key == "bare" and list(stored) == list(state_dict),
        file_format=file_format,
    )


def _find_state_dict(checkpoint: Any, path: Path) -> tuple[Mapping[str, Any], str]:
    """The state dict in a loaded checkpoint, and its key there (`"bare"` if the checkpoint is the state dict)."""
    if not isinstance(checkpoint, Mapping):
        raise UserError(
            f"{path} holds a {type(checkpoint).__name__}, not a state dict. "
            "Save one: torch.save(model.state_dict(), ...)."
        )
    # A disabled EMA may be stored as None or as an empty dict.
    found = [key for key in STATE_DICT_KEYS if isinstance(checkpoint.get(key), Mapping) and checkpoint[key]]
    if found:
        if len(found) > 1:
            logger.info("%s: '%s' is used, '%s' is not.", path, found[0], "', '".join(found[1:]))
        return checkpoint[found[0]], found[0]
    if not checkpoint or any(key in checkpoint for key in STATE_DICT_KEYS):
        raise UserError(f"{path} holds no weights: its state dict is empty. Use another checkpoint.")
    return checkpoint, "bare"


def _strip_wrappers(state_dict: Mapping[str, Any], is_lightning: bool) -> dict[str, Any]:
    """State dict without the prefixes that wrappers add to every key."""
    state_dict = {str(key): value for key, value in state_dict.items()}
    if is_lightning:
        # Keys outside `model.` belong to the task (loss, metrics), not to the network.
        network = {key: value for key, value in state_dict.items() if key.startswith(LIGHTNING_PREFIX)}
        state_dict = {key.removeprefix(LIGHTNING_PREFIX): value for key, value in network.items()} or state_dict
    while state_dict:
        shared = [prefix for prefix in WRAPPER_PREFIXES if all(key.startswith(prefix) for key in state_dict)]
        if not shared:
            break
        state_dict = {key.removeprefix(shared[0]): value for key, value in state_dict.items()}
    return state_dict


def _check_is_t2t_vit(state_dict: Mapping[str, Any], path: Path, found: list[str]) -> None:
    """Raise a UserError if tensors that determine the variant are missing; `found` are the file's own keys."""
    # Other vision transformers have most of ARCHITECTURE_KEYS, but no token stages.
    if not any(key.startswith(TOKEN_STAGE_PREFIX) for key in state_dict):
        raise UserError(
            f"{path} is not a T2T-ViT checkpoint: it holds {name_some(found)}. "
            "Use a checkpoint of T2T-ViT (scripts/download_checkpoint_t2t_vit.py downloads the published ones)."
        )
    missing = [
        key
        for key in ARCHITECTURE_KEYS
        if not isinstance(state_dict.get(key), torch.Tensor) or state_dict[key].dim() < 2
    ]
    if missing:
        raise UserError(
            f"{path} is not a complete T2T-ViT checkpoint: it lacks {name_some(missing)}. "
            "Use a checkpoint that holds the whole state dict."
        )


def _check_tensors(state_dict: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError unless every value is a dense floating-point tensor of finite numbers."""
    for key, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: '{key}' is a {type(tensor).__name__}, not a tensor. "
                "Save the state dict alone: torch.save(model.state_dict(), ...)."
            )
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(
                f"{path}: '{key}' is a tensor of {tensor.dtype} on {tensor.device} with layout {tensor.layout}; "
                "weights are dense floating-point tensors. Use an unquantised checkpoint."
            )
        # Cast because isfinite is not implemented for float8.
        if not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"{path} is corrupted: '{key}' holds NaN or infinite values. Use another checkpoint, or download this "
                "one again."
            )


def name_some(keys: Iterable[str], limit: int = 3) -> str:
    """The first `limit` keys in quotes, and how many more there are."""
    keys = list(keys)
    names = ", ".join(f"'{key}'" for key in keys[:limit]) or "nothing"
    return names if len(keys) <= limit else f"{names} and {len(keys) - limit} more"
