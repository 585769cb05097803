"""A split's images as a model takes them, decoded once and kept on the disk, so that evaluations decode nothing.

    cache_dir/
      <key>/              complete: it got this name last, by one rename
        entry.json        what it holds, to be read by people
        images.uint8      (N, 3, size, size), read through a memory map
        checksums.uint32  (N,), CRC-32 of each image
      <key>.unfinished/   the same while it is made
      <key>.lock          held by the process that makes it

The key is a hash of the images' names, of the sizes and times of change of the files that hold them, and of everything
that their pixels depend on. Where one of them changes there is a new entry; entries of other keys are left alone, to be
deleted by who no longer needs them. A file that changes and keeps both size and time is not noticed.

An interrupted entry is gone on with: images are written and flushed in order, and their checksums after them, so that
as many images are finished as there are checksums that fit. Each image is checked when it is first read in a run; one
that has been altered is an error and not replaced silently, since something is wrong with the disk.

Where images that cannot be decoded are skipped, an entry has a hole for each: zeros under a checksum that they do not
have. Whoever comes to a hole tries to decode that image, and finds it repaired, or the error there was.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
import PIL.features
import timm
import torch
import torchvision
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from scatterbrain.errors import UserError
from src.datamodules.dataset import ImageDataset, ImageError, ImageLoader, empty_batch
from src.utils.console import progress_display
from src.utils.files import name_for_json, write_json

FORMAT = 1
ENTRY_FILE, IMAGES_FILE, CHECKSUMS_FILE = "entry.json", "images.uint8", "checksums.uint32"
_CHECKSUM = np.dtype("<u4")
# Images that a worker decodes at a time, and bytes that are flushed at a time: what an interruption may cost.
_BATCH_SIZE = 32
CHUNK_BYTES = 64 << 20
# Images of a batch that a thread reads at a time.
_PART_SIZE = 32
# How long the other processes of a machine let its first one begin, and how often a lock is tried.
_FIRST_SECONDS = 5.0
_POLL_SECONDS = 0.2
_STAT_THREADS = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DecodedCache:
    """The entry of a dataset in a cache.

    Args:
        cache_dir: folder of all entries; it is made if need be.
        dataset: N images under a transform to uint8 (3, size, size).
        image_size: side of the images, pixels.
        **options: what else the pixels depend on, of types that JSON has.

    Attributes:
        folder: of the entry, once it is complete.
        unfinished: folder of the entry while it is made.
        description: what the entry holds, the content of its `entry.json`.
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
            "pixels": {"image_size": image_size, **options, "versions": _versions()},
            "source": {"layout": dataset.listing.format, "sha256": source_digest(dataset)},
        }
        content = json.dumps(self.description, sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        self.description["source"]["path"] = str(dataset.root)  # images that were moved are the same
        cache_dir = Path(cache_dir).expanduser().absolute()
        self.folder, self.unfinished = cache_dir / key, cache_dir / f"{key}.unfinished"
        self._lock = cache_dir / f"{key}.lock"

    @property
    def bytes_per_image(self) -> int:
        """Size of an image in the entry."""
        return self.shape[1] * self.shape[2] * self.shape[3]

    def make(self, num_workers: int = 0, local_rank: int = 0, skip: bool = False) -> None:
        """Decode what is not decoded yet, unless the entry is complete.

        One process does so, by preference the first of the machine; others wait until it is done or fails, and in the
        latter case try themselves, so that each has the error to tell.

        Args:
            num_workers: worker processes that decode; 0 decodes in this process.
            local_rank: number of this process on its machine.
            skip: leave a hole for an image that cannot be decoded; otherwise that is an error, in an entry that was
                made with holes too.

        Raises:
            UserError: an image cannot be decoded, the folder cannot be written, or its disk is too small. What is
                finished is kept.
        """
        self._make_unless_complete(num_workers, local_rank, skip)
        if not skip:
            self._check_holes(self.folder)

    def _make_unless_complete(self, num_workers: int, local_rank: int, skip: bool) -> None:
        if self.folder.is_dir():
            return
        console = Console(stderr=True, soft_wrap=True)
        with self._explained():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        if local_rank > 0:
            self._let_first_begin()
        with self._locked(console if local_rank == 0 else None):
            if not self.folder.is_dir():
                with _stopped_at_once():
                    self._make(num_workers, console, skip)

    def open(self) -> CachedImages:
        """The images of the complete entry.

        Raises:
            UserError: a file of it is missing or has another size than it should have.
        """
        return CachedImages(self.folder, self.shape, self.dataset)

    # Making an entry

    def _make(self, num_workers: int, console: Console, skip: bool) -> None:
        try:
            with self._explained():
                self.unfinished.mkdir(exist_ok=True)
                done = self._finished()
                if done and not skip:
                    self._check_holes(self.unfinished)
                self._check_space(done, console)
                write_json(self.unfinished / ENTRY_FILE, self.description)
            self._append(done, num_workers, console, skip)
            with self._explained():
                self._tell_holes()
        except BaseException:
            if not _size_of(self.unfinished / CHECKSUMS_FILE):  # nothing to go on from
                shutil.rmtree(self.unfinished, ignore_errors=True)
            raise
        with self._explained():
            _flush_folder(self.unfinished)
            os.rename(self.unfinished, self.folder)
            _flush_folder(self.folder.parent)

    def _append(self, done: int, num_workers: int, console: Console, skip: bool) -> None:
        """Decode the images from number `done` on; those written before an error or an interruption are kept."""
        with contextlib.ExitStack() as stack:
            with self._explained():
                files = [
                    stack.enter_context(_open_for_writing(self.unfinished / name))
                    for name in (IMAGES_FILE, CHECKSUMS_FILE)
                ]
                writer = _Writer(*files, self.bytes_per_image, done)
            try:
                self._decode(writer, num_workers, console, skip)
                with self._explained():
                    writer.flush()
            except BaseException:
                with contextlib.suppress(OSError):
                    writer.flush()
                with contextlib.suppress(OSError):
                    writer.cut()
                raise
        if writer.done != len(self.dataset):
            raise RuntimeError(f"{writer.done} of {len(self.dataset)} images were decoded")

    def _decode(self, writer: _Writer, num_workers: int, console: Console, skip: bool) -> None:
        done, total = writer.done, len(self.dataset)
        if done == total:  # only the rename was missing
            return
        loader = ImageLoader(
            self.dataset.subset(range(done, total)),
            batch_size=_BATCH_SIZE,
            num_workers=min(num_workers, -(-(total - done) // _BATCH_SIZE)),
            skip=skip,
        )
        with progress_display(console) as progress:
            task = progress.add_task("decoding", total=total, completed=done)
            for number, (images, _, positions) in enumerate(loader):
                if len(images) and (images.dtype != torch.uint8 or images.shape[1:] != self.shape[1:]):
                    raise TypeError(f"Expected uint8 images {self.shape[1:]}, got {images.dtype} {images.shape[1:]}.")
                content, holes = images.numpy(), None
                if skip and loader.skipped[number]:
                    first = number * _BATCH_SIZE
                    holes = np.ones(len(images) + len(loader.skipped[number]), bool)
                    holes[positions.numpy() - first] = False
                    content = np.zeros((len(holes), *self.shape[1:]), np.uint8)
                    content[~holes] = images.numpy().reshape(-1, *self.shape[1:])
                with self._explained():
                    writer.add(content, holes)
                progress.advance(task, len(content))

    def _finished(self) -> int:
        """Images that an earlier run left finished, from the first on; what follows is cut off."""
        images, checksums = self.unfinished / IMAGES_FILE, self.unfinished / CHECKSUMS_FILE
        if not images.exists() or not checksums.exists():
            return 0
        content = checksums.read_bytes()
        found = np.frombuffer(content[: len(content) // _CHECKSUM.itemsize * _CHECKSUM.itemsize], _CHECKSUM)
        done, hole, empty = 0, _checksum_of_hole(self.bytes_per_image), bytes(self.bytes_per_image)
        with open(images, "rb") as file:
            # flushing keeps the order of both, but not every disk flushes when it is told to
            while done < min(len(found), len(self.dataset)):
                image = file.read(self.bytes_per_image)
                if len(image) < self.bytes_per_image:
                    break
                if zlib.crc32(image) != found[done] and not (found[done] == hole and image == empty):
                    break
                done += 1
        os.truncate(images, done * self.bytes_per_image)
        os.truncate(checksums, done * _CHECKSUM.itemsize)
        return done

    def _check_holes(self, folder: Path) -> None:
        """Refuse holes, except for images that have come to be intact."""
        try:
            holes = self._holes(folder)
        except OSError:  # which is told where the entry is opened
            return
        for position in holes:
            if position < len(self.dataset):
                self.dataset.decode(position)

    def _holes(self, folder: Path) -> list[int]:
        """Positions of the images that are not there."""
        checksums = np.fromfile(folder / CHECKSUMS_FILE, _CHECKSUM)
        return np.flatnonzero(checksums == _checksum_of_hole(self.bytes_per_image)).tolist()

    def _tell_holes(self) -> None:
        """Add the names of the images that are not there to what the entry tells people."""
        holes = self._holes(self.unfinished)
        if holes:
            names = [name_for_json(self.dataset.paths[hole]) for hole in holes]
            write_json(self.unfinished / ENTRY_FILE, {**self.description, "not_decoded": names})

    def _check_space(self, done: int, console: Console) -> None:
        """Tell what is to be decoded and where it goes, and refuse to begin where the disk is too small."""
        total = len(self.dataset)
        needed = (total - done) * (self.bytes_per_image + _CHECKSUM.itemsize) + (1 << 16)
        free = shutil.disk_usage(self.unfinished).free
        if free < needed:
            raise self._too_small(f"has {_size(free)} free")
        begun = f", of which {done:,} are already there" if done else ""
        console.print(
            f"Decoding {total:,} images of {self.dataset.root} once for all evaluations{begun}: {_size(needed)} in "
            f"{self.folder}, on a disk with {_size(free)} free.",
            markup=False,
            highlight=False,
        )

    def _too_small(self, fault: str) -> UserError:
        there = _size_of(self.unfinished / IMAGES_FILE)
        needed = len(self.dataset) * self.bytes_per_image
        kept = f", of which {_size(there)} are kept in {self.unfinished} to go on from" if there else ""
        return UserError(
            f"The disk of datamodule.cache_dir={self.folder.parent} {fault}, and the decoded images of "
            f"{self.dataset.root} take {_size(needed)}{kept}. Free space there, give a folder on another disk, or "
            "leave datamodule.cache_dir out."
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the file system into what a user can do about them."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise self._too_small("is full") from error
            raise UserError(
                f"datamodule.cache_dir={self.folder.parent} cannot be used ({error.strerror or error}). Give a folder "
                "that you may write to, or leave it out."
            ) from error

    # One process at a time

    def _let_first_begin(self) -> None:
        end = time.monotonic() + _FIRST_SECONDS
        while time.monotonic() < end and not self._lock.exists() and not self.folder.is_dir():
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _locked(self, console: Console | None) -> Iterator[None]:
        """Hold the lock, which the system takes back from a process that is killed.

        Args:
            console: where to tell that another process is waited for.
        """
        try:
            import fcntl
        except ImportError as error:
            raise UserError("datamodule.cache_dir needs a system with POSIX locks. Leave it out.") from error
        with self._explained():
            while True:
                file = open(self._lock, "a+b")  # noqa: SIM115 - closed below
                try:
                    # not flock: worker processes would inherit the lock, and hold it after this one is killed
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(file, self._lock):
                        break
                    file.close()  # the one before has removed it: there may be another by now
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        file.close()
                        raise
                    file.seek(0)
                    holder = file.read(200).decode(errors="replace") or "another process"
                    file.close()
                    if console is not None:
                        console.print(
                            f"Waiting for {holder}, which is decoding the images of {self.dataset.root} into "
                            f"{self.folder.parent}.",
                            markup=False,
                            highlight=False,
                        )
                        console = None  # once
                    time.sleep(_POLL_SECONDS)
                except BaseException:
                    file.close()
                    raise
        try:
            with contextlib.suppress(OSError):  # for those who wait only
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                file.flush()
            yield
        finally:
            with contextlib.suppress(OSError):
                self._lock.unlink()
            with contextlib.suppress(OSError):
                file.close()


class _Writer:
    """Appends images, and after them their checksums, which make them count.

    Args:
        images: open for writing, unbuffered; what follows the images done is cut off.
        checksums: likewise.
        bytes_per_image: size of an image.
        done: images that are there.

    Attributes:
        done: images that are there and flushed.
    """

    def __init__(self, images: IO[bytes], checksums: IO[bytes], bytes_per_image: int, done: int) -> None:
        self._images, self._checksums = images, checksums
        self._bytes_per_image = bytes_per_image
        self._pending: list[int] = []
        self.done = done
        self.cut()

    def add(self, images: np.ndarray, holes: np.ndarray | None = None) -> None:
        """Write images, and flush them when there are enough.

        Args:
            images: (B, 3, size, size) uint8, zeros where there is a hole.
            holes: (B,) bool, which of them there are none of; None for no holes.
        """
        _write(self._images, images)
        checksums = [zlib.crc32(image) for image in images]
        if holes is not None:
            for row in np.flatnonzero(holes).tolist():
                checksums[row] = _checksum_of_hole(self._bytes_per_image)
        self._pending += checksums
        if len(self._pending) * self._bytes_per_image >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make what was added count."""
        if self._pending:
            os.fsync(self._images.fileno())
            _write(self._checksums, np.array(self._pending, _CHECKSUM))
            os.fsync(self._checksums.fileno())
            self.done += len(self._pending)
            self._pending.clear()

    def cut(self) -> None:
        """Cut off what does not count."""
        for file, size in ((self._images, self._bytes_per_image), (self._checksums, _CHECKSUM.itemsize)):
            file.truncate(self.done * size)
            file.seek(self.done * size)


@functools.cache
def _checksum_of_hole(size: int) -> int:
    """What stands for the checksum of an image of `size` bytes that is not there: zeros have the opposite of it.

    An intact image that happens to have this checksum is taken for a hole, and so decoded when it is read.
    """
    return zlib.crc32(bytes(size)) ^ 0xFFFFFFFF


def _open_for_writing(path: Path) -> IO[bytes]:
    # "wb" would empty the file, and "ab" ignore the position
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _write(file: IO[bytes], content: np.ndarray) -> None:
    """All of `content`: an unbuffered file may take a part only."""
    left = memoryview(np.ascontiguousarray(content)).cast("B")
    while left:
        left = left[file.write(left) :]


@contextlib.contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop here and now: an evaluation would only take note of them until its next batch."""

    def end(*_: Any) -> None:
        raise SystemExit(1)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, end)):
            # one that is ignored stays so, and what ends a process anyhow may do it
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


# What an entry is a copy of


def source_digest(dataset: ImageDataset) -> str:
    """SHA-256 of what tells the images from others without reading them.

    That is their names in order, and the size and time of change (nanoseconds) of the files that hold them, with the
    places inside of archives.

    Args:
        dataset: images of any layout.
    """
    positions = {name: position for position, name in enumerate(dataset.listing.names)}
    numbers: dict[Path, int] = {}
    digest = hashlib.sha256()
    for name in dataset.paths:
        path, within = dataset.listing.location(positions[name])
        number = numbers.setdefault(path, len(numbers))
        digest.update(f"{name}\0{number}\0{within}\0".encode(errors="surrogateescape"))
    for states in _file_states(list(numbers)):
        digest.update(f"{states}\0".encode())
    return digest.hexdigest()


def _file_states(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Size and time of change of each file; None where it cannot be had, of which decoding tells more."""

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

    # a network takes its time for each file, but answers many at once
    step = max(1, -(-len(paths) // _STAT_THREADS))
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        parts = pool.map(states, [paths[begin : begin + step] for begin in range(0, len(paths), step)])
        return [state for part in parts for state in part]


def _versions() -> dict[str, str | None]:
    """Of what decodes and resizes."""
    turbo = PIL.features.version_feature("libjpeg_turbo")
    return {
        "pillow": PIL.__version__,
        "jpeg": f"turbo {turbo}" if turbo else PIL.features.version_codec("jpg"),
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
    }


# Reading an entry


class CachedImages(Dataset):
    """The images of a complete entry, read a batch at a time.

    Args:
        folder: of the entry.
        shape: (N, 3, size, size).
        dataset: the images that it is made of, which decodes those that are not there.

    Raises:
        UserError: a file of the entry is missing or has another size than it should have.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int, int], dataset: ImageDataset) -> None:
        self.folder, self.shape, self.paths = folder, shape, dataset.paths
        self._dataset = dataset
        self._targets = torch.tensor(dataset.targets, dtype=torch.int64)
        sizes = {IMAGES_FILE: int(np.prod(shape, dtype=np.int64)), CHECKSUMS_FILE: shape[0] * _CHECKSUM.itemsize}
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
            self._checksums = np.fromfile(folder / CHECKSUMS_FILE, _CHECKSUM)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} cannot be read ({error}). {self._remedy}") from error
        self._there = self._checksums != _checksum_of_hole(int(np.prod(shape[1:])))

    @property
    def _remedy(self) -> str:
        return f"Delete the folder {self.folder}: the images are decoded once more then."

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        """One image, as `ImageDataset` gives it.

        Raises:
            UserError: it was altered, or is not there and cannot be decoded.
        """
        images, targets, _ = self.batch([index])
        return images[0], int(targets[0]), index

    def batch(self, indices: Sequence[int], skipped: dict[int, str] | None = None) -> list[torch.Tensor]:
        """Images by their positions, copied once.

        Args:
            indices: (B,) positions in [0, N).
            skipped: takes the positions of the images that are not there and cannot be decoded, and why; these are
                left out, so that B is smaller. None makes them an error.

        Returns:
            Images (B, 3, size, size) uint8, targets (B,) int64, and the positions (B,) int64.

        Raises:
            ImageError: an image is not there and cannot be decoded.
            UserError: an image was altered; each is checked when it is first read.
        """
        return _Reading(self, indices).finish(skipped)

    def read(self, positions: np.ndarray, images: np.ndarray) -> dict[int, ImageError]:
        """Copy images; several threads may do so at a time.

        Args:
            positions: (B,) positions in [0, N), each read by one thread alone.
            images: (B, 3, size, size) uint8, written here.

        Returns:
            Positions of the images that are not there and cannot be decoded, and why.

        Raises:
            UserError: an image was altered; each is checked when it is first read.
        """
        # "raise", the default, would copy once more; positions are those of a sampler
        np.take(self._images, positions, axis=0, out=images, mode="clip")
        lacking = {}
        for row in np.flatnonzero(~self._checked[positions]).tolist():
            index = int(positions[row])
            if not self._there[index]:
                try:
                    images[row] = self._dataset[index][0]
                except ImageError as error:
                    # words alone, see `ImageDataset`
                    lacking[index] = ImageError(str(error), error.reason)
            elif zlib.crc32(images[row]) != self._checksums[index]:
                raise UserError(f"{self.folder / IMAGES_FILE} is damaged at {self.paths[index]}. {self._remedy}")
        self._checked[positions] = self._there[positions]
        return lacking

    def targets(self, positions: torch.Tensor) -> torch.Tensor:
        """Classes (B,) of the images at positions (B,)."""
        return self._targets[positions]


class _Reading:
    """A batch of a cache that is being read: in parts, by the threads of a pool, or by whoever finishes it.

    Args:
        source: the cache's images.
        indices: (B,) positions in [0, N).
        pool: threads; None reads in `finish`.
        pin_memory: have the images in page-locked memory, from which they travel to a device while it computes.
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
        # what each part lacks, for `finish` to ask for
        self._parts: list[Callable[[], dict[int, ImageError]]]
        if pool is None:
            self._parts = [functools.partial(source.read, positions, images)]
        else:
            parts = [slice(begin, begin + _PART_SIZE) for begin in range(0, len(positions), _PART_SIZE)]
            self._parts = [pool.submit(source.read, positions[part], images[part]).result for part in parts]

    def finish(self, skipped: dict[int, str] | None) -> list[torch.Tensor]:
        """The batch once it has been read; arguments, result and errors as those of `CachedImages.batch`."""
        lacking = {index: error for part in self._parts for index, error in part().items()}
        images, positions = self._images, self._positions
        if lacking:
            if skipped is None:
                raise next(iter(lacking.values()))
            skipped |= {index: error.reason for index, error in lacking.items()}
            intact = torch.tensor([index not in lacking for index in positions.tolist()])
            images, positions = images[intact], positions[intact]
            if len(positions) == 0:
                return empty_batch()
        return [images, self._source.targets(positions), positions]


class CachedLoader(ImageLoader):
    """An `ImageLoader` of a cache's images: the same batches, each in one piece, read by threads of this process.

    To copy a batch takes less time than to hand it from one process to another, and threads copy and check at once.

    Args:
        images: the images.
        skip: see `ImageLoader`.
        num_threads: threads that read ahead; 0 reads in the thread that asks.
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
                yield self._finish(_Reading(self.dataset, indices, None, pin_memory))
            return
        parts_of_batch = -(-self.batch_size // _PART_SIZE)
        # so many batches ahead that each thread has a part and another one to go on with
        ahead = 1 + -(-2 * self.num_threads // parts_of_batch)
        readings: deque[_Reading] = deque()
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="cache")
        try:
            for indices in self.batch_sampler:
                readings.append(_Reading(self.dataset, indices, pool, pin_memory))
                if len(readings) > ahead:
                    yield self._finish(readings.popleft())
            while readings:
                yield self._finish(readings.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _finish(self, reading: _Reading) -> list[torch.Tensor]:
        skipped: dict[int, str] | None = {} if self._skip else None
        batch = reading.finish(skipped)
        if skipped is not None:
            self.skipped.append(skipped)
        return batch
