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
from src.checkpoints.files import code_message, load_file
from src.checkpoints.unpickling import Skipped
from src.models.modules.tokens_to_token import TOTAL_STRIDE

logger = logging.getLogger(__name__)

# Where files keep their state dict, by priority: published accuracies are those of the averaged weights.
STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "module")
MAX_NESTING = 4  # of a checkpoint in a checkpoint
# What wrappers (DataParallel, torch.compile, FSDP, activation checkpointing) add to the names of what they wrap.
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Attributes in which training code and Lightning modules keep the network.
NETWORK_NAMES = frozenset(("model", "net", "backbone"))
# Keys of every T2T-ViT, by which the network's prefix is found.
ANCHORS = ("cls_token", "blocks.0.mlp.fc1.weight")
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
        source_key: where the file keeps the weights: one of `STATE_DICT_KEYS`, several joined by dots, or `"bare"`.
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

    Formats: files of `torch.save` (with one of `STATE_DICT_KEYS`, in this order, or bare; Lightning checkpoints, whose
    network is stored under `model.`, `net.` or `backbone.`) and safetensors files; published or converted keys; with or
    without the prefixes of wrappers. The format is detected from the content, not from the name. No code in a file is
    run; objects other than dense tensors are skipped.

    Args:
        path: the file; `~` is expanded.

    Returns:
        The weights in the keys of `create_t2t_vit`'s models, and what they are.

    Raises:
        UserError: the file is missing, empty, truncated, a web page, a Git LFS pointer, an archive, or contains code;
            it holds no T2T-ViT, or several networks; or its weights are damaged (NaN, infinite, fewer than their
            shapes claim), quantised, nested or sparse.
    """
    path = Path(path).expanduser()
    checkpoint, file_format = load_file(path)
    stored, source_key = _find_state_dict(checkpoint, path)
    bare = _strip_wrappers(stored, path, is_lightning="pytorch-lightning_version" in checkpoint)
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
    source_key = "bare"
    for _ in range(MAX_NESTING):
        if isinstance(checkpoint, Skipped) and not checkpoint:
            raise UserError(code_message(path, checkpoint.full_name))
        if not isinstance(checkpoint, Mapping):
            raise UserError(
                f"{path} holds a {type(checkpoint).__name__}, not a state dict. "
                "Save one: torch.save(model.state_dict(), ...)."
            )
        # A disabled EMA may be stored as None or as an empty dict.
        found = [key for key in STATE_DICT_KEYS if _may_hold_weights(checkpoint.get(key))]
        if not found:
            break
        if len(found) > 1:
            logger.info("%s: '%s' is used, '%s' is not.", path, found[0], "', '".join(found[1:]))
        checkpoint = checkpoint[found[0]]
        source_key = found[0] if source_key == "bare" else f"{source_key}.{found[0]}"
    if not checkpoint or any(key in checkpoint for key in STATE_DICT_KEYS):
        raise UserError(f"{path} holds no weights: its state dict is empty. Use another checkpoint.")
    return checkpoint, source_key


def _may_hold_weights(value: Any) -> bool:
    """Whether an entry of a checkpoint is a state dict, or an object of a network's class, which is to be refused."""
    return isinstance(value, Skipped) or (isinstance(value, Mapping) and bool(value))


def _strip_wrappers(state_dict: Mapping[str, Any], path: Path, is_lightning: bool) -> dict[str, Any]:
    """State dict without the prefixes that wrappers, training code and Lightning modules add to the keys."""
    stripped: dict[str, Any] = {}
    for key, value in state_dict.items():
        name = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if name in stripped:
            raise UserError(
                f"{path} holds '{name}' twice, once under '{key}'. Use a checkpoint that holds one network."
            )
        stripped[name] = value
    prefixes = {key.removesuffix(anchor) for key in stripped for anchor in ANCHORS if key.endswith(anchor)}
    prefixes = sorted(prefix for prefix in prefixes if set(prefix.split(".")[:-1]) <= NETWORK_NAMES)
    if len(prefixes) > 1:
        raise UserError(
            f"{path} holds several networks, under {name_some(prefixes)}. Save one "
            "of them alone: torch.save(model.state_dict(), ...)."
        )
    (prefix,) = prefixes or ("",)
    inside = {key.removeprefix(prefix): value for key, value in stripped.items() if key.startswith(prefix)}
    # In a Lightning checkpoint, keys outside belong to the task (loss, metrics), not to the network.
    return inside if is_lightning or len(inside) == len(stripped) else stripped


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
        # `_check_tensors` names values that are no tensors
        if key not in state_dict or (isinstance(state_dict[key], torch.Tensor) and state_dict[key].dim() < 2)
    ]
    if missing:
        raise UserError(
            f"{path} is not a complete T2T-ViT checkpoint: it lacks {name_some(missing)}. "
            "Use a checkpoint that holds the whole state dict."
        )


def _check_tensors(state_dict: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError unless every value is a dense floating-point tensor of finite numbers that the file holds."""
    size = path.stat().st_size
    for key, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: '{key}' is a {type(tensor).__name__}, not a tensor. "
                "Save the state dict alone: torch.save(model.state_dict(), ...)."
            )
        is_dense = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested)
        if not (tensor.is_floating_point() and is_dense):
            layout = "nested" if tensor.is_nested else tensor.layout
            raise UserError(
                f"{path}: '{key}' is a tensor of {tensor.dtype} on {tensor.device} with layout {layout}; "
                "weights are dense floating-point tensors. Use an unquantised checkpoint."
            )
        # A shape costs nothing to claim; memory is needed only once the values are read.
        claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if claimed > min(held, size):
            raise UserError(
                f"{path} is damaged: '{key}' has shape {tuple(tensor.shape)}, {claimed:,} bytes, of which the file "
                f"holds {min(held, size):,}. Use another checkpoint, or download this one again."
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
