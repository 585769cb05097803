"""Images in one folder per class, as ImageNet is usually unpacked.

    data_dir/
      train/
        n01440764/n01440764_10026.JPEG ...
        n01443537/...
      val/
        n01440764/ILSVRC2012_val_00000293.JPEG ...
        n01443537/...

The transforms are timm's. In evaluation every image is counted exactly once, on any number of processes; in training
order and augmentation follow from the seed alone. Whatever can be wrong with a user's folder is a `UserError`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, create_transform
from torch.utils.data import DataLoader, Dataset, default_collate

from src.datamodules.augmentation import Augmentation, seed_augmentation
from src.datamodules.sampling import ShardedSampler, TrainingSampler, derive_seed
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
        images: the decoded images, in the order of `paths`, once `keep_images` was called; None before.

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
        self.images: list[Image.Image] | None = None
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
        image = load_rgb(self.root / self.paths[index]) if self.images is None else self.images[index]
        return self.transform(image), self.targets[index], index

    def keep_images(self) -> None:
        """Decode all images once and keep them in memory, which worker processes then share.

        Raises:
            UserError: a file cannot be decoded.
        """
        if self.images is None:
            self.images = [load_rgb(self.root / path) for path in self.paths]

    def subset(
        self, indices: Iterable[int], transform: Callable[[Image.Image], Any] | None = None
    ) -> ImageFolderDataset:
        """The images at `indices` of `paths`, in that order, under another transform where one is given."""
        part = copy.copy(self)
        part.paths = [self.paths[index] for index in indices]
        part.targets = [self.targets[index] for index in indices]
        part.transform = self.transform if transform is None else transform
        return part


class _AugmentedDataset(Dataset):
    """A dataset whose items are asked for with the seed of their augmentation."""

    def __init__(self, dataset: ImageFolderDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, int, int]:
        """The augmented image, its target, and the seed."""
        index, seed = item
        seed_augmentation(seed)
        image, target, _ = self.dataset[index]
        return image, target, seed


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
    """A folder of images, `data_dir/<split>/<class folder>/<file>`, for evaluation and training.

    In evaluation images are resized, centre-cropped and normalised by timm's evaluation transform: the shorter side
    to floor(image_size / crop_pct) pixels, the centre image_size x image_size kept. In training they are augmented,
    see `Augmentation`: workers crop and distort single images, the device normalises, erases and mixes whole batches.

    Attached to a trainer of several processes, each process reads its own part of the images (`ShardedSampler`,
    `TrainingSampler`); the trainer must be built with `use_distributed_sampler=False`.

    Args:
        data_dir: folder that holds the splits' folders; `~` is expanded. Needed from `setup` on.
        image_size: side of the model's input in pixels.
        num_classes: outputs of the model, see `class_index`.
        batch_size: images per batch and process.
        num_workers: worker processes that decode images, per process; 0 decodes in the process itself, None takes
            as many as the process has CPUs, at most 16.
        interpolation: of the resize, one of bicubic, bilinear, box, hamming, lanczos, nearest.
        crop_pct: part of the resized shorter side that the crop keeps, in (0, 1].
        mean: per colour, of values in [0, 1], subtracted; default ImageNet's.
        std: per colour, divided by; default ImageNet's.
        test_split: name of the folder in `data_dir` that is evaluated, and that training is watched on.
        train_split: name of the folder in `data_dir` that is trained on.
        holdout: part of each class's training images, in [0, 1), that is kept from training, and on which it is
            watched in place of `test_split`: settings are chosen so without a look at the test images.
        passes_per_epoch: passes over the training images in an epoch. With few images one pass is over before the
            workers have got going.
        keep_in_memory: decode the training images once, not in every pass; takes three bytes a pixel.
        seed: of the training images' order and augmentation, and of the choice of `holdout`.
        augmentation: options of `Augmentation`; None takes its defaults.
        pin_memory: batches in page-locked memory, for a faster copy to the GPU; None does so if CUDA is available.

    Attributes:
        test_dataset: an `ImageFolderDataset` once `setup` has run, None before.
        train_dataset: likewise, of what is trained on, augmented; None unless `setup("fit")` has run.
        val_dataset: likewise, of what training is watched on.

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
        train_split: str = "train",
        holdout: float = 0.0,
        passes_per_epoch: int = 1,
        keep_in_memory: bool = False,
        seed: int = 0,
        augmentation: Mapping[str, Any] | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        check_whole_number("datamodule.image_size", image_size, 1)
        check_whole_number("datamodule.num_classes", num_classes, 1)
        check_whole_number("datamodule.batch_size", batch_size, 1)
        check_whole_number("datamodule.passes_per_epoch", passes_per_epoch, 1)
        check_whole_number("datamodule.seed", seed, 0)
        if num_workers is not None:
            check_whole_number("datamodule.num_workers", num_workers, 0)
        if interpolation not in _INTERPOLATIONS:
            raise UserError(
                f"datamodule.interpolation={interpolation!r} is not valid. "
                f"{did_you_mean(interpolation, _INTERPOLATIONS)}"
            )
        if isinstance(crop_pct, bool) or not isinstance(crop_pct, (int, float)) or not 0 < crop_pct <= 1:
            raise UserError(f"datamodule.crop_pct={crop_pct!r} is not valid. Give a number above 0 and at most 1.")
        if isinstance(holdout, bool) or not isinstance(holdout, (int, float)) or not 0 <= holdout < 1:
            raise UserError(f"datamodule.holdout={holdout!r} is not valid. Give a number of at least 0 and below 1.")
        mean = _three_numbers("datamodule.mean", mean)
        std = _three_numbers("datamodule.std", std)
        if min(std) <= 0:
            raise UserError(f"datamodule.std={std!r} is not valid. Give three numbers above 0.")
        if not isinstance(keep_in_memory, bool):
            raise UserError(f"datamodule.keep_in_memory={keep_in_memory!r} is not valid. Give true or false.")
        for option, split in (("test_split", test_split), ("train_split", train_split)):
            if not isinstance(split, str) or not split:
                raise UserError(f"datamodule.{option}={split!r} is not valid. Give a folder's name, such as val.")
        self.data_dir = data_dir
        self.image_size = image_size
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.num_workers = min(16, _usable_cpus()) if num_workers is None else num_workers
        self.test_split = test_split
        self.train_split = train_split
        self.holdout = holdout
        self.passes_per_epoch = passes_per_epoch
        self.keep_in_memory = keep_in_memory
        self.seed = seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else bool(pin_memory)
        self.test_transform = create_transform(
            input_size=image_size,
            is_training=False,
            interpolation=interpolation,
            crop_pct=crop_pct,
            mean=mean,
            std=std,
        )
        self._augmentation_options = {"interpolation": interpolation, **(augmentation or {}), "mean": mean, "std": std}
        self.augmentation: Augmentation | None = None
        self.test_dataset: ImageFolderDataset | None = None
        self.train_dataset: ImageFolderDataset | None = None
        self.val_dataset: ImageFolderDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """List the images of the splits that a stage needs, once; a later call keeps them.

        Args:
            stage: `"fit"` for training and the images it is watched on; anything else for the test split.

        Raises:
            UserError: `data_dir` is not given, it or a split's folder is missing, see `ImageFolderDataset`; for
                training, also an augmentation that is not valid, or splits of different classes.
        """
        if stage != "fit":
            if self.test_dataset is None:
                self.test_dataset = self._dataset("test_split", self.test_transform)
        elif self.train_dataset is None:
            self._setup_training()

    def _setup_training(self) -> None:
        try:
            self.augmentation = Augmentation(self.image_size, self.num_classes, **self._augmentation_options)
        except TypeError:
            known = [name for name in inspect.signature(Augmentation).parameters if name != "self"]
            unknown = next(name for name in self._augmentation_options if name not in known)
            raise UserError(
                f"There is no option datamodule.augmentation.{unknown}. {did_you_mean(unknown, known)}"
            ) from None
        if self.augmentation.mixes and self.batch_size % 2:
            raise UserError(
                f"datamodule.batch_size={self.batch_size} has to be even, since images are mixed in pairs. Or leave "
                "mixing out: datamodule.augmentation.mixup_prob=0"
            )
        images = self._dataset("train_split", self.augmentation.transform)
        if self.holdout > 0:
            kept, held = _hold_out(images.targets, self.holdout, self.seed)
            if not kept or not held:
                raise UserError(
                    f"datamodule.holdout={self.holdout} of {len(images)} images leaves nothing to "
                    f"{'watch' if kept else 'train'} on. Choose another part."
                )
            self.train_dataset = images.subset(kept)
            self.val_dataset = images.subset(held, self.test_transform)
            return
        self.val_dataset = self._dataset("test_split", self.test_transform)
        if self.val_dataset.class_to_index != images.class_to_index:
            different = set(self.val_dataset.class_to_index.items()) ^ set(images.class_to_index.items())
            # a subset of ImageNet's folders keeps its indices: the other splits may well lack some
            if any(name not in _imagenet_synsets() for name, _ in different):
                raise UserError(
                    f"{images.root} and {self.val_dataset.root} do not hold the same class folders: "
                    f"{_listing({name for name, _ in different})}. Give both the same."
                )
        self.train_dataset = images

    def num_train_batches(self, world_size: int = 1) -> int:
        """Batches of an epoch on each of `world_size` processes, once `setup("fit")` has run."""
        return len(self._train_sampler(world_size=world_size)) // self.batch_size

    def _train_sampler(self, **options: int) -> TrainingSampler:
        return TrainingSampler(
            len(self.train_dataset), self.batch_size, self.seed, passes=self.passes_per_epoch, **options
        )

    def train_dataloader(self) -> ImageLoader:
        """Augmented batches of this process's part of the training images, beginning where the trainer stands.

        Returns:
            A loader of images (B, 3, size, size) uint8, targets (B,) int64 and seeds (B,) int64; the hooks below make
            the first two what `Augmentation.finish` returns.

        Raises:
            UserError: see `setup`; fewer images than a batch.
        """
        self.setup("fit")
        rank, world_size = self._place()
        updates, accumulate = (
            (self.trainer.global_step, self.trainer.accumulate_grad_batches) if self.trainer else (0, 1)
        )
        num_batches = self.num_train_batches(world_size)
        if self.keep_in_memory:
            self.train_dataset.keep_images()
        # an update takes `accumulate` batches, the last one of an epoch what is left
        epoch, updates = divmod(updates, math.ceil(num_batches / accumulate))
        return ImageLoader(
            _AugmentedDataset(self.train_dataset),
            batch_size=self.batch_size,
            sampler=self._train_sampler(
                rank=rank, world_size=world_size, epoch=epoch, skip_batches=updates * accumulate
            ),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
        )

    def on_before_batch_transfer(self, batch: list[torch.Tensor], dataloader_idx: int) -> list[torch.Tensor]:
        """Take the seeds out of a training batch while they can be read without waiting for the device."""
        if not (self.trainer and self.trainer.training):
            return batch
        images, targets, seeds = batch
        # what follows on the device, dropout included, draws from these
        seed = derive_seed(int(seeds[0]), self.trainer.global_rank)
        seed_augmentation(seed)
        torch.manual_seed(seed)
        return [images, targets]

    def on_after_batch_transfer(self, batch: list[torch.Tensor], dataloader_idx: int) -> list[torch.Tensor]:
        """Finish the augmentation of a training batch on the device."""
        if not (self.trainer and self.trainer.training):
            return batch
        return list(self.augmentation.finish(*batch))

    def val_dataloader(self) -> ImageLoader:
        """Batches of this process's part of the images that training is watched on; see `test_dataloader`."""
        self.setup("fit")
        return self._evaluation_loader(self.val_dataset)

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
        return self._evaluation_loader(self.test_dataset)

    def _evaluation_loader(self, dataset: ImageFolderDataset) -> ImageLoader:
        return ImageLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=ShardedSampler(len(dataset), *self._place()),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def _place(self) -> tuple[int, int]:
        """Rank of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _dataset(self, option: str, transform: Callable[[Image.Image], Any]) -> ImageFolderDataset:
        return ImageFolderDataset(self._split_folder(option), transform, self.num_classes)

    def _split_folder(self, option: str) -> Path:
        """The folder of the split that `option` names, or a `UserError` that says what is there in its place."""
        split = getattr(self, option)
        # "???" is OmegaConf's mark of a value not given.
        if self.data_dir is None or str(self.data_dir) in ("", "???"):
            raise UserError(
                f"No data folder given. Give datamodule.data_dir=/path, the folder that holds '{split}', "
                "or set DATA_DIR=/path in the file .env."
            )
        data_dir = Path(self.data_dir).expanduser().absolute()
        if not data_dir.is_dir():
            fault = "is a file, not a folder" if data_dir.exists() else "does not exist"
            raise UserError(
                f"The data folder {data_dir} {fault}. Give datamodule.data_dir (or DATA_DIR in the file .env) "
                f"the folder that holds '{split}'."
            )
        split_folder = data_dir / split
        if split_folder.is_dir():
            return split_folder

        folders, _ = scan_folder(data_dir)
        if _looks_like_split(data_dir, folders):
            name = "" if data_dir.name == split else f" datamodule.{option}={data_dir.name}"
            raise UserError(
                f"No folder '{split}' in {data_dir}, which looks like a split itself (class folders "
                f"{_listing(folders)}). Give its parent: datamodule.data_dir={data_dir.parent}{name}"
            )
        raise UserError(
            f"No folder '{split}' in {data_dir}; the folders there: {_listing(folders, 10) or 'none'}. "
            f"Give datamodule.data_dir the folder that holds '{split}', or name another "
            f"split with datamodule.{option}=..."
        )


def _hold_out(targets: Sequence[int], part: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions to train on and positions held out, both ascending: `part` of each class, rounded, drawn by `seed`."""
    generator = np.random.default_rng(seed)
    targets = np.asarray(targets)
    held = np.zeros(len(targets), dtype=bool)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        held[generator.permutation(members)[: round(part * len(members))]] = True
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def _looks_like_split(folder: Path, subfolders: Sequence[str]) -> bool:
    """Whether `folder` holds class folders: synsets by name, or two and more folders that all hold files."""
    if any(name in _imagenet_synsets() for name in subfolders):
        return True
    # A few folders tell; a wrong data_dir may hold very many.
    return len(subfolders) > 1 and all(scan_folder(folder / name)[1] for name in subfolders[:5])
