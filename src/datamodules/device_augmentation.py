"""Augmentation of whole batches on the device, for data sets that fit into its memory.

timm augments image by image on the CPU, which is too slow for a small network: 16 CPU cores fed an H100 with 2,700
images/s where it trains on 7,000. Here every image is decoded once, and crop, flip, rotation and colours are a handful
of tensor operations over the batch, each image with parameters of its own. (kornia offers this too, for newer Pythons.)
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

# Crops of a drawn area and shape may not fit into the image: how often to draw, as torchvision does.
CROP_TRIALS = 10
# Weights of the colours in a grey value, ITU-R BT.601, as Pillow has them; torchvision rounds the first to 0.2989.
GREY = (0.299, 0.587, 0.114)


def decode_images(dataset: ImageDataset, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode all images of a dataset, squeezed into squares.

    Args:
        dataset: N images; its transform is not applied.
        side: of the squares, pixels.

    Returns:
        Images (N, 3, side, side) uint8, and their width over their height (N,) float32, both on the CPU.

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

    with ThreadPoolExecutor(usable_cpus()) as pool:  # Pillow decodes and resizes without the interpreter's lock
        for _ in pool.map(decode, range(len(dataset))):
            pass
    return images, aspects


class DeviceAugmentation:
    """Random resized crop, flips, rotation and colour jitter, bilinear; draws from the global generator of the CPU.

    Crops are drawn as torchvision's `RandomResizedCrop` draws them, in the image as it was before it was squeezed;
    colours change by brightness, contrast and saturation in this order, as its `ColorJitter` computes them. What a
    rotation brings in from outside the image is reflected.

    Args:
        image_size: side of the output, pixels.
        scale: smallest and largest area of the crop, over that of the image.
        ratio: smallest and largest aspect ratio of the crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        rotation: largest angle of the rotation, degrees, to either side.
        color_jitter: largest change of brightness, contrast and saturation, as a part of them.
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

    def draw(self, aspects: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the parameters of a batch, on the CPU, which needs not wait for the device then.

        Args:
            aspects: (B,) width over height of the images before they were squeezed, on the CPU.

        Returns:
            Affine maps (B, 2, 3), see `draw_maps`, and factors of brightness, contrast and saturation (B, 3).
        """
        jitter = _uniform((len(aspects), 3), max(0, 1 - self.color_jitter), 1 + self.color_jitter)
        return self.draw_maps(aspects), jitter

    def __call__(self, images: torch.Tensor, maps: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
        """Augment a batch, on its device.

        Args:
            images: (B, 3, side, side) uint8, squeezed into squares.
            maps: (B, 2, 3), see `draw`.
            jitter: (B, 3), see `draw`.

        Returns:
            (B, 3, image_size, image_size) float32 in [0, 255].
        """
        grid = F.affine_grid(maps, (len(images), 3, self.image_size, self.image_size), align_corners=False)
        images = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return _jitter(images, jitter) if self.color_jitter > 0 else images

    def draw_maps(self, aspects: torch.Tensor) -> torch.Tensor:
        """Draw crops, flips and rotations.

        Args:
            aspects: (B,) width over height of the images.

        Returns:
            (B, 2, 3): the affine maps from the output's coordinates to the image's, both from -1 to 1.
        """
        number = len(aspects)
        areas = _uniform((number, CROP_TRIALS), *self.scale)
        ratios = _uniform((number, CROP_TRIALS), *map(math.log, self.ratio)).exp()
        # parts of the image's width and height
        widths = (areas * ratios / aspects[:, None]).sqrt()
        heights = (areas / ratios * aspects[:, None]).sqrt()
        fits = (widths <= 1) & (heights <= 1)
        first = fits.float().argmax(1, keepdim=True)
        # where none fits, the largest crop of the nearest ratio, from the middle
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
        # turned in pixels, where the image is `aspects` times as wide as high
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
