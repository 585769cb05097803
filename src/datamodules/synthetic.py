"""Random images that are in memory already: for measuring a machine, and for trying the commands without ImageNet.

Nothing is read, decoded or collated, so an evaluation runs as fast as the network lets it. A network has nothing to
recognise in them: its accuracy is that of guessing.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset

from src.datamodules.normalise import Normalise
from src.utils.errors import UserError, check_whole_number

NAME = "synthetic"


class SyntheticImages:
    """The images of the split: what they are called and what they show.

    Args:
        num_images: number of images N.
        num_distinct: number of images D that differ; image i is image i mod D.
        image_size: side, pixels.
        num_classes: number of classes that the targets are drawn from.
        seed: of pixels and targets.

    Attributes:
        root: what stands for the folder.
        paths: `synthetic/00000000` and so on, N of them.
        pixels: (D, 3, image_size, image_size) uint8, channels last in memory.
        targets: (N,) int64.

    Raises:
        UserError: the images do not fit in memory.
    """

    def __init__(self, num_images: int, num_distinct: int, image_size: int, num_classes: int, seed: int) -> None:
        self.root = NAME
        self.paths = [f"{NAME}/{index:08}" for index in range(num_images)]
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(num_classes, (num_images,), generator=generator)
        shape = (min(num_images, num_distinct), 3, image_size, image_size)
        try:
            pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            # the colours of a pixel together, as decoded images have them
            self.pixels = pixels.contiguous(memory_format=torch.channels_last)
        except RuntimeError as error:
            raise UserError(f"datamodule.num_distinct={num_distinct} images do not fit in memory. Lower it.") from error

    def __len__(self) -> int:
        return len(self.paths)


class _Batches(Dataset):
    """Whole batches of consecutive images, each a slice: nothing is gathered.

    Args:
        images: what they are taken from.
        begin: first image.
        end: image after the last one.
        batch_size: images per batch; the last one may have fewer.
        pin_memory: keep everything in page-locked memory.
    """

    def __init__(self, images: SyntheticImages, begin: int, end: int, batch_size: int, pin_memory: bool) -> None:
        self._begin, self._end, self._batch_size = begin, end, batch_size
        self._num_distinct = len(images.pixels)
        # the first ones once more behind the last, so that a batch is in one piece wherever it begins
        repeats = 1 + -(-(batch_size - 1) // self._num_distinct)
        pixels = torch.cat([images.pixels] * repeats)[: self._num_distinct + batch_size - 1]
        tensors = pixels, images.targets, torch.arange(len(images))
        self._pixels, self._targets, self._indices = (x.pin_memory() if pin_memory else x for x in tensors)

    def __len__(self) -> int:
        return -(-(self._end - self._begin) // self._batch_size)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        """Images (B, 3, size, size) uint8, targets (B,) int64 and positions in the split (B,) int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches, number {index} is none of them.")
        begin = self._begin + index * self._batch_size
        end = min(begin + self._batch_size, self._end)
        first = begin % self._num_distinct
        return [self._pixels[first : first + end - begin], self._targets[begin:end], self._indices[begin:end]]


class SyntheticDataModule(pl.LightningDataModule):
    """Random images in memory, in place of an `ImageFolderDataModule`, for evaluation alone.

    On several processes each has a stretch of its own. On the device batches are normalised in the network's dtype.

    Args:
        num_images: number of images.
        num_distinct: number of those that differ, kept in memory, 3 bytes a pixel; image i is image i mod
            `num_distinct`.
        image_size: side of the model's input in pixels.
        num_classes: outputs of the model.
        batch_size: images per batch and process.
        seed: of pixels and targets.
        mean: per colour, of values in [0, 1], subtracted; default ImageNet's.
        std: per colour, divided by; default ImageNet's.
        pin_memory: keep the images in page-locked memory, for a faster copy to the GPU; None does so if CUDA is
            available.

    Attributes:
        data_dir: what stands for the folder.
        test_split: what stands for the split.
        test_dataset: the images once `setup` has run, None before.

    Raises:
        UserError: a value that is not valid; the message names the option.
    """

    data_dir = NAME
    test_split = "test"

    def __init__(
        self,
        num_images: int = 50_000,
        num_distinct: int = 1024,
        image_size: int = 224,
        num_classes: int = 1000,
        batch_size: int = 128,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        for name, value, minimum in (
            ("num_images", num_images, 1),
            ("num_distinct", num_distinct, 1),
            ("image_size", image_size, 1),
            ("num_classes", num_classes, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            check_whole_number(f"datamodule.{name}", value, minimum)
        self.num_images, self.num_distinct = num_images, num_distinct
        self.image_size, self.num_classes = image_size, num_classes
        self.batch_size, self.seed = batch_size, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else bool(pin_memory)
        self.normalise = Normalise(mean, std)
        self.test_dataset: SyntheticImages | None = None

    def setup(self, stage: str | None = None) -> None:
        """Draw the images, once.

        Args:
            stage: anything but `"fit"`.

        Raises:
            UserError: the stage is `"fit"`; the images do not fit in memory.
        """
        if stage == "fit":
            raise UserError("datamodule=synthetic is for evaluation alone. Choose datamodule=imagenet for training.")
        if self.test_dataset is None:
            self.test_dataset = SyntheticImages(
                self.num_images, self.num_distinct, self.image_size, self.num_classes, self.seed
            )

    def test_dataloader(self) -> DataLoader:
        """Batches of this process's part of the images, in order; `setup` is run if it has not been.

        Returns:
            A loader of images (B, 3, size, size) uint8, targets (B,) int64 and positions in `test_dataset` (B,)
            int64. The last batch may be smaller.

        Raises:
            UserError: fewer images than processes.
        """
        self.setup("test")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.num_images < world_size:
            raise UserError(
                f"datamodule.num_images={self.num_images} cannot be shared among {world_size} processes. Raise it."
            )
        begin, end = (self.num_images * place // world_size for place in (rank, rank + 1))
        batches = _Batches(self.test_dataset, begin, end, self.batch_size, self.pin_memory)
        return DataLoader(batches, batch_size=None)

    def on_after_batch_transfer(self, batch: list[torch.Tensor], dataloader_idx: int) -> list[torch.Tensor]:
        """Normalise a batch on the device, in the dtype of the network's weights."""
        images, targets, indices = batch
        return [self.normalise(images, next(self.trainer.lightning_module.parameters()).dtype), targets, indices]
