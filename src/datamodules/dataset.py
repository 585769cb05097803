"""Images in any format as a dataset, and a loader that raises decoding errors in the main process."""

from __future__ import annotations

import copy
import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, default_collate

from scatterbrain.errors import UserError
from src.datamodules.formats import Listing
from src.datamodules.formats.class_folders import ClassFolders
from src.datamodules.formats.listing import ImageSource, read_source

_TIFF_BITS = 258  # tag BitsPerSample
# Errors that concern a single file, rather than the machine or the disk.
_FILE_ERRORS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO)


class ImageError(UserError):
    """One image cannot be decoded, and may be skipped; other errors concern more than one image.

    Args:
        message: names the image and the remedy.
        reason: the cause in a few words.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def load_rgb(source: ImageSource, max_pixels: int | None = None) -> Image.Image:
    """Decode a whole image, whatever its mode and format, to RGB with 8 bits.

    As timm does, except that Pillow's conversion clips grey images of 16 bits at 255, which makes them white; here they
    are scaled by 1 / 257. Grey images with 32-bit integers or floats have no known range and are refused.

    Args:
        source: a `Path`, or an image in an archive.
        max_pixels: largest width times height; None is Pillow's limit, 178,956,970 by default. A larger value raises
            Pillow's limit in this process.

    Returns:
        The image in mode RGB.

    Raises:
        ImageError: the file cannot be read or is not an intact image.
        UserError: the cause is not this image alone, but its archive, its folder or the machine.
    """
    data = None
    try:
        data = read_source(source)
        return _to_rgb(_open(data, max_pixels))
    except UserError:
        raise
    # On damaged input, Pillow's format plugins raise many types (OSError, SyntaxError, ValueError, struct.error,
    # DecompressionBombError, ...), which mean the same to the user.
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif data is not None and not data:
            reason = "the file is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not an image of a known format"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        remedy = getattr(source, "remedy", "Remove or replace the file.")
        if isinstance(error, Image.DecompressionBombError):
            reason = reason.partition(", could be")[0].rstrip(".")
            remedy = "Remove it, reduce it, or allow more pixels: datamodule.max_image_pixels=..."
        message = f"Cannot decode the image {source}: {reason}. {remedy}"
        if _concerns_one_image(error, source, was_read=data is not None):
            raise ImageError(message, reason) from error
        raise UserError(message) from error


def _open(data: bytes, max_pixels: int | None) -> Image.Image:
    if max_pixels is None:
        return Image.open(io.BytesIO(data))
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    image = Image.open(io.BytesIO(data))
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise Image.DecompressionBombError(f"Image size ({pixels} pixels) exceeds limit of {max_pixels} pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB.

    Raises:
        ValueError: grey values of an unknown range.
    """
    # some versions of Pillow decode a PNG or PGM file with 16 bits to mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = (getattr(image, "tag_v2", None) or {}).get(_TIFF_BITS, (16,))[0]
        grey = np.asarray(image).astype(np.float32) * (255 / (2**bits - 1))
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating point"
        raise ValueError(f"its grey values are {kind} (mode {image.mode}) of an unknown range, not 8 or 16 bits")
    return image.convert("RGB")


def _concerns_one_image(error: Exception, source: ImageSource, was_read: bool) -> bool:
    """Whether an error concerns this image only, unlike a lost disk or a lack of memory."""
    if isinstance(error, MemoryError):
        return False
    if was_read:
        return True
    readable = isinstance(source, Path) and os.access(source.parent, os.R_OK | os.X_OK)
    return readable and isinstance(error, OSError) and error.errno in _FILE_ERRORS


class ImageDataset(Dataset):
    """The images of a listing, decoded and transformed.

    Args:
        listing: the images of one split, in any format.
        transform: from a PIL image in mode RGB to a tensor (3, size, size).
        max_pixels: see `load_rgb`.

    Attributes:
        listing: as given.
        root: file or folder that holds the split.
        classes: names of the classes, sorted.
        class_to_index: class to target; position in `classes` and target differ for a subset of ImageNet.
        paths: the images' names: relative, with forward slashes.
        targets: class index of each image, in the order of `paths`.
    """

    def __init__(
        self,
        listing: Listing,
        transform: Callable[[Image.Image], torch.Tensor],
        max_pixels: int | None = None,
    ) -> None:
        self.listing = listing
        self.max_pixels = max_pixels
        self.transform = transform
        self.root = listing.root
        self.classes, self.class_to_index = listing.classes, listing.class_to_index
        self.paths, self.targets = listing.names, listing.targets
        # position of each image in the listing
        self._positions: Sequence[int] = range(len(listing))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        """Decode and transform one image.

        Args:
            index: position in `paths`.

        Returns:
            Transformed image (3, size, size), target, and `index` itself.

        Raises:
            UserError: the file cannot be decoded.
        """
        return self.transform(self.decode(index)), self.targets[index], index

    def decode(self, index: int) -> Image.Image:
        """One image without the transform, in mode RGB.

        Raises:
            UserError: the file cannot be decoded.
        """
        return load_rgb(self.listing.source(self._positions[index]), self.max_pixels)

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image.

        Raises:
            UserError: bytes are missing.
            OSError: the file cannot be read.
        """
        return self.listing.read(self._positions[index])

    def subset(self, indices: Iterable[int], transform: Callable[[Image.Image], Any] | None = None) -> ImageDataset:
        """The images at `indices` of `paths`, in that order, with another transform if one is given."""
        indices = list(indices)
        part = copy.copy(self)
        part.paths = [self.paths[index] for index in indices]
        part.targets = [self.targets[index] for index in indices]
        part._positions = [self._positions[index] for index in indices]
        part.transform = self.transform if transform is None else transform
        return part


class ImageFolderDataset(ImageDataset):
    """The images of one split in class folders, see `ClassFolders`.

    Args:
        root: folder of the split, which holds the class folders; `~` is expanded.
        transform: from a PIL image in mode RGB to a tensor (3, size, size).
        num_classes: outputs of the model, see `class_index`.

    Raises:
        UserError: no class folders, no images, or class folders that do not fit `num_classes`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Image.Image], torch.Tensor],
        num_classes: int = 1000,
    ) -> None:
        super().__init__(ClassFolders(root, num_classes), transform)


class _Skipped(NamedTuple):
    """Stands for an image that cannot be decoded: its position, and the reason."""

    index: int
    reason: str


class _ErrorsAsItems(Dataset):
    """Returns the `UserError`s of a dataset as items, which `ImageLoader` raises in the main process.

    Args:
        dataset: the images.
        skip: return a `_Skipped` for an `ImageError`.
    """

    def __init__(self, dataset: Dataset, skip: bool) -> None:
        self.dataset = dataset
        self.skip = skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UserError as error:
            # not the error itself, whose traceback would keep the image's bytes in memory
            return _Skipped(index, error.reason) if self.skip and isinstance(error, ImageError) else error


def _collate(items: list[Any]) -> Any:
    """`default_collate`, or the first `UserError` among the items."""
    for item in items:
        if isinstance(item, UserError):
            return item
    return default_collate(items)


def _collate_intact(items: list[Any]) -> Any:
    """Batch of the decoded images, and position to reason of the skipped ones; or the first `UserError`."""
    skipped = {item.index: item.reason for item in items if isinstance(item, _Skipped)}
    intact = [item for item in items if not isinstance(item, _Skipped)]
    batch = _collate(intact) if intact else empty_batch()
    return batch if isinstance(batch, UserError) else (batch, skipped)


def empty_batch() -> list[torch.Tensor]:
    """A batch without images: (0, 3, 0, 0) uint8, targets (0,) and positions (0,)."""
    none = torch.empty(0, dtype=torch.int64)
    return [torch.empty(0, 3, 0, 0, dtype=torch.uint8), none, none.clone()]


class ImageLoader(DataLoader):
    """A `DataLoader` that raises a `UserError` of the dataset unchanged in the main process.

    torch re-raises a worker's exception with the worker's traceback in its message. Here the worker returns the error
    in place of the batch, and the main process raises it, so the first failing image in order is reported, with its
    short message, for any number of workers.

    Args:
        dataset: with items like those of `ImageDataset`.
        skip: leave an image that cannot be decoded (`ImageError`) out of its batch; the batch is kept even if it is
            empty, so that the number of batches does not change. By default that is an error.
        **options: those of `torch.utils.data.DataLoader`, except `collate_fn`.

    Attributes:
        skipped: with `skip`, position to reason of the skipped images, for each batch of the current pass so far.
    """

    def __init__(self, dataset: Dataset, skip: bool = False, **options: Any) -> None:
        collate = _collate_intact if skip else _collate
        super().__init__(_ErrorsAsItems(dataset, skip), collate_fn=collate, **options)
        self._start_skipping(skip)

    def _start_skipping(self, skip: bool) -> None:
        self._skip = skip
        self.skipped: list[dict[int, str]] = []

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Yield images (B, 3, size, size), targets (B,) int64 and positions in the dataset (B,) int64."""
        self.skipped = []
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    # breaks the cycle with its traceback, or workers would only stop at the next garbage collection
                    del batch
            if self._skip:
                batch, skipped = batch
                self.skipped.append(skipped)
            yield batch
