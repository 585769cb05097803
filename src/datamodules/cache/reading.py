"""Reading a complete cache entry: the images through a memory map, and a loader with threads."""

from __future__ import annotations

import functools
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scatterbrain.errors import UserError
from src.datamodules.cache.writer import CHECKSUM_DTYPE, CHECKSUMS_FILE, IMAGES_FILE, missing_checksum
from src.datamodules.dataset import ImageDataset, ImageError, ImageLoader, empty_batch

# Images of a batch that one thread reads.
PART_SIZE = 32


class CachedImages(Dataset):
    """The images of a complete entry, read a batch at a time.

    Args:
        folder: of the entry.
        shape: (N, 3, size, size).
        dataset: the original images; missing ones are decoded from it.

    Raises:
        UserError: a file of the entry is missing or has the wrong size.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int, int], dataset: ImageDataset) -> None:
        self.folder, self.shape, self.paths = folder, shape, dataset.paths
        self._dataset = dataset
        self._targets = torch.tensor(dataset.targets, dtype=torch.int64)
        sizes = {IMAGES_FILE: int(np.prod(shape, dtype=np.int64)), CHECKSUMS_FILE: shape[0] * CHECKSUM_DTYPE.itemsize}
        for name, expected in sizes.items():
            try:
                size = os.stat(folder / name).st_size
            except OSError as error:
                raise UserError(f"{folder / name} cannot be read ({error.strerror}). {self._remedy}") from error
            if size != expected:
                raise UserError(f"{folder / name} has {size:,} bytes instead of {expected:,}. {self._remedy}")
        self._checked = np.zeros(shape[0], bool)
        try:
            self._images = np.memmap(folder / IMAGES_FILE, np.uint8, "r", shape=shape)
            self._checksums = np.fromfile(folder / CHECKSUMS_FILE, CHECKSUM_DTYPE)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} cannot be read ({error}). {self._remedy}") from error
        self._present = self._checksums != missing_checksum(int(np.prod(shape[1:])))

    @property
    def _remedy(self) -> str:
        return f"Delete the folder {self.folder}: the images are decoded again then."

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        """One image, as `ImageDataset` gives it.

        Raises:
            UserError: it was altered, or is missing and cannot be decoded.
        """
        images, targets, _ = self.batch([index])
        return images[0], int(targets[0]), index

    def batch(self, indices: Sequence[int], skipped: dict[int, str] | None = None) -> list[torch.Tensor]:
        """Images by their positions.

        Args:
            indices: (B,) positions in [0, N).
            skipped: receives position and reason of missing images that cannot be decoded; these are left out, so B
                is smaller. None makes them an error.

        Returns:
            Images (B, 3, size, size) uint8, targets (B,) int64, and the positions (B,) int64.

        Raises:
            ImageError: an image is missing and cannot be decoded.
            UserError: an image was altered; each is checked on its first read.
        """
        return _BatchRead(self, indices).finish(skipped)

    def read(self, positions: np.ndarray, images: np.ndarray) -> dict[int, ImageError]:
        """Copy images into an array; thread-safe for distinct positions.

        Args:
            positions: (B,) positions in [0, N); no two threads may read the same one.
            images: (B, 3, size, size) uint8, the output.

        Returns:
            Position and error of each missing image that cannot be decoded.

        Raises:
            UserError: an image was altered; each is checked on its first read.
        """
        # mode="raise", the default, makes another copy; a sampler's positions are valid
        np.take(self._images, positions, axis=0, out=images, mode="clip")
        failed = {}
        for row in np.flatnonzero(~self._checked[positions]).tolist():
            index = int(positions[row])
            if not self._present[index]:
                try:
                    images[row] = self._dataset[index][0]
                except ImageError as error:
                    # without the traceback, which would keep the image's bytes
                    failed[index] = ImageError(str(error), error.reason)
            elif zlib.crc32(images[row]) != self._checksums[index]:
                raise UserError(f"{self.folder / IMAGES_FILE} is damaged at {self.paths[index]}. {self._remedy}")
        self._checked[positions] = self._present[positions]
        return failed

    def targets(self, positions: torch.Tensor) -> torch.Tensor:
        """Classes (B,) of the images at positions (B,)."""
        return self._targets[positions]


class _BatchRead:
    """A batch that is being read, in parts by the threads of a pool, or without a pool by `finish`.

    Args:
        source: the cached images.
        indices: (B,) positions in [0, N).
        pool: threads; None reads in `finish`.
        pin_memory: allocate the images in page-locked memory, for asynchronous copies to a device.
    """

    def __init__(
        self,
        source: CachedImages,
        indices: Sequence[int],
        pool: ThreadPoolExecutor | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._source = source
        self._positions = torch.as_tensor(indices, dtype=torch.int64)
        self._images = torch.empty(
            len(self._positions), *source.shape[1:], dtype=torch.uint8, pin_memory=pin_memory and len(indices) > 0
        )
        positions, images = self._positions.numpy(), self._images.numpy()
        # each returns the errors of its part
        self._parts: list[Callable[[], dict[int, ImageError]]]
        if pool is None:
            self._parts = [functools.partial(source.read, positions, images)]
        else:
            parts = [slice(begin, begin + PART_SIZE) for begin in range(0, len(positions), PART_SIZE)]
            self._parts = [pool.submit(source.read, positions[part], images[part]).result for part in parts]

    def finish(self, skipped: dict[int, str] | None) -> list[torch.Tensor]:
        """Wait for the batch; arguments, result and errors as in `CachedImages.batch`."""
        failed = {index: error for part in self._parts for index, error in part().items()}
        images, positions = self._images, self._positions
        if failed:
            if skipped is None:
                raise next(iter(failed.values()))
            skipped |= {index: error.reason for index, error in failed.items()}
            intact = torch.tensor([index not in failed for index in positions.tolist()])
            images, positions = images[intact], positions[intact]
            if len(positions) == 0:
                return empty_batch()
        return [images, self._source.targets(positions), positions]


class CachedLoader(ImageLoader):
    """An `ImageLoader` of cached images: the same batches, read by threads of this process.

    Copying a batch takes less time than passing it between processes, and threads copy and check in parallel.

    Args:
        images: the images.
        skip: see `ImageLoader`.
        num_threads: threads that prefetch; 0 reads in the calling thread.
        **options: those of `torch.utils.data.DataLoader`, except `collate_fn` and `num_workers`.
    """

    def __init__(self, images: CachedImages, skip: bool = False, num_threads: int = 0, **options: Any) -> None:
        DataLoader.__init__(self, images, **options)
        self.num_threads = num_threads
        self._start_skipping(skip)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Yield images (B, 3, size, size), targets (B,) int64 and positions in the dataset (B,) int64."""
        self.skipped = []
        pin_memory = self.pin_memory and torch.cuda.is_available()
        if self.num_threads == 0:
            for indices in self.batch_sampler:
                yield self._finish(_BatchRead(self.dataset, indices, None, pin_memory))
            return
        parts_of_batch = -(-self.batch_size // PART_SIZE)
        # enough batches in advance for two parts per thread
        ahead = 1 + -(-2 * self.num_threads // parts_of_batch)
        readings: deque[_BatchRead] = deque()
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="cache")
        try:
            for indices in self.batch_sampler:
                readings.append(_BatchRead(self.dataset, indices, pool, pin_memory))
                if len(readings) > ahead:
                    yield self._finish(readings.popleft())
            while readings:
                yield self._finish(readings.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _finish(self, reading: _BatchRead) -> list[torch.Tensor]:
        skipped: dict[int, str] | None = {} if self._skip else None
        batch = reading.finish(skipped)
        if skipped is not None:
            self.skipped.append(skipped)
        return batch
