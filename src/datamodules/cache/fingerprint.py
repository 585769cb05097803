"""What the key of a cache entry depends on: names and files of the images, and library versions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
import PIL.features
import timm
import torchvision

from src.datamodules.dataset import ImageDataset

_STAT_THREADS = 16
# of `load_rgb`: raised when it decodes an image to other pixels
_DECODER = 2


def source_digest(dataset: ImageDataset) -> str:
    """SHA-256 that identifies the images without reading them.

    Hashes their names in order, the size and modification time (nanoseconds) of their files, and their positions in
    archives.

    Args:
        dataset: images in any format.
    """
    positions = {name: position for position, name in enumerate(dataset.listing.names)}
    numbers: dict[Path, int] = {}
    digest = hashlib.sha256()
    for name in dataset.paths:
        path, within = dataset.listing.location(positions[name])
        number = numbers.setdefault(path, len(numbers))
        digest.update(f"{name}\0{number}\0{within}\0".encode(errors="surrogateescape"))
    for state in _file_states(list(numbers)):
        digest.update(f"{state}\0".encode())
    return digest.hexdigest()


def library_versions() -> dict[str, str | int | None]:
    """Versions of `load_rgb` and the libraries that decode and resize."""
    turbo = PIL.features.version_feature("libjpeg_turbo")
    return {
        "decoder": _DECODER,
        "pillow": PIL.__version__,
        "jpeg": f"turbo {turbo}" if turbo else PIL.features.version_codec("jpg"),
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
    }


def _file_states(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Size and modification time of each file; None if it cannot be read, which decoding reports."""

    def states(part: Sequence[Path]) -> list[tuple[int, int] | None]:
        found = []
        for path in part:
            try:
                status = os.stat(path)
            except OSError:
                found.append(None)
            else:
                found.append((status.st_size, status.st_mtime_ns))
        return found

    # in threads, since network file systems have a high latency per file
    step = max(1, -(-len(paths) // _STAT_THREADS))
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        parts = pool.map(states, [paths[begin : begin + step] for begin in range(0, len(paths), step)])
        return [state for part in parts for state in part]
