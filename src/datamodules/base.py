"""Base of the data modules: common options, and normalisation of batches on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.normalise import Normalise


class ClassificationDataModule(pl.LightningDataModule):
    """Base of the data modules: evaluation loaders yield uint8 images, which are normalised on the device.

    Args:
        image_size: side of the model's input in pixels.
        num_classes: outputs of the model.
        batch_size: images per batch and process.
        seed: random seed.
        mean: mean per colour channel, of values in [0, 1]; default ImageNet's.
        std: standard deviation per colour channel; default ImageNet's.
        pin_memory: batches in page-locked memory, for a faster copy to the GPU; None does so if CUDA is available.

    Attributes:
        normalise: maps images in [0, 255] to the model's input.
        on_error: what an evaluation does with an image that cannot be decoded, `"raise"` or `"skip"`.

    Raises:
        UserError: an invalid value; the message names the option.
    """

    on_error: str = "raise"

    def __init__(
        self,
        image_size: int = 224,
        num_classes: int = 1000,
        batch_size: int = 128,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        check_whole_number("datamodule.image_size", image_size, 1)
        check_whole_number("datamodule.num_classes", num_classes, 1)
        check_whole_number("datamodule.batch_size", batch_size, 1)
        check_whole_number("datamodule.seed", seed, 0)
        self.mean = _three_numbers("datamodule.mean", mean)
        self.std = _three_numbers("datamodule.std", std)
        if min(self.std) <= 0:
            raise UserError(f"datamodule.std={self.std!r} is not valid. Give three numbers above 0.")
        self.image_size = image_size
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.seed = seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else bool(pin_memory)
        self.normalise = Normalise(self.mean, self.std)

    def on_after_batch_transfer(self, batch: list[torch.Tensor], dataloader_idx: int) -> list[torch.Tensor]:
        """Normalise a batch of an evaluation on the device, in the dtype of the model's weights."""
        images, *others = batch
        dtype = self.trainer.lightning_module.dtype
        # channels last: the network's first operation reads whole pixels
        return [self.normalise(images, dtype, torch.channels_last), *others]

    def rank_and_world_size(self) -> tuple[int, int]:
        """Rank of this process, and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _three_numbers(option: str, values: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"{option}={values!r} is not valid. Give three numbers, one per colour.") from None
    return red, green, blue
