"""One entry of the cache: its key, and the process that decodes its images."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from scatterbrain.errors import UserError
from src.datamodules.cache.fingerprint import library_versions, source_digest
from src.datamodules.cache.lock import POLL_SECONDS, file_lock
from src.datamodules.cache.reading import CachedImages
from src.datamodules.cache.writer import (
    CHECKSUM_DTYPE,
    CHECKSUMS_FILE,
    ENTRY_FILE,
    IMAGES_FILE,
    Writer,
    flush_folder,
    missing_checksum,
    open_for_writing,
)
from src.datamodules.dataset import ImageDataset, ImageLoader
from src.datamodules.formats.files import open_file, read_file
from src.utils.files import name_for_json, write_json
from src.utils.progress import progress_display
from src.utils.signals import signal_handlers

FORMAT = 1
# Images per batch of a decoding worker.
BATCH_SIZE = 32
# How long the other processes of a machine wait for the first one to start.
_FIRST_SECONDS = 5.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class DecodedCache:
    """The entry of a dataset in a cache.

    Args:
        cache_dir: folder of all entries; created if it does not exist.
        dataset: N images under a transform to uint8 (3, size, size).
        image_size: side of the images, pixels.
        **options: what else the pixels depend on, of JSON's types.

    Attributes:
        folder: of the complete entry.
        partial_folder: of the entry while it is written.
        description: content of the entry's `entry.json`.
    """

    def __init__(
        self, cache_dir: str | os.PathLike[str], dataset: ImageDataset, image_size: int, **options: Any
    ) -> None:
        self.dataset = dataset
        self.shape = (len(dataset), 3, image_size, image_size)
        self.description = {
            "format": FORMAT,
            "num_images": len(dataset),
            "shape": list(self.shape),
            "pixels": {"image_size": image_size, **options, "versions": library_versions()},
            "source": {"layout": dataset.listing.format, "sha256": source_digest(dataset)},
        }
        content = json.dumps(self.description, sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        self.description["source"]["path"] = str(dataset.root)  # not part of the key: moved images are the same
        cache_dir = Path(cache_dir).expanduser().absolute()
        self.folder, self.partial_folder = cache_dir / key, cache_dir / f"{key}.unfinished"
        self._lock = cache_dir / f"{key}.lock"

    @property
    def bytes_per_image(self) -> int:
        """Size of an image in the entry."""
        return self.shape[1] * self.shape[2] * self.shape[3]

    def make(self, num_workers: int = 0, local_rank: int = 0, skip: bool = False) -> None:
        """Complete the entry: decode the images that are not decoded yet.

        One process decodes, preferably local rank 0; the others wait. If it fails, they try themselves, so that every
        process raises the error.

        Args:
            num_workers: worker processes that decode; 0 decodes in this process.
            local_rank: rank of this process on its machine.
            skip: store images that cannot be decoded as missing; otherwise such an image is an error, also in an
                existing entry that was written with `skip`.

        Raises:
            UserError: an image cannot be decoded, the folder cannot be written, or its disk is too small. Complete
                images are kept.
        """
        self._make_unless_complete(num_workers, local_rank, skip)
        if not skip:
            self._check_missing(self.folder)

    def _make_unless_complete(self, num_workers: int, local_rank: int, skip: bool) -> None:
        if self.folder.is_dir():
            return
        console = Console(stderr=True, soft_wrap=True)
        with self._os_errors_as_user_errors():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        if local_rank > 0:
            self._wait_for_first()
        with self._locked(console if local_rank == 0 else None):
            if not self.folder.is_dir():
                with _signals_stop_immediately():
                    self._make(num_workers, console, skip)

    def open(self) -> CachedImages:
        """The images of the complete entry.

        Raises:
            UserError: a file of it is missing or has the wrong size.
        """
        return CachedImages(self.folder, self.shape, self.dataset)

    # Writing an entry

    def _make(self, num_workers: int, console: Console, skip: bool) -> None:
        try:
            with self._os_errors_as_user_errors():
                self.partial_folder.mkdir(exist_ok=True)
                done = self._truncate_to_complete()
                if done and not skip:
                    self._check_missing(self.partial_folder)
                self._check_space(done, console)
                write_json(self.partial_folder / ENTRY_FILE, self.description)
            self._append(done, num_workers, console, skip)
            with self._os_errors_as_user_errors():
                self._list_missing()
        except BaseException:
            if not _size_of(self.partial_folder / CHECKSUMS_FILE):  # nothing to resume from
                shutil.rmtree(self.partial_folder, ignore_errors=True)
            raise
        with self._os_errors_as_user_errors():
            flush_folder(self.partial_folder)
            os.rename(self.partial_folder, self.folder)
            flush_folder(self.folder.parent)

    def _append(self, done: int, num_workers: int, console: Console, skip: bool) -> None:
        """Decode the images from index `done` on; images written before an error or interruption are kept."""
        with contextlib.ExitStack() as stack:
            with self._os_errors_as_user_errors():
                files = [
                    stack.enter_context(open_for_writing(self.partial_folder / name))
                    for name in (IMAGES_FILE, CHECKSUMS_FILE)
                ]
                writer = Writer(*files, self.bytes_per_image, done)
            try:
                self._decode(writer, num_workers, console, skip)
                with self._os_errors_as_user_errors():
                    writer.flush()
            except BaseException:
                with contextlib.suppress(OSError):
                    writer.flush()
                with contextlib.suppress(OSError):
                    writer.truncate()
                raise
        if writer.done != len(self.dataset):
            raise RuntimeError(f"{writer.done} of {len(self.dataset)} images were decoded")

    def _decode(self, writer: Writer, num_workers: int, console: Console, skip: bool) -> None:
        done, total = writer.done, len(self.dataset)
        if done == total:  # interrupted just before the rename
            return
        loader = ImageLoader(
            self.dataset.subset(range(done, total)),
            batch_size=BATCH_SIZE,
            num_workers=min(num_workers, -(-(total - done) // BATCH_SIZE)),
            skip=skip,
        )
        with progress_display(console) as progress:
            task = progress.add_task("decoding", total=total, completed=done)
            for number, (images, _, positions) in enumerate(loader):
                if len(images) and (images.dtype != torch.uint8 or images.shape[1:] != self.shape[1:]):
                    raise TypeError(f"Expected uint8 images {self.shape[1:]}, got {images.dtype} {images.shape[1:]}.")
                content, missing = images.numpy(), None
                if skip and loader.skipped[number]:
                    first = number * BATCH_SIZE
                    missing = np.ones(len(images) + len(loader.skipped[number]), bool)
                    missing[positions.numpy() - first] = False
                    content = np.zeros((len(missing), *self.shape[1:]), np.uint8)
                    content[~missing] = images.numpy().reshape(-1, *self.shape[1:])
                with self._os_errors_as_user_errors():
                    writer.add(content, missing)
                progress.advance(task, len(content))

    def _truncate_to_complete(self) -> int:
        """Number of complete images that an earlier run has written; whatever follows them is cut off."""
        images, checksums = self.partial_folder / IMAGES_FILE, self.partial_folder / CHECKSUMS_FILE
        if not images.exists() or not checksums.exists():
            return 0
        content = read_file(checksums)
        itemsize = CHECKSUM_DTYPE.itemsize
        found = np.frombuffer(content[: len(content) // itemsize * itemsize], CHECKSUM_DTYPE)
        done, missing, zeros = 0, missing_checksum(self.bytes_per_image), bytes(self.bytes_per_image)
        with os.fdopen(open_file(images), "rb") as file:
            # the checksums are verified since not every disk flushes when fsync requests it
            while done < min(len(found), len(self.dataset)):
                image = file.read(self.bytes_per_image)
                if len(image) < self.bytes_per_image:
                    break
                if zlib.crc32(image) != found[done] and not (found[done] == missing and image == zeros):
                    break
                done += 1
        os.truncate(images, done * self.bytes_per_image)
        os.truncate(checksums, done * itemsize)
        return done

    def _check_missing(self, folder: Path) -> None:
        """Raise the decoding error of a missing image, unless its file has been repaired."""
        try:
            positions = self._missing(folder)
        except OSError:  # reported when the entry is opened
            return
        for position in positions:
            if position < len(self.dataset):
                self.dataset.decode(position)

    def _missing(self, folder: Path) -> list[int]:
        """Positions of the missing images."""
        checksums = np.fromfile(folder / CHECKSUMS_FILE, CHECKSUM_DTYPE)
        return np.flatnonzero(checksums == missing_checksum(self.bytes_per_image)).tolist()

    def _list_missing(self) -> None:
        """Add the names of missing images to `entry.json`."""
        positions = self._missing(self.partial_folder)
        if positions:
            names = [name_for_json(self.dataset.paths[position]) for position in positions]
            write_json(self.partial_folder / ENTRY_FILE, {**self.description, "not_decoded": names})

    def _check_space(self, done: int, console: Console) -> None:
        """Print how many images are decoded and where they are stored; raise if the disk is too small."""
        total = len(self.dataset)
        needed = (total - done) * (self.bytes_per_image + CHECKSUM_DTYPE.itemsize) + (1 << 16)
        free = shutil.disk_usage(self.partial_folder).free
        if free < needed:
            raise self._disk_error(f"has {_format_bytes(free)} free")
        resumed = f", of which {done:,} are already there" if done else ""
        console.print(
            f"Decoding {total:,} images of {self.dataset.root} once for all evaluations{resumed}: "
            f"{_format_bytes(needed)} in {self.folder}, on a disk with {_format_bytes(free)} free.",
            markup=False,
            highlight=False,
        )

    def _disk_error(self, problem: str) -> UserError:
        present = _size_of(self.partial_folder / IMAGES_FILE)
        needed = len(self.dataset) * self.bytes_per_image
        kept = ""
        if present:
            kept = f", of which {_format_bytes(present)} are kept in {self.partial_folder} to resume from"
        return UserError(
            f"The disk of datamodule.cache_dir={self.folder.parent} {problem}, and the decoded images of "
            f"{self.dataset.root} take {_format_bytes(needed)}{kept}. Free space there, give a folder on another "
            "disk, or leave datamodule.cache_dir out."
        )

    @contextlib.contextmanager
    def _os_errors_as_user_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise self._disk_error("is full") from error
            raise UserError(
                f"datamodule.cache_dir={self.folder.parent} cannot be used ({error.strerror or error}). Give a folder "
                "that you may write to, or leave it out."
            ) from error

    # One process at a time

    def _wait_for_first(self) -> None:
        """Give the first process of the machine time to start decoding."""
        end = time.monotonic() + _FIRST_SECONDS
        while time.monotonic() < end and not self._lock.exists() and not self.folder.is_dir():
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def _locked(self, console: Console | None) -> Iterator[None]:
        """Hold the entry's lock; `console` shows that another process is waited for."""

        def on_wait(holder: str) -> None:
            if console is not None:
                console.print(
                    f"Waiting for {holder}, which is decoding the images of {self.dataset.root} into "
                    f"{self.folder.parent}.",
                    markup=False,
                    highlight=False,
                )

        with contextlib.ExitStack() as stack:
            with self._os_errors_as_user_errors():
                stack.enter_context(file_lock(self._lock, on_wait))
            yield


def _signals_stop_immediately() -> contextlib.AbstractContextManager:
    """Context in which Ctrl-C and SIGTERM stop the process immediately; an evaluation's handlers wait for a batch."""

    def stop(*_: Any) -> None:
        raise SystemExit(1)

    return signal_handlers({signal.SIGINT: signal.default_int_handler, signal.SIGTERM: stop})


def _size_of(path: Path) -> int:
    """Size of a file in bytes, 0 if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _format_bytes(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
