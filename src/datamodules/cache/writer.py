"""Files of a cache entry: images are appended, and after them the checksums that mark them as complete."""

from __future__ import annotations

import functools
import os
import zlib
from pathlib import Path
from typing import IO

import numpy as np

ENTRY_FILE, IMAGES_FILE, CHECKSUMS_FILE = "entry.json", "images.uint8", "checksums.uint32"
CHECKSUM_DTYPE = np.dtype("<u4")
# Bytes of images between two flushes: an interruption loses at most that many.
FLUSH_BYTES = 64 << 20


class Writer:
    """Appends images, and after them their checksums, which mark the images as complete.

    Args:
        images: open for writing, unbuffered; whatever follows the `done` images is cut off.
        checksums: likewise.
        bytes_per_image: size of an image.
        done: number of complete images in the files.

    Attributes:
        done: number of complete images, flushed to the disk.
    """

    def __init__(self, images: IO[bytes], checksums: IO[bytes], bytes_per_image: int, done: int) -> None:
        self._images, self._checksums = images, checksums
        self._bytes_per_image = bytes_per_image
        self._pending: list[int] = []
        self.done = done
        self.truncate()

    def add(self, images: np.ndarray, missing: np.ndarray | None = None) -> None:
        """Write images, and flush if `FLUSH_BYTES` are pending.

        Args:
            images: (B, 3, size, size) uint8, zeros for missing images.
            missing: (B,) bool, images that could not be decoded; None if there are none.
        """
        _write(self._images, images)
        checksums = [zlib.crc32(image) for image in images]
        if missing is not None:
            for row in np.flatnonzero(missing).tolist():
                checksums[row] = missing_checksum(self._bytes_per_image)
        self._pending += checksums
        if len(self._pending) * self._bytes_per_image >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Flush pending images to the disk, then write and flush their checksums."""
        if self._pending:
            os.fsync(self._images.fileno())
            _write(self._checksums, np.array(self._pending, CHECKSUM_DTYPE))
            os.fsync(self._checksums.fileno())
            self.done += len(self._pending)
            self._pending.clear()

    def truncate(self) -> None:
        """Cut off incomplete images."""
        for file, size in ((self._images, self._bytes_per_image), (self._checksums, CHECKSUM_DTYPE.itemsize)):
            file.truncate(self.done * size)
            file.seek(self.done * size)


@functools.cache
def missing_checksum(size: int) -> int:
    """Stored in place of the checksum of a missing image: the complement of that of `size` zero bytes.

    An intact image that happens to have this checksum counts as missing, and so is decoded whenever it is read.
    """
    return zlib.crc32(bytes(size)) ^ 0xFFFFFFFF


def open_for_writing(path: Path) -> IO[bytes]:
    """Open a file for reading and writing, unbuffered; it is created if it does not exist."""
    # "wb" would empty the file, and "ab" ignores the position
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: IO[bytes], content: np.ndarray) -> None:
    """Write all of `content`: one call of an unbuffered file's `write` may write only a part."""
    left = memoryview(np.ascontiguousarray(content)).cast("B")
    while left:
        left = left[file.write(left) :]
