"""Images in one folder per class: their listing, decoding, and the loader that passes on what is wrong with them."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader, Dataset, default_collate

from src.utils.errors import UserError

logger = logging.getLogger(__name__)


@functools.cache
def imagenet_synsets() -> dict[str, int]:
    """ImageNet-1k's synset names, `n01440764` to `n15075141`, with the output index of each (0 to 999)."""
    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def listing(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names in sorted order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def class_index(folder_names: Iterable[str], num_classes: int = 1000) -> dict[str, int]:
    """Give each class folder the index of the model's output that stands for it.

    Folders that are all named after ImageNet-1k synsets get the standard indices, so a subset of ImageNet's
    folders is labelled as the whole set is. Any other folders are numbered in sorted order.

    Args:
        folder_names: names of the class folders, in any order.
        num_classes: outputs of the model.

    Returns:
        Folder name to index in [0, num_classes), in sorted order of the names.

    Raises:
        UserError: no folders; synsets among other names; synsets and `num_classes` other than 1000; other names
            and their count is not `num_classes`.
    """
    names = sorted(set(folder_names))
    if not names:
        raise UserError("No class folders. Put the images in one folder per class.")
    synsets = imagenet_synsets()
    others = [name for name in names if name not in synsets]
    if not others:
        if num_classes != len(synsets):
            raise UserError(
                f"The class folders ({listing(names)}) are ImageNet-1k synsets, which stand for {len(synsets)} "
                f"classes, but the model has {num_classes}. Set model.num_classes={len(synsets)}, or rename the "
                "folders to have them numbered in sorted order."
            )
        return {name: synsets[name] for name in names}
    if len(others) < len(names):
        raise UserError(
            f"{len(others)} of {len(names)} class folders are not ImageNet-1k synsets, unlike the rest: "
            f"{listing(others)}. Remove or rename them: class folders are either all synsets "
            "(n01440764, ...) or all other names."
        )
    if len(names) != num_classes:
        raise UserError(
            f"{len(names)} class folders ({listing(names)}), but the model has {num_classes} classes. Set "
            f"model.num_classes={len(names)} and a checkpoint trained on these classes, or give the data the "
            "model was trained on."
        )
    return {name: index for index, name in enumerate(names)}


def scan_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files directly in `folder`, links followed, hidden ones left out.

    A link to nothing counts as a file: left out, it would change what is evaluated without a word.

    Args:
        folder: an existing folder.

    Returns:
        Names of the folders, names of the files.

    Raises:
        UserError: the folder cannot be read.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except PermissionError:
        raise UserError(f"{folder} cannot be read: permission denied. Grant it to the user who runs this.") from None
    return sorted(folders), sorted(files)


def load_rgb(path: Path) -> Image.Image:
    """Decode a whole image file, whatever its mode and format, to RGB as timm does.

    Args:
        path: the file.

    Returns:
        The image in mode RGB.

    Raises:
        UserError: the file cannot be read or is not an intact image.
    """
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    # Pillow's format plugins raise nearly anything on damaged input (OSError, SyntaxError, ValueError,
    # struct.error, DecompressionBombError, ...), and to the user each of them means the same.
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif path.stat().st_size == 0:
            reason = "the file is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not an image of a known format"
        else:
            reason = str(error) or type(error).__name__
        raise UserError(f"Cannot decode the image {path}: {reason}. Remove or replace the file.") from error


class ImageFolderDataset(Dataset):
    """The images of one split, `root/<class folder>/<file>`, in sorted order of folder, then file name.

    Every file of a class folder that is not hidden is taken as an image, whatever its extension (some of
    ImageNet's .JPEG files are PNG). Files beside the class folders, folders inside them and class folders
    without images are left out with a warning. Links are followed.

    Args:
        root: folder of the split, which holds the class folders; `~` is expanded.
        transform: from a PIL image in mode RGB to a tensor (3, size, size).
        num_classes: outputs of the model, see `class_index`.

    Attributes:
        root: the split's folder.
        classes: names of the class folders, sorted.
        class_to_index: class folder to target; position in `classes` and target differ for a subset of ImageNet.
        paths: images relative to `root`, with forward slashes.
        targets: class index of each image, in the order of `paths`.

    Raises:
        UserError: no class folders, no images, or class folders that do not fit `num_classes`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Image.Image], torch.Tensor],
        num_classes: int = 1000,
    ) -> None:
        self.root = Path(root).expanduser()
        self.transform = transform
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not a folder. Give the folder that holds the class folders.")
        self.classes, loose_files = scan_folder(self.root)
        if not self.classes:
            found = f"holds {len(loose_files)} files but no class folders" if loose_files else "is empty"
            raise UserError(
                f"{self.root} {found}. Put the images in one folder per class, such as "
                f"{self.root.name}/n01440764/ILSVRC2012_val_00000293.JPEG."
            )
        try:
            self.class_to_index = class_index(self.classes, num_classes)
        except UserError as error:
            raise UserError(f"{self.root}: {error}") from None

        self.paths: list[str] = []
        self.targets: list[int] = []
        without_images, nested = [], []
        for name in self.classes:
            folders, files = scan_folder(self.root / name)
            self.paths += [f"{name}/{file}" for file in files]
            self.targets += [self.class_to_index[name]] * len(files)
            nested += [f"{name}/{folder}" for folder in folders]
            if not files:
                without_images.append(name)
        if not self.paths:
            hint = f" (images further down, as in {listing(nested, 1)}, are not taken)" if nested else ""
            raise UserError(
                f"No images in the {len(self.classes)} class folders of {self.root}{hint}. "
                "Put the images directly in their class folder."
            )
        if without_images:
            logger.warning("%s: class folders without images: %s", self.root, listing(without_images))
        if nested:
            logger.warning("%s: folders inside class folders are left out: %s", self.root, listing(nested))
        if loose_files:
            logger.warning("%s: files outside class folders are left out: %s", self.root, listing(loose_files))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        """Decode and transform one image.

        Args:
            index: position in `paths`.

        Returns:
            image (3, size, size) as the transform gives it, target, and `index` itself.

        Raises:
            UserError: the file cannot be decoded.
        """
        return self.transform(self.decode(index)), self.targets[index], index

    def decode(self, index: int) -> Image.Image:
        """One image as it is, in mode RGB.

        Raises:
            UserError: the file cannot be decoded.
        """
        return load_rgb(self.root / self.paths[index])

    def subset(
        self, indices: Iterable[int], transform: Callable[[Image.Image], Any] | None = None
    ) -> ImageFolderDataset:
        """The images at `indices` of `paths`, in that order, under another transform where one is given."""
        indices = list(indices)
        part = copy.copy(self)
        part.paths = [self.paths[index] for index in indices]
        part.targets = [self.targets[index] for index in indices]
        part.transform = self.transform if transform is None else transform
        return part


class _ErrorsAsItems(Dataset):
    """A dataset whose `UserError`s are returned in place of the item, for `ImageLoader` to raise."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


def _collate(items: list[Any]) -> Any:
    """`default_collate`, or the first `UserError` among the items."""
    for item in items:
        if isinstance(item, UserError):
            return item
    return default_collate(items)


class ImageLoader(DataLoader):
    """A `DataLoader` in which a `UserError` of the dataset reaches the main process as it was raised.

    torch re-raises a worker's exception with the worker's traceback as its message. Here the error travels as the
    batch instead and is raised where the batch is asked for, so the first failing image in order is the
    one reported, with its short message, for any number of workers.

    Args:
        dataset: items as `ImageFolderDataset` gives them.
        **options: those of `torch.utils.data.DataLoader`, except `collate_fn`.
    """

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        super().__init__(_ErrorsAsItems(dataset), collate_fn=_collate, **options)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Yield images (B, 3, size, size), targets (B,) int64 and positions in the dataset (B,) int64."""
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    # its traceback leads back to it: left to the garbage collector, workers take seconds each to stop
                    del batch
            yield batch
