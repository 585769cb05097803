"""Images in one folder per class, as ImageNet's validation set is usually unpacked, for evaluation.

    data_dir/
      val/
        n01440764/ILSVRC2012_val_00000293.JPEG ...
        n01443537/...

The transform is timm's own evaluation transform, and every image is counted exactly once, on any number of
processes. Whatever can be wrong with a user's folder is a `UserError`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, create_transform
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from src.utils.errors import UserError, check_whole_number, did_you_mean

logger = logging.getLogger(__name__)

# What torchvision's resize takes on PIL images; timm's "random" is for training only.
_INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")


@functools.cache
def _imagenet_synsets() -> dict[str, int]:
    """ImageNet-1k's synset names, `n01440764` to `n15075141`, with the output index of each (0 to 999)."""
    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _listing(names: Iterable[str], limit: int = 5) -> str:
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
    synsets = _imagenet_synsets()
    others = [name for name in names if name not in synsets]
    if not others:
        if num_classes != len(synsets):
            raise UserError(
                f"The class folders ({_listing(names)}) are ImageNet-1k synsets, which stand for {len(synsets)} "
                f"classes, but the model has {num_classes}. Set model.num_classes={len(synsets)}, or rename the "
                "folders to have them numbered in sorted order."
            )
        return {name: synsets[name] for name in names}
    if len(others) < len(names):
        raise UserError(
            f"{len(others)} of {len(names)} class folders are not ImageNet-1k synsets, unlike the rest: "
            f"{_listing(others)}. Remove or rename them: class folders are either all synsets "
            "(n01440764, ...) or all other names."
        )
    if len(names) != num_classes:
        raise UserError(
            f"{len(names)} class folders ({_listing(names)}), but the model has {num_classes} classes. Set "
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
        transform: from a PIL image in mode RGB to a float32 tensor (3, size, size).
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
            hint = f" (images further down, as in {_listing(nested, 1)}, are not taken)" if nested else ""
            raise UserError(
                f"No images in the {len(self.classes)} class folders of {self.root}{hint}. "
                "Put the images directly in their class folder."
            )
        if without_images:
            logger.warning("%s: class folders without images: %s", self.root, _listing(without_images))
        if nested:
            logger.warning("%s: folders inside class folders are left out: %s", self.root, _listing(nested))
        if loose_files:
            logger.warning("%s: files outside class folders are left out: %s", self.root, _listing(loose_files))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        """Decode and transform one image.

        Args:
            index: position in `paths`.

        Returns:
            image (3, size, size) float32, target, and `index` itself.

        Raises:
            UserError: the file cannot be decoded.
        """
        image = load_rgb(self.root / self.paths[index])
        return self.transform(image), self.targets[index], index


class ShardedSampler(Sampler[int]):
    """The indices rank, rank + world_size, rank + 2 world_size, ... below `size`.

    Over all ranks each index comes exactly once: nothing is padded, which would count some images twice, nor
    dropped. Ranks may therefore differ by one index, and so in their number of batches: collectives belong at the
    end of the epoch, not in a step.

    Args:
        size: number of images.
        rank: this process, in [0, world_size).
        world_size: number of processes.

    Raises:
        UserError: fewer images than processes.
        ValueError: rank outside [0, world_size).
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"Expected a rank in [0, {world_size}), got {rank}.")
        if size < world_size:
            raise UserError(
                f"{size} images cannot be shared among {world_size} processes. Lower trainer.devices, to {size} "
                "processes at most."
            )
        self._indices = range(rank, size, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


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
        """Yield images (B, 3, size, size) float32, targets (B,) int64 and positions in the dataset (B,) int64."""
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _three_numbers(option: str, values: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"{option}={values!r} is not valid. Give three numbers, one per colour.") from None
    return red, green, blue


def _usable_cpus() -> int:
    # sched_getaffinity knows of taskset and of containers pinned to CPUs, but does not exist on every system.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ImageFolderDataModule(pl.LightningDataModule):
    """The test split of a folder of images, `data_dir/<test_split>/<class folder>/<file>`.

    Images are resized, centre-cropped and normalised by timm's evaluation transform: the shorter side to
    floor(image_size / crop_pct) pixels, the centre image_size x image_size kept.

    Attached to a trainer of several processes, each process reads its own part of the images
    (`ShardedSampler`); the trainer must be built with `use_distributed_sampler=False`.

    Args:
        data_dir: folder that holds the split's folder; `~` is expanded. Needed from `setup` on.
        image_size: side of the model's input in pixels.
        num_classes: outputs of the model, see `class_index`.
        batch_size: images per batch and process.
        num_workers: worker processes that decode images, per process; 0 decodes in the process itself, None takes
            as many as the process has CPUs, at most 8.
        interpolation: of the resize, one of bicubic, bilinear, box, hamming, lanczos, nearest.
        crop_pct: part of the resized shorter side that the crop keeps, in (0, 1].
        mean: per colour, of values in [0, 1], subtracted; default ImageNet's.
        std: per colour, divided by; default ImageNet's.
        test_split: name of the split's folder in `data_dir`.
        pin_memory: batches in page-locked memory, for a faster copy to the GPU; None does so if CUDA is available.

    Attributes:
        test_dataset: an `ImageFolderDataset` once `setup` has run, None before.

    Raises:
        UserError: a value that is not valid; the message names the option.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        image_size: int = 224,
        num_classes: int = 1000,
        batch_size: int = 128,
        num_workers: int | None = None,
        interpolation: str = "bicubic",
        crop_pct: float = 0.9,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        test_split: str = "val",
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        check_whole_number("datamodule.image_size", image_size, 1)
        check_whole_number("datamodule.num_classes", num_classes, 1)
        check_whole_number("datamodule.batch_size", batch_size, 1)
        if num_workers is not None:
            check_whole_number("datamodule.num_workers", num_workers, 0)
        if interpolation not in _INTERPOLATIONS:
            raise UserError(
                f"datamodule.interpolation={interpolation!r} is not valid. "
                f"{did_you_mean(interpolation, _INTERPOLATIONS)}"
            )
        if isinstance(crop_pct, bool) or not isinstance(crop_pct, (int, float)) or not 0 < crop_pct <= 1:
            raise UserError(f"datamodule.crop_pct={crop_pct!r} is not valid. Give a number above 0 and at most 1.")
        mean = _three_numbers("datamodule.mean", mean)
        std = _three_numbers("datamodule.std", std)
        if min(std) <= 0:
            raise UserError(f"datamodule.std={std!r} is not valid. Give three numbers above 0.")
        if not isinstance(test_split, str) or not test_split:
            raise UserError(f"datamodule.test_split={test_split!r} is not valid. Give a folder's name, such as val.")
        self.data_dir = data_dir
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.num_workers = min(8, _usable_cpus()) if num_workers is None else num_workers
        self.test_split = test_split
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else bool(pin_memory)
        self.test_transform = create_transform(
            input_size=image_size,
            is_training=False,
            interpolation=interpolation,
            crop_pct=crop_pct,
            mean=mean,
            std=std,
        )
        self.test_dataset: ImageFolderDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """List the test split's images, once; a later call keeps them.

        Args:
            stage: Lightning's name of what is about to run; the test split is the same for all.

        Raises:
            UserError: `data_dir` is not given, it or the split's folder is missing, or see `ImageFolderDataset`.
        """
        if self.test_dataset is None:
            self.test_dataset = ImageFolderDataset(self._split_folder(), self.test_transform, self.num_classes)

    def test_dataloader(self) -> ImageLoader:
        """Batches of this process's part of the test split, in path order; `setup` is run if it has not been.

        Returns:
            A loader of images (B, 3, size, size) float32, targets (B,) int64 and positions in
            `test_dataset` (B,) int64. The last batch may be smaller. A file that cannot be decoded
            is a `UserError` when its batch is reached.

        Raises:
            UserError: see `setup`; fewer images than processes.
        """
        self.setup("test")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return ImageLoader(
            self.test_dataset,
            batch_size=self.batch_size,
            sampler=ShardedSampler(len(self.test_dataset), rank, world_size),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def _split_folder(self) -> Path:
        """The test split's folder, or a `UserError` that says what is there in its place."""
        # "???" is OmegaConf's mark of a value not given.
        if self.data_dir is None or str(self.data_dir) in ("", "???"):
            raise UserError(
                f"No data folder given. Give datamodule.data_dir=/path, the folder that holds '{self.test_split}', "
                "or set DATA_DIR=/path in the file .env."
            )
        data_dir = Path(self.data_dir).expanduser().absolute()
        if not data_dir.is_dir():
            fault = "is a file, not a folder" if data_dir.exists() else "does not exist"
            raise UserError(
                f"The data folder {data_dir} {fault}. Give datamodule.data_dir (or DATA_DIR in the file .env) "
                f"the folder that holds '{self.test_split}'."
            )
        split_folder = data_dir / self.test_split
        if split_folder.is_dir():
            return split_folder

        folders, _ = scan_folder(data_dir)
        if _looks_like_split(data_dir, folders):
            split = "" if data_dir.name == self.test_split else f" datamodule.test_split={data_dir.name}"
            raise UserError(
                f"No folder '{self.test_split}' in {data_dir}, which looks like a split itself (class folders "
                f"{_listing(folders)}). Give its parent: datamodule.data_dir={data_dir.parent}{split}"
            )
        raise UserError(
            f"No folder '{self.test_split}' in {data_dir}; the folders there: {_listing(folders, 10) or 'none'}. "
            f"Give datamodule.data_dir the folder that holds '{self.test_split}', or name another "
            "split with datamodule.test_split=..."
        )


def _looks_like_split(folder: Path, subfolders: Sequence[str]) -> bool:
    """Whether `folder` holds class folders: synsets by name, or two and more folders that all hold files."""
    if any(name in _imagenet_synsets() for name in subfolders):
        return True
    # A few folders tell; a wrong data_dir may hold very many.
    return len(subfolders) > 1 and all(scan_folder(folder / name)[1] for name in subfolders[:5])
