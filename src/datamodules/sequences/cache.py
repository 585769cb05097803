"""Data that has been read from many files, or drawn, kept in one safetensors file."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from scatterbrain.errors import UserError
from src.utils.files import atomic_write

FORMAT = "scatterbrain sequences 1"


def read_cached(
    cache: str | os.PathLike[str] | None,
    source: str,
    read: Callable[[], dict[str, torch.Tensor]],
    description: str | None,
) -> dict[str, torch.Tensor]:
    """The tensors that `read` gives, from the file `cache` where it exists; else they are written there.

    An existing file is never overwritten.

    Args:
        cache: the file; its folder is made. None calls `read` each time.
        source: name of the data source.
        read: gives the tensors, on the CPU.
        description: of what `read` would give, such as a digest of the files' names and sizes; None does not compare.

    Raises:
        UserError: the file is damaged, or holds other data; it cannot be written; or from `read`.
    """
    if cache is None:
        return read()
    path = Path(str(cache)).expanduser()
    if path.is_dir():
        raise UserError(
            f"{path} cannot be read as a cache of sequences: it is a folder. Give a file by datamodule.read.cache."
        )
    if os.path.lexists(path):
        return _load(path, source, description)
    if description is None:
        raise UserError(
            f"{path} does not exist, and no folder to read is given. Correct datamodule.read.cache, or give "
            "datamodule.read.data_dir."
        )
    # before the reading, which takes its time
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UserError(f"{path} cannot be written. Give another datamodule.read.cache, or null for none.")
    tensors = read()
    metadata = {"format": FORMAT, "source": source, "description": description, "sha256": _digest(tensors)}
    with atomic_write(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata=metadata))
    return tensors


def _load(path: Path, source: str, description: str | None) -> dict[str, torch.Tensor]:
    remedy = "Delete it to read the data again, or give another datamodule.read.cache."
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a cache of sequences of this version. {remedy}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} cannot be read as a cache of sequences: {reason}. {remedy}") from error
    if metadata.get("source") != source:
        raise UserError(f"{path} holds the data of '{metadata.get('source')}', not of '{source}'. {remedy}")
    if description is not None and metadata.get("description") != description:
        raise UserError(f"{path} was made of other files or options than those given. {remedy}")
    if metadata.get("sha256") != _digest(tensors):
        raise UserError(f"{path} is damaged: its checksum is wrong. {remedy}")
    return tensors


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
