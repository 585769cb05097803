"""Writing checkpoints: saving, conversion of a file in place, export in the published keys."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from scatterbrain.errors import UserError
from src.checkpoints.conversion import unconvert_key
from src.checkpoints.reading import PROJECTION_SUFFIX, CheckpointContents, read_checkpoint
from src.utils.files import atomic_write, sha256_of_file

logger = logging.getLogger(__name__)

BACKUP_SUFFIX = ".og"


@dataclass(frozen=True)
class Conversion:
    """Result of `convert_checkpoint_file`.

    Attributes:
        contents: of the file.
        path: the converted file.
        written: False if the file was already converted.
        backup: where the original is kept; None if it was not changed.
    """

    contents: CheckpointContents
    path: Path
    written: bool
    backup: Path | None


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], file_format: str = "torch") -> None:
    """Write a checkpoint atomically; a file at `path` is replaced.

    Args:
        checkpoint: state dict, or for `"torch"` a dict that holds one.
        path: destination; its folder must exist.
        file_format: `"torch"` (of `torch.save`) or `"safetensors"`.

    Raises:
        UserError: the file cannot be written, for example because the disk is full.
    """
    try:
        with atomic_write(path, "wb") as file:
            if file_format == "safetensors":
                tensors = {key: tensor.contiguous() for key, tensor in checkpoint.items()}
                file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
            else:
                torch.save(dict(checkpoint), file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"{path} could not be written ({str(error).partition(chr(10))[0]}). "
            "Check the free space and the permissions of its folder."
        ) from error


def convert_checkpoint_file(path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Conversion:
    """Convert a checkpoint file to a bare state dict in our keys; the original is never lost.

    In place, the original is first linked or copied to `<path>.og`, then the converted file atomically replaces
    `path`. If the conversion is interrupted, the complete original exists under one of the two names, and a second
    conversion finishes the work. A safetensors file stays one.

    Args:
        path: the file; `~` is expanded.
        output: destination, in safetensors format if it ends in `.safetensors`; `path` is not changed then. None
            converts in place.

    Returns:
        The contents, and the paths of the converted file and of the backup.

    Raises:
        UserError: the file cannot be read or written, `output` exists, or another file has the backup's name.
    """
    path = Path(path).expanduser()
    if output is not None:
        output = Path(output).expanduser()
        if os.path.lexists(output):
            raise UserError(f"{output} exists and is not overwritten. Move it or choose another output.")
        contents = read_checkpoint(path)
        file_format = "safetensors" if output.suffix == ".safetensors" else "torch"
        save_checkpoint(contents.state_dict, output, file_format)
        return Conversion(contents, output, written=True, backup=None)

    contents = read_checkpoint(path)
    if contents.converted:
        return Conversion(contents, path, written=False, backup=None)
    if path.suffix == BACKUP_SUFFIX:
        raise UserError(
            f"{path} is the backup of an earlier conversion. "
            "Convert it to another name with --output, or rename it first."
        )
    backup = path.with_name(path.name + BACKUP_SUFFIX)
    _back_up(path, backup)
    save_checkpoint(contents.state_dict, path, contents.file_format)
    return Conversion(contents, path, written=True, backup=backup)


def export_checkpoint_file(
    path: str | os.PathLike[str], output: str | os.PathLike[str], *, half: bool = False
) -> CheckpointContents:
    """Write the weights of a checkpoint of any format in the published keys, for use by other code.

    Optimizer state, training history and random projections are left out.

    Args:
        path: the checkpoint; `~` is expanded.
        output: destination; its folder must exist.
        half: round the weights to float16.

    Returns:
        The contents of `path`.

    Raises:
        UserError: the file cannot be read or written, `output` exists, or a weight is too large for float16.
    """
    output = Path(output).expanduser()
    if os.path.lexists(output):
        raise UserError(f"{output} exists and is not overwritten. Move it or choose another output.")
    contents = read_checkpoint(path)
    state_dict = {}
    for key, tensor in contents.state_dict.items():
        if key.endswith(PROJECTION_SUFFIX):
            continue
        tensor = tensor.half() if half else tensor
        if not torch.isfinite(tensor).all():
            raise UserError(f"'{key}' of {path} is too large for half precision. Leave out --half.")
        state_dict[unconvert_key(key)] = tensor
    save_checkpoint({"state_dict_ema": state_dict}, output)
    return contents


def _back_up(path: Path, backup: Path) -> None:
    """Link or copy `path` to `backup`; a file that already exists there must have the same content."""
    if os.path.lexists(backup):
        # An interrupted conversion leaves a backup of the same content.
        if backup.is_file() and sha256_of_file(backup) == sha256_of_file(path):
            return
        raise UserError(
            f"{path} is not converted, but its backup {backup} exists with other content; it is not overwritten. "
            "Move the backup away, or convert to another name with --output."
        )
    if not path.is_symlink():  # a hard link to a symbolic link would afterwards point at the converted file
        try:
            # Atomic, and fails if another process has created the name meanwhile.
            os.link(path, backup)
            return
        except FileExistsError:
            raise UserError(f"{backup} has just been created by another process. Try again.") from None
        except OSError:
            logger.debug("%s: no hard links on this file system, copying.", path)
    try:
        with open(path, "rb") as source, atomic_write(backup, "wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise UserError(
            f"{path} could not be copied to {backup} ({error.strerror}). "
            "Check the free space and the permissions of its folder."
        ) from error
    shutil.copystat(path, backup)
