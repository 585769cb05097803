"""Augmentation of whole batches on the device, for data sets that fit into its memory.

timm augments image by image on the CPU, which is too slow for a small network: 16 CPU cores augment 2,700 images/s, and
an H100 trains on 7,000. Here every image is decoded once, and crop, flip, rotation and colour jitter are a few tensor
operations on the batch, with random parameters per image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from src.datamodules.dataset import ImageDataset
from src.utils.machine import usable_cpus

# A crop of random area and aspect ratio may not fit into the image: number of attempts, as in torchvision.
CROP_TRIALS = 10
# Weights of the colour channels in grey, ITU-R BT.601, as in Pillow; torchvision rounds the first to 0.2989.
GREY = (0.299, 0.587, 0.114)


def decode_images(dataset: ImageDataset, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode all images of a dataset and resize them to squares.

    Args:
        dataset: N images; its transform is not applied.
        side: side of the squares, pixels.

    Returns:
        Images (N, 3, side, side) uint8, and their original aspect ratios, width over height, (N,) float32; on the CPU.

    Raises:
        UserError: a file cannot be decoded.
    """
    images = torch.empty(len(dataset), 3, side, side, dtype=torch.uint8)
    aspects = torch.empty(len(dataset))

    def decode(index: int) -> None:
        image = dataset.decode(index)
        aspects[index] = image.width / image.height
        square = image.resize((side, side), Image.Resampling.BICUBIC)
        images[index] = torch.from_numpy(np.array(square)).permute(2, 0, 1)

    with ThreadPoolExecutor(usable_cpus()) as pool:  # Pillow releases the GIL
        for _ in pool.map(decode, range(len(dataset))):
            pass
    return images, aspects


class DeviceAugmentation:
    """Random resized crop, flips, rotation and colour jitter, bilinear; uses the global generator of the CPU.

    Crops are distributed as those of torchvision's `RandomResizedCrop`, in the image of the original aspect ratio.
    Brightness, contrast and saturation change in this order, as in its `ColorJitter`. Rotated images are padded by
    reflection.

    Args:
        image_size: side of the output, pixels.
        scale: smallest and largest area of the crop relative to the image.
        ratio: smallest and largest aspect ratio of the crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        rotation: largest angle of the rotation, degrees, to either side.
        color_jitter: largest relative change of brightness, contrast and saturation.
    """

    def __init__(
        self,
        image_size: int,
        scale: Sequence[float],
        ratio: Sequence[float],
        hflip: float,
        vflip: float,
        rotation: float,
        color_jitter: float,
    ) -> None:
        self.image_size = image_size
        self.scale, self.ratio = scale, ratio
        self.hflip, self.vflip = hflip, vflip
        self.rotation = math.radians(rotation)
        self.color_jitter = color_jitter

    def sample(self, aspects: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the parameters of a batch on the CPU, without synchronising with the device.

        Args:
            aspects: (B,) original aspect ratios of the images, width over height, on the CPU.

        Returns:
            Affine maps (B, 2, 3), see `sample_maps`, and factors of brightness, contrast and saturation (B, 3).
        """
        jitter = _uniform((len(aspects), 3), max(0, 1 - self.color_jitter), 1 + self.color_jitter)
        return self.sample_maps(aspects), jitter

    def __call__(self, images: torch.Tensor, maps: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
        """Augment a batch, on its device.

        Args:
            images: (B, 3, side, side) uint8, resized to squares.
            maps: (B, 2, 3), see `sample`.
            jitter: (B, 3), see `sample`.

        Returns:
            (B, 3, image_size, image_size) float32 in [0, 255].
        """
        grid = F.affine_grid(maps, (len(images), 3, self.image_size, self.image_size), align_corners=False)
        images = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return _jitter(images, jitter) if self.color_jitter > 0 else images

    def sample_maps(self, aspects: torch.Tensor) -> torch.Tensor:
        """Sample crops, flips and rotations.

        Args:
            aspects: (B,) original aspect ratios of the images, width over height.

        Returns:
            (B, 2, 3): the affine maps from the output's coordinates to the image's, both from -1 to 1.
        """
        number = len(aspects)
        areas = _uniform((number, CROP_TRIALS), *self.scale)
        ratios = _uniform((number, CROP_TRIALS), *map(math.log, self.ratio)).exp()
        # relative to the image's width and height
        widths = (areas * ratios / aspects[:, None]).sqrt()
        heights = (areas / ratios * aspects[:, None]).sqrt()
        fits = (widths <= 1) & (heights <= 1)
        first = fits.float().argmax(1, keepdim=True)
        # if none fits, the largest central crop of the nearest ratio
        nearest = aspects.clamp(*self.ratio)
        some = fits.any(1)
        width = torch.where(some, widths.gather(1, first)[:, 0], (nearest / aspects).clamp(max=1))
        height = torch.where(some, heights.gather(1, first)[:, 0], (aspects / nearest).clamp(max=1))

        x, y = (_uniform((number,), -1, 1) * (1 - part) * some for part in (width, height))
        mirrored_x, mirrored_y = (
            1 - 2 * (torch.rand(number) < probability).float() for probability in (self.hflip, self.vflip)
        )
        angle = _uniform((number,), -self.rotation, self.rotation)
        cos, sin = angle.cos(), angle.sin()
        # rotated in pixels, where the image is `aspects` times as wide as high
        return torch.stack(
            [
                torch.stack([cos * width * mirrored_x, -sin * height / aspects * mirrored_y, x], 1),
                torch.stack([sin * width * aspects * mirrored_x, cos * height * mirrored_y, y], 1),
            ],
            1,
        )


def _jitter(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast and saturation of images (B, 3, H, W) in [0, 255] by factors (B, 3)."""
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    weights = torch.tensor(GREY, device=images.device).view(3, 1, 1)
    images = (images * brightness).clamp(0, 255)
    mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 255)
    grey = (images * weights).sum(1, keepdim=True)
    return torch.lerp(grey, images, saturation).clamp(0, 255)


def _uniform(shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    return torch.rand(shape) * (high - low) + low
