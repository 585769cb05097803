"""Augmentation for training with timm: single images in the workers, whole batches on the device."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset

from scatterbrain.errors import UserError, did_you_mean, is_number
from src.datamodules.dataset import ImageDataset
from src.datamodules.device_augmentation import DeviceAugmentation
from src.datamodules.normalise import Normalise

# Modes of torchvision's resize for PIL images.
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
# Modes of Pillow's rotation and shear, which the policies use; `random` is timm's choice between the first two.
_ROTATION_MODES = ("bicubic", "bilinear", "nearest", "random")


def seed_augmentation(seed: int) -> None:
    """Seed the CPU generators of timm, torchvision and PyTorch, but not those of devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 100 times as long


class Augmentation:
    """Augmentation recipe; the defaults are T2T-ViT's published ones.

    Args:
        image_size: side of the model's input, pixels.
        num_classes: number of classes.
        mean: mean per colour channel, of values in [0, 1].
        std: standard deviation per colour channel.
        interpolation: of the random resized crop, a mode of torchvision or `random`; always bilinear on the device.
        scale: smallest and largest area of the crop relative to the image.
        ratio: smallest and largest aspect ratio of the crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter; timm ignores it with most policies of
            `auto_augment`.
        rotation: largest angle of a rotation, degrees; only with `on_device`.
        auto_augment: timm's policy, such as `rand-m9-mstd0.5-inc1`; None for none. Not with `on_device`.
        re_prob: probability of erasing a random rectangle.
        re_mode: content of the rectangle: `pixel` (noise), `rand` (one colour), `const` (the mean).
        mixup_alpha: parameter of Mixup (Zhang et al., ICLR 2018); 0 for none.
        cutmix_alpha: parameter of CutMix (Yun et al., ICCV 2019); 0 for none.
        mixup_prob: probability of Mixup or CutMix for a batch.
        mixup_switch_prob: probability of CutMix if both are active.
        label_smoothing: probability mass spread over all classes (Szegedy et al., CVPR 2016).
        on_device: crop and distort by `batch_transform` on the device instead of `transform` in workers.

    Attributes:
        transform: from a PIL image in mode RGB to uint8 (3, size, size); uses the global generators. None with
            `on_device`.
        batch_transform: `DeviceAugmentation` with `on_device`, None without.

    Raises:
        UserError: an invalid value; the message names the option.
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.4,
        rotation: float = 0.0,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        re_prob: float = 0.25,
        re_mode: str = "pixel",
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        label_smoothing: float = 0.1,
        on_device: bool = False,
    ) -> None:
        for name, value in (
            ("hflip", hflip),
            ("vflip", vflip),
            ("re_prob", re_prob),
            ("mixup_prob", mixup_prob),
            ("mixup_switch_prob", mixup_switch_prob),
            ("label_smoothing", label_smoothing),
        ):
            _check_number(name, value, 0, 1)
        for name, value in (
            ("color_jitter", color_jitter),
            ("mixup_alpha", mixup_alpha),
            ("cutmix_alpha", cutmix_alpha),
        ):
            _check_number(name, value, 0)
        _check_number("rotation", rotation, 0, 180)
        geometry = {
            "scale": _checked_range("scale", scale, 1),
            "ratio": _checked_range("ratio", ratio),
            "hflip": hflip,
            "vflip": vflip,
        }
        if interpolation not in (*INTERPOLATIONS, "random"):
            raise UserError(
                f"datamodule.augmentation.interpolation={interpolation!r} is not valid. "
                f"{did_you_mean(interpolation, (*INTERPOLATIONS, 'random'))}"
            )
        if auto_augment and interpolation not in _ROTATION_MODES:
            raise UserError(
                f"datamodule.augmentation.interpolation={interpolation} cannot rotate images, as auto_augment does. "
                f"Choose one of: {', '.join(_ROTATION_MODES)}; or set datamodule.augmentation.auto_augment to null."
            )
        if re_mode not in ("pixel", "rand", "const"):
            raise UserError(
                f"datamodule.augmentation.re_mode={re_mode!r} is not valid. Choose one of: const, pixel, rand."
            )
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.transform, self.batch_transform = None, None
        if on_device:
            if auto_augment:
                raise UserError(
                    f"datamodule.augmentation.auto_augment={auto_augment} works on single images, in workers. Set it "
                    "to null, or datamodule.on_device=false."
                )
            self.batch_transform = DeviceAugmentation(
                image_size, **geometry, rotation=rotation, color_jitter=color_jitter
            )
        else:
            if rotation:
                raise UserError(
                    f"datamodule.augmentation.rotation={rotation} works on the device. Set it to 0 (auto_augment "
                    "rotates images too), or datamodule.on_device=true."
                )
            self.transform = _create_transform(
                input_size=image_size,
                interpolation=interpolation,
                **geometry,
                color_jitter=color_jitter or None,
                auto_augment=auto_augment or None,
                mean=tuple(mean),
            )
        self._normalise = Normalise(mean, std)
        self._erase = re_prob > 0 and {"probability": re_prob, "mode": re_mode}
        self._mix = None
        if mixup_prob > 0 and (mixup_alpha > 0 or cutmix_alpha > 0):
            self._mix = Mixup(
                mixup_alpha=mixup_alpha,
                cutmix_alpha=cutmix_alpha,
                prob=mixup_prob,
                switch_prob=mixup_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, which needs an even batch size."""
        return self._mix is not None

    def finish(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise, erase and mix a batch, on its device.

        Args:
            images: (B, 3, size, size) in [0, 255], uint8 or float.
            targets: (B,) classes.

        Returns:
            Images (B, 3, size, size) float32, and the probability of each class (B, num_classes) float32.
        """
        images = self._normalise(images)
        if self._erase:
            images = RandomErasing(**self._erase, device=images.device)(images)
        if self._mix is not None:
            return self._mix(images, targets)
        return images, mixup_target(targets, self.num_classes, lam=1.0, smoothing=self.label_smoothing)


class AugmentedDataset(Dataset):
    """A dataset indexed by pairs of an image's index and the seed of its augmentation.

    Args:
        dataset: the images.
        decode: return the augmented image; otherwise its index, for augmentation on the device.
    """

    def __init__(self, dataset: ImageDataset, decode: bool) -> None:
        self.dataset = dataset
        self.decode = decode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, int, int]:
        """The augmented image or its index, its target, and the seed."""
        index, seed = item
        if not self.decode:
            return index, self.dataset.targets[index], seed
        seed_augmentation(seed)
        image, target, _ = self.dataset[index]
        return image, target, seed


def _create_transform(auto_augment: str | None, **options: Any) -> Any:
    """The training transform of timm, up to uint8; its errors are raised as `UserError`."""
    try:
        # use_prefetcher leaves normalisation and erasing to the device
        transform = create_transform(is_training=True, use_prefetcher=True, auto_augment=auto_augment, **options)
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"datamodule.augmentation.auto_augment={auto_augment!r} is not valid"
            + (f" ({error})" if str(error) else "")
            + ". Give one of timm's policies, such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original; or null."
        ) from error
    for step in transform.transforms:
        # RandAugment and AugMix have a list of operations, AutoAugment has a list of lists
        for operation in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each colour channel, 0 included.

    RandAugment and AutoAugment sometimes request 0 bits, a black image, which recent versions of Pillow refuse.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _check_number(name: str, value: Any, minimum: float, maximum: float | None = None) -> None:
    limit = sys.float_info.max if maximum is None else maximum
    if not is_number(value) or not minimum <= value <= limit:
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise UserError(f"datamodule.augmentation.{name}={value!r} is not valid. Give a number {limits}.")


def _checked_range(name: str, values: Any, maximum: float | None = None) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        low = high = 0.0
    if not 0 < low <= high <= (sys.float_info.max if maximum is None else maximum):
        limit = "" if maximum is None else f" and at most {maximum}"
        raise UserError(
            f"datamodule.augmentation.{name}={values} is not valid. Give two numbers above 0{limit}, the smaller first."
        )
    return low, high
