"""Data module for ImageNet, a subset of it, or other images, in class folders or another format.

    data_dir/
      train/
        n01440764/n01440764_10026.JPEG ...
        n01443537/...
      val/
        n01440764/ILSVRC2012_val_00000293.JPEG ...
        n01443537/...

or flat folders, tar archives, WebDataset shards, Parquet or CSV files, see `src.datamodules.formats`. All formats give
the same classes and the same predictions.

The transforms are timm's. In evaluation every image counts exactly once, on any number of processes; in training order
and augmentation depend only on the seed. Errors in a user's data are a `UserError`.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from scatterbrain.errors import UserError, check_switch, check_whole_number, did_you_mean, is_number
from src.datamodules.augmentation import INTERPOLATIONS, Augmentation, AugmentedDataset, seed_augmentation
from src.datamodules.base import ClassificationDataModule
from src.datamodules.cache import CachedImages, CachedLoader, DecodedCache
from src.datamodules.dataset import ImageDataset, ImageLoader
from src.datamodules.device_augmentation import decode_images
from src.datamodules.formats import ClassNumbering, check_format, imagenet_synsets, open_listing
from src.datamodules.sampling import ShardedSampler, TrainingSampler, derive_seed, hold_out
from src.utils.machine import usable_cpus
from src.utils.text import abbreviate

# Options of datamodule.augmentation; the other arguments are options of the data module itself.
_AUGMENTATION_OPTIONS = [
    name
    for name in inspect.signature(Augmentation).parameters
    if name not in ("image_size", "num_classes", "mean", "std", "on_device")
]
ON_ERROR = ("raise", "skip")


class ImageFolderDataModule(ClassificationDataModule):
    """Images in `data_dir`, by default `data_dir/<split>/<class folder>/<file>`, for evaluation and training.

    In evaluation timm's transform resizes the shorter side to floor(image_size / crop_pct) pixels, keeps the central
    image_size x image_size and normalises. In training images are augmented, see `Augmentation`: workers crop and
    distort single images, the device normalises, erases and mixes whole batches.

    With a trainer of several processes, each process reads its own part of the images (`ShardedSampler`,
    `TrainingSampler`); build the trainer with `use_distributed_sampler=False`.

    Args:
        data_dir: folder that holds the splits' folders; `~` is expanded. Required by `setup`.
        image_size: side of the model's input in pixels.
        num_classes: outputs of the model, see `class_index`.
        batch_size: images per batch and process.
        num_workers: worker processes that decode images, per process, or threads that read cached images; 0 decodes
            and reads in the process itself, None takes the number of usable CPUs, at most 16.
        interpolation: of the resize, one of bicubic, bilinear, box, hamming, lanczos, nearest.
        crop_pct: fraction of the resized shorter side that the crop keeps, in (0, 1].
        mean: mean per colour channel, of values in [0, 1]; default ImageNet's.
        std: standard deviation per colour channel; default ImageNet's.
        test_split: split for evaluation, and for validation in training: name of a folder in `data_dir`, prefix of
            the files of other formats, or the files themselves (`val-{00..63}.tar`).
        train_split: split for training, likewise.
        holdout: fraction of each class's training images, in [0, 1), that is used for validation in place of
            `test_split`, so that settings can be chosen without the test images.
        passes_per_epoch: passes over the training images in an epoch; for small data sets, whose single pass is
            shorter than the start of the workers.
        shuffle_shards: number of shards (archives, or row groups of Parquet files) whose training images are shuffled
            together, so that a slow disk reads nearly sequentially; each image still comes once per pass. None
            shuffles all images. Not for shards of one class each: batches would have few classes.
        on_device: decode the training images once, keep them in the device's memory, and augment them there, which is
            faster than workers for data sets that fit. Images are kept as uint8 squares of `image_size` * 8 / 7
            pixels.
        seed: of the training images' order and augmentation, and of the choice of `holdout`.
        augmentation: options of `Augmentation`; None takes its defaults.
        pin_memory: batches in page-locked memory, for a faster copy to the GPU; None does so if CUDA is available.
        format: format of the splits, one of `FORMATS`; `"auto"` recognises it.
        cache_dir: folder for evaluation images after resize and crop, decoded when they are first needed, see
            `src.datamodules.cache`; `~` is expanded, None for no cache. Training images are not cached, since each
            epoch crops them differently.
        on_error: what an evaluation does with an image that cannot be decoded: `"raise"` ends it with an error that
            names the image, `"skip"` leaves the image out. An error of more than one image, such as a truncated
            archive, is always raised. Training refuses `"skip"`.
        class_order: order in which the classes are numbered, see `ClassNumbering`.
        labels: indices of classes named after ImageNet-1k synsets, or `"none"` for image files in a folder without
            classes, see `ClassNumbering`. Training refuses `"none"`.
        max_image_pixels: largest width times height of an image in a file; None is Pillow's limit, see `load_rgb`.

    Attributes:
        test_dataset: an `ImageDataset` after `setup`, None before.
        train_dataset: augmented training images after `setup("fit")`, None before.
        val_dataset: validation images after `setup("fit")`, None before.

    Raises:
        UserError: an invalid value; the message names the option.
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
        shuffle_shards: int | None = None,
        on_device: bool = False,
        seed: int = 0,
        augmentation: Mapping[str, Any] | None = None,
        pin_memory: bool | None = None,
        format: str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        on_error: str = "raise",
        class_order: str = "sorted",
        labels: str = "auto",
        max_image_pixels: int | None = None,
    ) -> None:
        super().__init__(image_size, num_classes, batch_size, seed, mean, std, pin_memory)
        check_whole_number("datamodule.passes_per_epoch", passes_per_epoch, 1)
        if shuffle_shards is not None:
            check_whole_number("datamodule.shuffle_shards", shuffle_shards, 1)
        if num_workers is not None:
            check_whole_number("datamodule.num_workers", num_workers, 0)
        if max_image_pixels is not None:
            check_whole_number("datamodule.max_image_pixels", max_image_pixels, 1)
        if interpolation not in INTERPOLATIONS:
            raise UserError(
                f"datamodule.interpolation={interpolation!r} is not valid. "
                f"{did_you_mean(interpolation, INTERPOLATIONS)}"
            )
        if not is_number(crop_pct) or not 0 < crop_pct <= 1:
            raise UserError(f"datamodule.crop_pct={crop_pct!r} is not valid. Give a number above 0 and at most 1.")
        if not is_number(holdout) or not 0 <= holdout < 1:
            raise UserError(f"datamodule.holdout={holdout!r} is not valid. Give a number of at least 0 and below 1.")
        check_switch("datamodule.on_device", on_device)
        check_format(format)
        for option, split in (("test_split", test_split), ("train_split", train_split)):
            if not isinstance(split, str) or not split:
                raise UserError(f"datamodule.{option}={split!r} is not valid. Give a folder's name, such as val.")
        if cache_dir is not None and (not isinstance(cache_dir, str | os.PathLike) or not os.fspath(cache_dir)):
            raise UserError(f"datamodule.cache_dir={cache_dir!r} is not valid. Give a folder, or null for no cache.")
        if on_error not in ON_ERROR:
            raise UserError(f"datamodule.on_error={on_error!r} is not valid. {did_you_mean(on_error, ON_ERROR)}")
        self.class_numbering = ClassNumbering(class_order, labels)
        self.data_dir = data_dir
        self.num_workers = min(16, usable_cpus()) if num_workers is None else num_workers
        self.test_split = test_split
        self.train_split = train_split
        self.format = format
        self.cache_dir = cache_dir
        self.on_error = on_error
        self.holdout = holdout
        self.passes_per_epoch = passes_per_epoch
        self.shuffle_shards = shuffle_shards
        self.on_device = on_device
        options = {"input_size": image_size, "is_training": False, "interpolation": interpolation, "crop_pct": crop_pct}
        self.test_transform = create_transform(**options, mean=self.mean, std=self.std)
        # use_prefetcher leaves the normalisation to the device
        self._test_pixels = create_transform(**options, use_prefetcher=True)
        self._pixel_options = {"image_size": image_size, "crop_pct": float(crop_pct), "interpolation": interpolation}
        if max_image_pixels is not None:  # decides which images are missing in a cache
            self._pixel_options["max_image_pixels"] = max_image_pixels
        self.max_image_pixels = max_image_pixels
        self._augmentation_options = {"interpolation": interpolation, **(augmentation or {})}
        self.augmentation: Augmentation | None = None
        # with on_device: the training images as squares, and their original aspect ratios
        self._images: torch.Tensor | None = None
        self._aspects: torch.Tensor | None = None
        self.test_dataset: ImageDataset | None = None
        self.train_dataset: ImageDataset | None = None
        self.val_dataset: ImageDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """List the images of the splits that a stage needs, on the first call.

        Args:
            stage: `"fit"` for training and validation images; anything else for the test split.

        Raises:
            UserError: `data_dir` is not given, it or a split is missing or invalid; for training, also an invalid
                augmentation, splits of different classes, `on_error="skip"` or `labels="none"`.
        """
        if stage != "fit":
            if self.test_dataset is None:
                self.test_dataset = self._dataset("test_split", self.test_transform)
        elif self.train_dataset is None:
            self._setup_training()

    def _setup_training(self) -> None:
        if self.on_error != "raise":
            raise UserError(
                f"datamodule.on_error={self.on_error} is for evaluation: training uses all of its images. "
                "python scripts/check_imagenet.py DIR --decode names those that cannot be decoded: remove or replace "
                "them, and leave datamodule.on_error out."
            )
        if not self.class_numbering.labelled:
            raise UserError("datamodule.labels=none is for evaluation: training needs labels. Leave it out.")
        for name in self._augmentation_options:
            if name not in _AUGMENTATION_OPTIONS:
                raise UserError(
                    f"There is no option datamodule.augmentation.{name}. {did_you_mean(name, _AUGMENTATION_OPTIONS)}"
                )
        self.augmentation = Augmentation(
            self.image_size,
            self.num_classes,
            self.mean,
            self.std,
            on_device=self.on_device,
            **self._augmentation_options,
        )
        if self.augmentation.mixes and self.batch_size % 2:
            raise UserError(
                f"datamodule.batch_size={self.batch_size} has to be even, since images are mixed in pairs. Or turn "
                "mixing off: datamodule.augmentation.mixup_prob=0"
            )
        images = self._dataset("train_split", self.augmentation.transform)
        if self.holdout > 0:
            kept, held = hold_out(images.targets, self.holdout, self.seed)
            if not kept or not held:
                raise UserError(
                    f"datamodule.holdout={self.holdout} of {len(images)} images leaves nothing to "
                    f"{'validate' if kept else 'train'} on. Choose another fraction."
                )
            self.train_dataset = images.subset(kept)
            self.val_dataset = images.subset(held, self.test_transform)
            return
        self.val_dataset = self._dataset("test_split", self.test_transform)
        if self.val_dataset.class_to_index != images.class_to_index:
            different = set(self.val_dataset.class_to_index.items()) ^ set(images.class_to_index.items())
            # a subset of ImageNet's classes, or of those in a file, keeps its indices: another split may lack some
            if not self.class_numbering.from_file and any(
                imagenet_synsets().get(name) != index for name, index in different
            ):
                raise UserError(
                    f"{images.root} and {self.val_dataset.root} do not hold the same class folders: "
                    f"{abbreviate({name for name, _ in different})}. Give both the same."
                )
        self.train_dataset = images

    def num_train_batches(self, world_size: int = 1) -> int:
        """Batches of an epoch on each of `world_size` processes; needs `setup("fit")`."""
        return len(self._train_sampler(world_size=world_size)) // self.batch_size

    def _train_sampler(self, **options: Any) -> TrainingSampler:
        images = self.train_dataset
        if self.shuffle_shards is not None:
            shards = images.listing.shards()
            if shards is None:
                raise UserError(
                    f"datamodule.shuffle_shards={self.shuffle_shards}, but {images.root} holds its images as separate "
                    "files, not in shards. Leave it out, or give data in one of the formats tar, webdataset and "
                    "parquet."
                )
            if len(images) < len(shards):  # without held-out images
                shard_of = dict(zip(images.listing.names, shards.tolist(), strict=True))
                shards = [shard_of[name] for name in images.paths]
            images.listing.keep_shards(self.shuffle_shards)
            options |= {"shards": shards, "shuffle_shards": self.shuffle_shards}
        return TrainingSampler(len(images), self.batch_size, self.seed, passes=self.passes_per_epoch, **options)

    def train_dataloader(self) -> ImageLoader:
        """Augmented batches of this process's part of the training images, starting at the trainer's current step.

        Returns:
            A loader of images (B, 3, size, size) uint8 or with `on_device` their indices (B,), targets (B,) int64 and
            seeds (B,) int64; the hooks below replace the first two by the results of `Augmentation.finish`.

        Raises:
            UserError: see `setup`; fewer images than a batch.
        """
        self.setup("fit")
        rank, world_size = self.rank_and_world_size()
        updates, accumulate = (
            (self.trainer.global_step, self.trainer.accumulate_grad_batches) if self.trainer else (0, 1)
        )
        num_batches = self.num_train_batches(world_size)
        if self.on_device and self._images is None:
            self._images, self._aspects = decode_images(self.train_dataset, self.image_size * 8 // 7)
        num_workers = 0 if self.on_device else self.num_workers
        # an update takes `accumulate` batches, the last one of an epoch possibly fewer
        epoch, updates = divmod(updates, math.ceil(num_batches / accumulate))
        return ImageLoader(
            AugmentedDataset(self.train_dataset, decode=not self.on_device),
            batch_size=self.batch_size,
            sampler=self._train_sampler(
                rank=rank, world_size=world_size, epoch=epoch, skip_batches=updates * accumulate
            ),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=self.pin_memory,
        )

    def on_before_batch_transfer(self, batch: list[torch.Tensor], dataloader_idx: int) -> list[torch.Tensor]:
        """Use the seeds of a training batch while they are on the CPU, where reading them does not synchronise."""
        if not (self.trainer and self.trainer.training):
            return batch
        images, targets, seeds = batch
        # seeds all later randomness on the device, dropout included
        seed = derive_seed(int(seeds[0]), self.trainer.global_rank)
        seed_augmentation(seed)
        torch.manual_seed(seed)
        if self.on_device:  # images are indices
            return [images, *self.augmentation.batch_transform.sample(self._aspects[images]), targets]
        return [images, targets]

    def on_after_batch_transfer(self, batch: list[torch.Tensor], dataloader_idx: int) -> list[torch.Tensor]:
        """Finish the augmentation of a training batch on the device; normalise any other batch."""
        if not self.trainer.training:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        images, *parameters, targets = batch
        if self.on_device:
            self._images = self._images.to(images.device)  # copies once
            images = self.augmentation.batch_transform(self._images[images], *parameters)
        return list(self.augmentation.finish(images, targets))

    def val_dataloader(self) -> ImageLoader:
        """Batches of this process's part of the validation images; see `test_dataloader`."""
        self.setup("fit")
        return self._evaluation_loader(self.val_dataset)

    def test_dataloader(self) -> ImageLoader:
        """Batches of this process's part of the test split, in path order; runs `setup` if necessary.

        Returns:
            A loader of images (B, 3, size, size) uint8, targets (B,) int64 and positions in `test_dataset` (B,) int64;
            the hook below normalises the images. The last batch may be smaller. A file that cannot be decoded is a
            `UserError` when its batch is read; with `on_error="skip"` it is left out of its batch, see `ImageLoader`.

        Raises:
            UserError: see `setup`; fewer images than processes.
        """
        self.setup("test")
        return self._evaluation_loader(self.test_dataset)

    def _evaluation_loader(self, dataset: ImageDataset) -> ImageLoader:
        images = dataset.subset(range(len(dataset)), self._test_pixels)
        options = {
            "batch_size": self.batch_size,
            "sampler": ShardedSampler(len(dataset), *self.rank_and_world_size()),
            "pin_memory": self.pin_memory,
            "skip": self.on_error == "skip",
        }
        if self.cache_dir is None:
            return ImageLoader(images, num_workers=self.num_workers, **options)
        return CachedLoader(self._cached(images), num_threads=self.num_workers, **options)

    def _cached(self, images: ImageDataset) -> CachedImages:
        """Evaluation images in the cache, decoded first if necessary."""
        cache = DecodedCache(self.cache_dir, images, **self._pixel_options)
        cache.make(self.num_workers, self.trainer.local_rank if self.trainer else 0, self.on_error == "skip")
        return cache.open()

    def _dataset(self, option: str, transform: Callable[[Image.Image], Any]) -> ImageDataset:
        """The images of the split that `option` names."""
        split = getattr(self, option)
        listing = open_listing(self.data_dir, split, option, self.num_classes, self.format, self.class_numbering)
        return ImageDataset(listing, transform, self.max_image_pixels)
