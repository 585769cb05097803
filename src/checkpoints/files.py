"""Files of `torch.save` and safetensors: opened without running any code in them, with errors that name the cause."""

from __future__ import annotations

import argparse
import difflib
import logging
import pickle
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from scatterbrain.errors import UserError
from src.checkpoints.published import PUBLISHED_CHECKPOINTS
from src.checkpoints.unpickling import CodeError, load_weights

logger = logging.getLogger(__name__)


def load_file(path: Path) -> tuple[Any, str]:
    """Load a file; no code in it is run.

    The format is detected from the content, not from the file name.

    Args:
        path: the file.

    Returns:
        What the file holds, tensors on the CPU and objects of other classes `Skipped`; and its format, `"torch"` or
        `"safetensors"`.

    Raises:
        UserError: the file is missing, empty, truncated, a web page, a Git LFS pointer or an archive, or contains code.
    """
    try:
        _check_is_file(path)
        return _load(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}). Check its permissions and its disk."
        ) from error


def _load(path: Path) -> tuple[Any, str]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1024)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")):
        raise UserError(
            f"{path} is a web page, not a checkpoint. Download it again from the file's direct address "
            "(scripts/download_checkpoint_t2t_vit.py does)."
        )
    if text.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the checkpoint itself. Run 'git lfs pull' in its repository, or "
            "download the file."
        )
    is_torch = head.startswith((b"PK\x03\x04", b"\x80"))  # a zip archive, or the pickle of older versions
    # Checked first: the 8-byte header length can look like the start of a pickle.
    if head[5:9] == b"\0\0\0{" or (path.suffix == ".safetensors" and not is_torch):
        return _load_safetensors(path, size), "safetensors"
    if head[257:262] == b"ustar":
        raise UserError(
            f"{path} is a tar archive. Unpack it (tar -xf {path.name}) and name the checkpoint in it; the "
            "published .pth.tar files are not archives and need no unpacking."
        )
    try:
        # timm stores its training options as a Namespace, which is plain data. A file object, since torch.load
        # reads any path that ends in .safetensors as safetensors.
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True), "torch"
    except Exception as error:  # damaged bytes can raise anything, OSError included
        if isinstance(error, pickle.UnpicklingError) and is_torch:
            try:
                return load_weights(path), "torch"
            except CodeError as code:
                raise UserError(code_message(path, str(code))) from error
            except Exception as second:
                logger.debug("%s cannot be read: %s", path, second)
        if is_torch:
            raise UserError(
                f"{path} ({size:,} bytes) is truncated or damaged, or not a file of torch.save. Download it again "
                "and compare the sizes."
            ) from error
        raise UserError(
            f"{path} is not a checkpoint: neither a file of torch.save nor a safetensors file. Check the path."
        ) from error


def code_message(path: Path, name: str) -> str:
    """Message that a file was refused for the function or class `name`."""
    return (
        f"{path} contains code ({name}), which was not run. Get the checkpoint from a source "
        "you trust, saved as weights alone: torch.save(model.state_dict(), ...)."
    )


def _check_is_file(path: Path) -> None:
    """Raise a UserError unless `path` is a file that is not empty."""
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        example = f", such as {path / files[0]}" if files else ""
        raise UserError(f"{path} is a folder, not a checkpoint. Give a file in it{example}.")
    if not path.exists():
        raise UserError(f"Checkpoint {path} does not exist. {_suggest_path(path)}")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file. Give a checkpoint file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: its download or copy failed. Download it again.")


def _suggest_path(path: Path) -> str:
    """Suggestions for a checkpoint path that does not exist."""
    if not path.parent.is_dir():
        return f"The folder {path.parent.absolute()} does not exist either; check the path."
    similar = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=3)
    if similar:
        return f"Did you mean {' or '.join(str(path.with_name(name)) for name in similar)}?"
    for name, published in PUBLISHED_CHECKPOINTS.items():
        if published.file_name == path.name:
            return f"Download it: python scripts/download_checkpoint_t2t_vit.py {name}"
    return f"Check the path; the folder {path.parent.absolute()} holds no file of a similar name."


def _load_safetensors(path: Path, size: int) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file."""
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} ({size:,} bytes) is truncated or damaged, or not a safetensors file ({error}). "
            "Download it again and compare the sizes."
        ) from error
