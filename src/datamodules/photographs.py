"""Photographs for the command-line tools: of a split, or one's own, which need no labels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from scatterbrain.errors import UserError
from src.datamodules.dataset import ImageDataset, ImageFolderDataset
from src.datamodules.formats.unlabelled import UnlabelledImages, list_unlabelled


def open_photographs(
    root: Path | None,
    paths: Sequence[str],
    transform: Callable[[Image.Image], torch.Tensor],
    num_classes: int,
) -> ImageDataset:
    """The photographs `paths`, in that order.

    Args:
        root: folder of a split, whose class folders hold the photographs; None for any files and folders, without
            labels.
        paths: relative to `root`, none for all of it; without `root` files, and folders whose images are taken.
        transform: from a PIL image in mode RGB to a tensor (3, size, size).
        num_classes: outputs of the model, see `ImageFolderDataset`.

    Raises:
        UserError: neither `root` nor paths; a photograph is not there, where near names are suggested; or see
            `ImageFolderDataset` and `list_unlabelled`.
    """
    if root is None:
        if not paths:
            raise UserError("No photographs given. Give --images FILE ..., or --data-dir.")
        return ImageDataset(_list_files(paths), transform)
    images = ImageFolderDataset(root, transform, num_classes)
    for path in paths:
        if path not in images.paths:
            near = difflib.get_close_matches(path, images.paths) or images.paths[:1]
            other = " Leave --data-dir out for a file that is elsewhere." if Path(path).exists() else ""
            raise UserError(f"--images: {path} is not in {root}. Is it one like {' or '.join(near)}?{other}")
    return images.subset(map(images.paths.index, paths)) if paths else images


def _list_files(paths: Sequence[str]) -> UnlabelledImages:
    names: list[str] = []
    for path in map(Path, paths):
        path = path.expanduser()
        if path.is_dir():
            names += [str(path / name) for name in list_unlabelled(path).names]
        elif path.exists():
            names.append(str(path))
        else:
            raise UserError(f"--images: {path} does not exist. Give files of images, or folders of them.")
    return UnlabelledImages(Path(), names)
