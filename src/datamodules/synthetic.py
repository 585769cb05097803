"""Random images in memory, for measuring the speed of a machine and for trying the commands without ImageNet.

Nothing is read, decoded or collated, so only the network limits the speed of an evaluation. Its accuracy is that of
guessing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.base import ClassificationDataModule

NAME = "synthetic"


class SyntheticImages:
    """Names, pixels and targets of the images.

    Args:
        num_images: number of images N.
        num_distinct: number of distinct images D; image i equals image i mod D.
        image_size: side, pixels.
        num_classes: number of classes of the random targets.
        seed: of pixels and targets.

    Attributes:
        root: name in place of a folder.
        paths: `synthetic/00000000` and so on, N of them.
        pixels: (D, 3, image_size, image_size) uint8.
        targets: (N,) int64.

    Raises:
        UserError: the images do not fit in memory.
    """

    def __init__(self, num_images: int, num_distinct: int, image_size: int, num_classes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (min(num_images, num_distinct), 3, image_size, image_size)
        try:
            self.pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        except RuntimeError as error:
            raise UserError(f"datamodule.num_distinct={num_distinct} images do not fit in memory. Lower it.") from error
        self.targets = torch.randint(num_classes, (num_images,), generator=generator)
        self.root = NAME
        self.paths = [f"{NAME}/{index:08}" for index in range(num_images)]

    def __len__(self) -> int:
        return len(self.paths)


class _Batches(Dataset):
    """Batches of consecutive images, each a slice of one tensor, without a copy.

    Args:
        images: all images.
        begin: index of the first image.
        end: index after the last image.
        batch_size: images per batch; the last one may have fewer.
        pin_memory: store the tensors in page-locked memory.
    """

    def __init__(self, images: SyntheticImages, begin: int, end: int, batch_size: int, pin_memory: bool) -> None:
        self._begin, self._end, self._batch_size = begin, end, batch_size
        self._num_distinct = len(images.pixels)
        # the first images are repeated at the end, so that every batch is contiguous
        repeats = 1 + -(-(batch_size - 1) // self._num_distinct)
        pixels = torch.cat([images.pixels] * repeats)[: self._num_distinct + batch_size - 1]
        tensors = pixels, images.targets, torch.arange(len(images))
        self._pixels, self._targets, self._indices = (x.pin_memory() if pin_memory else x for x in tensors)

    def __len__(self) -> int:
        return -(-(self._end - self._begin) // self._batch_size)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        """Images (B, 3, size, size) uint8, targets (B,) int64 and positions in the split (B,) int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches, so {index} is out of range.")
        begin = self._begin + index * self._batch_size
        end = min(begin + self._batch_size, self._end)
        first = begin % self._num_distinct
        return [self._pixels[first : first + end - begin], self._targets[begin:end], self._indices[begin:end]]


class SyntheticDataModule(ClassificationDataModule):
    """Random images in memory, in place of an `ImageFolderDataModule`, for evaluation only.

    Each process evaluates a contiguous part of them.

    Args:
        num_images: number of images.
        num_distinct: number of distinct images, in memory with 3 bytes per pixel; image i equals image i mod
            `num_distinct`.
        seed: of pixels and targets.
        **options: those of `ClassificationDataModule`.

    Attributes:
        data_dir: name in place of a folder.
        test_split: name in place of a split.
        test_dataset: the images once `setup` has run, None before.

    Raises:
        UserError: an invalid value; the message names the option.
    """

    data_dir = NAME
    test_split = "test"

    def __init__(
        self,
        num_images: int = 50_000,
        num_distinct: int = 1024,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(seed=seed, **options)
        check_whole_number("datamodule.num_images", num_images, 1)
        check_whole_number("datamodule.num_distinct", num_distinct, 1)
        self.num_images, self.num_distinct = num_images, num_distinct
        self.test_dataset: SyntheticImages | None = None

    def setup(self, stage: str | None = None) -> None:
        """Generate the images, once.

        Args:
            stage: anything but `"fit"`.

        Raises:
            UserError: the stage is `"fit"`; the images do not fit in memory.
        """
        if stage == "fit":
            raise UserError("datamodule=synthetic is for evaluation only. Choose datamodule=imagenet for training.")
        if self.test_dataset is None:
            self.test_dataset = SyntheticImages(
                self.num_images, self.num_distinct, self.image_size, self.num_classes, self.seed
            )

    def test_dataloader(self) -> DataLoader:
        """Batches of this process's part of the images, in order; runs `setup` if necessary.

        Returns:
            A loader of images (B, 3, size, size) uint8, targets (B,) int64 and positions in `test_dataset` (B,)
            int64. The last batch may be smaller.

        Raises:
            UserError: fewer images than processes.
        """
        self.setup("test")
        rank, world_size = self.rank_and_world_size()
        if self.num_images < world_size:
            raise UserError(
                f"datamodule.num_images={self.num_images} cannot be shared among {world_size} processes. Raise it."
            )
        begin, end = (self.num_images * part // world_size for part in (rank, rank + 1))
        batches = _Batches(self.test_dataset, begin, end, self.batch_size, self.pin_memory)
        return DataLoader(batches, batch_size=None)
